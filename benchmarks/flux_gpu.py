"""FLUX.1-dev at full size on one GPU: seconds an image, memory, and what batches change.

    python benchmarks/flux_gpu.py [--output table.md]
    python benchmarks/flux_gpu.py --small        # a toy of the same architecture, on any machine

Weights are random, which neither time nor memory depends on. Each case runs a few denoising steps
and one decoding after a warm-up; an image of 28 steps is reckoned from them. Cases: 512 and 1024
pixels, 17 and 512 tokens, batches of 1, 2, 4 and 8, every offload mode, compiled or not; beside
them a naive loop of one record at a time that keeps the text encoders on the device. Without a GPU
nothing but `--small` runs, and the script says so.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.devices import DTYPES, clear_cache, is_out_of_memory
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import family_named
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Offload, Placement

T = TypeVar("T")
STEPS = 28
MEASURED_STEPS = 4
T5_BYTES, CLIP_BYTES = 4_762_310_656 * 2, 123_060_480 * 2
"""Parameters of T5-XXL's and CLIP-L's text encoders, in bfloat16."""

FULL = {"guidance_embeds": True}
SMALL = {
    "guidance_embeds": True,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
}
FULL_VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SMALL_VAE = {"latent_channels": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    pixels: int
    tokens: int
    batch: int
    offload: Offload = "none"
    compiled: bool = False
    encoders: bool = False


def cases(small: bool) -> Iterator[Case]:
    """Give what is measured; offload and compilation at the middle of the other ranges."""
    sizes, batches = ((32, 64), (1, 2)) if small else ((512, 1024), (1, 2, 4, 8))
    for pixels, tokens, batch in itertools.product(sizes, (17, 512), batches):
        yield Case(pixels, tokens, batch)
    for pixels, batch in itertools.product(sizes, sorted({1, batches[-2]})):
        yield Case(pixels, 17, batch, encoders=True)
        yield Case(pixels, 17, batch, compiled=True)
        if not small:
            yield Case(pixels, 17, batch, "model")
            yield Case(pixels, 17, batch, "group")
            yield Case(pixels, 17, batch, "sequential")


def load(case: Case, device: str, dtype: str, *, small: bool) -> DiffusersImages:
    """Make a pipeline of random weights, placed as the case says."""
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    scales = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    with torch.device("cpu" if small else device):
        transformer = FluxTransformer2DModel(**(SMALL if small else FULL))
        vae = AutoencoderKL(**(SMALL_VAE if small else FULL_VAE), **blocks, **scales)
    torch.set_default_dtype(torch.float32)
    if case.offload != "none":
        transformer.to("cpu")
        vae.to("cpu")
        clear_cache(device)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    configs = dict(transformer.config), dict(vae.config)
    model = Model(family_named("flux"), "random", Path(), "", "FluxPipeline", *configs)
    return DiffusersImages(pipeline, model, Placement(dtype, device, case.offload, case.compiled))


def embeddings(case: Case, images: DiffusersImages) -> dict[str, torch.Tensor]:
    """Make embeddings of the case's length, the same for a record in any batch."""
    generator = torch.Generator().manual_seed(1)
    t5_width, clip_width = map(images.model.width, images.model.family.columns)
    t5 = torch.randn(8, case.tokens, t5_width, generator=generator)
    clip = torch.randn(8, clip_width, generator=generator)
    return {"prompt_embeds": t5[: case.batch], "pooled_prompt_embeds": clip[: case.batch]}


def measure(case: Case, device: str, dtype: str, *, small: bool) -> tuple[str, np.ndarray | None]:
    """Give a row of the table, and the first picture."""
    cuda = torch.device(device).type == "cuda"
    images: DiffusersImages | None = None
    try:
        images = load(case, device, dtype, small=small)
        held = (
            torch.empty(T5_BYTES + CLIP_BYTES, dtype=torch.uint8, device=device)
            if (case.encoders and cuda)
            else None
        )
        settings = Settings("", "", dtype, MEASURED_STEPS, 3.5, case.pixels, case.pixels)
        inputs, seeds = embeddings(case, images), list(range(case.batch))
        images.denoise(inputs, seeds, Settings(**{**vars(settings), "steps": 1}))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        denoising, latents = timed(device, partial(images.denoise, inputs, seeds, settings))
        decoding, pictures = timed(device, partial(images.decode, latents, settings))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return f"{head(case)} out of memory | | |", None
    finally:
        images = held = None  # noqa: F841 - what a failed case holds must not tax the next one
        gc.collect()
        clear_cache(device)
    swapped = "reckoned with one swap" if case.offload == "model" else ""
    each = (denoising / MEASURED_STEPS * STEPS + decoding) / case.batch
    peak = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}" if cuda else "-"
    return f"{head(case)} {each:.2f} | {peak} | {swapped} |", pictures[0]


def timed(device: str, work: Callable[[], T]) -> tuple[float, T]:
    """Time one call, the device's work included."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def head(case: Case) -> str:
    """Give the first cells of a row."""
    loop = "naive, encoders kept" if case.encoders else "ours"
    compiled = "yes" if case.compiled else ""
    return (
        f"| {loop} | {case.pixels} | {case.tokens} | {case.batch} | {case.offload} | {compiled} |"
    )


def main() -> None:
    """Measure all cases and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        sys.exit("not run: no CUDA device here, so none of the full-size cases was measured")
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if cuda else ("cpu", "float32")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    lines = [
        f"FLUX.1-dev{' (small)' if options.small else ''}, random weights, {dtype}, {name}, "
        f"torch {torch.__version__}; seconds an image of {STEPS} steps, peak GiB",
        "",
        "| loop | pixels | tokens | batch | offload | compiled | s/image | GiB | remark |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    first: dict[tuple[int, int, int], np.ndarray] = {}
    for case in cases(options.small):
        row, picture = measure(case, device, dtype, small=options.small)
        if picture is not None and case.offload == "none" and not case.compiled:
            first[case.pixels, case.tokens, case.batch] = picture.astype(int)
        lines.append(row)
        print(row, flush=True)
    for (pixels, tokens, batch), picture in first.items():
        alone = first.get((pixels, tokens, 1))
        if batch > 1 and alone is not None:
            difference = np.abs(picture - alone)
            lines.append(
                f"\n{pixels} pixels, {tokens} tokens: batch {batch} against 1 differs by "
                f"{difference.mean():.3f} on average and {difference.max()} at most, of 255"
            )
            print(lines[-1])
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
