"""Delete, verify, compact, merge, history: what they change, and what they leave alone."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import zarr
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import (
    ConflictError,
    DamagedDataError,
    NotFoundError,
    SchemaMismatchError,
)


def contents(store: EmbeddingStore) -> dict[str, bytes]:
    selection = store.select()
    t5, clip = selection.read("t5"), selection.read("clip")
    return {str(key): t5[i].tobytes() + clip[i].tobytes() for i, key in enumerate(selection.keys())}


def test_delete_is_one_commit_and_the_past_stays(store):
    for round_ in (1, 2):
        fill(store, node=0, round=round_)
    reader = EmbeddingStore.open(store.path)
    assert store.delete(round=1, class_name="dog") == 3
    opened = EmbeddingStore.open(store.path)
    assert (opened.commit, len(opened), len(store), len(reader)) == (3, 9, 9, 12)
    assert len(opened.select(round=1, class_name="dog")) == 0
    past = EmbeddingStore.open(store.path, as_of=2)
    assert len(past.select(round=1, class_name="dog")) == 3
    assert np.array_equal(past.select().read("t5"), reader.select().read("t5"))


def test_delete_of_nothing_is_no_commit_and_needs_a_filter(store):
    fill(store, node=0, round=1)
    assert store.delete(round=7) == 0
    assert store.commit == 1
    with pytest.raises(SchemaMismatchError, match="at least one filter"):
        store.delete()
    with pytest.raises(SchemaMismatchError, match="round"):
        store.delete(round="1")


def test_delete_sees_what_others_wrote_since(store):
    fill(store, node=0, round=1)
    old = EmbeddingStore.open(store.path)
    fill(store, node=1, round=1)
    assert old.delete(round=1) == 12


def test_a_deleted_record_can_come_back(store):
    given = fill(store, node=0, round=1)
    store.delete(index=0)
    fill(store, node=0, round=1)
    assert len(store) == 6
    selection = store.select(index=0)
    for key, t5 in zip(selection.keys(), selection.read("t5"), strict=True):
        assert np.array_equal(t5, given[key.class_name, 0]["t5"])


def test_history_says_what_each_commit_did(store):
    fill(store, node=0, round=1)
    fill(store, node="server", round=2)
    store.delete(node=0, class_name="dog")
    with store.append(node=0, round=1, if_exists="replace") as batch:
        batch.add(split="train", class_name="cat", index=0, **values(1, 99))
    for _ in range(3):
        fill(store, node=7, round=store.commit, classes="dog", n=1)
    store.compact()
    table = store.history()
    assert table["commit"].tolist() == list(range(1, 9))
    assert table["kind"].tolist()[:5] == ["append", "append", "delete", "replace", "append"]
    assert table["kind"].iloc[-1] == "compact"
    assert table["added"].tolist() == [6, 6, 0, 1, 1, 1, 1, 0]
    assert table["deleted"].tolist() == [0, 0, 3, 1, 0, 0, 0, 0]
    assert table["records"].tolist() == [6, 12, 9, 9, 10, 11, 12, 12]
    assert table["nodes"].tolist()[:4] == [("0",), ("server",), ("0",), ("0",)]
    assert table["rounds"].tolist()[:4] == [(1,), (2,), (1,), (1,)]
    assert (table["bytes"] >= 0).all()
    assert table["bytes"].sum() > 0
    assert isinstance(table["time"].dtype, pd.DatetimeTZDtype)


def test_history_of_the_past(store):
    fill(store, node=0, round=1)
    fill(store, node=0, round=2)
    past = EmbeddingStore.open(store.path, as_of=1).history()
    assert past["records"].tolist() == [6]


def test_compact_gathers_small_commits_bit_for_bit(store):
    for round_ in range(9):
        fill(store, node=0, round=round_, classes="dog", n=1)
    before, recorded = contents(store), store.select().records["recorded_in"].tolist()
    files = len(list(store.path.glob("t5/c.*")))
    done = store.compact()
    assert (done.records_moved, files, len(list(store.path.glob("t5/c.*")))) == (9, 9, 3)
    assert done.files_freed == 18
    assert done.bytes_after < done.bytes_before
    opened = EmbeddingStore.open(store.path)
    assert contents(opened) == contents(store) == before
    assert opened.select().records["recorded_in"].tolist() == recorded
    assert opened.verify().sound


def test_compact_frees_files_of_the_dead_without_copying(store):
    fill(store, node=0, round=1, n=4)
    fill(store, node=0, round=2, n=4)
    store.delete(round=1)
    done = store.compact()
    assert (done.records_moved, done.files_freed) == (0, 4)
    assert len(store) == 8
    again = store.compact()
    assert (again.records_moved, again.files_freed) == (0, 0)
    assert again.bytes_before == again.bytes_after == done.bytes_after
    assert EmbeddingStore.open(store.path).commit == store.commit


def test_compact_converges(store):
    fill(store, node=0, round=1, n=5)
    commits = []
    for _ in range(3):
        store.compact()
        commits.append(store.commit)
    assert commits[1] == commits[2]


def test_a_reader_of_an_older_commit_is_told_to_refresh(store):
    for round_ in range(4):
        fill(store, node=0, round=round_, classes="dog", n=1)
    reader = EmbeddingStore.open(store.path)
    before = contents(reader)
    store.compact()
    with pytest.raises(NotFoundError, match="commit 4 was compacted away in commit 5; refresh"):
        reader.select().read("t5")
    with pytest.raises(NotFoundError, match="refresh"):
        EmbeddingStore.open(store.path, as_of=4).select().read("clip")
    reader.refresh()
    assert contents(reader) == before


def test_compact_refuses_to_copy_damage(store):
    for round_ in range(4):
        fill(store, node=0, round=round_, classes="dog", n=1)
    (store.path / "t5" / "c.2.0.0").unlink()
    with pytest.raises(DamagedDataError, match="round 2"):
        store.compact()
    opened = EmbeddingStore.open(store.path)
    assert opened.commit == 4
    assert opened.select(round=[0, 1, 3]).read("t5").shape == (3, 3, 8)


def test_compact_after_a_kill_between_commit_and_unlink(store, monkeypatch):
    for round_ in range(4):
        fill(store, node=0, round=round_, classes="dog", n=1)
    before = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr("fedgfe_store.storage.compact._files_of_the_dead", lambda snapshot: [])
        store.compact()
    assert len(list(store.path.glob("t5/c.*"))) == 5
    assert len(store.verify().leftovers) == 8
    done = EmbeddingStore.open(store.path).compact()
    assert (done.records_moved, done.files_freed) == (0, 8)
    assert contents(EmbeddingStore.open(store.path)) == before


def test_verify_names_the_damaged_and_repair_lets_them_come_back(store):
    fill(store, node=0, round=1, classes="dog", n=4)
    given = fill(store, node=3, round=9, classes="cat", n=4)
    assert store.verify().sound
    before = contents(store)
    (store.path / "t5" / "c.1.0.0").unlink()
    found = EmbeddingStore.open(store.path).verify()
    assert [str(d.key) for d in found.damaged] == [
        f"node 3, round 9, split train, class cat, index {i}" for i in range(4)
    ]
    assert all("missing" in damage.reason for damage in found.damaged)
    assert not found.sound
    repaired = EmbeddingStore.open(store.path)
    repaired.verify(repair=True)
    assert len(repaired) == 4
    assert repaired.verify().sound
    with repaired.append(node=3, round=9) as batch:
        for index in range(4):
            batch.add(split="train", class_name="cat", index=index, **given["cat", index])
    assert batch.added == 4
    assert contents(EmbeddingStore.open(store.path)) == before


def test_verify_reports_what_is_no_record(store):
    fill(store, node=0, round=1)
    (store.path / "clip" / "zarr.json").write_text("{")
    (store.path / "pending").write_text("{}")
    (store.path / "t5" / "c.9.0.0").write_bytes(b"x")
    (store.path / "node" / "c.0.abc.tmp").write_bytes(b"x")
    found = store.verify()
    assert not found.damaged
    assert len(found.problems) == 1
    assert "clip/zarr.json" in found.problems[0]
    assert len(found.leftovers) == 3
    fill(store, node=0, round=2)
    after = store.verify()
    assert after.sound
    assert after.leftovers == ()


@pytest.mark.parametrize("torn", [b"", b"{", "earlier"])
def test_metadata_that_a_power_cut_tore_is_found_and_mended(store, torn):
    fill(store, node=0, round=1)
    file = store.path / "clip" / "zarr.json"
    earlier = file.read_bytes()
    fill(store, node=0, round=2)
    file.write_bytes(earlier if torn == "earlier" else torn)
    read = EmbeddingStore.open(store.path).select(round=2).read("clip")
    assert np.array_equal(read, store.select(round=2).read("clip"))
    found = store.verify()
    assert [problem for problem in found.problems if "clip/zarr.json" in problem]
    assert len(found.problems) == 1
    repaired = store.verify(repair=True)
    assert repaired.sound
    assert repaired.mended == ("clip/zarr.json: written anew for other Zarr readers",)
    assert store.verify().sound
    assert store.commit == 2
    rows = json.loads(earlier)["shape"][0]
    assert zarr.open_array(store.path / "clip", mode="r").shape[0] == 2 * rows


@pytest.mark.parametrize("name", ["round", "created_in", "t5_digest", "extra"])
def test_verify_goes_on_over_damaged_key_columns(store, name):
    fill(store, node=0, round=1)
    (store.path / name / "c.0").unlink()
    found = EmbeddingStore.open(store.path).verify()
    assert not found.sound
    assert any(name in problem for problem in found.problems)


def test_merge_brings_sites_together(store, tmp_path):
    fill(store, node=0, round=1)
    other = EmbeddingStore.create(tmp_path / "b.zarr", SMALL)
    fill(other, node=1, round=1, n=7)
    fill(other, node=0, round=1)
    other.delete(node=1, index=0)
    batch = store.merge(other)
    assert (batch.added, batch.skipped, store.commit) == (12, 6, 2)
    opened = EmbeddingStore.open(store.path)
    ours, theirs = contents(opened), contents(EmbeddingStore.open(other.path))
    assert {key: ours[key] for key in theirs} == theirs
    left = opened.select(node=1).records.drop(columns="recorded_in")
    right = other.select(node=1).records.drop(columns="recorded_in")
    pd.testing.assert_frame_equal(left, right)


def test_merge_rounds_to_the_targets_precision(store, tmp_path):
    given = fill(store, node=0, round=1)
    schema = Schema.flux(3, width=8, clip=(4,), precision="bfloat16")
    target = EmbeddingStore.create(tmp_path / "b.zarr", schema)
    target.merge(store)
    with target.append(node=0, round=1) as batch:
        for (name, index), tensors in given.items():
            batch.add(split="train", class_name=name, index=index, **tensors)
    assert (batch.added, batch.skipped) == (0, 6)


def test_merge_refuses_conflicts_and_other_shapes(store, tmp_path):
    fill(store, node=0, round=1)
    other = EmbeddingStore.create(tmp_path / "b.zarr", SMALL)
    with other.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=[0, 99], **values(2, 5))
    with pytest.raises(ConflictError, match="index 0"):
        store.merge(other)
    assert EmbeddingStore.open(store.path).commit == 1
    assert store.merge(other, if_exists="replace").replaced == 1
    wide = EmbeddingStore.create(tmp_path / "c.zarr", Schema.flux(5, width=8, clip=(4,)))
    with pytest.raises(SchemaMismatchError, match=r"t5 \[3, 8\].*t5 \[5, 8\]"):
        store.merge(wide)


def test_merge_of_optional_audio(tmp_path):
    schema = Schema.flux(3, width=8, clip=(4,), audio=(2, 5), granule=4)
    source = EmbeddingStore.create(tmp_path / "a.zarr", schema)
    audio = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    with source.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=[0, 1], audio=audio, **values(2))
        batch.add(split="val", class_name="dog", index=[0], **values(1))
    target = EmbeddingStore.create(tmp_path / "b.zarr", schema)
    assert target.merge(source).added == 3
    assert target.select().records["has_audio"].tolist() == [True, True, False]
    assert np.array_equal(target.select(split="train").read("audio"), audio)
    assert target.merge(source).skipped == 3


def test_another_encoder_is_refused_with_both_fingerprints(store, tmp_path):  # cases.md d1
    from fedgfe_store import Metadata

    schema = Schema.flux(3, width=8, clip=(4,), metadata=Metadata(encoder="t5-xxl@1"))
    made = EmbeddingStore.create(tmp_path / "e.zarr", schema)
    with pytest.raises(SchemaMismatchError, match="'t5-xxl@1'.*'t5-small@2'"):
        made.append(node=0, round=0, encoder="t5-small@2")
    with made.append(node=0, round=0, encoder="t5-xxl@1") as batch:
        batch.add(split="train", class_name="dog", index=0, **values(1))
    assert batch.added == 1


def test_a_pickled_store_and_selection_read_the_same(store):
    fill(store, node=0, round=1)
    selection = store.select(class_name="dog")
    for original in (store.select(), selection):
        copy = pickle.loads(pickle.dumps(original))
        assert np.array_equal(copy.read("t5"), original.read("t5"))
    assert len(pickle.loads(pickle.dumps(store))) == 6


def test_the_past_cannot_be_changed(store):
    fill(store, node=0, round=1)
    past = EmbeddingStore.open(store.path, as_of=1)
    for change in (lambda: past.delete(round=1), past.compact, lambda: past.verify(repair=True)):
        with pytest.raises(SchemaMismatchError, match="as of commit 1"):
            change()
