"""Options of ``generate``: what pictures depend on, and where and how they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    BatchSizeType = click.ParamType[int | None, object]
else:
    # Not generic at run time in every click that is allowed.
    BatchSizeType = click.ParamType


class BatchSize(BatchSizeType):
    """A whole number from 1, or ``auto``, which is None."""

    name = "batch size"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as int or None."""
        if value is None or value == "auto":
            return None
        if isinstance(value, str) and value.isdecimal() and int(value) >= 1:
            return int(value)
        return self.fail(f"expected auto or a number from 1, got {value!r}", param, ctx)


_PICTURE = [
    click.option(
        "--diffusion-type",
        "--diffusion_type",
        type=click.Choice(["flux", "sd"]),
        help="Family of the model [the store's].",
    ),
    click.option("--model", help="Hub id, folder or tiny [$FEDGFE_MODEL, the store's]."),
    click.option(
        "--steps",
        "--num_inference_steps",
        type=click.IntRange(min=1),
        help="Denoising steps [dev 28, schnell 4, tiny 8, Stable Diffusion 50].",
    ),
    click.option(
        "--guidance",
        "--guidance_scale",
        type=float,
        help="Guidance scale [3.5; Stable Diffusion 7.5; schnell takes none].",
    ),
    click.option(
        "--negative",
        metavar="PROMPT|FILE",
        help="Negative prompt, or embeddings in a file; Stable Diffusion only [empty prompt].",
    ),
    click.option("--height", type=click.IntRange(min=1), help="Pixels [the model's own]."),
    click.option("--width", type=click.IntRange(min=1), help="Pixels [the model's own]."),
    click.option(
        "--pool",
        type=click.Choice(["last", "first", "mean"]),
        default="last",
        show_default=True,
        help="How a CLIP sequence becomes FLUX's vector, where the store holds sequences.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Base seed of the noise."),
    click.option(
        "--images-per-record",
        type=click.IntRange(1, 10_000),
        default=1,
        show_default=True,
        help="Images of each record, each from noise of its own.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="What to compute in [bfloat16 on a GPU, float32 on the CPU].",
    ),
    click.option(
        "--quantize", type=click.Choice(["nf4", "fp8"]), help="Quantize the denoiser's weights."
    ),
]

_PLACE = [
    click.option("--device", help="Such as cpu or cuda:1 [a GPU where there is one]."),
    click.option(
        "--offload",
        type=click.Choice(["auto", "none", "model", "group", "sequential"]),
        default="auto",
        show_default=True,
        help="What the GPU holds: all, denoiser or decoder, a few blocks, a layer.",
    ),
    click.option(
        "--batch-size",
        "--batch_size",
        type=BatchSize(),
        default="auto",
        show_default=True,
        help="Images per call of the model; auto goes by their size and the GPU's memory.",
    ),
    click.option("--compile", "compiled", is_flag=True, help="Compile the denoiser's blocks."),
    click.option(
        "--vae-tiling", is_flag=True, help="Decode tile by tile what does not fit the memory."
    ),
    click.option(
        "--clear-cache-every",
        "--clear_cache_every",
        type=click.IntRange(min=1),
        metavar="N",
        help="Give the GPU's cache back after every N batches.",
    ),
]


def picture_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that change pictures."""
    return _with(function, _PICTURE)


def place_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where and how pictures are made."""
    return _with(function, _PLACE)


def _with(function: Callable[..., Any], options: list[Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function
