"""Stable Diffusion: what is known of a model before it is loaded, and its pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.files import check_number, check_numbers
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement, Sampling
from fedgfe_store.schema import Schema

# Feature maps at full latent resolution that the U-Net holds at once, skip connections included.
# Counted with Stable Diffusion 1.5's under diffusers 0.42 they are 26 in tensors at 32 and 64
# latents a side; attention of 8 heads over 64 x 64 is 102 where no kernel computes it in pieces.
_MAPS_PER_LATENT = 100


class StableDiffusionModel(Model):
    """A Stable Diffusion model, 1.x or 2.x: a U-Net under one CLIP sequence a record."""

    kind = "sd"
    pipeline_class = "StableDiffusionPipeline"
    part = "unet"
    default_name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    columns = ("clip",)
    encoder_parts = ("text_encoder", "tokenizer")
    encoder_classes: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel"}

    @property
    def clip_width(self) -> int:
        """Features of a CLIP token."""
        return int(self.denoiser["cross_attention_dim"])

    @property
    def size_step(self) -> int:
        """Pixels per latent, which the pipeline asks sizes to be multiples of."""
        return self.latent_scale

    @property
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for: what the U-Net was trained at."""
        return int(self.denoiser["sample_size"]) * self.latent_scale

    @property
    def default_steps(self) -> int:
        """Denoising steps when none are asked for."""
        return 50

    @property
    def default_guidance(self) -> float:
        """Guidance scale when none is asked for."""
        return 7.5

    def needs_negative(self, guidance: float | None) -> bool:
        """Whether guidance is free of a classifier: above 1, unless the U-Net embeds the scale."""
        embedded = self.denoiser.get("time_cond_proj_dim") is not None
        return guidance is not None and guidance > 1 and not embedded

    @property
    def blocks(self) -> int:
        """Blocks of the U-Net on its way down and up, and the one between."""
        return 2 * len(self.denoiser["block_out_channels"]) + 1

    def denoising_values(self, tokens: int, height: int, width: int) -> int:
        """Numbers that one record's denoising holds at once besides the weights, guided."""
        latents = height * width // self.latent_scale**2
        return int(2 * latents * self.denoiser["block_out_channels"][0] * _MAPS_PER_LATENT)

    def check_config(self) -> None:
        """Refuse models for filling and editing, whose U-Nets take more channels."""
        where = str(self.folder / self.part / "config.json")
        for key in ("cross_attention_dim", "sample_size", "in_channels"):
            check_number(self.denoiser, key, where)
        check_numbers(self.denoiser, "block_out_channels", where)
        expected, got = self.vae["latent_channels"], self.denoiser["in_channels"]
        if got != expected:
            raise SchemaMismatchError(
                f"model {self.folder}: expected a text-to-image U-Net of {expected} input "
                f"channels, got {got}"
            )

    def check_schema(self, schema: Schema) -> None:
        """Make sure that a store has CLIP sequences of the model's width."""
        clip = schema.columns.get("clip")
        if clip is None or len(clip) != 2 or clip[1] != self.clip_width:
            raise SchemaMismatchError(
                f"embeddings for the model {self.name}: expected sd: clip [tokens, "
                f"{self.clip_width}], got {schema.describe()}"
            )

    def load(self, placement: Placement) -> StableDiffusionImages:
        """Load U-Net and decoder."""
        return StableDiffusionImages.load(self, placement)


class StableDiffusionImages(DiffusersImages):
    """Stable Diffusion through diffusers' own pipeline, without safety checker.

    Conditioning is ``clip`` ``[images, tokens, features]`` and, where guidance needs it,
    ``negative`` of the same shape; latents are ``[images, channels, height / 8, width / 8]``.
    """

    model: StableDiffusionModel
    left_out: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
        ),
        "requires_safety_checker": False,
    }

    def draw(self, generators: Sequence[torch.Generator], height: int, width: int) -> torch.Tensor:
        """Draw initial latents as the pipeline does from one generator an image."""
        scale = self.model.latent_scale
        shape = (1, self.model.denoiser["in_channels"], height // scale, width // scale)
        drawn = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
        return torch.cat(drawn)

    def arguments(
        self, embeddings: Mapping[str, torch.Tensor], images: int, settings: Sampling
    ) -> dict[str, Any]:
        """Give the pipeline's own arguments; negative embeddings as many as positive ones."""
        clip, negative = embeddings["clip"], embeddings.get("negative")
        if clip.ndim != 3 or clip.shape[::2] != (images, self.model.clip_width):
            raise SchemaMismatchError(
                f"embeddings: expected clip [{images}, tokens, {self.model.clip_width}], "
                f"got {list(clip.shape)}"
            )
        wanted = list(clip.shape) if self.model.needs_negative(settings.guidance) else None
        got = None if negative is None else list(negative.shape)
        if got != wanted:
            raise SchemaMismatchError(
                f"negative embeddings under guidance {settings.guidance}: expected {wanted}, "
                f"got {got}"
            )
        return {
            "prompt_embeds": clip,
            "negative_prompt_embeds": negative,
            "guidance_scale": settings.guidance,
        }

    def scaled(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Bring latents to the decoder's scale."""
        scaled: torch.Tensor = latents / self._pipeline.vae.config.scaling_factor
        return scaled
