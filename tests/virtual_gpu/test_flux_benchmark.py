"""`benchmarks/flux_gpu.py` with the tiny FLUX: every mode has its row, and no second is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from virtual_gpu.device import Cards

from benchmarks import card, flux_gpu

Rows = dict[tuple[str, str], dict[str, str]]


def run(folder: Path, *arguments: str) -> tuple[str, Rows]:
    """Give the title and the rows, by mode and loop."""
    output = folder / "table.md"
    common = ("--tiny", "--steps", "1", "--pixels", "32", "--tokens", "3", "--batch", "2")
    flux_gpu.main([*common, "--output", str(output), *arguments])
    title, _, *lines = output.read_text().splitlines()
    assert len({line[:60].rindex("|") for line in lines}) == 1, "columns line up"
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return title, {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.long
def test_every_mode_has_a_row_and_a_simulated_card_no_seconds(tmp_path: Path) -> None:
    title, rows = run(tmp_path)
    assert "SIMULATED" in title
    assert {mode for mode, _ in rows} == {mode.name for mode in flux_gpu.MODES}
    naive = {mode for mode, loop in rows if loop == "naive"}
    assert naive == {"none", "model", "group", "sequential", "fp8-cast", "nf4"}
    assert "bitsandbytes" in rows["nf4", "ours"]["remark"]
    ran = {key: row for key, row in rows.items() if key[0] != "nf4"}
    assert {(row["images/s"], row["idle"]) for row in ran.values()} == {("not seen", "not seen")}
    held = {key: float(row["GiB allocated"]) for key, row in ran.items()}
    assert held["none", "ours"] > held["sequential", "ours"] > 0
    assert all(float(row["GiB reserved"]) >= held[key] for key, row in ran.items())
    assert rows["group, resident", "ours"]["remark"] == "2 of 3 blocks stay"
    assert rows["auto", "ours"]["remark"] == "none"
    assert {row["batch"] for (_, loop), row in ran.items() if loop == "naive"} == {"1"}


def test_a_mode_that_does_not_fit_is_a_row_and_the_others_go_on(
    tmp_path: Path, cards: Cards
) -> None:
    cards.limit(0, 8)
    _, rows = run(tmp_path, "--mode", "none", "--mode", "sequential")
    assert rows["none", "ours"]["remark"].startswith("does not fit: ")
    assert rows["none", "naive"]["remark"].startswith("out of memory: CUDA out of memory")
    assert {row["images/s"] for (mode, _), row in rows.items() if mode == "none"} == {"-"}
    assert ("sequential", "naive") in rows


@pytest.mark.long
def test_on_the_cpu_images_a_second_are_measured(tmp_path: Path) -> None:
    title, rows = run(tmp_path, "--device", "cpu", "--mode", "none", "--mode", "group")
    assert "no card" in title
    assert "SIMULATED" not in title
    assert float(rows["none", "ours"]["images/s"]) > 0
    assert rows["none", "ours"]["idle"] == "-"
    assert rows["group", "ours"]["remark"].startswith("nothing to offload from")


def test_full_size_is_not_run_without_a_card() -> None:
    with pytest.raises(SystemExit, match="the card is simulated"):
        flux_gpu.main([])


def test_kernels_that_overlap_count_once_and_copies_not_at_all() -> None:
    events: list[dict[str, Any]] = [
        {"cat": "kernel", "ts": 10, "dur": 10},
        {"cat": "kernel", "ts": 0, "dur": 5},
        {"cat": "kernel", "ts": 12, "dur": 3},
        {"cat": "kernel", "ts": 18, "dur": 4},
        {"cat": "gpu_memcpy", "ts": 0, "dur": 100},
        {"name": "process_name", "ph": "M"},
    ]
    assert card.busy_microseconds(events) == 5 + 12


def test_weights_are_filled_in_place(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    shapes = {"a": (40, 50), "b": (3000,)}
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path
    )
    size = path.stat().st_size
    flux_gpu.fill_randomly(path, "cpu", "bfloat16")
    assert path.stat().st_size == size
    found = load_file(path)
    assert {name: tuple(values.shape) for name, values in found.items()} == shapes
    for values in found.values():
        assert 0.018 < values.float().std() < 0.022
