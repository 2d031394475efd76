"""Latents: the noise that a pipeline begins with, and what its decoder is given at the end.

The pipelines differ in how they hold an image while they denoise it. The five ways here are those
of diffusers 0.42, whose own functions do the packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedgfe_store.models.family import Latents

# A packed or patched token stands for a square of so many latents a side.
_SIDE = 2


def draw(
    pipeline: Any,
    layout: Latents,
    generators: Sequence[torch.Generator],
    channels: int,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """Draw initial latents as a pipeline does itself from one generator an image.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        The pipeline.
    layout : {"plain", "packed", "patched", "framed"}
        How it holds an image.
    generators : sequence of torch.Generator
        One an image, on the CPU.
    channels, rows, columns : int
        Of an image's latents.

    Returns
    -------
    torch.Tensor
        float32 on the CPU, ``[images, ...]`` as the pipeline's argument ``latents``.
    """
    shape = (channels, rows, columns)
    if layout == "patched":
        shape = (channels * _SIDE**2, rows // _SIDE, columns // _SIDE)
    noise = torch.cat(
        [torch.randn((1, *shape), generator=g, dtype=torch.float32) for g in generators]
    )
    if layout in ("packed", "framed"):
        packed: torch.Tensor = pipeline._pack_latents(noise, len(noise), channels, rows, columns)
        return packed
    return noise


def scaled(
    pipeline: Any, layout: Latents, latents: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Turn a pipeline's latents into what its decoder takes.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        The pipeline.
    layout : {"plain", "packed", "patched", "framed"}
        How it holds an image.
    latents : torch.Tensor
        As it returns them under ``output_type="latent"``.
    height, width : int
        Of the image, in pixels.

    Returns
    -------
    torch.Tensor
        ``[images, channels, rows, columns]``, of a decoder of frames with an axis of one frame
        before the rows.
    """
    config = pipeline.vae.config
    if layout == "patched":
        return _unpatched(pipeline, latents, height, width)
    if layout in ("packed", "framed"):
        latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    means, deviations = (getattr(config, f"latents_{n}", None) for n in ("mean", "std"))
    if means and deviations:
        ones = (1,) * (latents.ndim - 2)
        mean, deviation = (
            torch.tensor(values).view(1, -1, *ones).to(latents.device, latents.dtype)
            for values in (means, deviations)
        )
        if layout == "framed":
            # The pipeline divides by the reciprocal; rounded so, pixels are the same to a bit.
            unscaled: torch.Tensor = latents / (1.0 / deviation)
        else:
            unscaled = latents * deviation / config.scaling_factor
        return unscaled + mean
    unscaled = latents / config.scaling_factor
    shift = getattr(config, "shift_factor", None)
    return unscaled if shift is None else unscaled + shift


def _unpatched(pipeline: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo FLUX.2's packing and normalization, which FLUX.2 klein has undone already."""
    result: torch.Tensor
    if latents.ndim == 4:
        return latents
    vae = pipeline.vae
    side = _SIDE * pipeline.vae_scale_factor
    unpacked = latents.transpose(1, 2).unflatten(2, (height // side, width // side))
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
    variance = vae.bn.running_var.view(1, -1, 1, 1)
    deviation = torch.sqrt(variance + vae.config.batch_norm_eps).to(latents.device, latents.dtype)
    result = pipeline._unpatchify_latents(unpacked * deviation + mean)
    return result
