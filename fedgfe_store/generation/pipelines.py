"""Image models behind one small interface, and FLUX as its first case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.models import Model
from fedgfe_store.generation.offload import Offload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SWAP_BATCHES = 16

Picture = NDArray[np.uint8]
"""A picture, uint8 ``[height, width, 3]``."""


class ImagePipeline(Protocol):
    """What a run needs of an image model.

    Attributes
    ----------
    model : Model
        Which model it is.
    dtype, device, offload : str
        What it computes in, where, and where its weights wait meanwhile.
    columns : tuple of str
        Tensor columns that it is conditioned on.
    batches_per_swap : int
        Batches to denoise before the first of them is decoded.
    """

    @property
    def model(self) -> Model: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def offload(self) -> str: ...  # noqa: D102
    @property
    def columns(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def batches_per_swap(self) -> int: ...  # noqa: D102

    def noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        """Draw initial latents, one image a seed: float32 on the CPU, whatever comes after."""
        ...

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        latents: torch.Tensor,
        *,
        steps: int,
        guidance: float | None,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """Denoise a batch under its embeddings, one row an image."""
        ...

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Picture | None]:
        """Turn denoised latents into pictures; None for one with values that are not finite."""
        ...


class FluxImages:
    """FLUX through diffusers' own pipeline, without text encoders.

    Build it with `load`. Conditioning is ``t5`` ``[images, tokens, features]`` and ``clip``
    ``[images, features]``; latents are packed, ``[images, image tokens, 4 x channels]``.

    Parameters
    ----------
    pipeline : diffusers.FluxPipeline
        The pipeline, weights on the CPU.
    model : Model
        What it was loaded from.
    dtype : str
        Dtype of its weights.
    device : str
        Where to compute.
    offload : {"none", "model"}
        ``"model"`` keeps one of transformer and decoder on the device at a time.
    """

    columns = ("t5", "clip")

    def __init__(
        self, pipeline: Any, model: Model, *, dtype: str, device: str, offload: Offload = "none"
    ) -> None:
        self.model, self.dtype, self.device, self.offload = model, dtype, device, offload
        self.batches_per_swap = _SWAP_BATCHES if offload == "model" else 1
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        self._swap: Swap | None = None
        if offload == "model":
            parts = {"transformer": pipeline.transformer, "vae": pipeline.vae}
            self._swap = Swap(parts, lambda tensor: tensor.to(device))
        else:
            self._pipeline.to(device)

    @classmethod
    def load(cls, model: Model, *, dtype: str, device: str, offload: Offload = "none") -> Self:
        """Load a model's transformer and decoder.

        Raises
        ------
        NotFoundError
            If weights are missing and cannot be fetched.
        """
        model.fetch_weights()
        with _quiet_loading():
            from diffusers import FluxPipeline

            try:
                pipeline = FluxPipeline.from_pretrained(
                    os.fspath(model.folder),
                    text_encoder=None,
                    tokenizer=None,
                    text_encoder_2=None,
                    tokenizer_2=None,
                    dtype=DTYPES[dtype],
                    local_files_only=True,
                )
            except OSError as error:
                raise NotFoundError(f"model {model.name}: {error}") from error
        return cls(pipeline, model, dtype=dtype, device=device, offload=offload)

    def noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        """Draw initial latents as `FluxPipeline` does from one generator an image.

        Parameters
        ----------
        seeds : sequence of int
            One an image.
        height, width : int
            Picture size in pixels.

        Returns
        -------
        torch.Tensor
            float32 on the CPU, packed.
        """
        channels = self.model.transformer["in_channels"] // 4
        rows, columns = (2 * (n // self.model.pixels_per_token) for n in (height, width))
        drawn = [
            torch.randn(
                (1, channels, rows, columns),
                generator=torch.Generator("cpu").manual_seed(seed),
                dtype=torch.float32,
            )
            for seed in seeds
        ]
        packed: torch.Tensor = self._pipeline._pack_latents(
            torch.cat(drawn), len(drawn), channels, rows, columns
        )
        return packed

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        latents: torch.Tensor,
        *,
        steps: int,
        guidance: float | None,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """Denoise a batch.

        Parameters
        ----------
        embeddings : mapping
            ``t5`` and ``clip``, any float dtype and device.
        latents : torch.Tensor
            Noise, one image a row of the embeddings.
        steps : int
            Denoising steps.
        guidance : float or None
            Guidance scale; without effect on a model that takes none.
        height, width : int
            Picture size in pixels.

        Returns
        -------
        torch.Tensor
            Packed latents on the device.

        Raises
        ------
        SchemaMismatchError
            If a shape does not fit; the pipeline itself would not notice.
        """
        t5, clip = embeddings["t5"], embeddings["clip"]
        self._check_shapes(t5, clip, len(latents))
        if self._swap:
            self._swap.bring("transformer")
        # FLUX neither moves nor casts what it is given, and takes the noise's dtype from it.
        dtype = DTYPES[self.dtype]
        result: torch.Tensor = self._pipeline(
            prompt_embeds=t5.to(self.device, dtype),
            pooled_prompt_embeds=clip.to(self.device, dtype),
            latents=latents.to(self.device, dtype),
            num_inference_steps=steps,
            guidance_scale=1.0 if guidance is None else guidance,
            height=height,
            width=width,
            output_type="latent",
            return_dict=False,
        )[0]
        return result

    def _check_shapes(self, t5: torch.Tensor, clip: torch.Tensor, images: int) -> None:
        expected = (images, self.model.t5_width), (images, self.model.clip_width)
        if t5.ndim != 3 or (t5.shape[::2], tuple(clip.shape)) != expected:
            raise SchemaMismatchError(
                f"embeddings: expected t5 [{images}, tokens, {self.model.t5_width}] and clip "
                f"[{images}, {self.model.clip_width}], got {list(t5.shape)} and {list(clip.shape)}"
            )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Picture | None]:
        """Decode latents to the pixels that `FluxPipeline` would give.

        Parameters
        ----------
        latents : torch.Tensor
            Packed latents, as `denoise` returns them.
        height, width : int
            Picture size in pixels.

        Returns
        -------
        list of ndarray or None
            uint8 ``[height, width, 3]``; None for a picture with NaN or infinity.
        """
        if self._swap:
            self._swap.bring("vae")
        pipeline, vae = self._pipeline, self._pipeline.vae
        unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        scaled = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled.to(vae.device), return_dict=False)[0]
        finite = torch.isfinite(decoded).flatten(1).all(dim=1).tolist()
        if not all(finite):
            decoded = torch.nan_to_num(decoded)
        values = pipeline.image_processor.postprocess(decoded, output_type="np")
        pixels = (values * 255).round().astype(np.uint8)
        return [picture if ok else None for picture, ok in zip(pixels, finite, strict=True)]


class Swap:
    """Keeps one of several modules on a device, and all of them in the memory of the host.

    Weights do not change here, so giving up the device's copy is enough to move a module out:
    nothing is copied back, and the host's memory does not grow.

    Parameters
    ----------
    modules : mapping
        Modules by name, on the host.
    put : callable
        Copies a tensor to the device.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        put: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._put = put
        self._present: str | None = None
        self._tensors = {
            name: [(t, t.data) for t in chain(module.parameters(), module.buffers())]
            for name, module in modules.items()
        }

    def bring(self, name: str) -> None:
        """Put the module `name` on the device, and nothing else."""
        if name == self._present:
            return
        if self._present is not None:
            for tensor, home in self._tensors[self._present]:
                tensor.data = home
        for tensor, home in self._tensors[name]:
            tensor.data = self._put(home)
        self._present = name


def choose_device(device: str | None) -> str:
    """Check a device's name; without one, give ``"cuda"`` where there is a GPU, else ``"cpu"``.

    Raises
    ------
    SchemaMismatchError
        If it is not a device of this machine.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SchemaMismatchError(
            f"device: expected one of this machine, got {device!r} ({reason})"
        ) from None
    return device


def choose_dtype(dtype: str | None, device: str) -> str:
    """Check a dtype's name; without one, take bfloat16 (else float16) on CUDA, else float32.

    Raises
    ------
    SchemaMismatchError
        If it is none of float32, bfloat16 and float16.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise SchemaMismatchError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        return dtype
    if torch.device(device).type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def free_bytes(device: str) -> int | None:
    """Give the free memory of a CUDA device; None for others, where it is not known."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.mem_get_info(torch.device(device))[0]


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep loading bars, and remarks on image processors that are not used, off the terminal."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    shown, level = logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
