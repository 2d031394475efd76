"""Blocks that stay on the card while others move, weights in 8 bits, and what fits nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from virtual_gpu.cases import SIZE, Case, N, assert_like_cpu, render
from virtual_gpu.device import Cards

from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.blocks import Blocks
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement

SETTINGS = Settings("", "", "float32", 2, 3.5, 32, 32)


def blocks_of(model: Model) -> Blocks:
    stored = model.weights(model.part).tensors()
    return Blocks.of({name: 4 * numbers for name, (numbers, _) in stored.items()})


def images_of(case: Case, placement: Placement) -> np.ndarray:
    """Make two batches: from the second forward on blocks are fetched ahead."""
    images = DiffusersImages.load(resolve_model(str(case.model)), placement)
    made = []
    for first in (1, 3):
        latents = images.denoise(case.embeddings(2), [first, first + 1], SETTINGS)
        made += list(images.decode(latents, SETTINGS))
    return np.stack(made).astype(np.int16)  # type: ignore[arg-type]


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("quantization", [None, "fp8-cast"])
def test_resident_blocks_stay_and_the_images_are_the_same(
    case: Case, cards: Cards, pinned: bool, quantization: str | None
) -> None:
    model = resolve_model(str(case.model))
    sizes = blocks_of(model).sizes
    stay = tuple(sizes)[: len(sizes) // 2]
    expected = images_of(case, Placement("float32", "cpu", quantization=quantization))  # type: ignore[arg-type]
    placement = Placement(
        "float32",
        "cuda:1",
        "group",
        quantization=quantization,  # type: ignore[arg-type]
        resident=stay,
        pinned=pinned,
    )
    before = cards.late_copies
    assert abs(images_of(case, placement) - expected).max() <= 1
    assert cards.late_copies - before > 8, "the others come while these work"
    images = DiffusersImages.load(model, placement)
    network = images._denoiser
    here = {name for name, weights in network.named_parameters() if weights.is_cuda}
    assert {".".join(name.split(".")[:2]) for name in here} == set(stay)


def test_packed_weights_lie_on_the_card_and_give_the_cpus_images(
    flux_case: Case, cards: Cards
) -> None:
    pytest.importorskip("bitsandbytes", reason="nf4 takes bitsandbytes")
    expected = images_of(flux_case, Placement("float32", "cpu", quantization="nf4"))
    before = cards.taken(0)
    placement = Placement("float32", "cuda:1", quantization="nf4")
    assert abs(images_of(flux_case, placement) - expected).max() <= 1
    images = DiffusersImages.load(resolve_model(str(flux_case.model)), placement)
    weights = list(images._denoiser.parameters())
    assert {weight.device for weight in weights} == {torch.device("cuda:1")}
    assert torch.uint8 in {weight.dtype for weight in weights}
    assert cards.taken(0) == before


def test_weights_in_8_bits_take_less_and_are_other_settings(
    case: Case, cards: Cards, tmp_path: Path
) -> None:
    held = {}
    for name in (None, "fp8-cast"):
        placement = Placement("float32", "cuda:1", quantization=name)
        images = DiffusersImages.load(resolve_model(str(case.model)), placement)
        held[name] = cards.held(1)
        kinds = {weights.dtype for weights in images._denoiser.parameters()}
        assert (torch.float8_e4m3fn in kinds) == (name is not None)
        assert all(weights.is_cuda for weights in images._denoiser.parameters())
        del images
    assert held["fp8-cast"] < 0.75 * held[None]
    render(case, tmp_path, device="cuda:1")
    assert_like_cpu(case, tmp_path)
    options = {"steps": 2, "height": SIZE, "width": SIZE, "dtype": "float32", "device": "cuda:1"}
    with pytest.raises(ConflictError, match="quantization None -> fp8-cast"):
        generate(case.selection, tmp_path, model=str(case.model), quantize="fp8-cast", **options)  # type: ignore[arg-type]


def test_what_fits_nowhere_is_refused_before_anything_is_loaded(
    case: Case, cards: Cards, tmp_path: Path
) -> None:
    cards.limit(1, 200)
    before = cards.taken(1)
    with pytest.raises(SchemaMismatchError, match=r"expected 0\.3 GiB free on cuda:1") as caught:
        render(case, tmp_path, device="cuda:1", batch_size=None)
    assert "--offload sequential tries it nevertheless" in str(caught.value)
    assert cards.taken(1) == before
    report, _ = render(case, tmp_path, device="cuda:1", batch_size=None, offload="sequential")
    assert (report.done, report.failed) == (N, ())
    assert_like_cpu(case, tmp_path)
