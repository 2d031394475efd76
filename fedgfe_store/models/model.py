"""An image model: what is known of it before any weights are loaded, and what it is then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from fedgfe_store.errors import NotFoundError
from fedgfe_store.models.files import FP16, Weights, find_weights, read_json
from fedgfe_store.models.hub import download, how_to_get
from fedgfe_store.models.placement import Picture, Placement, Sampling
from fedgfe_store.schema import Kind, Schema

_WEIGHTS = "diffusion_pytorch_model"
_ENCODER_WEIGHTS = "model"
_WEIGHT_PATTERNS = (f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}-*-of-*.safetensors")
_FP16_PATTERN = f"{_WEIGHTS}*.{FP16}*.safetensors"


@dataclass(frozen=True)
class Model(ABC):
    """An image model whose configuration has been read and whose weights have not.

    Each family of models is one module with a subclass of this and its pipeline: what differs
    between them is here, so that a run can be planned and refused without loading anything.

    Parameters
    ----------
    name : str
        What it was asked for as: ``"tiny"``, a hub id, or the name of a local folder.
    folder : Path
        Where its files are; of a model of the hub, the cached snapshot.
    revision : str
        Commit of the hub, or a digest of the local files.
    denoiser, vae : mapping
        Configurations of the network that denoises and of the one that decodes.
    from_hub : bool
        Whether missing weights can be fetched.

    Attributes
    ----------
    kind : str
        Family, as `Schema.kind` and ``--diffusion-type`` name it.
    pipeline_class : str
        Class of diffusers that its ``model_index.json`` names.
    part : str
        Name of the denoising network in that pipeline.
    default_name : str
        Model of the family that is used when none is asked for.
    columns : tuple of str
        Tensor columns that it is conditioned on.
    encoder_parts : tuple of str
        Text encoders and tokenizers of the pipeline.
    encoder_classes : mapping
        Class of transformers of each text encoder.
    """

    name: str
    folder: Path
    revision: str
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    from_hub: bool = False

    kind: ClassVar[Kind]
    pipeline_class: ClassVar[str]
    part: ClassVar[str]
    default_name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    encoder_parts: ClassVar[tuple[str, ...]]
    encoder_classes: ClassVar[Mapping[str, str]]

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one axis."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    @abstractmethod
    def size_step(self) -> int:
        """What height and width have to be multiples of, in pixels."""

    @property
    @abstractmethod
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for."""

    @property
    @abstractmethod
    def default_steps(self) -> int:
        """Denoising steps when none are asked for."""

    @property
    @abstractmethod
    def default_guidance(self) -> float | None:
        """Guidance scale when none is asked for; None if the model takes none."""

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale has an effect."""
        return True

    def needs_negative(self, guidance: float | None) -> bool:
        """Whether it needs negative embeddings under a guidance scale."""
        return False

    @abstractmethod
    def check_config(self) -> None:
        """Refuse a model whose configuration is not one of a text-to-image model.

        Raises
        ------
        SchemaMismatchError
            What was expected and what its configuration says.
        """

    @abstractmethod
    def check_schema(self, schema: Schema) -> None:
        """Make sure that a store's embeddings fit, before any weights are loaded.

        Raises
        ------
        SchemaMismatchError
            If not; both sides are shown.
        """

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks of the denoising network, which group offload moves one by one."""

    @abstractmethod
    def denoising_values(self, tokens: int, height: int, width: int) -> int:
        """Numbers that one record's denoising holds at once besides the weights."""

    @abstractmethod
    def load(self, placement: Placement) -> ImagePipeline:
        """Load the weights.

        Raises
        ------
        NotFoundError
            If weights are missing and cannot be fetched.
        """

    def parameters(self, part: str) -> int:
        """Count the parameters of a part, such as ``"vae"``, from its weight files."""
        return self.weights(part).parameters()

    def weights(self, part: str) -> Weights:
        """Find the weight files of a part."""
        stem = _ENCODER_WEIGHTS if part in self.encoder_parts else _WEIGHTS
        return find_weights(self.folder / part, stem)

    def config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        """Read a part's configuration.

        Raises
        ------
        NotFoundError
            If there is none.
        SchemaMismatchError
            If it is no JSON object.
        """
        return read_json(self.folder / part / name)

    @property
    def has_weights(self) -> bool:
        """Whether the weights are here."""
        return all(self.weights(part).files for part in (self.part, "vae"))

    def fetch_weights(self) -> None:
        """Download a hub model's weights where they are missing.

        Raises
        ------
        NotFoundError
            If they are neither here nor reachable.
        """
        if self.has_weights:
            return
        if not self.from_hub:
            raise NotFoundError(
                f"model {self.folder}: expected {_WEIGHTS}.safetensors in {self.part} and vae, "
                "got none or only some"
            )
        for weights in (_WEIGHT_PATTERNS, (_FP16_PATTERN,)):
            names = ("*.json", *weights)
            patterns = [f"{part}/{name}" for part in (self.part, "vae") for name in names]
            download(self.name, [*patterns, "scheduler/*"], revision=self.revision)
            if self.has_weights:
                return
        raise NotFoundError(how_to_get(self.name, "its weights are not all in the cache"))

    def fetch(self, *parts: str) -> bool:
        """Make sure that other parts, such as ``"text_encoder"``, are here if the model has them.

        Returns
        -------
        bool
            Whether they are.

        Raises
        ------
        NotFoundError
            If a hub model's parts are not here, and the hub is not reachable.
        """
        if self.from_hub and self._incomplete(parts):
            ignored = ["*.bin", "*.msgpack", "*.h5"]
            patterns = [f"{part}/*" for part in parts]
            for variants in ([f"*.{FP16}.*", f"*.{FP16}-*"], []):
                left_out = [*ignored, *variants]
                download(self.name, patterns, revision=self.revision, ignored=left_out)
                if not self._incomplete([p for p in parts if (self.folder / p).is_dir()]):
                    break
            here = [part for part in parts if (self.folder / part).is_dir()]
            if lacking := self._incomplete(here):  # without a network the cache counts as it is
                raise NotFoundError(how_to_get(self.name, f"cached without {lacking[0]}'s files"))
        return all((self.folder / part).is_dir() for part in parts)

    def _incomplete(self, parts: Sequence[str]) -> list[str]:
        return [part for part in parts if not _is_complete(self.folder / part)]


def _is_complete(folder: Path) -> bool:
    """Whether an encoder or tokenizer is here whole, not only its configuration."""
    names = {path.name for path in folder.glob("*")}
    if "config.json" in names:
        return bool(find_weights(folder, _ENCODER_WEIGHTS).files or list(folder.glob("*.bin")))
    return "tokenizer.json" in names or any(not name.endswith(".json") for name in names)


class ImagePipeline(Protocol):
    """What a run needs of an image model.

    Attributes
    ----------
    model : Model
        Which model it is.
    placement : Placement
        How it was loaded.
    batches_per_swap : int
        Batches to denoise before the first of them is decoded.
    """

    @property
    def model(self) -> Model: ...  # noqa: D102
    @property
    def placement(self) -> Placement: ...  # noqa: D102
    @property
    def batches_per_swap(self) -> int: ...  # noqa: D102

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        settings: Sampling,
        *,
        on_step: Callable[[], None],
    ) -> torch.Tensor:
        """Denoise a batch under its embeddings, one row and one seed an image.

        `on_step` is called after each step; what it raises ends the batch.
        """
        ...

    def decode(
        self, latents: torch.Tensor, settings: Sampling, *, tiled: bool
    ) -> list[Picture | None]:
        """Turn denoised latents into images; None for one with values that are not finite."""
        ...
