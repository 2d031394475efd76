"""Tiny image models of random weights, one of each family, and what diffusers makes with them.

Conditioning has the widths of the real models, all else is as small as the classes allow. A model's
images depend visibly on every column, on the masks and on the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tiny_parts as parts
import torch
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]

TOKENS = 24
"""Tokens of a record where the family takes any number."""


@dataclass(frozen=True)
class TinyFamily:
    """A family's model and what it is conditioned on.

    Parameters
    ----------
    name : str
        Key in `FAMILIES`.
    pipeline_class : str
        Its class in diffusers.
    build : callable
        Makes denoiser, decoder and scheduler, by the names that they have in the pipeline.
    columns : mapping
        Argument of the pipeline to shape of a record. The mask of a `ragged` one is no argument.
    mask_type : str
        What ``encode_prompt`` returns masks as.
    ragged : bool
        Whether the pipeline takes a list with the rows that the mask keeps.
    negatives : bool
        Whether guidance needs negative embeddings.
    guidance : str
        Argument that sets the strength of guidance.
    call : mapping
        More arguments that a call with embeddings needs.
    options : mapping
        Entries of ``model_index.json`` besides the parts.
    encoders : tuple of str
        Parts that embeddings take the place of.
    """

    name: str
    pipeline_class: str
    build: Callable[[], dict[str, Any]]
    columns: Mapping[str, tuple[int, ...]]
    mask_type: str = "int64"
    ragged: bool = False
    negatives: bool = False
    guidance: str = "guidance_scale"
    call: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")

    @property
    def masks(self) -> tuple[str, ...]:
        """Columns that are masks: 1 for each token that counts, then 0."""
        return tuple(argument for argument in self.columns if "mask" in argument)


def save(name: str, folder: Path, *, encoders: bool = False) -> Path:
    """Save a family's model as a checkpoint would lie there, in float32; the same one each time.

    Parameters
    ----------
    encoders : bool
        Whether it has text encoders and tokenizers. Few are small: up to 120 MB.
    """
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = dict.fromkeys(family.encoders) | family.build()
        if encoders:
            from tiny_encoders import make  # who needs none does not wait for transformers

            made |= make(name)
    _class(family)(**made, **family.options).save_pretrained(folder)
    return folder


def records(name: str, count: int, seed: int) -> dict[str, NDArray[Any]]:
    """Draw embeddings, and masks of different lengths: argument to ``[count, ...]``.

    Embeddings where a mask is 0 are no zeros, as those of padding are not in most families.
    """
    family = FAMILIES[name]
    rng = np.random.default_rng(seed)
    drawn: dict[str, NDArray[Any]] = {}
    for argument, shape in family.columns.items():
        if argument in family.masks:
            # 1 more or less is another length, and never all: then some pipelines forget the mask.
            lengths = 3 + (rng.integers(shape[0]) + 5 * np.arange(count)) % (shape[0] - 4)
            mask = np.arange(shape[0]) < lengths[:, None]
            drawn[argument] = mask.astype(family.mask_type)
        else:
            drawn[argument] = rng.standard_normal((count, *shape), dtype=np.float32)
    return drawn


@lru_cache(maxsize=1)
def load(folder: Path, name: str) -> diffusers.DiffusionPipeline:
    """Load a model without its text encoders, with diffusers alone; the last one is kept."""
    family = FAMILIES[name]
    left_out = dict.fromkeys(family.encoders)
    pipeline = _class(family).from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def direct(
    folder: Path,
    name: str,
    columns: Columns,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None,
    size: int | tuple[int, int],
    negatives: Columns | None = None,
    **more: Any,
) -> list[NDArray[np.uint8]]:
    """Make images with diffusers alone: one call, one generator on the CPU an image.

    Parameters
    ----------
    columns : mapping
        What `records` returns, for as many records as there are `seeds`.
    guidance : float, optional
        None leaves the pipeline's own.
    size : int or (height, width)
        In pixels.
    negatives : mapping, optional
        Columns of one record or of as many as there are `seeds`.
    **more
        Arguments of the pipeline.

    Returns
    -------
    list of array
        uint8 ``[height, width, 3]``.
    """
    family = FAMILIES[name]
    height, width = (size, size) if isinstance(size, int) else size
    given = dict(family.call) | _arguments(family, columns, len(seeds))
    for argument, value in _arguments(family, negatives or {}, len(seeds)).items():
        given[f"negative_{argument}"] = value
    if guidance is not None:
        given[family.guidance] = guidance
    return pixels(
        load(folder, name)(
            **given | more,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=generators(seeds),
            output_type="np",
        ).images
    )


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a generator on the CPU for each image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(images: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    """Round images as diffusers does when it makes pictures of them."""
    assert np.isfinite(images).all()
    return list((images * 255).round().astype(np.uint8))


def _class(family: TinyFamily) -> type[diffusers.DiffusionPipeline]:
    return getattr(diffusers, family.pipeline_class)


def _arguments(family: TinyFamily, columns: Columns, count: int) -> dict[str, Any]:
    """Return columns as the pipeline takes them; one record's are repeated."""
    tensors = {
        argument: torch.tensor(values).expand(count, *values.shape[1:]).contiguous()
        for argument, values in columns.items()
    }
    if not family.ragged or not tensors:
        return tensors
    kept = tensors.pop(family.masks[0]).bool()
    return {
        argument: [row[mask] for row, mask in zip(rows, kept, strict=True)]
        for argument, rows in tensors.items()
    }


_TWO = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_THREE = (*_TWO, "text_encoder_3", "tokenizer_3")
_UNCHECKED = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
# The pipelines' own value of the first counts as given, and the second changes the size.
_BINNED = {"negative_prompt": None, "use_resolution_binning": False}


def _sequence(tokens: int, width: int, *, pooled: int = 0, mask: str = "") -> dict[str, Any]:
    columns: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, width)}
    if pooled:
        columns["pooled_prompt_embeds"] = (pooled,)
    if mask:
        columns[mask] = (tokens,)
    return columns


def _flux(name: str, *, guidance_embeds: bool) -> TinyFamily:
    build = partial(parts.flux, guidance_embeds=guidance_embeds)
    return TinyFamily(name, "FluxPipeline", build, _sequence(17, 4096, pooled=768), encoders=_TWO)


def _sdxl(name: str, build: Callable[[], dict[str, Any]]) -> TinyFamily:
    columns = _sequence(77, 2048, pooled=1280)
    return TinyFamily(name, "StableDiffusionXLPipeline", build, columns, encoders=_TWO)


def _klein(name: str, *, distilled: bool) -> TinyFamily:
    return TinyFamily(
        name,
        "Flux2KleinPipeline",
        partial(parts.flux2, 7680, guidance_embeds=False),
        _sequence(TOKENS, 7680),
        negatives=not distilled,
        options={"is_distilled": distilled},
    )


def _masked(
    name: str,
    pipeline_class: str,
    build: Callable[[], dict[str, Any]],
    tokens: int,
    width: int,
    mask: str = "prompt_attention_mask",
    **options: Any,
) -> TinyFamily:
    columns = _sequence(tokens, width, mask=mask)
    return TinyFamily(name, pipeline_class, build, columns, negatives=True, **options)


_LIST = [
    _flux("flux-dev", guidance_embeds=True),
    _flux("flux-schnell", guidance_embeds=False),
    TinyFamily(
        "sd",
        "StableDiffusionPipeline",
        partial(parts.sd, 768),
        _sequence(77, 768),
        negatives=True,
        options={"requires_safety_checker": False},
        encoders=_UNCHECKED,
    ),
    _sdxl("sdxl", partial(parts.sdxl, diffusers.EulerDiscreteScheduler)),
    _sdxl("sdxl-turbo", parts.sdxl_turbo),
    _sdxl("sdxl-lcm", partial(parts.sdxl, diffusers.LCMScheduler, time_cond_proj_dim=16)),
    TinyFamily(
        "sd3",
        "StableDiffusion3Pipeline",
        parts.sd3,
        _sequence(77 + TOKENS, 4096, pooled=2048),
        negatives=True,
        encoders=_THREE,
    ),
    TinyFamily(
        "flux2-dev",
        "Flux2Pipeline",
        partial(parts.flux2, 15360, guidance_embeds=True),
        _sequence(TOKENS, 15360),
    ),
    _klein("flux2-klein", distilled=True),
    _klein("flux2-klein-base", distilled=False),
    _masked(
        "pixart-alpha",
        "PixArtAlphaPipeline",
        partial(parts.pixart, conditions=True),
        120,
        4096,
        call=_BINNED,
    ),
    _masked(
        "pixart-sigma",
        "PixArtSigmaPipeline",
        partial(parts.pixart, conditions=False),
        TOKENS,
        4096,
        call=_BINNED,
    ),
    _masked("chroma", "ChromaPipeline", parts.chroma, TOKENS, 4096, mask_type="float32"),
    _masked("sana", "SanaPipeline", parts.sana, TOKENS, 2304, call=_BINNED),
    _masked("lumina2", "Lumina2Pipeline", parts.lumina2, TOKENS, 2304),
    _masked(
        "qwen-image",
        "QwenImagePipeline",
        parts.qwen,
        TOKENS,
        3584,
        "prompt_embeds_mask",
        guidance="true_cfg_scale",
    ),
    _masked("z-image", "ZImagePipeline", parts.zimage, TOKENS, 2560, ragged=True),
]

FAMILIES: dict[str, TinyFamily] = {family.name: family for family in _LIST}
"""A model of each family, and of what is otherwise in some, by name."""
