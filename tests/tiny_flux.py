"""The tiny FLUX through diffusers alone, as an oracle."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline

from fedgfe_store.models.tiny import TINY_FLUX, TINY_GUIDANCE, TINY_SIZE, TINY_STEPS


def load(dtype: torch.dtype | None = None) -> FluxPipeline:
    options = {} if dtype is None else {"dtype": dtype}
    pipeline = FluxPipeline.from_pretrained(
        str(TINY_FLUX),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render(pipeline, t5, clip, latents, *, steps: int = TINY_STEPS) -> list[np.ndarray]:
    """Call the ordinary pipeline on one batch; pictures as uint8 [64, 64, 3]."""
    dtype = pipeline.transformer.dtype
    images = pipeline(
        prompt_embeds=t5.to(dtype),
        pooled_prompt_embeds=clip.to(dtype),
        latents=latents.to(dtype),
        height=TINY_SIZE,
        width=TINY_SIZE,
        num_inference_steps=steps,
        guidance_scale=TINY_GUIDANCE,
    ).images
    return [np.asarray(image) for image in images]
