"""Moving weights between host and device while images are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from fedgfe_store.models.host import pin_exactly
from fedgfe_store.models.placement import Placement

# By these names diffusers' own group offload takes its hooks off before it puts them on anew.
_GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def offload_blocks(pipeline: Any, denoiser: Any, placement: Placement) -> None:
    """Let diffusers move a network's blocks, or its single layers, to the device as they work.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        Weights on the host.
    denoiser : torch.nn.Module
        Its denoising network.
    placement : Placement
        The device, not the CPU. ``"group"`` moves blocks but for those that are resident, and
        keeps the decoder on the device; on CUDA the next block comes while one works, from pinned
        memory. Without that, layers move in its place. ``"sequential"`` moves layers one by one,
        the decoder's too, which takes least memory and most time.
    """
    device = torch.device(placement.device)
    if placement.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=placement.device)
        return
    streamed, blocks = device.type == "cuda", placement.pinned or device.type != "cuda"
    if streamed and blocks:
        pin_exactly()
    with _apart(denoiser, placement.resident) as resident:
        for block in resident:
            block.to(device)
        denoiser.enable_group_offload(
            onload_device=device,
            offload_type="block_level" if blocks else "leaf_level",
            num_blocks_per_group=1 if blocks else None,
            use_stream=streamed,
            low_cpu_mem_usage=streamed and not blocks,
        )
    pipeline.vae.to(device)


def bring_home(pipeline: Any, device: str) -> None:
    """Undo what `offload_blocks` did, and move all weights to the host.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        Any weights of it may be on the device, as after an error half-way.
    device : str
        The device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(torch.device(device))  # blocks that were on their way
    pipeline.remove_all_hooks()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            for part in module.modules():
                registry: Any = getattr(part, "_diffusers_hook", None)
                for name in _GROUP_HOOKS if registry else ():
                    registry.remove_hook(name, recurse=False)
            module.to("cpu")


@contextmanager
def _apart(network: torch.nn.Module, names: Sequence[str]) -> Iterator[list[torch.nn.Module]]:
    """Take blocks out of a network's lists for a while, so that no hook finds them."""
    wanted, taken, before = set(names), [], {}
    for name, child in network.named_children():
        if isinstance(child, torch.nn.ModuleList):
            of = {f"{name}.{n}": block for n, block in enumerate(child)}
            if found := [block for each, block in of.items() if each in wanted]:
                before[name] = child
                taken += found
                rest = [block for each, block in of.items() if each not in wanted]
                setattr(network, name, torch.nn.ModuleList(rest))
    try:
        yield taken
    finally:
        for name, child in before.items():
            setattr(network, name, child)


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
        self.send_home()
        try:
            for tensor, home in self._tensors[name]:
                tensor.data = self._put(home)
        except BaseException:  # half a module on the device is of no use, and takes its memory
            self._send_home(name)
            raise
        self._present = name

    def send_home(self) -> None:
        """Put what is on the device off it."""
        if self._present is not None:
            self._send_home(self._present)
        self._present = None

    def _send_home(self, name: str) -> None:
        for tensor, home in self._tensors[name]:
            tensor.data = home
