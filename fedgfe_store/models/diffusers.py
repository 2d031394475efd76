"""Image models of diffusers: one adapter for all families, led by their declarations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.column import Column
from fedgfe_store.models.devices import DTYPES, clear_cache, enough_memory
from fedgfe_store.models.latents import draw, scaled
from fedgfe_store.models.loading import load_part, load_pipeline, naming
from fedgfe_store.models.lora import apply_loras
from fedgfe_store.models.model import Model
from fedgfe_store.models.offload import Swap, bring_home, offload_blocks
from fedgfe_store.models.pixels import Pixels
from fedgfe_store.models.placement import PACKED, SWAP_BATCHES, Picture, Placement, Sampling
from fedgfe_store.models.quantization import cast_layerwise, quantization_config

_AXES = ("height", "width")
_MASKS = {"int64": torch.int64, "bool": torch.bool}


class DiffusersImages:
    """A pipeline of diffusers without text encoders, for embeddings that are there already.

    Build it with `load`. Conditioning goes by the pipeline's own arguments, such as
    ``prompt_embeds`` ``[images, tokens, features]``, and ``negative_prompt_embeds`` where guidance
    leads away from something; latents are as the pipeline gives them. A pipeline whose
    declaration says ``latents = "own"`` draws its noise and decodes itself: what it gives as
    latents are finished images, float32 ``[images, height, width, 3]`` from 0 to 1.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        The pipeline, weights on the CPU.
    model : Model
        What it was loaded from.
    placement : Placement
        How it was loaded, and where its weights are to lie.
    """

    def __init__(self, pipeline: Any, model: Model, placement: Placement) -> None:
        self.model, self.placement = model, placement
        self._dtype = DTYPES[placement.dtype]
        self._own = model.family.latents == "own"
        self._pipeline = pipeline
        self._takes = inspect.signature(type(pipeline).__call__).parameters
        self._pipeline.set_progress_bar_config(disable=True)
        self._denoiser = getattr(pipeline, model.part)
        self._swap: Swap | None = None
        if torch.device(placement.device).type == "cuda" and _is_flat(pipeline.vae):
            # What convolutions of half precision on a GPU work in; others are converted each time.
            pipeline.vae.to(memory_format=torch.channels_last)
        self._put()
        if placement.compiled:
            self._denoiser.compile_repeated_blocks()

    @property
    def batches_per_swap(self) -> int:
        """Batches to denoise before the first of them is decoded."""
        return SWAP_BATCHES if self._swap else 1

    def place(self, placement: Placement) -> None:
        """Let the weights wait elsewhere, without loading them again.

        Parameters
        ----------
        placement : Placement
            Of another offload mode, and like the old one in all else; not for packed weights.

        Raises
        ------
        torch.OutOfMemoryError, MemoryError
            If there is no room for them; then they are on the host, and want another place.
        """
        if self._swap:
            self._swap.send_home()
        bring_home(self._pipeline, self.placement.device)
        self.placement = placement
        self._put()
        clear_cache(placement.device)

    def _put(self) -> None:
        """Put weights that are on the host where the placement says."""
        pipeline, placement, self._swap = self._pipeline, self.placement, None
        if placement.quantization in PACKED:  # the denoiser was loaded to where it works
            pipeline.vae.to(placement.device)
        elif placement.offload == "none":
            pipeline.to(placement.device)
        elif placement.offload == "model" and self._own:
            pipeline.enable_model_cpu_offload(device=placement.device)
        elif placement.offload == "model":
            parts = {self.model.part: self._denoiser, "vae": pipeline.vae}
            self._swap = Swap(parts, lambda tensor: tensor.to(placement.device))
        else:
            offload_blocks(pipeline, self._denoiser, placement)

    @classmethod
    def load(cls, model: Model, placement: Placement) -> Self:
        """Load a model's denoising network and decoder.

        Raises
        ------
        NotFoundError
            If weights are missing and cannot be fetched.
        SchemaMismatchError
            If a file is not what is expected, or memory is not enough.
        """
        model.fetch_weights()
        dtype, quantization = DTYPES[placement.dtype], placement.quantization
        options: dict[str, Any] = {}
        if quantization in PACKED:
            options["quantization_config"] = quantization_config(quantization, dtype)
            options["device_map"] = placement.device
        with enough_memory(
            placement.describe(f"loading the model {model.name}"), placement.remedy()
        ):
            # Some decoders overflow in float16, and their pipelines know.
            upcast = model.family.upcast and model.vae.get("force_upcast") is True
            full = upcast and dtype == torch.float16
            parts = {
                model.part: load_part(model, model.part, dtype, **options),
                "vae": load_part(model, "vae", torch.float32 if full else dtype),
            }
            if quantization == "fp8-cast":
                cast_layerwise(parts[model.part], dtype)
            model.config("scheduler", "scheduler_config.json")
            pipeline = load_pipeline(model, dtype, parts, keep=("scheduler",), rest="")
            # Before anything notes where the weights are: what is added moves along with them.
            apply_loras(pipeline, model, placement.loras)
            return cls(pipeline, model, placement)

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        settings: Sampling,
        *,
        on_step: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Denoise a batch.

        Parameters
        ----------
        embeddings : mapping
            By the pipeline's argument, any dtype and device, one row an image.
        seeds : sequence of int
            One an image.
        settings : Sampling
            Steps, guidance scale and size.
        on_step : callable
            Called after each step; what it raises ends the batch.

        Returns
        -------
        torch.Tensor
            Latents on the device.

        Raises
        ------
        SchemaMismatchError
            If a shape does not fit; the pipeline itself would not notice.
        """
        with naming(f"model {self.model.folder} cannot denoise"):
            arguments = self._arguments(embeddings, len(seeds), settings)
            if self._swap:
                self._swap.bring(self.model.part)
            # Noise is drawn in float32 on the CPU whatever comes after; the pipelines neither move
            # nor cast what they are given, and some take the noise's dtype from it.
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            if not self._own:
                drawn = self.draw(generators, settings.height, settings.width)
                kept = None if self.model.family.float32_latents else self._dtype
                arguments["latents"] = drawn.to(self.placement.device, kept)
            with _compiling() if self.placement.compiled else nullcontext():
                result = self._pipeline(
                    **arguments,
                    **self._stepping(on_step),
                    # Schedulers that add noise at each step go on drawing from the image's own.
                    generator=generators,
                    num_inference_steps=settings.steps,
                    height=settings.height,
                    width=settings.width,
                    output_type="np" if self._own else "latent",
                    return_dict=False,
                )[0]
            return torch.from_numpy(np.asarray(result)) if self._own else result

    def draw(self, generators: Sequence[torch.Generator], height: int, width: int) -> torch.Tensor:
        """Draw initial latents as the pipeline does, float32 on the CPU, one image a generator."""
        model, scale = self.model, self.model.latent_scale
        shape = (model.latent_channels, height // scale, width // scale)
        return draw(self._pipeline, model.family.latents, generators, *shape)

    def _stepping(self, on_step: Callable[[], None]) -> dict[str, Any]:
        """Give the argument under which this pipeline calls back after each step."""
        if "callback_on_step_end" in self._takes:
            return {"callback_on_step_end": _calling(on_step)}
        if "callback" not in self._takes:  # a declared pipeline's: a stop waits for the batch
            return {}
        return {"callback": lambda step, timestep, latents: on_step(), "callback_steps": 1}

    def _arguments(
        self, embeddings: Mapping[str, torch.Tensor], images: int, settings: Sampling
    ) -> dict[str, Any]:
        """Check the embeddings of `images` images; give what the pipeline wants besides noise.

        Raises
        ------
        SchemaMismatchError
            If a shape does not fit; the pipeline itself would not notice.
        """
        family, guidance = self.model.family, settings.guidance
        positive = self._side(embeddings, "", images)
        arguments = {**family.call, **positive}
        if family.guidance_argument in self._takes:
            # What takes no guidance may still ask for a scale: 1 is none.
            arguments[family.guidance_argument] = 1.0 if guidance is None else guidance
        given = any(name.startswith("negative_") for name in embeddings)
        if self.model.needs_negative(guidance) or given:
            if not self.model.takes_negative(guidance):
                raise SchemaMismatchError(
                    f"negative embeddings under guidance {guidance}: expected none, got some"
                )
            negative = self._side(embeddings, "negative_", images)
            if not family.apart:
                _check_alike(positive, negative)
            arguments |= negative
        if "negative_prompt" in self._takes:
            # The default of some is an empty prompt, which goes with no embeddings.
            arguments["negative_prompt"] = None
        return arguments

    def _side(
        self, embeddings: Mapping[str, torch.Tensor], side: str, images: int
    ) -> dict[str, Any]:
        """Give positive or negative conditioning as the pipeline takes it, masks to match."""
        values: dict[str, Any] = {}
        for column in self.model.family.columns:
            name = side + column.argument
            found, expected = embeddings.get(name), self._shape(column, images)
            if column.is_mask:  # a declaration names the sequence before its mask
                expected[1] = values[side + self.model.family.sequence.argument].shape[1]
                found = torch.ones(images, int(expected[1])) if found is None else found
            if found is None or not _is_shaped(found, expected):
                shape = ", ".join(map(str, expected))
                got = None if found is None else list(found.shape)
                raise SchemaMismatchError(f"embeddings: expected {name} [{shape}], got {got}")
            values[name] = self._at_home(found, column)
        return self._cut(values, side)

    def _shape(self, column: Column, images: int) -> list[int | str]:
        tokens: list[int | str] = [] if column.kind == "vector" else ["tokens"]
        return [images, *tokens, *([] if column.is_mask else [self.model.width(column)])]

    def _cut(self, values: dict[str, Any], side: str) -> dict[str, Any]:
        """Cut sequences to their tokens, where the pipeline takes a list of them."""
        lengths = [column for column in self.model.family.columns if column.kind == "lengths"]
        for column in lengths:
            mask = values.pop(side + column.argument)
            name = side + self.model.family.sequence.argument
            values[name] = [row[kept] for row, kept in zip(values[name], mask, strict=True)]
        return values

    def _at_home(self, value: torch.Tensor, column: Column | None = None) -> torch.Tensor:
        dtype = self._dtype
        if column is not None and column.kind == "lengths":
            dtype = torch.bool
        elif column is not None and column.kind == "mask":
            dtype = _MASKS.get(column.dtype, dtype)
        return value.to(self.placement.device, dtype)

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, settings: Sampling, *, tiled: bool = False
    ) -> Sequence[Picture | None]:
        """Decode latents to the pixels that the pipeline itself would give.

        It does not wait for the device; taking an image does, in whatever thread.

        Parameters
        ----------
        latents : torch.Tensor
            As `denoise` returns them, or some rows of it.
        settings : Sampling
            Size of the images.
        tiled : bool
            Decode tile by tile, which takes less memory and changes pixels.

        Returns
        -------
        sequence of ndarray or None
            uint8 ``[height, width, 3]``; None for an image with NaN or infinity.
        """
        with naming(f"model {self.model.folder} cannot decode"):
            if self._own:
                return Pixels(latents.float(), torch.isfinite(latents))
            if self._swap:
                self._swap.bring("vae")
            pipeline, vae, layout = self._pipeline, self._pipeline.vae, self.model.family.latents
            ready = scaled(pipeline, layout, latents, settings.height, settings.width)
            with _tiling(vae, ready) if tiled else nullcontext():
                ready = ready.to(self.placement.device, vae.dtype)
                decoded = vae.decode(ready, return_dict=False)[0]
            if decoded.ndim == 5:  # a decoder of frames gives one
                decoded = decoded[:, :, 0]
            shown = pipeline.image_processor.postprocess(
                torch.nan_to_num(decoded), output_type="pt"
            )
            return Pixels(shown.permute(0, 2, 3, 1), torch.isfinite(decoded))


def _is_flat(network: torch.nn.Module) -> bool:
    """Whether a network knows no convolutions of frames."""
    return all(weights.ndim < 5 for weights in network.parameters())


def _is_shaped(values: torch.Tensor, expected: Sequence[int | str]) -> bool:
    """Whether a tensor has a shape, in which a word stands for any length."""
    return values.ndim == len(expected) and all(
        isinstance(wanted, str) or wanted == got
        for wanted, got in zip(expected, values.shape, strict=True)
    )


def _check_alike(positive: Mapping[str, Any], negative: Mapping[str, Any]) -> None:
    """Refuse negatives of other lengths, which pipelines put beside the others as one batch."""
    for name, value in positive.items():
        other = negative[f"negative_{name}"]
        if isinstance(value, torch.Tensor) and value.shape != other.shape:
            raise SchemaMismatchError(
                f"embeddings: expected negative_{name} {list(value.shape)} like the others, got "
                f"{list(other.shape)}"
            )


def _calling(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(
        pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        on_step()
        return tensors

    return callback


@contextmanager
def _compiling() -> Iterator[None]:
    """Say plainly what keeps torch from compiling, such as a machine without a C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise SchemaMismatchError(f"compile: not possible here: {reason}") from error


@contextmanager
def _tiling(vae: Any, latents: torch.Tensor) -> Iterator[None]:
    """Decode in tiles of half the image: by itself a decoder splits larger ones only."""
    names: tuple[str, ...] = ("tile_latent_min_size", "tile_sample_min_size")
    values: tuple[int, ...]
    if hasattr(vae, names[0]):
        before = [getattr(vae, name) for name in names]
        side = max(4, min(before[0], min(latents.shape[-2:]) // 2))
        values = (side, side * before[1] // before[0])
    else:  # decoders of later releases: sizes and strides in pixels, by axis
        names = tuple(f"tile_sample_{what}_{axis}" for what in ("min", "stride") for axis in _AXES)
        scale = vae.spatial_compression_ratio
        sides = [max(4, n // 2) * scale for n in latents.shape[-2:]]
        # Tiles overlap by a quarter, as diffusers' own do.
        values = (*sides, *(max(scale, side * 3 // 4 // scale * scale) for side in sides))
        kept = tuple(f"tile_latent_min_{axis}" for axis in _AXES)
        if hasattr(vae, kept[0]):  # Sana's keeps in latents, too, from what on it splits
            names, values = (*names, *kept), (*values, *(side // scale for side in sides))
        before = [getattr(vae, name) for name in names]
    for name, value in zip(names, values, strict=True):
        setattr(vae, name, value)
    # `enable_tiling` sets sizes to defaults in some classes, and only this in all.
    vae.use_tiling, used = True, vae.use_tiling
    try:
        yield
    finally:
        vae.use_tiling = used
        for name, value in zip(names, before, strict=True):
            setattr(vae, name, value)
