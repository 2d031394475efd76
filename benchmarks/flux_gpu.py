"""FLUX.1-dev at full size on one GPU: images a second, idle share and peak memory, mode by mode.

    python -m benchmarks.flux_gpu [--mode NAME ...] [--output table.md]
    python -m benchmarks.flux_gpu --tiny     # the bundled tiny FLUX, on any device

Weights are random and drawn on the card, from the published configuration: nothing is downloaded,
24 GB of temporary disk are filled (`--folder`). Each mode is measured as `generate` places it and
beside a naive loop of diffusers, one image a call. Nothing is extrapolated: images a second are
those of images of so few steps, warm-up apart. The idle share is 1 - the time in which a kernel ran
by wall time, from the intervals of torch.profiler's CUDA activity in a pass of its own; while only
copies run the device counts as idle.

A simulated card computes on the CPU and knows no seconds: there is only `--tiny` for it, which then
shows memory alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import GIB, driver, figures, give_back, is_card, is_simulated
from benchmarks.full_size import save
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.placing import load_of
from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.choice import Choice, Memory, choose
from fedgfe_store.models.devices import (
    DTYPES,
    choose_device,
    choose_dtype,
    first_line,
    is_out_of_memory,
    usable_bytes,
)
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.host import free_host_bytes, pin_exactly
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Offload, Placement, Quantization, possible_offloads
from fedgfe_store.models.quantization import cast_layerwise, check_quantization, quantization_config
from fedgfe_store.models.tiny import TINY_FLUX, TINY_SIZE

LIMIT_SECONDS = 540
"""Of one row, so that with its last step it ends within ten minutes."""
BATCHES, NAIVE_IMAGES = 2, 2
DISK_BYTES = 26 * GIB
HEAD = (*("mode", "loop", "batch", "images/s", "idle"), "GiB allocated", "GiB reserved", "remark")


@dataclass(frozen=True)
class Mode:
    """Where weights wait and how they are kept; with no offload mode, what `auto` chooses."""

    name: str
    offload: Offload | None
    resident: bool = False
    quantization: Quantization | None = None

    @property
    def is_naive(self) -> bool:
        """Whether diffusers has it by a call of its own."""
        return self.offload is not None and not self.resident


MODES = (
    Mode("none", "none"),
    Mode("model", "model"),
    Mode("group", "group"),
    Mode("group, resident", "group", resident=True),
    Mode("sequential", "sequential"),
    Mode("fp8-cast", "none", quantization="fp8-cast"),
    Mode("nf4", "none", quantization="nf4"),
    Mode("auto", None, resident=True),
)


@dataclass(frozen=True)
class Job:
    """A model on a device, and the images that are made."""

    model: Model
    device: str
    settings: Settings
    tokens: int

    def embeddings(self, images: int) -> dict[str, torch.Tensor]:
        """Draw conditioning by the pipeline's arguments."""
        generator, values = torch.Generator().manual_seed(1), {}
        for column in self.model.family.columns:
            tokens = [] if column.kind == "vector" else [self.tokens]
            shape = (images, *tokens, self.model.width(column))
            values[column.argument] = torch.randn(shape, generator=generator)
        return values


class OverTimeError(Exception):
    """A row takes longer than it may."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description="FLUX.1-dev on one GPU, mode by mode.")
    parser.add_argument("--tiny", action="store_true", help="the bundled tiny FLUX")
    parser.add_argument("--mode", action="append", choices=[mode.name for mode in MODES])
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pixels", type=int, help="width and height; default 1024")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, help="default: what generate would choose")
    parser.add_argument("--folder", type=Path, help="where 24 GB of weights go for a while")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    if not options.tiny and (not is_card(device) or is_simulated()):
        what = "the card is simulated" if is_simulated() else "there is no CUDA device"
        sys.exit(f"not run: {what}, so nothing of full size was measured; --tiny runs here")
    dtype = "float32" if options.tiny else choose_dtype(None, device)[0]
    side = options.pixels or (TINY_SIZE if options.tiny else 1024)
    settings = Settings("", "", dtype, options.steps, 3.5, side, side)
    modes = [mode for mode in MODES if options.mode is None or mode.name in options.mode]
    temporary: Any = (
        nullcontext() if options.tiny else tempfile.TemporaryDirectory(dir=options.folder)
    )
    with temporary as folder:
        path = TINY_FLUX if folder is None else random_flux(Path(folder), device, dtype)
        job = Job(resolve_model(str(path)), device, settings, options.tokens)
        rows = [row for mode in modes for row in rows_of(mode, job, options.batch)]
    lines = [title(job, tiny=options.tiny), "", *table([HEAD, *rows])]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


def random_flux(folder: Path, device: str, dtype: str) -> Path:
    """Save FLUX.1-dev with random weights, which are drawn on the card."""
    if (free := shutil.disk_usage(folder).free) < DISK_BYTES:
        sys.exit(f"not run: {folder} has {free / GIB:.0f} GiB free, {DISK_BYTES / GIB:.0f} needed")
    save("flux-dev", folder, DTYPES[dtype])
    for path in folder.rglob("*.safetensors"):
        fill_randomly(path, device, dtype)
    return folder


def fill_randomly(path: Path, device: str, dtype: str) -> None:
    """Write random values over those of a file of safetensors, all of one dtype."""
    generator = torch.Generator(device).manual_seed(0)
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            values = torch.empty(entry["shape"], dtype=DTYPES[dtype], device=device)
            values.normal_(0, 0.02, generator=generator)
            file.seek(8 + length + entry["data_offsets"][0])
            file.write(values.flatten().view(torch.uint8).cpu().numpy().tobytes())


def rows_of(mode: Mode, job: Job, batch: int | None) -> Iterator[tuple[str, ...]]:
    """Measure a mode, and the naive loop in the same mode; what does not fit is a row as well."""
    loops: dict[str, Callable[[], tuple[str, ...]]] = {"ours": lambda: ours(mode, job, batch)}
    if mode.is_naive:
        loops["naive"] = lambda: naive(mode, job)
    for loop, measure in loops.items():
        try:
            cells = measure()
        except (SchemaMismatchError, OverTimeError) as error:
            cells = without_figures(str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cells = without_figures(f"out of memory: {first_line(error)}")
        # Past the handler, whose traceback holds on to what filled the memory.
        give_back(job.device)
        print(mode.name, loop, *cells, sep=" | ", file=sys.stderr, flush=True)
        yield (mode.name, loop, *cells)


def without_figures(reason: str) -> tuple[str, ...]:
    """Give the cells of a row that has only a reason."""
    return (*"-----", reason)


def ours(mode: Mode, job: Job, batch: int | None) -> tuple[str, ...]:
    """Measure a mode as `generate` carries it out."""
    deadline = begin(mode, job)
    settings = replace(job.settings, quantization=mode.quantization)
    placement, choice = planned(mode, replace(job, settings=settings), batch)
    images = DiffusersImages.load(job.model, placement)
    size, at_once = choice.batch_size, choice.decode_size
    inputs, seeds = job.embeddings(size), list(range(size))
    together = min(BATCHES, images.batches_per_swap)

    def make(steps: int) -> int:
        asked, made = replace(settings, steps=steps), 0
        for _ in range(0, BATCHES, together):
            latents = [
                images.denoise(inputs, seeds, asked, on_step=deadline) for _ in range(together)
            ]
            for each in latents:
                for first in range(0, size, at_once):
                    made += len(list(images.decode(each[first : first + at_once], asked)))
        return made

    return (
        str(size),
        *figures(make, job.settings.steps, job.device),
        remark(mode, placement, choice),
    )


def planned(mode: Mode, job: Job, batch: int | None) -> tuple[Placement, Choice]:
    """Place weights and size batches as `generate` does.

    Raises
    ------
    SchemaMismatchError
        If it does not fit.
    """
    quantization, dtype = mode.quantization, job.settings.dtype
    every = possible_offloads(False, quantization)
    modes: tuple[Offload, ...] = every if mode.offload is None else (mode.offload,)
    if not is_card(job.device) and mode.offload is None:
        modes = ("none",)
    load = load_of(job.model, job.settings, job.tokens)
    free = usable_bytes(job.device)
    memory = Memory(free, free_host_bytes(), exact=pin_exactly())
    choice = choose(load, memory, modes=modes, batch_size=batch, partial_residency=mode.resident)
    if choice is None:
        plenty = replace(memory, device=None, host=2**62)
        least = choose(load, plenty, modes=modes, batch_size=batch or 1, partial_residency=False)
        assert least is not None
        raise SchemaMismatchError(
            f"does not fit: {gib(least.device)} of the card and {gib(least.host)} of the host "
            f"planned, {gib(free or 0)} and {gib(memory.host)} free"
        )
    stay = tuple(name for name in load.blocks.tensors if name not in choice.moving)
    placement = Placement(
        dtype,
        job.device,
        choice.offload,
        quantization=quantization,
        resident=stay if choice.offload == "group" else (),
        pinned=choice.pinned,
    )
    return placement, choice


def remark(mode: Mode, placement: Placement, choice: Choice) -> str:
    """Say what was chosen that the mode's name does not say."""
    words: list[str] = [] if mode.offload else [choice.offload]
    if choice.offload == "group":
        count = len(placement.resident)
        words.append(f"{count} of {count + len(choice.moving)} blocks stay")
        words += [] if choice.pinned else ["layers move"]
    return ", ".join(words)


def naive(mode: Mode, job: Job) -> tuple[str, ...]:
    """Measure diffusers' own pipeline in a loop, one image a call, as its documentation has it."""
    deadline = begin(mode, job)
    pipeline = naive_pipeline(mode, job)
    kept, side = DTYPES[job.settings.dtype], job.settings.height
    inputs = {name: each.to(job.device, kept) for name, each in job.embeddings(1).items()}

    def on_step(_pipeline: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        deadline()
        return tensors

    def make(steps: int) -> int:
        for seed in range(NAIVE_IMAGES):
            pipeline(
                **inputs,
                num_inference_steps=steps,
                guidance_scale=job.settings.guidance,
                height=side,
                width=side,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=on_step,
            )
        return NAIVE_IMAGES

    return ("1", *figures(make, job.settings.steps, job.device), "")


def naive_pipeline(mode: Mode, job: Job) -> Any:
    """Load and place a pipeline with diffusers' own calls."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    folder, kept = job.model.folder, DTYPES[job.settings.dtype]
    parts: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    if mode.quantization == "nf4":
        parts["transformer"] = FluxTransformer2DModel.from_pretrained(
            folder / "transformer",
            dtype=kept,
            quantization_config=quantization_config("nf4", kept),
        )
    pipeline = FluxPipeline.from_pretrained(folder, dtype=kept, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if mode.quantization == "fp8-cast":
        cast_layerwise(pipeline.transformer, kept)
    if mode.offload == "model":
        pipeline.enable_model_cpu_offload(device=job.device)
    elif mode.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=job.device)
    elif mode.offload == "group":
        pipeline.transformer.enable_group_offload(
            onload_device=torch.device(job.device),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
        pipeline.vae.to(job.device)
    else:
        pipeline.to(job.device)
    return pipeline


def begin(mode: Mode, job: Job) -> Callable[[], None]:
    """Check that the machine has the mode; give what ends a row that takes too long.

    Raises
    ------
    SchemaMismatchError
        If it has not: the reason.
    """
    if mode.quantization:
        check_quantization(
            mode.quantization, device=job.device, dtype=job.settings.dtype, compiled=False
        )
    if mode.offload not in (None, "none") and not is_card(job.device):
        raise SchemaMismatchError(f"nothing to offload from: the device is {job.device}")
    if is_card(job.device):
        torch.cuda.reset_peak_memory_stats(job.device)
    end = time.monotonic() + LIMIT_SECONDS

    def check() -> None:
        if time.monotonic() > end:
            raise OverTimeError(f"more than {LIMIT_SECONDS} seconds")

    return check


def gib(size: int) -> str:
    """Say how many GiB."""
    return f"{size / GIB:.1f} GiB"


def title(job: Job, *, tiny: bool) -> str:
    """Say what was measured, on what, and when."""
    what = "the bundled tiny FLUX" if tiny else "FLUX.1-dev at full size, random weights"
    settings = job.settings
    words = [
        f"{what}, {settings.dtype}, {settings.width} x {settings.height}, {job.tokens} tokens",
        f"images of {settings.steps} steps (nothing extrapolated)",
        torch.cuda.get_device_name(job.device) if is_card(job.device) else "CPU, no card",
        f"driver {driver(job.device)}",
        f"torch {torch.__version__}",
        f"{datetime.now().astimezone():%Y-%m-%d}",
    ]
    if is_card(job.device) and is_simulated():
        words.append("SIMULATED: memory alone, no seconds")
    return "; ".join(words)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Line rows up under the first of them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return [lines[0], rule, *lines[1:]]


if __name__ == "__main__":
    main()
