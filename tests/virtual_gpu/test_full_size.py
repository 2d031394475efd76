"""Models of full size: what the estimates say of them, and a card that is shared meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pictures import provenance_of
from PIL import Image
from virtual_gpu.device import Cards
from virtual_gpu.full_size import save_wide_flux

from benchmarks import full_size
from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import Settings, seed_of
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.fit import estimate_footprint
from fedgfe_store.models.placement import Placement
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection

N, SIZE, GIB = 32, 64, 1024


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_size.save("flux-dev", tmp_path_factory.mktemp("full") / "dev")


@pytest.fixture
def skipping(cards: Cards) -> Iterator[Cards]:
    with cards.skipping(scratch=50):
        cards.limit(1, 200 * GIB)
        yield cards


@pytest.mark.long
@pytest.mark.parametrize(("pixels", "tokens", "batch"), [(1024, 512, 1)])
def test_estimates_cover_what_is_taken(
    skipping: Cards, flux_dev: Path, pixels: int, tokens: int, batch: int
) -> None:
    model = resolve_model(str(flux_dev))
    images = DiffusersImages.load(model, Placement("bfloat16", "cuda:1"))
    weights = skipping.held(1)
    footprint = estimate_footprint(
        model, item_bytes=2, batch_size=batch, tokens=tokens, height=pixels, width=pixels
    )
    assert weights == pytest.approx(footprint.denoiser + footprint.vae, rel=0.01)
    settings = Settings("", "", "bfloat16", 1, 3.5, pixels, pixels)
    embeddings = {
        "prompt_embeds": torch.zeros(batch, tokens, 4096),
        "pooled_prompt_embeds": torch.zeros(batch, 768),
    }
    latents = images.denoise(embeddings, list(range(batch)), settings)
    assert 0.4 * footprint.denoising < skipping.peak(1) - weights < footprint.denoising
    skipping.empty()
    assert len(images.decode(latents, settings)) == batch
    assert 0.4 * footprint.decoding < skipping.peak(1) - weights < footprint.decoding
    del images, latents
    gc.collect()


@pytest.mark.long
def test_a_card_of_24_gib_of_which_another_process_takes_6_and_gives_them_back(
    cards: Cards, tmp_path: Path
) -> None:
    """All images, the right ones, with what was on the card when each was made."""
    model, selection = save_wide_flux(tmp_path / "wide"), records(tmp_path / "store.zarr")
    remarks: list[str] = []
    made = 0

    def share(count: int) -> None:
        nonlocal made
        made += count
        cards.limit(0, (18 if 6 <= made < 12 else 24) * GIB)

    cards.limit(0, 24 * GIB)
    with cards.skipping():
        report = generate(
            selection,
            tmp_path / "out",
            model=str(model),
            device="cuda:0",
            steps=1,
            height=SIZE,
            width=SIZE,
            batch_size=1,
            clear_cache_every=1,
            report=remarks.append,
            progress=share,
        )
    assert (report.done, report.failed) == (N, ())
    assert cards.refusals(0) > 0
    assert remarks == [
        "out of memory: going on with offload group",
        "memory is free again: going on with offload none",
    ]
    offloads = []
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.bfloat16)
    for key in selection.keys():
        path = tmp_path / "out" / image_name(key)
        offloads.append(provenance_of(path)["offload"])
        with Image.open(path) as image:
            apart = np.abs(np.asarray(image, np.int16) - decoded_noise(vae, seed_of(0, key)))
        assert apart.max() <= 4, (
            "bfloat16 has steps of two below 1, and layouts sum in other orders"
        )
    away = offloads.count("group")
    assert offloads == ["none"] * offloads.index("group") + ["group"] * away + ["none"] * (
        N - away - offloads.index("group")
    )
    assert 16 <= away < N - 6


def records(path: Path) -> Selection:
    store = EmbeddingStore.create(path, Schema.flux(4, width=64, clip=(16,)))
    rng = np.random.default_rng(0)
    with store.append(node=0, round=5) as batch:
        batch.add(
            split="train",
            class_name=["dog"] * N,
            index=range(N),
            t5=rng.standard_normal((N, 4, 64), np.float32),
            clip=rng.standard_normal((N, 16), np.float32),
        )
    return store.select()


@torch.no_grad()
def decoded_noise(vae: AutoencoderKL, seed: int) -> np.ndarray:
    """Decode noise with diffusers' decoder alone, on the CPU."""
    noise = torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    latents = noise.to(torch.bfloat16) / vae.config.scaling_factor + vae.config.shift_factor
    values = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).float()
    return (values.numpy() * 255).round().astype(np.int16)
