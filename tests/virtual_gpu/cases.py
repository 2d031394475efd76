"""Small random models with records for them, and what the CPU makes of these."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from generation_fakes import NO_ENCODERS, save_random_flux, save_random_sd
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.selection import Selection

N = 6
SIZE = 64
HEAVY_RECORDS = 14
HEAVY: dict[str, Any] = {"steps": 1, "height": 32, "width": 32, "batch_size": 1}
"""How images of the model with heavy weights are made."""


@dataclass(frozen=True)
class Case:
    """A model, its records, and the folder of the images that the CPU made."""

    kind: str
    model: Path
    selection: Selection
    expected: Path

    def embeddings(self, images: int) -> dict[str, torch.Tensor]:
        """Give conditioning by the arguments of the pipeline."""
        generator = torch.Generator().manual_seed(1)
        if self.kind != "sd":
            return {
                "prompt_embeds": torch.randn(images, 5, 8, generator=generator),
                "pooled_prompt_embeds": torch.randn(images, 4, generator=generator),
            }
        return {
            "prompt_embeds": torch.randn(images, 77, 8, generator=generator),
            "negative_prompt_embeds": torch.randn(images, 77, 8, generator=generator),
        }


def make(root: Path, kind: str, *, records: int = N, **options: Any) -> Case:
    """Save a random FLUX or Stable Diffusion, and let the CPU make images with it."""
    if kind == "sd":
        schema, model = Schema.sd(77, width=8), save_random_sd(root / kind)
    else:
        save = save_random_flux if kind == "flux" else save_heavy_flux
        schema, model = Schema.flux(5, width=8, clip=(4,)), save(root / kind)
    store, rng = EmbeddingStore.create(root / f"{kind}.zarr", schema), np.random.default_rng(0)
    values = {
        name: rng.standard_normal((records, *shape), np.float32)
        for name, shape in schema.columns.items()
    }
    with store.append(node=0, round=5) as batch:
        batch.add(split="train", class_name="dog", index=range(records), **values)
    case = Case(kind, model, store.select(), root / f"{kind}-cpu")
    render(case, case.expected, device="cpu", **options)
    return case


def render(case: Case, folder: Path, **options: Any) -> tuple[GenerationReport, list[str]]:
    """Make a case's images anew; give the report and what was said."""
    remarks: list[str] = []
    shutil.rmtree(folder, ignore_errors=True)
    options = {"steps": 2, "height": SIZE, "width": SIZE, "dtype": "float32", **options}
    options = {"batch_size": 4, "model": str(case.model), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = generate(case.selection, folder, report=remarks.append, **options)
    return report, remarks


def assert_like_cpu(case: Case, folder: Path) -> None:
    """Compare all images with those of the CPU; batches of another size round otherwise."""
    expected = sorted(case.expected.glob("*.png"))
    assert len(expected) == len(case.selection)
    for path in expected:
        with Image.open(path) as one, Image.open(folder / path.name) as other:
            apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
        assert apart.max() <= 1, path.name


def save_heavy_flux(folder: Path) -> Path:
    """Save a FLUX whose weights take far more than its work: 95 MiB of denoiser, 34 of decoder."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=6,
        num_attention_heads=12,
        attention_head_dim=32,
        joint_attention_dim=8,
        pooled_projection_dim=4,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
        in_channels=16,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 16, 256),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline(scheduler, vae=vae, transformer=transformer, **NO_ENCODERS)
    pipeline.save_pretrained(folder)
    return folder
