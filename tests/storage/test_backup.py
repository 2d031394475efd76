"""Copies of a store, made while it is written and brought up to date by repeating."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError
from fedgfe_store.storage import files


def contents(path: Path) -> dict[str, bytes]:
    selection = EmbeddingStore.open(path).select()
    t5 = selection.read("t5")
    return {str(key): t5[i].tobytes() for i, key in enumerate(selection.keys())}


@pytest.fixture
def elsewhere(monkeypatch):
    """As if the copy lay on another file system."""
    monkeypatch.setattr(files, "linked", lambda file, temporary: False)


@pytest.mark.usefixtures("elsewhere")
def test_a_backup_is_the_store_and_repeating_brings_what_is_new(store, tmp_path):
    copy = tmp_path / "deep" / "copy.zarr"
    fill(store, node=0, round=1)
    first = store.backup(copy)
    assert (first.commit, first.records, first.linked) == (1, 6, 0)
    assert contents(copy) == contents(store.path)
    assert EmbeddingStore.open(copy).id == store.id
    fill(store, node=0, round=2)
    store.delete(node=0, round=1, class_name="cat")
    before = {file: file.stat().st_ino for file in (copy / "t5").glob("c.*")}
    second = store.backup(copy)
    assert (second.commit, second.records) == (3, 9)
    assert second.nbytes < first.nbytes * 2
    assert {file: file.stat().st_ino for file in before} == before, "copied again"
    assert contents(copy) == contents(store.path)
    found = EmbeddingStore.open(copy).verify()
    assert (found.sound, found.leftovers) == (True, ())
    assert store.backup(copy).copied == 0
    store.compact()
    assert store.backup(copy).removed > 0
    assert EmbeddingStore.open(copy).verify().sound
    assert contents(copy) == contents(store.path)


def test_on_the_same_file_system_tensor_files_are_linked_and_live_their_own_life(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    fill(store, node=0, round=1)
    done = store.backup(copy)
    assert done.linked == len([f for n in SMALL.columns for f in (copy / n).glob("c.*")])
    kept = contents(copy)
    store.delete(node=0)
    store.compact()
    assert contents(copy) == kept
    opened = EmbeddingStore.open(copy)
    fill(opened, node=3, round=9)
    assert EmbeddingStore.open(copy).verify().sound
    assert len(EmbeddingStore.open(store.path)) == 0


def test_a_backup_never_takes_anything_away(store, tmp_path):
    fill(store, node=0, round=1)
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    fill(other, node=9, round=1)
    with pytest.raises(ConflictError, match="another store"):
        store.backup(other.path)
    copy = tmp_path / "copy.zarr"
    store.backup(copy)
    fill(EmbeddingStore.open(copy), node=5, round=5)
    fill(store, node=6, round=6)
    with pytest.raises(ConflictError, match="commits of its own"):
        store.backup(copy)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ConflictError, match=r"thesis\.tex"):
        store.backup(folder)
    with pytest.raises(ConflictError, match="one is in the other"):
        store.backup(store.path / "copy")
    with pytest.raises(ConflictError, match="a file is there"):
        store.backup(folder / "thesis.tex")


@pytest.mark.usefixtures("elsewhere")
def test_a_backup_that_was_broken_off_opens_as_before_and_goes_on(store, tmp_path, monkeypatch):
    copy = tmp_path / "copy.zarr"
    fill(store, node=0, round=1)
    real, calls = shutil.copyfileobj, [0, 0]

    def broken(source, out, length):
        calls[0] += 1
        if calls[0] == calls[1]:
            raise OSError(28, "No space left on device", out.name)
        real(source, out, length)

    monkeypatch.setattr(shutil, "copyfileobj", broken)
    for stop in (1, 5, 30):
        calls[:] = 0, stop
        with pytest.raises(OSError, match="No space left"):
            store.backup(copy)
        assert not (copy / "zarr.json").exists()
    calls[1] = 0
    store.backup(copy)
    kept = contents(copy)
    fill(store, node=0, round=2)
    store.delete(node=0, round=1)
    for stop in (1, 3, 9):
        calls[:] = 0, stop
        with pytest.raises(OSError, match="No space left"):
            store.backup(copy)
        assert contents(copy) == kept
        assert EmbeddingStore.open(copy).verify().sound
    calls[1] = 0
    store.backup(copy)
    assert contents(copy) == contents(store.path)


def test_a_merge_of_nothing_new_reads_no_tensor(store, tmp_path, reads):
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    for number in range(4):
        fill(store, node=0, round=number)
        fill(other, node=0, round=number)
    reads.clear()
    batch = store.merge(other)
    assert (batch.added, batch.skipped) == (0, 24)
    assert not [file for file in reads if file.startswith(("t5/", "clip/"))]
    fill(other, node=1, round=1)
    reads.clear()
    batch = store.merge(other)
    assert (batch.added, batch.skipped) == (6, 24)
    read = {file for file in reads if file.startswith(("t5/c.", "clip/c."))}
    assert read == {"t5/c.8.0.0", "t5/c.9.0.0", "clip/c.8.0", "clip/c.9.0"} | {
        file
        for file in read
        if file.endswith(".tmp")  # written here, not read
    }
    assert np.array_equal(store.select(node=1).read("t5"), other.select(node=1).read("t5"))


def test_a_merge_that_skips_looks_at_keys_alone_and_one_that_differs_is_refused(store, tmp_path):
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    fill(store, node=0, round=1)
    with other.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(3), **values(3, 77))
    with pytest.raises(ConflictError, match="with other tensors"):
        store.merge(other)
    assert store.merge(other, if_exists="skip").skipped == 3
    assert store.merge(other, if_exists="replace").replaced == 3
    assert np.array_equal(store.select(class_name="dog").read("t5"), values(3, 77)["t5"])


def test_a_batch_supersedes_what_it_does_not_add(store):
    fill(store, node=0, round=1)
    fill(store, node=0, round=2)
    tensors = values(3, 10_100)  # what `fill` gave the dogs of round 1
    with store.append(node=0, round=1, if_exists="replace", source="run 2") as batch:
        batch.supersede(node=0, round=1, split="train")
        batch.add(
            split="train", class_name="dog", index=[0], **{n: t[:1] for n, t in tensors.items()}
        )
        batch.add(split="train", class_name="dog", index=[1], **values(1, 5))
        batch.add(split="train", class_name="bird", index=[0], **values(1, 6))
    assert (batch.added, batch.replaced, batch.skipped, batch.removed) == (1, 1, 1, 4)
    keys = [(k.class_name, k.index) for k in store.select(round=1).keys()]
    assert sorted(keys) == [("bird", 0), ("dog", 0), ("dog", 1)]
    assert len(store.select(round=2)) == 6
    last = store.history().iloc[-1]
    assert (last["kind"], last["source"], last["added"], last["deleted"]) == (
        "replace",
        "run 2",
        2,
        5,
    )
    with store.append(node=0, round=2) as batch:
        batch.supersede(node=0, round=2, split="train")
    assert (batch.removed, len(store.select(round=2))) == (6, 0)
    with store.append(node=0, round=2) as batch:
        batch.supersede(node=0, round=2, split="train")
    assert (batch.removed, store.commit) == (0, 4)


def test_a_fork_leaves_its_parents_commit_alone(store):
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        batch._write(rest=True)
        child = os.fork()
        if not child:
            code = 1
            try:
                try:
                    batch.__exit__(ValueError, ValueError("x"), None)
                    batch.add(split="train", class_name="cat", index=0, **values(1))
                except ConflictError as error:
                    code = 0 if "fork" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(EmbeddingStore.open(store.path)) == 9
    assert store.verify().sound


def test_backup_on_the_command_line(store, tmp_path):
    fill(store, node=0, round=1)
    copy = tmp_path / "copy.zarr"
    done = CliRunner().invoke(group, ["--store", str(store.path), "backup", str(copy), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "6 records, commit 1" in done.output
    assert contents(copy) == contents(store.path)
