"""Whether a model fits a device, and which offload mode and batch do, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Offload

# What is no tensor: workspaces of cuBLAS and cuDNN, and ends of the allocator's blocks.
RESERVE_BYTES = 256 * 2**20
# Feature maps at full resolution that the decoder's last blocks hold at once: 3.0 in tensors, as
# counted with FLUX.1's under diffusers 0.42 at 128 and 256 pixels, and room for convolutions' own.
_MAPS_PER_PIXEL = 5
# One block at work, one on its way in, one on its way out.
_BLOCKS_ON_DEVICE = 3
# Layers of a block, of which sequential offload holds one at a time; the largest is a third of it.
_LAYERS_PER_BLOCK = 3


@dataclass(frozen=True)
class Footprint:
    """Device memory in bytes: weights, and what work on one batch needs besides.

    Parameters
    ----------
    denoiser, vae : int
        Weights of the network that denoises and of the one that decodes.
    block : int
        Weights of one block of the denoising network.
    denoising, decoding : int
        What a batch needs in either besides its weights.
    """

    denoiser: int
    vae: int
    block: int
    denoising: int
    decoding: int

    def needed(self, offload: Offload) -> int:
        """Give the peak under an offload mode."""
        peak = {
            "none": self.denoiser + self.vae + max(self.denoising, self.decoding),
            "model": max(self.denoiser + self.denoising, self.vae + self.decoding),
            "group": self.vae + max(_BLOCKS_ON_DEVICE * self.block + self.denoising, self.decoding),
            "sequential": max(self.block // _LAYERS_PER_BLOCK + self.denoising, self.decoding),
        }
        return peak[offload] + RESERVE_BYTES


def estimate_footprint(
    model: Model,
    *,
    item_bytes: int,
    batch_size: int,
    tokens: int,
    height: int,
    width: int,
    weight_share: float = 1.0,
) -> Footprint:
    """Estimate a run's device memory from its weight files and the size of its images.

    Parameters
    ----------
    model : Model
        The model; its weights have to be on disk.
    item_bytes : int
        Bytes of a number in the dtype that it runs in.
    batch_size, tokens : int
        Records of a batch, and tokens of a record.
    height, width : int
        Picture size in pixels.
    weight_share : float
        What quantization leaves of the denoising network's weights.

    Returns
    -------
    Footprint
        Bytes.
    """
    channels = max(_channels(model.vae)[:2])
    denoiser = int(model.parameters(model.part) * item_bytes * weight_share)
    return Footprint(
        denoiser=denoiser,
        vae=model.parameters("vae") * item_bytes,
        block=denoiser // model.blocks,
        denoising=batch_size * model.denoising_values(tokens, height, width) * item_bytes,
        decoding=batch_size * height * width * channels * _MAPS_PER_PIXEL * item_bytes,
    )


def _channels(decoder: Mapping[str, Any]) -> list[int]:
    """Give a decoder's channels by level, those at full size first, as its class says them."""
    for key in ("block_out_channels", "decoder_block_out_channels"):
        if key in decoder:
            return list(decoder[key])
    return [decoder["base_dim"] * times for times in decoder["dim_mult"]]


def choose_offload(
    wanted: str,
    *,
    device_type: str,
    free_bytes: int | None,
    footprint: Footprint,
    possible: Sequence[Offload] = get_args(Offload),
) -> tuple[Offload, str | None]:
    """Decide on an offload mode.

    Parameters
    ----------
    wanted : {"auto", "none", "model", "group", "sequential"}
        ``"auto"`` is the first of the others that fits.
    device_type : str
        ``"cpu"``, ``"cuda"``, ...; on the CPU nothing is offloaded.
    free_bytes : int or None
        Free memory of the device; None where it is not known, so that everything is put there.
    footprint : Footprint
        What the run needs.
    possible : sequence of str
        What ``"auto"`` may come to.

    Returns
    -------
    mode : str
        The decision.
    remark : str or None
        One line for the user where it is not simply what was asked for.

    Raises
    ------
    SchemaMismatchError
        If `wanted` is unknown.
    """
    modes = get_args(Offload)
    if wanted != "auto" and wanted not in modes:
        raise SchemaMismatchError(
            f"offload: expected auto, {', '.join(modes[:-1])} or {modes[-1]}, got {wanted!r}"
        )
    if device_type == "cpu":
        asked = wanted not in ("auto", "none")
        return "none", f"offload: {wanted} is ignored on the CPU" if asked else None
    if wanted != "auto":
        return wanted, None  # type: ignore[return-value]
    if free_bytes is None:
        return "none", None
    for mode in possible:
        if footprint.needed(mode) <= free_bytes:
            return mode, None if mode == "none" else f"offload: {mode}"
    last = possible[-1]
    return last, (
        f"offload: {last}, though the run may need {gib(footprint.needed(last))} "
        f"and {gib(free_bytes)} are free"
    )


def gib(size: int) -> str:
    """Give a number of bytes as a card's memory is told."""
    return f"{size / 2**30:.1f} GiB"
