"""Memory that is not enough: a line or a step down, never a traceback, and never other images."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pictures import provenance_of
from virtual_gpu.cases import Case, assert_like_cpu, render
from virtual_gpu.device import MIB, Cards

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models import devices
from fedgfe_store.models.placement import Offload

MODES: tuple[Offload, ...] = get_args(Offload)


@pytest.mark.parametrize(
    "mode",
    [mode if mode == "none" else pytest.param(mode, marks=pytest.mark.long) for mode in MODES],
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
