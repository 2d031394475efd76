"""Prompts through the tiny models that have text encoders, with diffusers alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tiny_families import FAMILIES, TOKENS, TinyFamily, generators, pixels

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Prompting:
    """How a family takes prompts.

    Parameters
    ----------
    returned : tuple of str
        Arguments that the values of ``encode_prompt`` are, in their order; "" for what is none.
    tokens : int
        What both ``encode_prompt`` and the pipeline have as ``max_sequence_length``; 0 for none.
    encode : mapping
        More arguments of ``encode_prompt``.
    """

    returned: tuple[str, ...]
    tokens: int = TOKENS
    encode: Mapping[str, Any] = field(default_factory=dict)

    @property
    def both(self) -> dict[str, int]:
        """Arguments of ``encode_prompt`` and of the pipeline."""
        return {"max_sequence_length": self.tokens} if self.tokens else {}


_POOLED = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
_MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
_ALONE = ("prompt_embeds", "")
_FLUX = Prompting(("prompt_embeds", "pooled_prompt_embeds", ""), 17)
_SDXL = Prompting(_POOLED, 0)
_SANA = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"]

PROMPTING: dict[str, Prompting] = {
    "flux-dev": _FLUX,
    "flux-schnell": _FLUX,
    "sd": Prompting(
        _POOLED[:2],
        0,
        {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    ),
    "sdxl": _SDXL,
    "sdxl-turbo": _SDXL,
    "sdxl-lcm": _SDXL,
    "sd3": Prompting(_POOLED, encode={"prompt_2": None, "prompt_3": None}),
    "flux2-dev": Prompting(_ALONE, 2 * TOKENS),
    "flux2-klein": Prompting(_ALONE),
    "flux2-klein-base": Prompting(_ALONE),
    "pixart-alpha": Prompting(_MASKED, 120),
    "pixart-sigma": Prompting(_MASKED),
    "chroma": Prompting(
        (
            "prompt_embeds",
            "",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "",
            "negative_prompt_attention_mask",
        )
    ),
    # The pipeline's own instruction goes before the prompt, but not when encoding alone.
    "sana": Prompting(_MASKED, encode={"complex_human_instruction": _SANA.default}),
    # The pipeline's own words before the prompt take most of the tokens.
    "lumina2": Prompting(_MASKED, 256),
    "qwen-image": Prompting(("prompt_embeds", "prompt_embeds_mask"), 512),
    "z-image": Prompting(("prompt_embeds", "negative_prompt_embeds")),
}
"""How each family of `FAMILIES` takes prompts."""


@lru_cache(maxsize=1)
def load_whole(folder: Path, name: str) -> diffusers.DiffusionPipeline:
    """Load a model with its text encoders; the last one is kept."""
    family = FAMILIES[name]
    # A safety checker, which the tiny models lack, is left out by name.
    left_out = {
        part: None for part in family.encoders if "text_" not in part and "token" not in part
    }
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(folder: Path, name: str, prompts: Sequence[str]) -> tuple[Columns, Columns]:
    """Encode prompts with the pipeline's own ``encode_prompt``.

    Returns
    -------
    tuple of dict
        Columns of the prompts and of as many empty ones, as `records` has them. The latter are
        empty where a family needs none.
    """
    family, prompting = FAMILIES[name], PROMPTING[name]
    wanted = _encode(folder, family, prompting, list(prompts))
    unwanted = {
        argument.removeprefix("negative_"): wanted.pop(argument)
        for argument in list(wanted)
        if argument.startswith("negative_")
    }
    if not family.negatives:
        return wanted, {}
    return wanted, unwanted or _encode(folder, family, prompting, [""] * len(prompts))


def _encode(folder: Path, family: TinyFamily, prompting: Prompting, prompts: list[str]) -> Columns:
    pipeline = load_whole(folder, family.name)
    given = {"prompt": prompts} | dict(prompting.encode) | prompting.both
    with torch.no_grad():
        values = pipeline.encode_prompt(**given)
    columns: Columns = {}
    for argument, value in zip(prompting.returned, values, strict=True):
        if isinstance(value, list):
            columns |= _padded(argument, value)
        elif argument and value is not None:
            columns[argument] = (
                value.float().numpy() if value.is_floating_point() else value.numpy()
            )
    for mask in family.masks:  # one pipeline returns none where all tokens count
        columns.setdefault(mask, np.ones(columns["prompt_embeds"].shape[:2], dtype=np.int64))
    return columns


def _padded(argument: str, rows: list[torch.Tensor]) -> Columns:
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        argument: padded.numpy(),
        argument.replace("embeds", "attention_mask"): mask.astype(np.int64),
    }


def from_prompts(
    folder: Path,
    name: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None,
    size: int | tuple[int, int],
) -> list[NDArray[np.uint8]]:
    """Make images from prompts, as `direct` does from embeddings."""
    family = FAMILIES[name]
    height, width = (size, size) if isinstance(size, int) else size
    given: dict[str, Any] = {k: v for k, v in family.call.items() if k != "negative_prompt"}
    if name == "qwen-image":  # without, it is not guided
        given["negative_prompt"] = [""] * len(prompts)
    if guidance is not None:
        given[family.guidance] = guidance
    return pixels(
        load_whole(folder, name)(
            prompt=list(prompts),
            **given,
            **PROMPTING[name].both,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=generators(seeds),
            output_type="np",
        ).images
    )
