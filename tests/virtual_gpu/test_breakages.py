"""Faults that are put in on purpose: each is found, so the other tests here can fail."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from virtual_gpu.cases import Case, N, assert_like_cpu, render
from virtual_gpu.device import MIB, Cards

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models import devices, offload
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.offload import Swap
from fedgfe_store.models.placement import Placement


def make(case: Case, folder: Path, mode: str, **options: Any) -> None:
    """What a sound run does: every image, and the CPU's."""
    report, _ = render(case, folder, device="cuda:1", offload=mode, **options)
    assert (report.done, report.failed) == (N, ())
    assert_like_cpu(case, folder)


def test_blocks_that_nobody_waits_for(
    flux_case: Case, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: None)
    with pytest.raises(AssertionError, match="infinity"):
        make(flux_case, tmp_path, "group")
    assert cards.pending
    cards.drop_pending()


def test_pixels_that_nobody_waits_for(
    flux_case: Case, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    with pytest.raises(AssertionError):
        make(flux_case, tmp_path, "none", batch_size=N)
    cards.drop_pending()


def test_noise_that_stays_on_the_host(
    flux_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        DiffusersImages, "_at_home", lambda images, value, column=None: value.to(images._dtype)
    )
    with pytest.raises(SchemaMismatchError, match="all tensors to be on the same device"):
        make(flux_case, tmp_path, "none")


def test_weights_on_another_card(
    flux_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedgfe_store.models.diffusers.Swap",
        lambda parts, put: Swap(parts, lambda tensor: tensor.to("cuda:0")),
    )
    with pytest.raises(SchemaMismatchError, match="all tensors to be on the same device"):
        make(flux_case, tmp_path, "model")


def test_a_swap_that_leaves_weights_behind(
    flux_case: Case, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(flux_case, tmp_path, "model")
    peak = cards.peak(1)
    cards.empty()
    monkeypatch.setattr(Swap, "_send_home", lambda swap, name: None)
    make(flux_case, tmp_path, "model")
    assert cards.peak(1) > peak + MIB / 16


def test_latents_that_are_kept(
    flux_case: Case, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, decode = [], DiffusersImages.decode

    def keeping(images: DiffusersImages, latents: torch.Tensor, *rest: Any, **more: Any) -> Any:
        kept.append(latents)
        return decode(images, latents, *rest, **more)

    monkeypatch.setattr(DiffusersImages, "decode", keeping)
    make(flux_case, tmp_path, "none")
    gc.collect()
    assert cards.held(1) > 0
    kept.clear()
    gc.collect()
    assert cards.held(1) == 0


def test_a_lack_of_memory_that_nobody_recognizes(
    flux_case: Case, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgfe_store.generation.denoise.is_out_of_memory", lambda error: False)
    cards.limit(1, 4)
    with pytest.raises(torch.OutOfMemoryError):
        make(flux_case, tmp_path, "sequential", height=256, width=256)


def test_hooks_that_stay(flux_case: Case, cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    images = DiffusersImages.load(
        resolve_model(str(flux_case.model)), Placement("float32", "cuda:1", "group")
    )
    weights = cards.held(1)
    monkeypatch.setattr(offload, "_GROUP_HOOKS", ())
    images.place(Placement("float32", "cuda:1", "none"))
    assert cards.held(1) == weights, "diffusers does not move them"
    monkeypatch.undo()
    images.place(Placement("float32", "cuda:1", "none"))
    assert cards.held(1) > 2 * weights


def test_a_device_without_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "str", lambda device: device.type, raising=False)
    assert devices.choose_device("cuda:1") != "cuda:1"
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device(devices.choose_device("cuda:1")))
