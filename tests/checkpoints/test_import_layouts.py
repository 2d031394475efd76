"""However tensors lie in a file, and whatever becomes of it meanwhile, its records are torch's."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy
import numpy as np
import pytest
import torch

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import import_checkpoints, read_checkpoint
from fedgfe_store.errors import DamagedDataError

COUNT = 23
"""Entries of a file: more than ten, so that the names of its members have different lengths."""
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _of_their_own(t5: torch.Tensor, clip: torch.Tensor) -> Pairs:
    return [(a.clone(), b.clone()) for a, b in zip(t5, clip, strict=True)]


def _backwards(t5: torch.Tensor, clip: torch.Tensor) -> Pairs:
    return list(zip(reversed(list(t5)), reversed(list(clip)), strict=True))


def _every_other(t5: torch.Tensor, clip: torch.Tensor) -> Pairs:
    wide = torch.stack([t5, t5 + 1], dim=1), torch.stack([clip, clip + 1], dim=1)
    return list(zip(wide[0][:, 0], wide[1][:, 1], strict=True))


def _one_for_all(t5: torch.Tensor, clip: torch.Tensor) -> Pairs:
    return [(t5[0], clip[0]) for _ in t5]


def _across(t5: torch.Tensor, clip: torch.Tensor) -> Pairs:
    turned = t5.transpose(1, 2).contiguous()
    return list(zip(turned.transpose(1, 2), clip, strict=True))


def _of_many_types(t5: torch.Tensor, clip: torch.Tensor) -> Pairs:
    types = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    return [(a.to(types[i % 4]), b) for i, (a, b) in enumerate(zip(t5, clip, strict=True))]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "made",
    [
        lambda t5, clip: list(zip(t5, clip, strict=True)),
        _of_their_own,
        _backwards,
        _every_other,
        _one_for_all,
        _across,
        _of_many_types,
    ],
    ids=["one_storage", "own", "backwards", "every_other", "one_for_all", "across", "many_types"],
)
def test_every_layout_of_tensors(
    tmp_path: Path, made: Callable[[torch.Tensor, torch.Tensor], Pairs], compression: int
) -> None:
    pairs = made(*legacy.tensors(COUNT))
    entries = [legacy.entry(t5, clip, i) for i, (t5, clip) in enumerate(pairs)]
    path = legacy.save(tmp_path, legacy.content(entries))
    if compression != zipfile.ZIP_STORED:
        _pack(path, compression)
    expected = torch.load(path, weights_only=True)["embeddings"] if not compression else entries
    assert import_checkpoints(tmp_path / "s.zarr", path).records == COUNT
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    for name in ("t5", "clip"):
        values = store.select().read(name)
        given = [entry[f"{name}_embedding"].float().numpy() for entry in expected]
        assert np.asarray(values).tobytes() == np.stack(given).tobytes()


def _pack(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_the_older_format_in_many_storages(tmp_path: Path) -> None:
    pairs = _of_their_own(*legacy.tensors(COUNT))
    entries = [legacy.entry(t5, clip, i) for i, (t5, clip) in enumerate(pairs)]
    path = legacy.save(tmp_path, legacy.content(entries), _use_new_zipfile_serialization=False)
    import_checkpoints(tmp_path / "s.zarr", path)
    values = EmbeddingStore.open(tmp_path / "s.zarr").select().read("t5")
    assert np.asarray(values).tobytes() == torch.stack([t5 for t5, _ in pairs]).numpy().tobytes()


def test_entries_outlive_their_file(tmp_path: Path) -> None:
    path, expected = legacy.node_file(tmp_path)
    entries = list(read_checkpoint(path).entries)
    path.write_bytes(bytes(path.stat().st_size))
    for entry in entries:
        assert entry.t5 is not None
        assert torch.equal(entry.t5, expected["dog", entry.index][0])


@pytest.mark.parametrize("replaced", [False, True], ids=["in_place", "by_another_file"])
@pytest.mark.parametrize("new_only", [False, True])
def test_a_file_written_anew_while_the_one_before_is_imported(
    tmp_path: Path, replaced: bool, new_only: bool
) -> None:
    folder = tmp_path / "vegas"
    for number in (1, 2, 3):
        legacy.node_file(folder, round=number, seed=number)
    other, expected = legacy.node_file(tmp_path, round=2, seed=20)

    def write_the_next(report: Any) -> None:
        if report.round != 1:
            return
        if replaced:
            other.replace(folder / other.name)
            return
        # Not cut short first, which would be the end of who has it mapped.
        with (folder / other.name).open("r+b") as file:
            file.write(other.read_bytes())

    report = import_checkpoints(
        tmp_path / "s.zarr", folder, new_only=new_only, on_file=write_the_next
    )
    assert [(file.records, file.error) for file in report.files] == [(3, None)] * 3
    values = EmbeddingStore.open(tmp_path / "s.zarr").select(round=2).read("t5")
    given = [t5.numpy() for t5, _ in expected.values()]
    assert np.asarray(values).tobytes() == np.stack(given).tobytes()
    again = import_checkpoints(tmp_path / "s.zarr", folder, new_only=True)
    assert [file.known for file in again.files] == [True] * 3


def test_a_file_that_fails_does_not_stop_the_ones_before_and_after(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        legacy.node_file(tmp_path, round=number)
    path = tmp_path / "node_0_embeddings_r2.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    assert [file.records for file in report.files] == [3, 0, 3]
    assert "cut short or damaged" in str(report.files[1].error)
    stopped = import_checkpoints(tmp_path / "other.zarr", tmp_path, fail_fast=True)
    assert [file.records for file in stopped.files] == [3, 0]


def test_a_file_written_in_place_while_it_is_imported_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = legacy.node_file(tmp_path)
    data = path.read_bytes()
    read = EmbeddingStore.append

    def append(self: EmbeddingStore, **options: Any) -> Any:
        path.write_bytes(data)  # the same bytes at another time: nobody can tell
        return read(self, **options)

    monkeypatch.setattr(EmbeddingStore, "append", append)
    report = import_checkpoints(tmp_path / "s.zarr", path).files[0]
    assert "changed while it was being read" in str(report.error)
    monkeypatch.undo()
    assert len(EmbeddingStore.open(tmp_path / "s.zarr")) == 0
    assert import_checkpoints(tmp_path / "s.zarr", path).records == 3


def test_a_file_that_goes_while_it_is_read_was_there(tmp_path: Path) -> None:
    path, expected = legacy.node_file(tmp_path)
    checkpoint = read_checkpoint(path)
    entries = []
    for entry in checkpoint.entries:
        path.unlink(missing_ok=True)
        entries.append(entry)
    assert len(entries) == len(expected)
    with pytest.raises(DamagedDataError):
        list(checkpoint.entries)
