"""Where weights lie and how many images a batch has, chosen together for the most images a second.

Everything here follows from sizes: of weights, from the headers of their files; of what work needs
besides, estimated; of the memory that is free. Seconds are a model's, good enough to tell one
choice from another and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fedgfe_store.models.blocks import Blocks
from fedgfe_store.models.fit import RESERVE_BYTES, Footprint
from fedgfe_store.models.host import pinned_bytes
from fedgfe_store.models.placement import Offload

_GIB = 2**30
_MEGAPIXEL = 1024**2
_FLUX_BYTES = 11_901_408_320 * 2
# Five forwards of FLUX.1-dev in bfloat16, offloaded with a stream: 9.75 s block by block, pinned;
# 13.72 s layer by layer and pinned on the way; 38.07 s block by block and pinned on the way, where
# the copy into pinned memory holds all up (diffusers, pull request 11106).
_PINNED_RATE = 5 * _FLUX_BYTES / 9.75
_LAYERS_RATE = 5 * _FLUX_BYTES / 13.72
_PAGEABLE_RATE = 5 * _FLUX_BYTES / 38.07
# What four lanes of PCIe 3.0 carry; a disk that is faster is one more reason to be right.
_DISK_RATE = 4 * 0.985e9
# FLUX.1-dev at 1024 x 1024 in 28 steps on an H100: 6.6 s for one image and 24.8 s for a batch of
# four, as published for eager bfloat16. So a step takes 19 ms and 0.217 s an image more. Slower
# cards hide transfers better, and then a larger batch does no harm.
_STEP_SECONDS = 0.0191
_IMAGE_SECONDS = 0.2167
# Counted with torch's FlopCounterMode: FLUX.1 at 1024 x 1024 and 512 tokens, and AutoencoderKL's
# decoder at 1024 x 1024.
_FLUX_OPERATIONS = 74.4e12
_DECODER_OPERATIONS = 10.5e12
_OPERATIONS_RATE = _FLUX_OPERATIONS / _IMAGE_SECONDS
# Batches larger than these gain little, and are lost with a process that is killed.
_BATCHES = (1, 2, 3, 4, 6, 8)
# Of choices that are as good as equal the one that moves and takes least is taken.
_AS_GOOD = 1.015
# torch, diffusers and their libraries hold 0.5 GiB; records read ahead and images that wait to be
# written have the rest.
_HOST_RESERVE = 2 * _GIB


@dataclass(frozen=True)
class Memory:
    """What is free.

    Parameters
    ----------
    device : int or None
        Bytes of the device; None where they are not known.
    host : int
        Bytes of the host that this process may take.
    exact : bool
        Whether torch pins without rounding to powers of two.
    """

    device: int | None
    host: int
    exact: bool = False


@dataclass(frozen=True)
class Load:
    """What a run asks of the machine.

    Parameters
    ----------
    footprint : callable
        Gives what a batch of so many needs.
    blocks : Blocks
        Those of the denoising network, as it is kept.
    pixels : int
        Of an image.
    steps : int
        Denoising steps.
    operations : float
        Floating-point operations of one image's step.
    converted : bool
        Whether weights are kept otherwise than their files have them. If not, they are pages of
        these files, which the host drops where it is short and reads again.
    loading : int
        Bytes of the host that loading takes for a while, if any.
    swap_batches : int
        Batches that are denoised before the decoder takes the denoiser's place.
    added : int
        Bytes of the denoiser's weights that are in no file of its own, as those of LoRA.
    """

    footprint: Callable[[int], Footprint]
    blocks: Blocks
    pixels: int
    steps: int
    operations: float
    converted: bool = False
    loading: int = 0
    swap_batches: int = 1
    added: int = 0


@dataclass(frozen=True)
class Choice:
    """Where weights lie, how many images a batch has, and what that takes.

    Parameters
    ----------
    offload : {"none", "model", "group", "sequential"}
        Where weights wait.
    batch_size, decode_size : int
        Images that are denoised and that are decoded at a time.
    device, host : int
        Bytes that it takes at most.
    seconds : float
        Of an image, by the model of costs.
    moving : tuple of str
        Blocks that move, under ``"group"``.
    pinned : bool
        Whether they wait in pinned memory; if not, single layers move.
    """

    offload: Offload
    batch_size: int
    decode_size: int
    device: int
    host: int
    seconds: float
    moving: tuple[str, ...] = ()
    pinned: bool = True


def decode_size(pixels: int) -> int:
    """Give how many images are decoded at a time: as many as have the pixels of a large one."""
    return max(1, min(_BATCHES[-1], _MEGAPIXEL // pixels))


def choose(
    load: Load,
    memory: Memory,
    *,
    modes: Sequence[Offload],
    batch_size: int | None = None,
    partial_residency: bool = True,
) -> Choice | None:
    """Choose the offload mode and the batch that make most images a second, of those that fit.

    Parameters
    ----------
    load : Load
        What the run asks.
    memory : Memory
        What is free.
    modes : sequence of str
        Offload modes that are possible.
    batch_size : int, optional
        The batch, where it is settled.
    partial_residency : bool
        Whether blocks may stay on the device while others move.

    Returns
    -------
    Choice or None
        None where nothing fits.
    """
    batches = _BATCHES if batch_size is None else (batch_size,)
    found = [
        choice
        for size in batches
        for choice in options(load, memory, size, modes, partial_residency=partial_residency)
        if memory.device is None or choice.device <= memory.device
        if choice.host + _HOST_RESERVE <= memory.host
    ]
    # Where nothing has to move nothing does: what a larger batch gains is less certain.
    found = [choice for choice in found if choice.offload == "none"] or found
    enough = min((choice.seconds for choice in found), default=0.0) * _AS_GOOD
    return min(
        (choice for choice in found if choice.seconds <= enough),
        key=lambda each: (modes.index(each.offload), not each.pinned, each.batch_size),
        default=None,
    )


def options(
    load: Load,
    memory: Memory,
    size: int,
    modes: Sequence[Offload],
    *,
    partial_residency: bool = True,
) -> Iterator[Choice]:
    """Give the ways to place weights for batches of `size`, whether or not they fit."""
    need, at_once = load.footprint(size), min(size, decode_size(load.pixels))
    decoding = load.footprint(at_once).decoding
    weights = need.denoiser + need.vae
    on_host = max(load.loading, weights if load.converted else load.added)
    chosen = partial(Choice, batch_size=size, decode_size=at_once)
    seconds = partial(_seconds, load, size)
    if "none" in modes:
        device = weights + max(need.denoising, decoding) + RESERVE_BYTES
        yield chosen("none", device=device, host=on_host, seconds=seconds())
    if "model" in modes:
        device = max(need.denoiser + need.denoising, need.vae + decoding) + RESERVE_BYTES
        rate = _PAGEABLE_RATE if load.converted or weights <= memory.host else _DISK_RATE
        swap = weights / min(rate, _PAGEABLE_RATE) / (size * load.swap_batches)
        yield chosen("model", device=device, host=on_host, seconds=seconds() + swap)
    if "group" in modes and load.blocks.tensors:
        for pinned in (True, False):
            moving = _moving(load, need, decoding, memory.device, pinned, partial_residency)
            moved = load.blocks.rest + sum(load.blocks.sizes[name] for name in moving)
            rate = _PINNED_RATE if pinned else _LAYERS_RATE
            if not (pinned or load.converted or moved <= memory.host):
                rate = min(rate, _DISK_RATE)
            yield chosen(
                "group",
                device=_grouped(load, need, decoding, moving, pinned),
                host=max(on_host, _pinned_host(load, moving, memory.exact) if pinned else 0),
                seconds=seconds(moved / rate),
                moving=moving,
                pinned=pinned,
            )
    if "sequential" in modes:
        device = max(load.blocks.largest_tensor + need.denoising, decoding) + RESERVE_BYTES
        after = weights / _PAGEABLE_RATE
        yield chosen("sequential", device=device, host=on_host, seconds=seconds(after=after))


def _seconds(load: Load, size: int, beside: float = 0.0, after: float = 0.0) -> float:
    """Reckon an image's seconds; of a step, transfers are `beside` the work or `after` it."""
    step = max(_STEP_SECONDS + size * load.operations / _OPERATIONS_RATE, beside) + after
    decoding = load.pixels / _MEGAPIXEL * _DECODER_OPERATIONS / _OPERATIONS_RATE
    return load.steps * step / size + decoding


def _moving(
    load: Load,
    need: Footprint,
    decoding: int,
    free: int | None,
    pinned: bool,
    partial_residency: bool,
) -> tuple[str, ...]:
    """Choose as few blocks as leave room for the work; all where that is not to be."""
    count = len(load.blocks.tensors)
    if free is not None and partial_residency:
        for few in range(1, count):
            moving = load.blocks.moving(few)
            if _grouped(load, need, decoding, moving, pinned) <= free:
                return moving
    return load.blocks.moving(count)


def _grouped(
    load: Load, need: Footprint, decoding: int, moving: Sequence[str], pinned: bool
) -> int:
    """Give the device memory under group offloading in which these blocks move."""
    sizes = load.blocks.sizes
    resident = sum(sizes.values()) - sum(sizes[name] for name in moving)
    # One at work and the next on its way.
    largest = sorted((sizes[name] for name in moving), reverse=True)
    coming = sum(largest[:2]) + load.blocks.rest if pinned else 2 * load.blocks.largest_tensor
    return need.vae + resident + max(coming + need.denoising, decoding) + RESERVE_BYTES


def _pinned_host(load: Load, moving: Sequence[str], exact: bool) -> int:
    tensors = [size for name in moving for size in load.blocks.tensors[name]]
    pinned = pinned_bytes(tensors, exact=exact)
    # Pinned copies are made of all blocks before the first of the others is given up.
    return sum(tensors) + pinned if load.converted else pinned
