"""Image models of diffusers: what all families have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.devices import DTYPES, enough_memory
from fedgfe_store.models.loading import load_part, load_pipeline, naming
from fedgfe_store.models.model import Model
from fedgfe_store.models.offload import Swap, offload_blocks
from fedgfe_store.models.placement import Picture, Placement, Sampling
from fedgfe_store.models.quantization import quantization_config

# Moving a network of billions of parameters takes seconds, and a batch's latents take next to no
# memory; what waits for the decoder is lost where a process is killed, so there is an end to it.
_SWAP_BATCHES = 16


class DiffusersImages(ABC):
    """A pipeline of diffusers without text encoders, for embeddings that are there already.

    Build it with `load`. A family's subclass says what its pipeline takes.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        The pipeline, weights on the CPU.
    model : Model
        What it was loaded from.
    placement : Placement
        How it was loaded, and where its weights are to lie.

    Attributes
    ----------
    left_out : mapping
        What `load` passes to the pipeline so that encoders are neither loaded nor missed.
    """

    left_out: ClassVar[Mapping[str, Any]]

    def __init__(self, pipeline: Any, model: Any, placement: Placement) -> None:
        self.model, self.placement = model, placement
        self.batches_per_swap = _SWAP_BATCHES if placement.offload == "model" else 1
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        self._denoiser = getattr(pipeline, model.part)
        self._swap: Swap | None = None
        if placement.quantization:  # the denoiser was loaded to where it works
            pipeline.vae.to(placement.device)
        elif placement.offload == "none":
            self._pipeline.to(placement.device)
        elif placement.offload == "model":
            parts = {model.part: self._denoiser, "vae": pipeline.vae}
            self._swap = Swap(parts, lambda tensor: tensor.to(placement.device))
        else:
            offload_blocks(pipeline, self._denoiser, placement.device, placement.offload)
        if placement.compiled:
            self._denoiser.compile_repeated_blocks()

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
        if quantization:
            options["quantization_config"] = quantization_config(quantization, dtype)
            options["device_map"] = placement.device
        with enough_memory(
            placement.describe(f"loading the model {model.name}"), placement.remedy()
        ):
            parts = {
                **cls.left_out,
                model.part: load_part(model, model.part, dtype, **options),
                "vae": load_part(model, "vae", dtype),
            }
            model.config("scheduler", "scheduler_config.json")
            return cls(load_pipeline(model, dtype, parts, rest=""), model, placement)

    @abstractmethod
    def draw(self, generators: Sequence[torch.Generator], height: int, width: int) -> torch.Tensor:
        """Draw initial latents, float32 on the CPU, one image a generator."""

    @abstractmethod
    def arguments(
        self, embeddings: Mapping[str, torch.Tensor], images: int, settings: Sampling
    ) -> dict[str, Any]:
        """Check the embeddings of `images` images; give what the pipeline wants besides noise.

        Raises
        ------
        SchemaMismatchError
            If a shape does not fit.
        """

    @abstractmethod
    def scaled(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Turn the pipeline's latents into the decoder's."""

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
            The model's columns, any float dtype and device, one row an image.
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
            arguments = self.arguments(embeddings, len(seeds), settings)
            if self._swap:
                self._swap.bring(self.model.part)
            # Noise is drawn in float32 on the CPU whatever comes after; the pipelines neither move
            # nor cast what they are given, and some take the noise's dtype from it.
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            latents = self.draw(generators, settings.height, settings.width)
            with _compiling() if self.placement.compiled else nullcontext():
                result: torch.Tensor = self._pipeline(
                    **{name: self._at_home(value) for name, value in arguments.items()},
                    latents=self._at_home(latents),
                    # Schedulers that add noise at each step go on drawing from the image's own.
                    generator=generators,
                    num_inference_steps=settings.steps,
                    height=settings.height,
                    width=settings.width,
                    callback_on_step_end=_calling(on_step),
                    output_type="latent",
                    return_dict=False,
                )[0]
            return result

    def _at_home(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.placement.device, DTYPES[self.placement.dtype])

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, settings: Sampling, *, tiled: bool = False
    ) -> list[Picture | None]:
        """Decode latents to the pixels that the pipeline itself would give.

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
        list of ndarray or None
            uint8 ``[height, width, 3]``; None for an image with NaN or infinity.
        """
        with naming(f"model {self.model.folder} cannot decode"):
            if self._swap:
                self._swap.bring("vae")
            pipeline, vae = self._pipeline, self._pipeline.vae
            scaled = self.scaled(latents, settings.height, settings.width)
            with _tiling(vae, scaled) if tiled else nullcontext():
                decoded = vae.decode(self._at_home(scaled), return_dict=False)[0]
            finite = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
            if not all(finite):
                decoded = torch.nan_to_num(decoded)
            values = pipeline.image_processor.postprocess(decoded, output_type="np")
            pixels = (values * 255).round().astype(np.uint8)
            return [picture if ok else None for picture, ok in zip(pixels, finite, strict=True)]


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
    before = vae.tile_latent_min_size, vae.tile_sample_min_size
    side = max(4, min(before[0], min(latents.shape[-2:]) // 2))
    vae.tile_latent_min_size = side
    vae.tile_sample_min_size = side * before[1] // before[0]
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = before
