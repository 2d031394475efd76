"""A stand-in image model that says what it was given, and a small random FLUX."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from numpy.typing import NDArray

from fedgfe_store.generation.models import Model, resolve_model

SIZE = 32
NO_ENCODERS = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def save_random_flux(
    folder: Path, *, width: int = 8, clip: int = 4, guidance: bool = True, seed: int = 0
) -> Path:
    """Save a FLUX of random weights, whose pictures depend visibly on all that goes in."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=width,
        pooled_projection_dim=clip,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
        in_channels=16,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(2.0)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        **NO_ENCODERS,
    )
    pipeline.save_pretrained(folder)
    return folder


def load_flux(folder: Path, **options: object) -> FluxPipeline:
    """Load a model with diffusers alone, as the reference to compare with."""
    pipeline = FluxPipeline.from_pretrained(folder, **NO_ENCODERS, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def checksum(t5: NDArray[np.float32], clip: NDArray[np.float32], seed: int) -> bytes:
    """Three bytes that tell which embeddings and seed a picture was made from."""
    content = t5.tobytes() + clip.tobytes() + seed.to_bytes(8, "big")
    return zlib.crc32(content).to_bytes(4, "big")[:3]


class FakePipeline:
    """Paints each picture in the colour of the checksum of what it was conditioned on.

    The latents of the records numbered `bad_latents`, counted as they come, are NaN; so is what
    becomes of the colours `bad_pixels` as they are decoded.
    """

    columns = ("t5", "clip")

    def __init__(
        self,
        folder: Path,
        *,
        batches_per_swap: int = 1,
        bad_latents: Collection[int] = (),
        bad_pixels: Collection[bytes] = (),
    ) -> None:
        self.model: Model = resolve_model(str(folder))
        self.dtype, self.device, self.offload = "float32", "cpu", "none"
        self.batches_per_swap = batches_per_swap
        self.bad_latents, self.bad_pixels = bad_latents, bad_pixels
        self.calls: list[str] = []
        self.batch_sizes: list[int] = []
        self.inputs: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._seeds: list[int] = []

    def noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        self._seeds = list(seeds)
        return torch.zeros(len(seeds), 3)

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        latents: torch.Tensor,
        *,
        steps: int,
        guidance: float | None,
        height: int,
        width: int,
    ) -> torch.Tensor:
        self.calls.append("denoise")
        self.batch_sizes.append(len(latents))
        pairs = [(t5.numpy(), clip.numpy()) for t5, clip in zip(*embeddings.values(), strict=True)]
        result = torch.empty(len(latents), 3)
        for row, (seed, pair) in enumerate(zip(self._seeds, pairs, strict=True)):
            spoilt = len(self.inputs) in self.bad_latents
            self.inputs[seed] = pair
            result[row] = torch.nan if spoilt else torch.tensor(list(checksum(*pair, seed)))
        return result

    def decode(
        self, latents: torch.Tensor, height: int, width: int
    ) -> list[NDArray[np.uint8] | None]:
        self.calls.append("decode")
        pictures = []
        for colour in latents.numpy().astype(np.uint8):
            spoilt = colour.tobytes() in self.bad_pixels
            pictures.append(None if spoilt else np.tile(colour, (height, width, 1)))
        return pictures
