"""What releases before format version 2 could do to a store, which a repair undoes."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import fill, values
from places import DATA

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.records import KEY_COLUMNS, NOTE_COLUMNS
from fedgfe_store.storage import key_files
from fedgfe_store.storage.checksums import row_digests
from fedgfe_store.storage.layout import key_columns
from fedgfe_store.storage.staging import Staging


@pytest.fixture
def old(tmp_path: Path) -> EmbeddingStore:
    path = tmp_path / "old.zarr"
    shutil.copytree(DATA / "federation_v1.zarr", path)
    return EmbeddingStore.open(path)


def rewrite(store: EmbeddingStore, name: str, values: np.ndarray) -> None:
    column = key_columns(store.schema)[name]
    file = key_files.key_file(store.path, name, 0)
    file.write_bytes(key_files.encode(column, values).contents)


def hurt_a_time(old: EmbeddingStore) -> None:
    """Give the third record a time that no reader takes, as earlier releases published it."""
    snapshot = EmbeddingStore.open(old.path)._snapshot
    rows = np.arange(snapshot.point.records)
    names = (*KEY_COLUMNS, *NOTE_COLUMNS)
    columns = {name: snapshot.column_at(name, rows).copy() for name in names}
    live = int(old.select().rows[2])
    columns["timestamp"][live] = 253_402_300_800_000  # datetime.max, as the old writer rounded it
    rewrite(old, "timestamp", columns["timestamp"])
    digests = snapshot.column_at("row_digest", rows).copy()
    digests[live] = row_digests(columns)[live]
    rewrite(old, "row_digest", digests)


@pytest.mark.parametrize("first", ["timestamp", "row_digest"])
def test_a_repair_of_times_that_was_broken_off_can_be_made_again(old, monkeypatch, first):
    hurt_a_time(old)

    def cut_off(staging: Staging, fence: object) -> None:
        for path, temporary in staging._waiting.items():
            if path.parent.name == first:
                temporary.rename(path)
        raise OSError("the power is cut")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "place", cut_off)
        with pytest.raises(OSError, match="the power is cut"):
            EmbeddingStore.open(old.path).verify(repair=True)
    assert not EmbeddingStore.open(old.path).verify().sound
    found = EmbeddingStore.open(old.path).verify(repair=True)
    assert found.sound
    assert found.mended == (f"{old.select().keys()[2]}: its time was one that no reader takes",)
    mended = EmbeddingStore.open(old.path)
    assert mended.verify().sound
    assert mended.select().keys() == old.select().keys()


def test_a_time_that_no_reader_takes_is_brought_to_one_that_all_take(old):
    hurt_a_time(old)
    hurt = EmbeddingStore.open(old.path)
    with pytest.raises(DamagedDataError, match="timestamp"):
        _ = hurt.select().records
    assert not hurt.verify().sound
    found = hurt.verify(repair=True)
    assert found.sound
    assert found.mended == (f"{old.select().keys()[2]}: its time was one that no reader takes",)
    mended = EmbeddingStore.open(old.path)
    times = mended.select().records["timestamp"]
    assert times[2] == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=9_223_372_036_854)
    expected = old.select().records["timestamp"].drop(2)
    assert times.drop(2).equals(expected)
    assert np.array_equal(mended.select().read("t5"), old.select().read("t5"))
    assert mended.history()["kind"].tolist()[-1] == "repair"
    assert mended.upgrade()


def test_marks_that_came_to_life_are_cleared(old):
    """As a copy read in an unlucky order was left by an append of the release before."""
    kinds = old.history()["kind"].tolist()
    last_append = max(i for i, kind in enumerate(kinds) if kind == "append") + 1
    deleted = old._snapshot.column("deleted_in").copy()
    victims = old.select(node=0, round=0).rows
    deleted[victims] = last_append
    rewrite(old, "deleted_in", deleted)
    hurt = EmbeddingStore.open(old.path)
    with pytest.raises(DamagedDataError, match="commit marks show"):
        len(hurt)
    found = hurt.verify(repair=True)
    assert found.sound
    assert found.mended == (f"{len(victims)} records had marks of a commit that was never made",)
    mended = EmbeddingStore.open(old.path)
    assert [str(k) for k in mended.select().keys()] == [str(k) for k in old.select().keys()]
    fill_again = mended.select().read("clip")
    assert np.array_equal(fill_again, old.select().read("clip"))


def test_other_damage_of_key_columns_is_not_touched(old):
    file = key_files.key_file(old.path, "timestamp", 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    hurt = EmbeddingStore.open(old.path)
    with pytest.raises(DamagedDataError):
        hurt.verify(repair=True).mended  # noqa: B018
        _ = hurt.select().records
    assert file.read_bytes() == bytes(data)


def test_a_copy_with_marks_beyond_its_commit_is_sound_and_stays_so(store, tmp_path):
    """What a live copy is that read ``zarr.json`` first: the next append must clear the marks."""
    for number in range(3):
        fill(store, node=0, round=number)
    before = (store.path / "zarr.json").read_bytes()
    store.delete(round=1)
    (store.path / "zarr.json").write_bytes(before)
    copy = EmbeddingStore.open(store.path)
    assert len(copy) == 18
    found = copy.verify()
    assert found.sound
    assert len(found.leftovers) == 1
    assert "marks of a commit that was never published" in found.leftovers[0]
    fill(copy, node=1, round=5)
    opened = EmbeddingStore.open(store.path)
    assert len(opened) == 24
    assert (opened.verify().sound, opened.verify().leftovers) == (True, ())


@pytest.mark.parametrize(
    "name", ["round", "node", "created_in", "deleted_in", "row_digest", "t5_digest"]
)
def test_chunks_of_a_key_column_that_changed_places_are_damage(tmp_path, monkeypatch, name):
    for module in ("layout", "commit", "key_chunks", "snapshot", "metadata", "key_files"):
        monkeypatch.setattr(f"fedgfe_store.storage.{module}.KEY_CHUNK", 8)
    monkeypatch.setattr("fedgfe_store.storage.verify.KEY_CHUNK", 8)
    from conftest import SMALL

    store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    for number in range(3):
        fill(store, node=number, round=number, classes="dog", n=8)
    store.delete(node=0, index=0)
    first, second = (store.path / name / f"c.{number}" for number in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    assert one != other
    first.write_bytes(other)
    second.write_bytes(one)
    hurt = EmbeddingStore.open(store.path)
    found = hurt.verify()
    assert not found.sound
    assert any(f"key column {name}" in problem for problem in found.problems)

    def look() -> None:
        hurt.select().counts("round", "node")
        hurt.history()
        selection = hurt.select(sample_id="train_1", round=1)
        _ = selection.records, selection.read("t5")

    with pytest.raises(DamagedDataError, match=f"key column {name}.*not what was committed there"):
        look()


def test_what_a_copy_brought_along_is_no_value_of_a_later_record(tmp_path):
    schema = Schema.flux(3, width=8, clip=(4,), granule=4, audio=(2, 3))
    store = EmbeddingStore.create(tmp_path / "a.zarr", schema)
    for number in (1, 2):
        before = (store.path / "zarr.json").read_bytes()
        audio = np.ones((4, 2, 3), np.float32)
        with store.append(node=0, round=number) as batch:
            batch.add(
                split="train", class_name="dog", index=range(4), audio=audio, **values(4, 0, schema)
            )
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy)
    (copy / "zarr.json").write_bytes(before)  # as a copy that reads it first
    fill(EmbeddingStore.open(copy), node=0, round=3, classes="dog", n=4)
    with xr.open_zarr(copy) as found:
        assert np.isfinite(found["audio"].values[:4]).all()
        assert np.isnan(found["audio"].values[4:]).all()
