"""Where the weights lie while images are made, decided from sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import psutil
import torch

from fedgfe_store.errors import SchemaMismatchError

if TYPE_CHECKING:
    from fedgfe_store.models.model import Model

Offload = Literal["none", "model", "group", "sequential"]

_RESERVE_BYTES = 256 * 2**20
# Feature maps at full resolution that the decoder's last blocks hold at once.
_MAPS_PER_PIXEL = 5
# One block at work, one on its way in, one on its way out.
_BLOCKS_ON_DEVICE = 3
# Layers of a block, of which sequential offload holds one at a time; the largest is a third of it.
_LAYERS_PER_BLOCK = 3
# Group offload copies whole blocks from pinned memory, which the host keeps beside the weights.
_HOST_COPIES = 2.2


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
        return peak[offload] + _RESERVE_BYTES


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
    """Estimate a run's device memory from its weight files and the size of its pictures.

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
    channels = max(model.vae["block_out_channels"][:2])
    denoiser = int(model.parameters(model.part) * item_bytes * weight_share)
    return Footprint(
        denoiser=denoiser,
        vae=model.parameters("vae") * item_bytes,
        block=denoiser // model.blocks,
        denoising=batch_size * model.denoising_values(tokens, height, width) * item_bytes,
        decoding=batch_size * height * width * channels * _MAPS_PER_PIXEL * item_bytes,
    )


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
        return "none", None if wanted == "none" else f"offload: {wanted} is ignored on the CPU"
    if wanted != "auto":
        return wanted, None  # type: ignore[return-value]
    if free_bytes is None:
        return "none", None
    for mode in possible:
        if footprint.needed(mode) <= free_bytes:
            return mode, None if mode == "none" else f"offload: {mode}"
    last = possible[-1]
    return last, (
        f"offload: {last}, though the run may need {_gib(footprint.needed(last))} "
        f"and {_gib(free_bytes)} are free"
    )


def offload_blocks(
    pipeline: Any, denoiser: Any, device: str, offload: Literal["group", "sequential"]
) -> None:
    """Let diffusers move a network's blocks, or its single layers, to the device as they work.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        Weights on the host.
    denoiser : torch.nn.Module
        Its denoising network.
    device : str
        Not the CPU.
    offload : {"group", "sequential"}
        ``"group"`` moves blocks and keeps the decoder on the device; on CUDA the next block comes
        while one works. ``"sequential"`` moves layers, which takes least memory and most time.
    """
    if offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
        return
    weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    streamed = torch.device(device).type == "cuda"
    denoiser.enable_group_offload(
        onload_device=torch.device(device),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streamed,
        low_cpu_mem_usage=streamed and psutil.virtual_memory().available < _HOST_COPIES * weights,
    )
    pipeline.vae.to(device)


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
            self._send_home(self._present)
        self._present = None
        try:
            for tensor, home in self._tensors[name]:
                tensor.data = self._put(home)
        except BaseException:  # half a module on the device is of no use, and takes its memory
            self._send_home(name)
            raise
        self._present = name

    def _send_home(self, name: str) -> None:
        for tensor, home in self._tensors[name]:
            tensor.data = home


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
