"""Which image model is meant, and what is known of it before any weights are loaded."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from fedgfe_store.errors import FedgfeStoreError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.files import (
    FP16,
    Weights,
    check_number,
    check_numbers,
    check_real,
    digest_files,
    find_weights,
    read_json,
)
from fedgfe_store.models.tiny import tiny_flux_path
from fedgfe_store.schema import Kind, Schema

if TYPE_CHECKING:
    from fedgfe_store.models.diffusers import ImagePipeline, Placement

MODEL_VARIABLE = "FEDGFE_MODEL"

_FAMILIES: dict[Kind, tuple[str, str]] = {
    "flux": ("fedgfe_store.models.flux", "FluxModel"),
    "sd": ("fedgfe_store.models.sd", "StableDiffusionModel"),
}
_WEIGHTS = "diffusion_pytorch_model"
_ENCODER_WEIGHTS = "model"
_WEIGHT_PATTERNS = (f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}-*-of-*.safetensors")
_FP16_PATTERN = f"{_WEIGHTS}*.{FP16}*.safetensors"
_HUB_TIMEOUT_SECONDS = 5


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
            _download(self.name, [*patterns, "scheduler/*"], revision=self.revision)
            if self.has_weights:
                return
        raise NotFoundError(_how_to_get(self.name, "its weights are not all in the cache"))

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
                _download(self.name, patterns, revision=self.revision, ignored=left_out)
                if not self._incomplete([p for p in parts if (self.folder / p).is_dir()]):
                    break
            here = [part for part in parts if (self.folder / part).is_dir()]
            if lacking := self._incomplete(here):  # without a network the cache counts as it is
                raise NotFoundError(_how_to_get(self.name, f"cached without {lacking[0]}'s files"))
        return all((self.folder / part).is_dir() for part in parts)

    def _incomplete(self, parts: Sequence[str]) -> list[str]:
        return [part for part in parts if not _is_complete(self.folder / part)]


def family_of(kind: Kind) -> type[Model]:
    """Return the class of a family's models.

    Raises
    ------
    SchemaMismatchError
        If there is no such family.
    """
    if kind not in _FAMILIES:
        raise SchemaMismatchError(
            f"diffusion type: expected {' or '.join(get_args(Kind))}, got {kind!r}"
        )
    module, name = _FAMILIES[kind]
    family: type[Model] = getattr(import_module(module), name)
    return family


def resolve_model(
    name: str | None = None, *, kind: Kind = "flux", stored: str | None = None
) -> Model:
    """Find a model and read its configuration.

    Parameters
    ----------
    name : str, optional
        ``"tiny"``, a local folder, or a hub id. Without one the environment variable
        ``FEDGFE_MODEL`` counts, then `stored`, then the family's default.
    kind : {"flux", "sd"}
        Family that it has to be of.
    stored : str, optional
        The model that the store names.

    Returns
    -------
    Model
        The model, without its weights.

    Raises
    ------
    NotFoundError
        If there is no such model, or if it is neither cached nor reachable: how to get it.
    SchemaMismatchError
        If it is there but not a text-to-image model of the family.
    """
    family = family_of(kind)
    given = (
        (name, None),
        (os.environ.get(MODEL_VARIABLE), f"${MODEL_VARIABLE} names the model"),
        (stored, "the store names the model"),
    )
    name, origin = next(((n, why) for n, why in given if n), (family.default_name, None))
    try:
        return _resolve(name, family)
    except FedgfeStoreError as error:
        if origin:
            error.add_note(f"{origin} {name}; --model goes before it")
        raise


def _resolve(name: str, family: type[Model]) -> Model:
    folder = tiny_flux_path() if name == "tiny" else Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        known_as = (
            "tiny" if folder.resolve() == tiny_flux_path().resolve() else folder.resolve().name
        )
        _check_pipeline(folder, family)
        return _read(family, known_as, folder, _digest_folder(folder, family.part))
    if name == "tiny":
        raise NotFoundError(
            f"model tiny: expected a folder {folder}, got none; reinstall fedgfe-store"
        )
    if os.path.exists(folder):
        raise NotFoundError(f"model: expected tiny, a folder or a hub id, got the file {name}")
    found = _on_hub(name, family)
    if found is None:
        raise NotFoundError(
            f"model: expected tiny, a folder or a hub id, got {name!r}, where there is nothing"
        )
    _check_pipeline(found, family)
    return _read(family, name, found, found.name, from_hub=True)


def _on_hub(name: str, family: type[Model]) -> Path | None:
    """Return a hub model's folder in the cache; None if no model can have such a name."""
    from huggingface_hub.errors import HFValidationError

    if "/" not in name:
        return None
    try:
        return _cached_snapshot(name, family.part) or _download(name, ["*.json"])
    except HFValidationError:
        return None


def _check_pipeline(folder: Path, family: type[Model]) -> None:
    found = read_json(folder / "model_index.json").get("_class_name")
    if found == family.pipeline_class:
        return
    kinds = [kind for kind in _FAMILIES if family_of(kind).pipeline_class == found]
    hint = f"; --diffusion-type {kinds[0]} takes it, where the embeddings fit" if kinds else ""
    raise SchemaMismatchError(
        f"model {folder}: expected a {family.pipeline_class}, got {found}{hint}"
    )


def _read(
    family: type[Model], name: str, folder: Path, revision: str, *, from_hub: bool = False
) -> Model:
    denoiser = read_json(folder / family.part / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    where = str(folder / "vae" / "config.json")
    check_numbers(vae, "block_out_channels", where)
    check_number(vae, "latent_channels", where)
    if "scaling_factor" in vae:  # else the decoder's class has one
        check_real(vae, "scaling_factor", where)
    model = family(name, folder, revision, denoiser, vae, from_hub)
    model.check_config()
    return model


def _digest_folder(folder: Path, denoiser: str) -> str:
    """Hash configurations, and sizes and samples of the weights: cheap, and any training shows."""
    return digest_files(folder, (denoiser, "vae", "scheduler"))


def _is_complete(folder: Path) -> bool:
    """Whether an encoder or tokenizer is here whole, not only its configuration."""
    names = {path.name for path in folder.glob("*")}
    if "config.json" in names:
        return bool(find_weights(folder, _ENCODER_WEIGHTS).files or list(folder.glob("*.bin")))
    return "tokenizer.json" in names or any(not name.endswith(".json") for name in names)


def _cached_snapshot(name: str, denoiser: str) -> Path | None:
    """Return where the hub's cache has a model's configurations; None if any is missing."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    configs = [folder / part / "config.json" for part in (denoiser, "vae")]
    return folder if all(config.is_file() for config in configs) else None


def _download(
    name: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    ignored: list[str] | None = None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            etag_timeout=_HUB_TIMEOUT_SECONDS,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise NotFoundError(_how_to_get(name, str(error).strip().splitlines()[0])) from error
    return Path(folder)


def _how_to_get(name: str, reason: str) -> str:
    return (
        f"model {name}: expected a folder, or a model in the local cache or on the hub, got none "
        f"of them ({reason}).\n"
        f"Where there is a network: accept the licence on the model's page if it is gated, log in "
        f"with `hf auth login`, and run `hf download {name}` with HF_HOME set to a folder that "
        "this machine sees.\n"
        "`--model FOLDER` takes a local copy; `--model tiny` runs without any download."
    )
