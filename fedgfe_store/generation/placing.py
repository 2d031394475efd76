"""Where a run's weights lie and how many images a batch has, on this machine as it is now."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.launchers import processes_here
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.blocks import Blocks
from fedgfe_store.models.choice import Choice, Load, Memory, choose, decode_size
from fedgfe_store.models.devices import DTYPES, free_bytes
from fedgfe_store.models.fit import Footprint, choose_offload, estimate_footprint, gib
from fedgfe_store.models.host import free_host_bytes, pin_exactly
from fedgfe_store.models.lora import Lora
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import (
    PACKED,
    SWAP_BATCHES,
    Offload,
    Placement,
    possible_offloads,
)
from fedgfe_store.models.quantization import WEIGHT_SHARE

# How safetensors name what is computed in.
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Of the products of all weights with all positions, so many are computed. Counted with torch's
# FlopCounterMode: FLUX.1 0.68, whose double blocks have weights of their own for image and text;
# U-Nets, which work on few positions in their middle, 0.11 (Stable Diffusion 1.5) and 0.08 (XL).
_SHARE, _SHARE_OF_UNET = 0.7, 0.1


def place(
    request: Request, model: Model, settings: Settings, tokens: int, placement: Placement
) -> tuple[Placement, int, str | None]:
    """Decide where the weights wait, and on the images of a batch.

    Parameters
    ----------
    request : Request
        What is asked.
    model : Model
        The model; its weights have to be on disk.
    settings : Settings
        Of the images.
    tokens : int
        Tokens of a record.
    placement : Placement
        Device, dtype and quantization.

    Returns
    -------
    placement : Placement
        With the offload mode.
    batch_size : int
        Images of a batch.
    remark : str or None
        One line for the user where it is not simply what was asked for.

    Raises
    ------
    SchemaMismatchError
        If nothing fits and all was left to be decided: what would fit.
    """
    free = free_bytes(placement.device)
    if free is None:  # the CPU, or a device that does not tell
        size = request.batch_size or decode_size(settings.height * settings.width)
        return _as_asked(request, model, settings, tokens, placement, size, None)
    memory = Memory(free, free_host_bytes(processes_here(os.environ)), exact=pin_exactly())
    load = load_of(model, settings, tokens, placement.loras)
    auto = request.offload == "auto"
    possible = possible_offloads(placement.compiled, placement.quantization)
    # Who asks for a mode may have reasons to leave memory free.
    modes: tuple[Offload, ...] = possible if auto else (request.offload,)  # type: ignore[assignment]
    found = choose(load, memory, modes=modes, batch_size=request.batch_size, partial_residency=auto)
    if found is not None:
        return _placed(placement, found, load), found.batch_size, _remark(found, load, auto)
    if auto and request.batch_size is None:
        raise _refusal(model, settings, tokens, placement, load, memory)
    size = request.batch_size or decode_size(load.pixels)
    return _as_asked(request, model, settings, tokens, placement, size, free)


def place_in(load: Load, placement: Placement, usable: int) -> Placement:
    """Decide what a mode keeps on the device, and in what memory of the host the rest waits.

    Parameters
    ----------
    load : Load
        What the run asks of the machine.
    placement : Placement
        With the mode.
    usable : int
        Bytes of the device that it may take.

    Returns
    -------
    Placement
        With room for one image, if there is any such.
    """
    memory = Memory(usable, free_host_bytes(processes_here(os.environ)), exact=pin_exactly())
    # They come home as copies, and what is pinned comes on top of these.
    load = replace(load, converted=True)
    found = choose(load, memory, modes=(placement.offload,), batch_size=1)
    if found is None:
        return replace(placement, resident=(), pinned=False)
    return _placed(placement, found, load)


def batch_beside(model: Model, settings: Settings, tokens: int, device: str) -> int:
    """Decide on the images of a batch for a model that is on its device already."""
    free = free_bytes(device)
    if free is None or not model.has_weights:
        return decode_size(settings.height * settings.width)
    load = load_of(model, settings, tokens)

    def without_weights(size: int) -> Footprint:
        return replace(load.footprint(size), denoiser=0, vae=0)

    memory = Memory(free, 2**62)
    found = choose(replace(load, footprint=without_weights), memory, modes=("none",))
    return found.batch_size if found else decode_size(load.pixels)


def load_of(model: Model, settings: Settings, tokens: int, loras: Sequence[Lora] = ()) -> Load:
    """Say what a run asks of a machine, from the headers of weight files and sizes of images."""
    quantization, kept = settings.quantization, DTYPES[settings.dtype].itemsize
    share, unet = WEIGHT_SHARE[quantization], not model.family.features
    stored = model.weights(model.part).tensors()
    # What is packed goes to the device tensor by tensor. All else is loaded whole first.
    other = any(dtype != _STORED[settings.dtype] for _, dtype in stored.values())
    loading = 0 if quantization in PACKED or not other else kept
    scale = model.latent_scale if unet else model.size_step
    positions = settings.height * settings.width // scale**2 + (0 if unet else tokens)
    passes = 2 if model.takes_negative(settings.guidance) else 1
    numbers = sum(numbers for numbers, _ in stored.values())

    one = estimate_footprint(
        model,
        item_bytes=kept,
        batch_size=1,
        tokens=tokens,
        height=settings.height,
        width=settings.width,
        weight_share=share,
    )
    added = kept * sum(lora.numbers for lora in loras)
    block = one.block + added // model.blocks
    one = replace(one, denoiser=one.denoiser + added, block=block)
    blocks = Blocks.of({name: int(n * kept * share) for name, (n, _) in stored.items()})
    return Load(
        lambda size: replace(one, denoising=size * one.denoising, decoding=size * one.decoding),
        blocks.with_added(added),
        pixels=settings.height * settings.width,
        steps=settings.steps,
        operations=2 * passes * numbers * positions * (_SHARE_OF_UNET if unet else _SHARE),
        converted=bool(loading) or quantization not in (None, *PACKED),
        loading=loading * numbers,
        swap_batches=1 if model.family.latents == "own" else SWAP_BATCHES,
        added=added,
    )


def _placed(placement: Placement, found: Choice, load: Load) -> Placement:
    stay = tuple(name for name in load.blocks.tensors if name not in found.moving)
    return replace(
        placement,
        offload=found.offload,
        resident=stay if found.offload == "group" else (),
        pinned=found.pinned,
    )


def _remark(found: Choice, load: Load, auto: bool) -> str | None:
    if found.offload == "none" or not (auto or found.offload == "group"):
        return None
    words = [f"offload: {found.offload}"]
    blocks = len(load.blocks.tensors)
    if len(found.moving) < blocks and found.offload == "group":
        words.append(f"{blocks - len(found.moving)} of {blocks} blocks stay on the device")
    if not found.pinned:
        words.append("layer by layer, since the host has no memory to pin whole blocks")
    return ", ".join(words) if auto or len(words) > 1 else None


def _as_asked(
    request: Request,
    model: Model,
    settings: Settings,
    tokens: int,
    placement: Placement,
    size: int,
    free: int | None,
) -> tuple[Placement, int, str | None]:
    """Do as asked, though it may not fit: batches get smaller where it does not."""
    kind = torch.device(placement.device).type
    if kind == "cpu" or (free is None and request.offload == "auto"):
        footprint = Footprint(0, 0, 0, 0, 0)  # nothing is decided by it
    else:
        footprint = load_of(model, settings, tokens, placement.loras).footprint(size)
    offload, remark = choose_offload(
        request.offload,
        device_type=kind,
        free_bytes=free,
        footprint=footprint,
        possible=possible_offloads(placement.compiled, placement.quantization),
    )
    return replace(placement, offload=offload, pinned=False), size, remark


def _refusal(
    model: Model,
    settings: Settings,
    tokens: int,
    placement: Placement,
    load: Load,
    memory: Memory,
) -> SchemaMismatchError:
    modes = possible_offloads(placement.compiled, placement.quantization)
    plenty = replace(memory, device=None, host=2**62)
    least = [choose(load, plenty, modes=(mode,), batch_size=1) for mode in modes]
    device = min(found.device for found in least if found)
    host = min(found.host for found in least if found)
    fits = list(_fitting(model, settings, tokens, placement, memory))
    forced = f"--offload {modes[-1]} tries it nevertheless"
    return SchemaMismatchError(
        f"memory for the model {model.name} in {settings.quantization or settings.dtype}: expected "
        f"{gib(device)} free on {placement.device} and {gib(host)} of the host for one image of "
        f"{settings.width}x{settings.height}, got {gib(memory.device or 0)} and "
        f"{gib(memory.host)}; {' or '.join([*fits, forced])}"
    )


def _fitting(
    model: Model, settings: Settings, tokens: int, placement: Placement, memory: Memory
) -> Iterator[str]:
    """Name what would fit."""
    loras = placement.loras
    if load_of(model, settings, tokens).loading:
        kinds = {dtype for _, dtype in model.weights(model.part).tensors().values()}
        for name in (name for name, stored in _STORED.items() if kinds == {stored}):
            modes = possible_offloads(placement.compiled, placement.quantization)
            changed = load_of(model, replace(settings, dtype=name), tokens, loras)
            if choose(changed, memory, modes=modes):
                yield f"--dtype {name}, as the files are, fits"
    for name in ("fp8-cast", "nf4"):
        if settings.quantization is None and not loras:  # these take no LoRA
            modes = possible_offloads(placement.compiled, name)
            changed = load_of(model, replace(settings, quantization=name), tokens)
            if choose(changed, memory, modes=modes):
                yield f"--quantize {name} fits"
    step, side = model.size_step, min(settings.height, settings.width) // 2
    side = side // step * step
    if side:
        modes = possible_offloads(placement.compiled, placement.quantization)
        smaller = load_of(model, replace(settings, height=side, width=side), tokens, loras)
        if choose(smaller, memory, modes=modes):
            yield f"--height {side} --width {side} fits"
