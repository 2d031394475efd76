"""What a run gives up and takes back as the device's memory changes: decided from sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline

from fedgfe_store import EmbeddingStore
from fedgfe_store.generation import room as rooms
from fedgfe_store.generation.prepare import Run, prepare
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.room import Room
from fedgfe_store.models import files
from fedgfe_store.models.fit import Footprint
from fedgfe_store.models.placement import Offload, Placement

MIB = 2**20
# What one image takes: 456 MiB under "none", 416 under "model", 362 under "group", 272 under
# "sequential".
NEEDED = Footprint(
    denoiser=150 * MIB, vae=40 * MIB, block=17 * MIB, denoising=10 * MIB, decoding=5 * MIB
)


class Moving(FakePipeline):
    """Notes where it is put; the modes in `refusing` find no room."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.placement = Placement("float32", "cuda:0")
        self.refusing: dict[Offload, Exception] = {}
        self.places: list[Placement] = []

    def place(self, placement: Placement) -> None:
        self.placement = placement
        self.places.append(placement)
        error = self.refusing.get(placement.offload)
        if error is not None and (placement.pinned or placement.offload != "group"):
            raise error


def replaced(run: Run, placement: Placement, mode: Offload, usable: int) -> Placement:
    """Keep what memory there is above what all blocks need that move."""
    stay = max(0, usable // MIB - 362) // 17 if mode == "group" else 0
    resident = tuple(f"blocks.{n}" for n in range(stay))
    return replace(placement, offload=mode, resident=resident, pinned=True)


class Bench:
    """A room, and the memory that it is told there is."""

    def __init__(self, run: Run, pipeline: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.usable, self.said, self.pipeline = 500 * MIB, list[str](), pipeline
        monkeypatch.setattr(rooms, "usable_bytes", lambda device: self.usable)
        monkeypatch.setattr(rooms, "clear_cache", lambda device: None)
        monkeypatch.setattr(Run, "replaced", replaced)
        run.__dict__["load"] = replace(run.load, footprint=lambda size: NEEDED)
        self.room = Room(run, pipeline, movable=True, report=self.said.append)

    @property
    def mode(self) -> str:
        return self.pipeline.placement.offload

    def batches(self, count: int) -> None:
        for _ in range(count):
            self.room.take_back()
            self.room.batch_done()


Made = Callable[..., Bench]


@pytest.fixture
def bench(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Make a bench for a run with options."""
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=5)

    def made(**options: Any) -> Bench:
        pipeline, request = Moving(flux), asked(**options)
        run = prepare(store.select(), tmp_path / "out", request, pipeline=pipeline)
        return Bench(run, pipeline, monkeypatch)

    return made


def asked(**options: Any) -> Request:
    return Request(**{"steps": 1, "height": SIZE, "width": SIZE, "batch_size": 4, **options})


def test_weights_step_down_as_far_as_memory_says_and_return_after_16_batches(bench: Made) -> None:
    it = bench()
    for usable, mode in ((430, "model"), (370, "group"), (300, "sequential")):
        it.usable = usable * MIB
        assert it.room.give_up_denoising(4)
        assert it.mode == mode
    assert it.room.batch == 4, "where one image would not have fitted no batch is halved"
    it.usable = 500 * MIB
    it.batches(16)
    assert it.mode == "sequential"
    it.batches(1)
    assert it.mode == "none"
    assert it.said == [
        "out of memory: going on with offload model",
        "out of memory: going on with offload group",
        "out of memory: going on with offload sequential",
        "memory is free again: going on with offload none",
    ]


def test_a_neighbour_that_comes_and_goes_moves_weights_once_in_16_batches(bench: Made) -> None:
    it = bench()
    for batch in range(64):
        it.usable = (500 if batch % 2 else 430) * MIB
        if it.mode == "none" and it.usable < 456 * MIB:
            assert it.room.give_up_denoising(1)
        it.batches(1)
    back = [each.offload for each in it.pipeline.places].count("none")
    assert 1 <= back <= 64 // 16
    assert len(it.pipeline.places) <= 2 * 64 // 16


def test_batches_and_slices_halve_and_return_with_memory_alone(bench: Made) -> None:
    it = bench(offload="none")
    it.usable = 460 * MIB
    assert it.room.give_up_denoising(4)
    assert it.room.give_up_denoising(2)
    assert it.room.give_up_decoding(4)
    assert (it.room.batch, it.room.slice) == (1, 2)
    it.batches(40)
    assert (it.room.batch, it.room.slice) == (1, 2), "there is no more memory than there was"
    it.usable = 500 * MIB
    it.batches(1)
    assert (it.room.batch, it.room.slice) == (4, 4)
    assert it.said[-1] == "memory is free again: going on in batches of 4"
    assert it.pipeline.places == [], "a mode that was asked for stays"


def test_blocks_leave_the_device_before_the_mode_changes_and_return(bench: Made) -> None:
    it = bench()
    it.usable = 410 * MIB
    assert it.room.give_up_denoising(1)
    assert (it.mode, len(it.pipeline.placement.resident)) == ("group", 2)
    it.pipeline.placement = replace(it.pipeline.placement, resident=("a", "b", "c"))
    it.usable = 380 * MIB
    it.room.give_up_denoising(1)
    assert (it.mode, len(it.pipeline.placement.resident)) == ("group", 1)
    it.usable = 412 * MIB
    it.batches(17)
    assert (it.mode, len(it.pipeline.placement.resident)) == ("group", 2)
    assert (
        it.said[-1] == "memory is free again: going on with offload group, 2 blocks on the device"
    )


def test_where_nothing_fits_by_estimate_one_mode_after_the_other_is_tried(bench: Made) -> None:
    it = bench()
    it.usable = 20 * MIB
    modes = []
    while it.room.give_up_denoising(1):
        modes.append(it.mode)
    assert modes == ["model", "group", "sequential"]
    assert it.room.remedy() == (
        "a smaller --height and --width or a GPU with more free memory may help"
    )


def test_a_mode_that_finds_no_room_is_passed_over(bench: Made) -> None:
    it = bench()
    it.pipeline.refusing["model"] = torch.OutOfMemoryError("CUDA out of memory.")
    it.usable = 430 * MIB
    assert it.room.give_up_denoising(1)
    assert it.mode == "group"


def test_blocks_wait_unpinned_where_the_host_has_no_memory_to_pin(bench: Made) -> None:
    it = bench()
    it.pipeline.refusing["group"] = RuntimeError("CUDA error: out of memory")
    it.usable = 370 * MIB
    assert it.room.give_up_denoising(1)
    assert (it.mode, it.pipeline.placement.pinned) == ("group", False)


def test_a_host_without_memory_is_told_as_such(bench: Made) -> None:
    it = bench()
    it.usable = 300 * MIB
    for mode in ("model", "group", "sequential"):
        it.pipeline.refusing[mode] = MemoryError()
    assert not it.room.give_up_denoising(1)
    expected = "more memory of the host (--mem under SLURM) or fewer processes on it may help"
    assert it.room.remedy() == it.room.decoding_remedy() == expected


@pytest.mark.parametrize(
    ("usable", "tiling", "expected"),
    [
        (430, False, "--offload model or group or sequential or --vae-tiling may help"),
        (300, True, "--offload sequential or a smaller --height and --width may help"),
        (200, False, "--vae-tiling may help"),
        (200, True, "a smaller --height and --width may help"),
    ],
)
def test_what_is_named_for_decoding_is_what_helps(
    bench: Made, usable: int, tiling: bool, expected: str
) -> None:
    it = bench(offload="none", vae_tiling=tiling)
    it.usable = usable * MIB
    while it.room.give_up_decoding(1):
        assert it.room.tiled
    assert it.room.decoding_remedy() == expected


def test_headers_of_weights_are_read_once_however_often_modes_are_weighed(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=1)
    pipeline = Moving(flux)
    run = prepare(store.select(), tmp_path / "out", asked(), pipeline=pipeline)
    monkeypatch.setattr(rooms, "usable_bytes", lambda device: MIB)
    monkeypatch.setattr(rooms, "clear_cache", lambda device: None)
    read: list[Path] = []
    tensors = files._tensors

    def noted(path: Path) -> Any:
        read.append(path)
        return tensors(path)

    monkeypatch.setattr(files, "_tensors", noted)
    room = Room(run, pipeline, movable=True, report=lambda line: None)
    while room.give_up_denoising(1):
        room.remedy()
    once = len(read)
    parts = [run.model.weights(part).files for part in ("transformer", "vae")]
    assert set(read) == {file for files in parts for file in files}
    for _ in range(3):
        room.remedy()
        room.decoding_remedy()
    assert len(read) == once <= 3
