"""FLUX: what is known of a model before it is loaded, and its pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.files import check_number, check_real, check_truth
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement, Sampling
from fedgfe_store.models.tiny import TINY_GUIDANCE, TINY_SIZE, TINY_STEPS
from fedgfe_store.schema import Schema

# Tensors of the model's width that a block holds at once per token: the residual, q, k, v with
# their rotated float32 copies, the four-fold hidden layer before and after its activation. Counted
# with one block of each kind of FLUX.1's under diffusers 0.42 they are 17.2 to 17.6 at 273 to 1,536
# tokens; kernels of attention have the rest.
_TENSORS_PER_TOKEN = 24
_SIZES = (
    "joint_attention_dim",
    "pooled_projection_dim",
    "num_attention_heads",
    "attention_head_dim",
)


class FluxModel(Model):
    """A FLUX model, such as FLUX.1-dev or a schnell-like one, which takes no guidance."""

    kind = "flux"
    pipeline_class = "FluxPipeline"
    part = "transformer"
    default_name = "black-forest-labs/FLUX.1-dev"
    columns = ("t5", "clip")
    encoder_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    encoder_classes: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale has an effect; schnell-like models have none."""
        return bool(self.denoiser["guidance_embeds"])

    @property
    def t5_width(self) -> int:
        """Features of a T5 token."""
        return int(self.denoiser["joint_attention_dim"])

    @property
    def clip_width(self) -> int:
        """Features of the pooled CLIP vector."""
        return int(self.denoiser["pooled_projection_dim"])

    @property
    def size_step(self) -> int:
        """Width of the square of pixels that one image token stands for."""
        return 2 * self.latent_scale

    @property
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for; like diffusers, 128 latents."""
        return TINY_SIZE if self.name == "tiny" else 128 * self.latent_scale

    @property
    def default_steps(self) -> int:
        """Denoising steps when none are asked for."""
        if self.name == "tiny":
            return TINY_STEPS
        return 28 if self.takes_guidance else 4

    @property
    def default_guidance(self) -> float | None:
        """Guidance scale when none is asked for; None if the model takes none."""
        if not self.takes_guidance:
            return None
        return TINY_GUIDANCE if self.name == "tiny" else 3.5

    @property
    def blocks(self) -> int:
        """Double and single blocks of the transformer."""
        return max(1, int(self.denoiser["num_layers"] + self.denoiser["num_single_layers"]))

    def denoising_values(self, tokens: int, height: int, width: int) -> int:
        """Numbers that one record's denoising holds at once besides the weights."""
        features = self.denoiser["num_attention_heads"] * self.denoiser["attention_head_dim"]
        sequence = tokens + height * width // self.size_step**2
        return int(sequence * features * _TENSORS_PER_TOKEN)

    def check_config(self) -> None:
        """Refuse models for filling and editing, whose transformers take more channels."""
        where = str(self.folder / self.part / "config.json")
        for key in (*_SIZES, "in_channels"):
            check_number(self.denoiser, key, where)
        for key in ("num_layers", "num_single_layers"):
            check_number(self.denoiser, key, where, least=0)
        check_truth(self.denoiser, "guidance_embeds", where)
        check_real(self.vae, "shift_factor", str(self.folder / "vae" / "config.json"))
        expected, got = 4 * self.vae["latent_channels"], self.denoiser["in_channels"]
        if got != expected:
            raise SchemaMismatchError(
                f"model {self.folder}: expected a text-to-image transformer of {expected} input "
                f"channels, got {got}"
            )

    def check_schema(self, schema: Schema) -> None:
        """Make sure that a store has T5 sequences and CLIP embeddings of the model's widths."""
        t5, clip = schema.columns.get("t5"), schema.columns.get("clip")
        fits = (
            t5 is not None
            and clip is not None
            and (len(t5), len(clip)) in ((2, 1), (2, 2))
            and (t5[-1], clip[-1]) == (self.t5_width, self.clip_width)
        )
        if not fits:
            raise SchemaMismatchError(
                f"embeddings for the model {self.name}: expected flux: t5 [tokens, "
                f"{self.t5_width}], clip [{self.clip_width}] or [tokens, {self.clip_width}], "
                f"got {schema.describe()}"
            )

    def load(self, placement: Placement) -> FluxImages:
        """Load transformer and decoder."""
        return FluxImages.load(self, placement)


class FluxImages(DiffusersImages):
    """FLUX through diffusers' own pipeline.

    Conditioning is ``t5`` ``[images, tokens, features]`` and ``clip`` ``[images, features]``;
    latents are packed, ``[images, image tokens, 4 x channels]``.
    """

    model: FluxModel
    left_out: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )

    def draw(self, generators: Sequence[torch.Generator], height: int, width: int) -> torch.Tensor:
        """Draw initial latents as `FluxPipeline` does from one generator an image."""
        channels = self.model.denoiser["in_channels"] // 4
        rows, columns = (2 * (n // self.model.size_step) for n in (height, width))
        drawn = [
            torch.randn((1, channels, rows, columns), generator=generator, dtype=torch.float32)
            for generator in generators
        ]
        packed: torch.Tensor = self._pipeline._pack_latents(
            torch.cat(drawn), len(drawn), channels, rows, columns
        )
        return packed

    def arguments(
        self, embeddings: Mapping[str, torch.Tensor], images: int, settings: Sampling
    ) -> dict[str, Any]:
        """Give the pipeline's own arguments; it would not notice a missing axis itself."""
        t5, clip = embeddings["t5"], embeddings["clip"]
        expected = (images, self.model.t5_width), (images, self.model.clip_width)
        if t5.ndim != 3 or (t5.shape[::2], tuple(clip.shape)) != expected:
            raise SchemaMismatchError(
                f"embeddings: expected t5 [{images}, tokens, {self.model.t5_width}] and clip "
                f"[{images}, {self.model.clip_width}], got {list(t5.shape)} and {list(clip.shape)}"
            )
        return {
            "prompt_embeds": t5,
            "pooled_prompt_embeds": clip,
            "guidance_scale": 1.0 if settings.guidance is None else settings.guidance,
        }

    def scaled(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Unpack latents and bring them to the decoder's scale."""
        pipeline, config = self._pipeline, self._pipeline.vae.config
        unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        scaled: torch.Tensor = unpacked / config.scaling_factor + config.shift_factor
        return scaled
