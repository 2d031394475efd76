"""Stores that are packed in another way, or not at all: seen by other readers, and damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError, SchemaMismatchError
from fedgfe_store.schema import TensorColumn

RAW = Schema.flux(3, width=8, clip=(4,), granule=4, compression="none")
"""Of t5 and of clip a chunk holds four records, unless `one_record_a_chunk`."""


@pytest.fixture
def raw(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(tmp_path / "raw.zarr", RAW)


@pytest.fixture(params=[1, 2, 4])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Records of t5 in an inner chunk."""
    monkeypatch.setattr("fedgfe_store.schema._CHUNK_BYTES", request.param * 3 * 8 * 4)
    return request.param


def tensorstore_array(path: Path, name: str) -> tensorstore.TensorStore:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return tensorstore.open(spec, open=True).result()


def zarr_array(path: Path, name: str) -> zarr.Array:
    array = zarr.open_group(path, mode="r+")[name]
    assert isinstance(array, zarr.Array)
    return array


@pytest.mark.parametrize("compression", ["shuffle", "none"])
def test_other_readers_see_the_same_numbers(tmp_path, compression):
    columns = (
        TensorColumn("t5", (17, 64), ragged=True),
        TensorColumn("mask", (17,), dtype="bool"),
        TensorColumn("audio", (3, 5), optional=True),
    )
    schema = Schema.of("custom", *columns, compression=compression)
    path = EmbeddingStore.create(tmp_path / "s.zarr", schema).path
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((n, 64), dtype=np.float32) for n in rng.integers(1, 18, 70)]
    mask = rng.random((70, 17)) < 0.5
    for part in (slice(0, 37), slice(37, 70)):  # the second one opens anew, and is appended alike
        more = {"audio": np.ones((33, 3, 5), np.float32)} if part.start else {}
        with EmbeddingStore.open(path).append(node=0, round=part.start) as batch:
            n = len(given[part])
            batch.add(split="val", class_name="a", index=range(n), t5=given[part], **more,
                      mask=mask[part])  # fmt: skip
    store = EmbeddingStore.open(path)
    assert store.schema == schema.with_classes(["a"])
    assert store.verify().sound
    selection = store.select()
    padded = np.zeros((70, 17, 64), np.float32)
    for each, one in zip(padded, given, strict=True):
        each[: len(one)] = one
    assert np.array_equal(selection.read("t5"), padded)
    assert np.array_equal(selection.read("mask"), mask)
    assert np.isnan(selection.read("audio")).any(axis=(1, 2)).tolist() == [True] * 37 + [False] * 33
    for name in schema.columns:
        ours = selection.read(name)
        theirs = np.asarray(zarr_array(path, name)[:])[selection.rows]
        assert np.array_equal(theirs, ours, equal_nan=name == "audio")
        theirs = tensorstore_array(path, name)[selection.rows].read().result()
        assert np.array_equal(theirs, ours, equal_nan=name == "audio")


def test_any_rows_in_any_order_are_those_that_came(raw, chunk):
    given = fill(raw, node=0, round=1, n=5)
    selection = EmbeddingStore.open(raw.path).select()
    rng = np.random.default_rng(chunk)
    orders = [np.arange(10), np.arange(10)[::-1], [3], [5, 4], [1, 2, 3, 4, 5, 6], [2, 2, 2]]
    for order in [*orders, *(rng.integers(0, 10, 25) for _ in range(20))]:
        part = selection.take(np.array(order))
        expected = [given[key.class_name, key.index]["t5"] for key in part.keys()]
        assert np.array_equal(part.read("t5"), expected)


@pytest.mark.parametrize("writer", ["zarr", "tensorstore"])
def test_what_other_writers_leave_is_read_wherever_its_chunks_lie(raw, chunk, writer):
    fill(raw, node=0, round=1, n=5)
    expected = raw.select().read("t5")
    if writer == "zarr":
        array = zarr_array(raw.path, "t5")
        array[:] = np.asarray(array[:])
    else:
        target = tensorstore_array(raw.path, "t5")
        target.write(target.read().result()).result()
    assert np.array_equal(EmbeddingStore.open(raw.path).select().read("t5"), expected)
    assert EmbeddingStore.open(raw.path).verify().sound


def test_a_flipped_bit_is_an_error_that_names_the_record(raw, monkeypatch):
    monkeypatch.setattr("fedgfe_store.schema._CHUNK_BYTES", 3 * 8 * 4)
    path = EmbeddingStore.create(raw.path.parent / "one.zarr", RAW).path
    fill(EmbeddingStore.open(path), node=3, round=9, classes="dog")
    file = path / "t5" / "c.0.0.0"
    good = file.read_bytes()
    expected = EmbeddingStore.open(path).select().read("t5")
    named = 0
    for offset in range(0, len(good), 3):
        bad = bytearray(good)
        bad[offset] ^= 0x40
        file.write_bytes(bad)
        store = EmbeddingStore.open(path)
        try:
            read = store.select().read("t5")
        except DamagedDataError as error:
            assert "t5 of node 3, round 9, split train, class dog, index" in str(error)
            named += 1
        else:  # a checksum, which covers what the digest does
            assert np.array_equal(read, expected)
        if offset % 5 == 0:
            assert not store.verify().sound
    assert named > len(good) / 3 / 2


def test_a_file_that_is_cut_is_an_error_wherever(raw):
    fill(raw, node=3, round=9, classes="dog")
    file = raw.path / "t5" / "c.0.0.0"
    good = file.read_bytes()
    selection = EmbeddingStore.open(raw.path).select()
    for size in range(0, len(good), 5):
        file.write_bytes(good[:size])
        with pytest.raises(DamagedDataError, match="t5 of node 3, round 9"):
            selection.read("t5")


def test_a_file_that_is_cut_while_it_is_read_is_an_error(raw, monkeypatch):
    fill(raw, node=3, round=9, classes="dog")
    file = raw.path / "t5" / "c.0.0.0"
    preadv = os.preadv

    def cut_first(handle, memory, offset):
        os.truncate(file, 7)
        return preadv(handle, memory, offset)

    monkeypatch.setattr(os, "preadv", cut_first)
    with pytest.raises(DamagedDataError, match="t5 of node 3, round 9"):
        EmbeddingStore.open(raw.path).select().read("t5")


def test_a_disk_that_gives_a_few_bytes_at_a_time_is_asked_again(raw, chunk, monkeypatch):
    fill(raw, node=0, round=1, n=5)
    expected = raw.select().read("t5")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda h, memory, *at: preadv(h, [memory[0][:50]], *at))
    assert np.array_equal(EmbeddingStore.open(raw.path).select().read("t5"), expected)


@pytest.mark.parametrize(
    "entry", [(2**40, 388), (2**64 - 4, 388), (0, 2**63), (0, 3), (0, 384), (4, 388)]
)
def test_an_index_with_a_sound_checksum_is_still_not_trusted(raw, entry):
    fill(raw, node=0, round=1)
    file = raw.path / "t5" / "c.0.0.0"
    content = file.read_bytes()
    assert np.frombuffer(content[-20:-4], "<u8").tolist() == [0, 4 * 3 * 8 * 4 + 4]
    index = np.array([entry], "<u8").tolist()[0]
    sealed = np.array(index, "<u8").tobytes()
    file.write_bytes(content[:-20] + sealed + google_crc32c.value(sealed).to_bytes(4, "little"))
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1"):
        EmbeddingStore.open(raw.path).select().read("t5")


def test_only_what_was_chosen_is_said(tmp_path, raw):
    def said(store: EmbeddingStore) -> dict[str, object]:
        return json.loads((store.path / "zarr.json").read_text())["attributes"]["fedgfe_store"]

    usual = EmbeddingStore.create(tmp_path / "usual.zarr", SMALL)
    assert (said(usual)["features"], "compression" in said(usual)) == ([], False)
    assert (said(raw)["features"], said(raw)["compression"]) == (["compression"], "none")
    with pytest.raises(SchemaMismatchError, match="compression: expected bitshuffle, shuffle, no"):
        Schema.flux(compression=cast(Any, "zip"))


def test_a_shared_store_is_not_packed_either(tmp_path):
    store = EmbeddingStore.create(tmp_path / "many.zarr", RAW, shared=True)
    given = values(9, 1)
    with store.append(node=0, round=1) as batch:
        batch.add(split="val", class_name="a", index=range(9), **given)
    selection = EmbeddingStore.open(store.path).select()
    for name in RAW.columns:
        assert np.array_equal(selection.take(slice(None, None, -1)).read(name), given[name][::-1])
    assert (store.path / "t5" / "c.0.0.0").stat().st_size == 4 * 3 * 8 * 4 + 4 + 20
