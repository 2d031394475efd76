"""Memory that is not enough: a line or a step down, never a traceback, and never other images."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pictures import provenance_of
from virtual_gpu.cases import Case, assert_like_cpu, make, render
from virtual_gpu.device import MIB, Cards

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models import choice, devices, fit
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.placement import Offload

MODES: tuple[Offload, ...] = get_args(Offload)


@pytest.mark.parametrize(
    "mode",
    [
        mode if mode in ("none", "group") else pytest.param(mode, marks=pytest.mark.long)
        for mode in MODES
    ],
)
def test_less_memory_makes_smaller_batches_and_the_same_images(
    flux_case: Case, cards: Cards, tmp_path: Path, mode: Offload
) -> None:
    options = {"device": "cuda:1", "offload": mode, "height": 128, "width": 128, "steps": 1}
    wide = replace(flux_case, expected=tmp_path / "cpu")
    render(wide, wide.expected, **{**options, "device": "cpu"})
    cards.empty()
    render(wide, tmp_path / "out", **options)
    full, smaller, refused = cards.peak(1, reserved=True), 0, 0
    for share in (0.8, 0.6):
        cards.empty()
        cards.limit(1, full * share / MIB)
        try:
            report, remarks = render(wide, tmp_path / "out", **options)
        except SchemaMismatchError as error:
            assert str(error).startswith("out of memory loading the model")
            refused += 1
            continue
        if report.failed:
            assert "out of memory" in report.failed[0].reason
            refused += 1
            continue
        assert_like_cpu(wide, tmp_path / "out")
        smaller += any(line.startswith("out of memory") for line in remarks)
        assert provenance_of(next((tmp_path / "out").glob("*.png")))["offload"] == mode
        gc.collect()
        assert cards.held(1) < MIB / 4, "nothing is left behind"
    assert smaller + refused


def test_what_a_user_asks_for_is_not_changed(flux_case: Case, cards: Cards, tmp_path: Path) -> None:
    def shrink(count: int) -> None:
        cards.limit(1, 0)

    options: dict[str, Any] = {"device": "cuda:1", "clear_cache_every": 1, "batch_size": 1}
    report, remarks = render(flux_case, tmp_path, **options, offload="none", progress=shrink)
    assert report.failed
    assert not any("offload" in line for line in remarks)
    assert report.failed[0].reason.startswith("out of memory")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_what_libraries_say_counts_as_lack_of_memory_where_it_is_short(
    cards: Cards, text: str
) -> None:
    error = RuntimeError(text)
    cards.limit(0, 512)
    assert devices.is_out_of_memory(error)
    cards.limit(0, 8192)
    assert not devices.is_out_of_memory(error)
    assert devices.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


ONE = {"steps": 1, "height": 32, "width": 32, "batch_size": 1}
WORK = 24 * MIB
RESERVE = 30 * MIB


@pytest.fixture(scope="module")
def heavy_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model of many weights and little work, as real ones are."""
    root = tmp_path_factory.mktemp("made")
    return make(root, "heavy", records=24, **ONE)


class Neighbour:
    """Another process on a card: how much it leaves from which batch on.

    Work on a batch takes `WORK` besides what a batch's tensors do.
    """

    def __init__(self, cards: Cards, leaves: dict[int, int]) -> None:
        self._cards, self._leaves = cards, leaves
        self.batches = 0
        self.modes: list[Offload] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = DiffusersImages.denoise

        def denoise(images: DiffusersImages, *given: Any, on_step: Callable[[], None]) -> Any:
            def step() -> None:
                torch.empty(WORK, dtype=torch.uint8, device="cuda:1")
                on_step()

            if (left := self._leaves.get(self.batches)) is not None:
                # It has what is free, and torch keeps for itself what work once took.
                torch.cuda.empty_cache()
                self._cards.limit(1, left)
                print("HELD", self._cards.held(1) / MIB, torch.cuda.memory_reserved(1) / MIB, left)
            made = real(images, *given, on_step=step)
            self.batches += 1
            self.modes.append(images.placement.offload)
            return made

        monkeypatch.setattr(DiffusersImages, "denoise", denoise)


def test_auto_gives_up_mode_after_mode_while_it_runs_and_takes_all_back(
    heavy_case: Case, cards: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fit, choice):
        monkeypatch.setattr(module, "RESERVE_BYTES", RESERVE)
    neighbour = Neighbour(cards, {2: 80, 4: 68, 6: 50, 7: 1024})
    neighbour.watch(monkeypatch)
    refused = cards.refusals(1)
    import time; t0=(time.process_time(), time.time())
    report, remarks = render(heavy_case, tmp_path, device="cuda:1", offload="auto", **ONE)
    print("CPU", time.process_time()-t0[0], time.time()-t0[1], remarks, neighbour.modes)
    assert (report.done, report.failed) == (24, ())
    assert_like_cpu(heavy_case, tmp_path)
    down = [f"out of memory: going on with offload {mode}" for mode in MODES[1:]]
    assert remarks == [*down, "memory is free again: going on with offload none"]
    runs = [(mode, len(list(same))) for mode, same in itertools.groupby(neighbour.modes)]
    assert runs == [("none", 2), ("model", 2), ("group", 2), ("sequential", 16), ("none", 2)]
    assert cards.refusals(1) - refused == 3
