"""Opening a store again, and key columns whose digest is that of the bytes in their file."""

from __future__ import annotations

import random

import google_crc32c
import numpy as np
import pytest
from conftest import SMALL, fill
from numcodecs.zstd import Zstd
from test_columns import rewritten

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage import key_files
from fedgfe_store.storage.layout import KEY_CHUNK, key_columns
from fedgfe_store.storage.zones import Zone, Zones

TEXTS = ["", "dog", "Straßenbahn", "犬", "🐕" * 5, "a\0b", "\0", "e\u0301", "x" * 300]
NUMBERS = [0, 1, -1, 2**31 - 1, 7, 7, 7, -5, 3]


def test_a_store_that_was_opened_before_is_read_again(store):
    fill(store, node=0, round=1)
    first = EmbeddingStore.open(store.path)
    fill(store, node=0, round=2)
    second = EmbeddingStore.open(store.path)
    assert (len(first), len(second)) == (6, 12)
    first.refresh()
    assert first.commit == second.commit == 2
    sound = (store.path / "zarr.json").read_bytes()
    (store.path / "zarr.json").write_bytes(sound.replace(b'"live": 12', b'"live": 11'))
    for _ in range(2):
        with pytest.raises(DamagedDataError, match="its checksum does not fit"):
            EmbeddingStore.open(store.path)
    (store.path / "zarr.json").write_bytes(sound)
    assert len(EmbeddingStore.open(store.path)) == 12


def test_a_store_is_opened_whatever_its_arrays_are_packed_with(store):
    """Metadata that is not as this release writes it is covered by the checksum as it stands."""
    fill(store, node=0, round=1)

    def other(ours, arrays):
        arrays["node"]["attributes"] = {"about": "Köln", "number": 1.0}

    rewritten(store.path, other)
    found = EmbeddingStore.open(store.path)
    assert len(found.select().records) == 6
    fill(found, node=0, round=2)
    assert len(EmbeddingStore.open(store.path).select().records) == 12


@pytest.mark.parametrize(
    ("name", "values"),
    [("class_name", TEXTS), ("index", NUMBERS), *(("node", [text] * 3) for text in TEXTS)],
)
def test_the_digest_of_a_file_is_that_of_the_values_that_are_asked_of_it(name, values):
    column = key_columns(SMALL)[name]
    array = np.array(values, column.dtype)
    contents = key_files.encode(column, array).contents
    for n in range(1, len(values) + 1):
        found = key_files.decoded(column, contents, n)
        assert found.values.tolist() == values[:n]
        assert found.digest == key_files.digest(column, array[:n])
        assert found.digest == key_files.encode(column, array[:n]).digest


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**32 - 1])
def test_a_text_that_is_longer_than_its_file_is_damage(size):
    column = key_columns(SMALL)["node"]
    packed = (KEY_CHUNK).to_bytes(4, "little") + size.to_bytes(4, "little") + b"\xffdog"
    data = Zstd().encode(packed)
    contents = data + google_crc32c.value(data).to_bytes(4, "little")
    for n in (1, 2, KEY_CHUNK):
        if size or n > 1:
            with pytest.raises((ValueError, RuntimeError)):
                key_files.decoded(column, contents, n)


def test_chunks_that_hold_a_round_are_found_as_by_looking_at_each():
    draw = random.Random(0)
    for _ in range(300):
        some = [draw.choices(range(12), k=2) for _ in range(6)]
        bounds = [(min(each), max(each)) for each in some]
        zones = Zones((), (*(Zone(a, b, None) for a, b in bounds), None, Zone(0, -1, 0)))
        ends = range(-3, 15)
        ranges = [
            range(draw.choice(ends), draw.choice(ends), draw.choice([1, 2, -1])) for _ in "ab"
        ]
        wanted = [*draw.choices(range(-2, 14), k=draw.randrange(3)), *ranges[: draw.randrange(3)]]
        numbers = {n for each in wanted for n in (each if isinstance(each, range) else [each])}
        found = zones.may_hold({"round": wanted})
        sure = [i for i, (a, b) in enumerate(bounds) if numbers & set(range(a, b + 1))]
        assert {*sure, 6} <= set(found) <= set(range(7))
        if all(abs(each.step) == 1 for each in ranges):
            assert found == [*sure, 6]
