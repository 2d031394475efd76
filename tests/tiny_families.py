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
import torch
from numpy.typing import NDArray
from tiny_parts import (
    deep_compression,
    flow,
    kl,
    kl_of_flux2,
    kl_of_qwen,
    lively,
    unet,
)

Columns = Mapping[str, NDArray[Any]]
Parts = dict[str, Any]

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
        Argument of the pipeline to shape of a record. Of a `ragged` family the mask is none.
    masks : tuple of str
        Which of the columns are masks: 1 for each token that counts, then 0.
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
    build: Callable[[], Parts]
    columns: Mapping[str, tuple[int, ...]]
    masks: tuple[str, ...] = ()
    mask_type: str = "int64"
    ragged: bool = False
    negatives: bool = False
    guidance: str = "guidance_scale"
    call: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")


def save(name: str, folder: Path) -> Path:
    """Save a family's model as a checkpoint would lie there, in float32; the same one each time."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = family.build()
    pipeline = _class(family)(**parts, **dict.fromkeys(family.encoders), **family.options)
    pipeline.save_pretrained(folder)
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
    images = load(folder, name)(
        **given | more,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
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


def _flux(*, guidance_embeds: bool) -> Parts:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    return {"transformer": lively(transformer), "vae": kl(shift=0.1), "scheduler": flow()}


def _chroma() -> Parts:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return {"transformer": lively(transformer), "vae": kl(shift=0.1), "scheduler": flow()}


def _flux2(width: int, *, guidance_embeds: bool) -> Parts:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {"transformer": lively(transformer), "vae": kl_of_flux2(), "scheduler": flow()}


def _sd(width: int) -> Parts:
    beta = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **beta)
    denoiser = unet(cross_attention_dim=width, attention_head_dim=4)
    return {"unet": denoiser, "vae": kl(), "scheduler": scheduler}


def _sdxl(scheduler: Any, **options: Any) -> Parts:
    denoiser = unet(
        cross_attention_dim=2048,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=1280 + 6 * 8,
        **options,
    )
    beta = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return {"unet": denoiser, "vae": kl(), "scheduler": scheduler(**beta)}


def _turbo() -> Parts:
    parts = _sdxl(diffusers.EulerAncestralDiscreteScheduler)
    scheduler = parts["scheduler"]
    trailing = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    return parts | {"scheduler": trailing}


def _sd3() -> Parts:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return {
        "transformer": lively(transformer),
        "vae": kl(shift=0.1),
        "scheduler": flow(shift=3.0),
    }


def _pixart(*, conditions: bool) -> Parts:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=24,
        caption_channels=4096,
        use_additional_conditions=conditions,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return {"transformer": lively(transformer), "vae": kl(), "scheduler": scheduler}


def _sana() -> Parts:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
    )
    return {
        "transformer": lively(transformer),
        "vae": deep_compression(),
        "scheduler": flow(shift=3.0),
    }


def _lumina2() -> Parts:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=2304,
    )
    return {
        "transformer": lively(transformer),
        "vae": kl(shift=0.1),
        "scheduler": flow(shift=6.0),
    }


def _qwen() -> Parts:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
    )
    return {"transformer": lively(transformer), "vae": kl_of_qwen(), "scheduler": flow()}


def _zimage() -> Parts:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    return {
        "transformer": lively(transformer),
        "vae": kl(shift=0.1),
        "scheduler": flow(shift=3.0),
    }


_TWO = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_THREE = (*_TWO, "text_encoder_3", "tokenizer_3")
_MASK = ("prompt_attention_mask",)
_BINNED = {"negative_prompt": None, "use_resolution_binning": False}


def _masked(tokens: int, width: int, mask: str = _MASK[0]) -> dict[str, tuple[int, ...]]:
    return {"prompt_embeds": (tokens, width), mask: (tokens,)}


def _families() -> list[TinyFamily]:
    flux = {"prompt_embeds": (17, 4096), "pooled_prompt_embeds": (768,)}
    sdxl = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}
    sd3 = {"prompt_embeds": (77 + TOKENS, 4096), "pooled_prompt_embeds": (2048,)}
    klein = {"prompt_embeds": (TOKENS, 7680)}
    unchecked = {"requires_safety_checker": False}
    sd_parts = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    euler, lcm = diffusers.EulerDiscreteScheduler, diffusers.LCMScheduler
    return [
        TinyFamily(
            "flux-dev",
            "FluxPipeline",
            partial(_flux, guidance_embeds=True),
            flux,
            encoders=_TWO,
        ),
        TinyFamily(
            "flux-schnell",
            "FluxPipeline",
            partial(_flux, guidance_embeds=False),
            flux,
            encoders=_TWO,
        ),
        TinyFamily(
            "sd",
            "StableDiffusionPipeline",
            partial(_sd, 768),
            {"prompt_embeds": (77, 768)},
            negatives=True,
            options=unchecked,
            encoders=sd_parts,
        ),
        TinyFamily(
            "sdxl",
            "StableDiffusionXLPipeline",
            partial(_sdxl, euler),
            sdxl,
            encoders=_TWO,
        ),
        TinyFamily(
            "sdxl-turbo",
            "StableDiffusionXLPipeline",
            _turbo,
            sdxl,
            encoders=_TWO,
        ),
        TinyFamily(
            "sdxl-lcm",
            "StableDiffusionXLPipeline",
            partial(_sdxl, lcm, time_cond_proj_dim=16),
            sdxl,
            encoders=_TWO,
        ),
        TinyFamily(
            "sd3",
            "StableDiffusion3Pipeline",
            _sd3,
            sd3,
            negatives=True,
            encoders=_THREE,
        ),
        TinyFamily(
            "flux2-dev",
            "Flux2Pipeline",
            partial(_flux2, 15360, guidance_embeds=True),
            {"prompt_embeds": (TOKENS, 15360)},
        ),
        TinyFamily(
            "flux2-klein",
            "Flux2KleinPipeline",
            partial(_flux2, 7680, guidance_embeds=False),
            klein,
            options={"is_distilled": True},
        ),
        TinyFamily(
            "flux2-klein-base",
            "Flux2KleinPipeline",
            partial(_flux2, 7680, guidance_embeds=False),
            klein,
            negatives=True,
            options={"is_distilled": False},
        ),
        TinyFamily(
            "pixart-alpha",
            "PixArtAlphaPipeline",
            partial(_pixart, conditions=True),
            _masked(120, 4096),
            _MASK,
            negatives=True,
            call=_BINNED,
        ),
        TinyFamily(
            "pixart-sigma",
            "PixArtSigmaPipeline",
            partial(_pixart, conditions=False),
            _masked(TOKENS, 4096),
            _MASK,
            negatives=True,
            call=_BINNED,
        ),
        TinyFamily(
            "chroma",
            "ChromaPipeline",
            _chroma,
            _masked(TOKENS, 4096),
            _MASK,
            mask_type="float32",
            negatives=True,
        ),
        TinyFamily(
            "sana",
            "SanaPipeline",
            _sana,
            _masked(TOKENS, 2304),
            _MASK,
            negatives=True,
            call=_BINNED,
        ),
        TinyFamily(
            "lumina2",
            "Lumina2Pipeline",
            _lumina2,
            _masked(TOKENS, 2304),
            _MASK,
            negatives=True,
        ),
        TinyFamily(
            "qwen-image",
            "QwenImagePipeline",
            _qwen,
            _masked(TOKENS, 3584, "prompt_embeds_mask"),
            ("prompt_embeds_mask",),
            negatives=True,
            guidance="true_cfg_scale",
        ),
        TinyFamily(
            "z-image",
            "ZImagePipeline",
            _zimage,
            _masked(TOKENS, 2560, "prompt_embeds_mask"),
            ("prompt_embeds_mask",),
            ragged=True,
            negatives=True,
        ),
    ]


FAMILIES: dict[str, TinyFamily] = {family.name: family for family in _families()}
"""Every family's model by its name."""
