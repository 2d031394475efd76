"""An image model: what is known of it before any weights are loaded, and what it is then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.column import Column
from fedgfe_store.models.family import Family
from fedgfe_store.models.files import (
    FP16,
    Weights,
    check_number,
    check_numbers,
    check_real,
    check_reals,
    check_truth,
    find_weights,
    read_json,
)
from fedgfe_store.models.hub import download, how_to_get
from fedgfe_store.models.tiny import TINY_GUIDANCE, TINY_SIZE, TINY_STEPS
from fedgfe_store.schema import Schema

_WEIGHTS = "diffusion_pytorch_model"
_ENCODER_WEIGHTS = "model"
_WEIGHT_PATTERNS = (f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}-*-of-*.safetensors")
_FP16_PATTERN = f"{_WEIGHTS}*.{FP16}*.safetensors"
# Keys of a decoder's configuration, of which each class has one: AutoencoderKL, AutoencoderDC, and
# those of frames, such as Qwen-Image's.
_CHANNELS = ("latent_channels", "z_dim")
_SCALES = ("block_out_channels", "encoder_block_out_channels", "temperal_downsample")

# Tensors of the model's width that a block holds at once per token: the residual, q, k, v with
# their rotated float32 copies, the four-fold hidden layer before and after its activation. Counted
# with one block of each kind of FLUX.1's under diffusers 0.42 they are 17.2 to 17.6 at 273 to 1,536
# tokens; kernels of attention have the rest.
_TENSORS_PER_TOKEN = 24
# Feature maps at full latent resolution that a U-Net holds at once, skip connections included.
# Counted under diffusers 0.42 they are 26 in tensors with Stable Diffusion 1.5's at 32 and 64
# latents a side, and 16 with XL's; kernels of attention, which compute it in pieces on every GPU,
# and of convolutions have the rest.
_MAPS_PER_LATENT = 40


@dataclass(frozen=True)
class Model:
    """An image model whose configuration has been read and whose weights have not.

    What differs between the families of models is declared in a table, so that a run can be
    planned and refused without loading anything.

    Parameters
    ----------
    family : Family
        What it is, as the table declares it and as its configurations vary it.
    name : str
        What it was asked for as: ``"tiny"``, a hub id, or the name of a local folder.
    folder : Path
        Where its files are; of a model of the hub, the cached snapshot.
    revision : str
        Commit of the hub, or a digest of the local files.
    pipeline_class : str
        Class of diffusers that its ``model_index.json`` names.
    denoiser, vae : mapping
        Configurations of the network that denoises and of the one that decodes.
    from_hub : bool
        Whether missing weights can be fetched.
    """

    family: Family
    name: str
    folder: Path
    revision: str
    pipeline_class: str
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    from_hub: bool = False

    @property
    def kind(self) -> str:
        """Name of its family."""
        return self.family.name

    @property
    def part(self) -> str:
        """Name of the denoising network in the pipeline."""
        return self.family.denoiser

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """Text encoders and tokenizers of the pipeline."""
        return (*self.family.encoders, *self.family.tokenizers)

    @property
    def latent_channels(self) -> int:
        """Channels of the decoder's latents."""
        return int(self.vae[self._vae_key(_CHANNELS)])

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one axis."""
        key = self._vae_key(_SCALES)
        # Each level but the last halves; of the frames' decoder the list is of the halvings.
        halvings = len(self.vae[key]) - (key != "temperal_downsample")
        return int(2**halvings)

    def _vae_key(self, known: Sequence[str]) -> str:
        return next((key for key in known if key in self.vae), known[0])

    @property
    def size_step(self) -> int:
        """What height and width have to be multiples of: a side of an image token, in pixels."""
        return self.latent_scale * self._number(self.family.step)

    @property
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for."""
        if self.name == "tiny":
            return TINY_SIZE
        return self.latent_scale * self._number(self.family.size)

    @property
    def default_steps(self) -> int:
        """Denoising steps when none are asked for."""
        return TINY_STEPS if self.name == "tiny" else self.family.steps

    @property
    def default_guidance(self) -> float | None:
        """Guidance scale when none is asked for; None if the model takes none."""
        if not self.takes_guidance:
            return None
        return TINY_GUIDANCE if self.name == "tiny" else self.family.guidance

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale has an effect."""
        embedded = self.family.embedded
        return self.family.guidance is not None and (not embedded or bool(self.denoiser[embedded]))

    def takes_negative(self, guidance: float | None) -> bool:
        """Whether negative embeddings have an effect under a guidance scale."""
        embedded = self.family.unless and self.denoiser.get(self.family.unless) is not None
        above = guidance is not None and guidance > self.family.above
        return self.family.negatives != "none" and self.takes_guidance and not embedded and above

    def needs_negative(self, guidance: float | None) -> bool:
        """Whether it needs negative embeddings under a guidance scale; some make their own."""
        return self.family.negatives == "rows" and self.takes_negative(guidance)

    def width(self, column: Column) -> int:
        """Features of a token, or of a vector, of one of its columns."""
        return self._number(column.width)

    def _number(self, value: int | str) -> int:
        return int(self.denoiser[value]) if isinstance(value, str) else value

    @property
    def blocks(self) -> int:
        """Blocks of the denoising network, which group offload moves one by one."""
        if not self.family.blocks:  # a U-Net's on its way down and up, and the one between
            return 2 * len(self.denoiser["block_out_channels"]) + 1
        return max(1, sum(int(self.denoiser[key]) for key in self.family.blocks))

    def denoising_values(self, tokens: int, height: int, width: int) -> int:
        """Numbers that one record's denoising holds at once besides the weights."""
        guided = 1 if self.family.negatives == "none" else 2
        if not self.family.features:
            latents = height * width // self.latent_scale**2
            return int(guided * latents * self.denoiser["block_out_channels"][0] * _MAPS_PER_LATENT)
        features = prod(int(self.denoiser[key]) for key in self.family.features)
        sequence = tokens + height * width // self.size_step**2
        return int(guided * sequence * features * _TENSORS_PER_TOKEN)

    def check_config(self) -> None:
        """Refuse a model whose configuration is not one of a text-to-image model of the family.

        Raises
        ------
        SchemaMismatchError
            What was expected and what its configuration says.
        """
        family = self.family
        where = str(self.folder / self.part / "config.json")
        keys = (*(column.width for column in family.columns), family.step, family.size)
        for key in (*keys, *family.features, "in_channels"):
            if isinstance(key, str) and key:
                check_number(self.denoiser, key, where)
        for key in family.blocks:
            check_number(self.denoiser, key, where, least=0)
        if not family.features:
            check_numbers(self.denoiser, "block_out_channels", where)
        if family.embedded:
            check_truth(self.denoiser, family.embedded, where)
        self._check_decoder()
        square = 4 if family.latents in ("packed", "patched", "framed") else 1
        expected, got = square * self.latent_channels, self.denoiser["in_channels"]
        if family.latents != "own" and got != expected:
            raise SchemaMismatchError(
                f"model {self.folder}: expected a text-to-image {self.part_title} of {expected} "
                f"input channels, got {got}"
            )

    @property
    def part_title(self) -> str:
        """What people call the denoising network."""
        return {"unet": "U-Net"}.get(self.part, self.part)

    def _check_decoder(self) -> None:
        where = str(self.folder / "vae" / "config.json")
        check_number(self.vae, self._vae_key(_CHANNELS), where)
        key = self._vae_key(_SCALES)
        if key == "temperal_downsample":
            found = self.vae[key]
            if not isinstance(found, list) or not found:
                raise SchemaMismatchError(f"model: expected a list as {key} in {where}")
            for name in ("latents_mean", "latents_std"):
                check_reals(self.vae, name, where)
        else:
            check_numbers(self.vae, key, where)
        if "scaling_factor" in self.vae:  # else the decoder's class has one
            check_real(self.vae, "scaling_factor", where)
        if self.family.latents == "packed":
            check_real(self.vae, "shift_factor", where)

    def conditioning(self, schema: Schema) -> dict[str, str]:
        """Find the columns of a store that condition it, before any weights are loaded.

        Parameters
        ----------
        schema : Schema
            The store's.

        Returns
        -------
        dict of str to str
            Name of the store's column by the pipeline's argument. A mask that the store does not
            have is left out: all tokens count then, or as many as the sequence's length says,
            where it is ragged.

        Raises
        ------
        SchemaMismatchError
            If they do not fit; both sides are shown.
        """
        found: dict[str, str] = {}
        for column in self.family.columns:
            if column.is_mask:
                name = self._mask_of(column, found[self.family.sequence.argument], schema)
            else:
                name = self._column_of(column, schema)
            if name is not None:
                found[column.argument] = name
        return found

    def _column_of(self, column: Column, schema: Schema) -> str:
        width = self.width(column)
        for name in column.names:
            shape = schema.columns.get(name)
            ranks = (2,) if column.kind == "sequence" else (1, 2)
            if shape is not None and len(shape) in ranks and shape[-1] == width:
                return name
        raise self._misfit(schema)

    def _mask_of(self, column: Column, sequence: str, schema: Schema) -> str | None:
        """Find the mask of a sequence: a column named as it or as the sequence."""
        tokens = schema.columns[sequence][:1]
        for name in (*column.names, f"{sequence}_mask", f"{sequence}_attention_mask"):
            shape = schema.columns.get(name)
            if shape is not None and shape != tokens:
                raise self._misfit(schema, f", {name} {list(tokens)} beside {sequence}")
            if shape is not None:
                return name
        return None

    def _misfit(self, schema: Schema, more: str = "") -> SchemaMismatchError:
        return SchemaMismatchError(
            f"embeddings for the model {self.name}: expected {self._expected()}{more}, got "
            f"{schema.describe()}"
        )

    def _expected(self) -> str:
        """Say which columns it takes, under the names that FedGFE gives them where it does."""
        shapes = []
        for column in self.family.columns:
            name, width = column.names[-1], self.width(column) if column.width else 0
            if column.is_mask:
                continue
            vector = f"[{width}] or " if column.kind == "vector" else ""
            shapes.append(f"{name} {vector}[tokens, {width}]")
        return f"{self.kind}: {', '.join(shapes)}"

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
