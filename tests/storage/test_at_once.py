"""Calls of many bytes, which are written from the caller's memory: no copy, and no difference."""

from __future__ import annotations

import errno
import tracemalloc
from typing import Any

import numpy as np
import pytest
from conftest import values

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import BusyError, ConflictError, SchemaMismatchError
from fedgfe_store.records import RecordBatch
from fedgfe_store.storage import append, ready, shard_files

GRANULE = 8


@pytest.fixture
def at_once(monkeypatch):
    """Let every call count as one of many bytes."""
    monkeypatch.setattr(append, "_AT_ONCE_BYTES", 1)


def schema(**options: Any) -> Schema:
    return Schema.flux(5, width=16, clip=(6,), audio=(3, 4), granule=GRANULE, **options)


def drawn(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"t5": (5, 16), "clip": (6,), "audio": (3, 4)}
    return {k: rng.standard_normal((n, *s), np.float32) for k, s in shapes.items()}


def put(batch: Any, first: int, tensors: dict[str, np.ndarray]) -> None:
    n = len(tensors["clip"])
    batch.add(split="train", class_name="dog", index=range(first, first + n), **tensors)


def contents(store: EmbeddingStore) -> dict[str, list[bytes]]:
    """Return the bytes of each record, by its key."""
    found = store.select()
    read = [found.read(name) for name in found.schema.columns]
    return {
        str(key): [values[i].tobytes() for values in read] for i, key in enumerate(found.keys())
    }


@pytest.mark.parametrize(
    ("precision", "compression"),
    [("float32", "bitshuffle"), ("float32", "none"), ("bfloat16", "bitshuffle")],
)
def test_what_is_written_at_once_is_what_is_written_later(
    tmp_path, monkeypatch, precision, compression
):
    sizes, given = (3, 37, 2, 20, 1), drawn(63)
    told = []
    for least in (1, 2**40):
        monkeypatch.setattr(append, "_AT_ONCE_BYTES", least)
        options = {"precision": precision, "compression": compression}
        store = EmbeddingStore.create(tmp_path / str(least), schema(**options))
        with store.append(node=0, round=0) as batch:
            first = 0
            for number, n in enumerate(sizes):
                some = {k: v[first : first + n] for k, v in given.items()}
                if number % 2:
                    del some["audio"]
                put(batch, first, some)
                first += n
        assert batch.added == len(store) == sum(sizes)
        assert EmbeddingStore.open(store.path).verify().sound
        told.append(contents(store))
    assert told[0] == told[1]


@pytest.mark.usefixtures("at_once")
def test_a_caller_may_use_its_memory_again(tmp_path):
    store, given = EmbeddingStore.create(tmp_path / "s", schema()), drawn(20)
    kept = {name: values.copy() for name, values in given.items()}
    # Not one after another in memory, and of another data type.
    given["t5"] = np.ascontiguousarray(given["t5"][::-1])[::-1]
    with store.append(node=0, round=0) as batch:
        put(batch, 0, given)
        for values in given.values():
            values[...] = np.nan
    for name, values in kept.items():
        assert np.array_equal(store.select().read(name), values)


@pytest.mark.usefixtures("at_once")
def test_a_call_that_is_refused_adds_nothing(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s", schema())
    wrong = drawn(9, 1)
    wrong["clip"][4, 2] = np.inf
    with store.append(node=0, round=0) as batch:
        put(batch, 0, drawn(9))
        with pytest.raises(SchemaMismatchError, match="index 13"):
            put(batch, 9, wrong)
        with pytest.raises(ConflictError, match="added twice"):
            put(batch, 8, drawn(9, 2))
        put(batch, 9, drawn(9, 3))
        put(batch, 9, drawn(9, 3))
    assert (batch.added, batch.skipped) == (18, 9)
    assert np.array_equal(store.select().read("t5")[9:], drawn(9, 3)["t5"])
    with pytest.raises(ConflictError, match="is in"), store.append(node=0, round=0) as batch:
        put(batch, 30, drawn(20, 4))
        put(batch, 0, drawn(9, 5))
    assert len(EmbeddingStore.open(store.path)) == 18
    assert store.verify().leftovers == ()


@pytest.mark.usefixtures("at_once")
def test_values_that_change_meanwhile_are_refused(tmp_path, monkeypatch):
    store = EmbeddingStore.create(tmp_path / "s", schema())
    given, new = drawn(20), ready.Seen.new

    def changed(seen: Any, records: Any) -> Any:
        given["t5"][17, 2, 3] += 1
        return new(seen, records)

    monkeypatch.setattr(ready.Seen, "new", changed)
    with (
        pytest.raises(ConflictError, match=r"t5 of .*index 17: its values changed"),
        store.append(node=0, round=0) as batch,
    ):
        put(batch, 0, given)
    assert len(EmbeddingStore.open(store.path)) == 0
    assert store.verify().leftovers == ()


@pytest.mark.usefixtures("at_once")
def test_a_block_that_lost_records_is_not_committed(tmp_path, monkeypatch):
    store = EmbeddingStore.create(tmp_path / "s", schema())
    write = shard_files.TensorFiles.write

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(ConflictError, match=r"could not be written.*No space left"),
        store.append(node=0, round=0) as batch,
    ):
        monkeypatch.setattr(shard_files.TensorFiles, "write", full)
        with pytest.raises(OSError, match="No space"):
            put(batch, 0, drawn(9))
        monkeypatch.setattr(shard_files.TensorFiles, "write", write)
        with pytest.raises(ConflictError, match="could not be written"):
            put(batch, 9, drawn(9, 1))
    assert len(EmbeddingStore.open(store.path)) == 0
    assert store.verify().leftovers == ()


def test_many_bytes_are_not_copied_and_few_do_not_keep_others_waiting(tmp_path):
    wide = Schema.flux(64, width=4096, clip=(6,), granule=4)
    store = EmbeddingStore.create(tmp_path / "s", wide)
    n = append._AT_ONCE_BYTES // wide.record_nbytes + 1
    t5, clip = np.ones((n, 64, 4096), np.float32), np.zeros((n, 6), np.float32)
    with store.append(node=0, round=0) as batch:
        put(batch, 0, {"t5": t5[:1], "clip": clip[:1]})
        EmbeddingStore.open(store.path).delete(round=9, timeout=0)  # the lock is free
        tracemalloc.start()
        try:
            put(batch, 1, {"t5": t5, "clip": clip})
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        with pytest.raises(BusyError):
            EmbeddingStore.open(store.path).delete(round=0, timeout=0)
    assert most < t5.nbytes / 2
    assert len(store) == n + 1


def test_many_small_calls_are_each_counted_once(store, monkeypatch):
    asked, nbytes = [0], vars(RecordBatch)["nbytes"].fget

    def counted(records: RecordBatch) -> int:
        asked[0] += 1
        return int(nbytes(records))

    monkeypatch.setattr(RecordBatch, "nbytes", property(counted))
    with store.append(node=0, round=1) as batch:
        for index in range(200):
            batch.add(split="train", class_name="dog", index=index, **values(1, index))
    assert asked[0] < 200 * 10
    assert len(EmbeddingStore.open(store.path)) == 200
