"""Records in any order, in loaders with workers, with labels; and parts of a selection."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, fill, values
from processes import finished
from torch.utils.data import DataLoader, DistributedSampler

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import ConflictError, DamagedDataError, SchemaMismatchError


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Two nodes, two rounds, three classes with three samples each: 36 records."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for node in ("0", "server"):
        for number in (1, 5):
            fill(store, node=node, round=number, classes="dog cat bird")
    return EmbeddingStore.open(store.path)


def order_of(batches):
    return [key for batch in batches for key in batch.selection.keys()]


# Order


def test_shuffled_batches_are_a_permutation_and_hold_their_own_tensors(filled):
    selection = filled.select()
    batches = selection.batches(5, shuffle=True, seed=1)
    keys = order_of(batches)
    assert keys != selection.keys()
    assert sorted(keys) == sorted(selection.keys())
    assert [len(batch) for batch in batches] == [5] * 7 + [1]
    places = [selection.keys().index(key) for key in keys]
    found = torch.cat([batch["t5"] for batch in batches]).numpy()
    assert np.array_equal(found, selection.read("t5")[places])


def test_a_seed_fixes_the_order_and_an_epoch_changes_it(filled):
    def order(**options):
        return order_of(filled.select().batches(4, shuffle=True, **options))

    batches = filled.select().batches(4, shuffle=True, seed=7)
    first = order_of(batches)
    assert order_of(batches) == first == order(seed=7)
    assert order(seed=8) != first
    batches.set_epoch(1)
    assert order_of(batches) == order(seed=8)
    torch.manual_seed(0)
    one, two = order(), order()
    assert one != two
    torch.manual_seed(0)
    assert [order(), order()] == [one, two]
    # Any record may come first, wherever it lies in the store.
    firsts = {order(seed=seed)[0] for seed in range(60)}
    assert len(firsts) > 20


def test_a_last_small_batch_can_be_left_out(filled):
    batches = filled.select().batches(5, drop_last=True)
    assert [len(batch) for batch in batches] == [5] * 7
    assert len(batches) == len(DataLoader(batches, batch_size=None)) == 7
    assert list(filled.select(round=99).batches(5, drop_last=True, shuffle=True)) == []


@pytest.mark.parametrize(
    "options", [{"seed": 3}, {"shuffle": True, "seed": -1}, {"shuffle": True, "seed": 1.5}]
)
def test_a_seed_of_no_use_is_refused(filled, options):
    with pytest.raises(SchemaMismatchError, match="seed: expected a whole number from 0 up"):
        filled.select().batches(4, **options)


# Labels


def test_labels_are_places_among_the_classes_of_the_store(filled):
    assert filled.select().classes == ["bird", "cat", "dog"]
    dogs = filled.select(class_name=["dog", "bird"])
    assert dogs.classes == ["bird", "cat", "dog"]
    (batch,) = dogs.batches(100, labels=True)
    assert batch["label"].dtype == torch.int64
    names = [dogs.classes[number] for number in batch["label"].tolist()]
    assert names == dogs.records["class_name"].tolist()
    assert "label" not in next(iter(dogs.batches(4))).tensors


def test_negatives_are_of_no_class(store):
    fill(store, node=0, round=1)
    with store.append(node="text", round=0) as batch:
        batch.add(split="negative", class_name="negative", index=0, **values(1))
    assert store.select().classes == ["cat", "dog"]
    (batch,) = store.select(split=["train", "negative"]).batches(10, labels=True)
    assert sorted(set(batch["label"].tolist())) == [-1, 0, 1]


# Datasets


def test_a_dataset_gives_records_by_position(filled):
    selection = filled.select(round=5)
    dataset = selection.to_torch(labels=True, dtype=torch.bfloat16, columns=["clip"])
    assert len(dataset) == 18
    one = dataset[-1]
    assert sorted(one) == ["clip", "label"]
    assert torch.equal(one["clip"], torch.from_numpy(selection.read("clip")[-1]).bfloat16())
    assert len(list(dataset)) == 18
    with pytest.raises(IndexError):
        dataset[18]
    loader = DataLoader(selection.to_torch(), batch_size=7, shuffle=True)
    seen = torch.cat([batch["t5"] for batch in loader]).numpy()
    assert np.array_equal(np.sort(seen, 0), np.sort(selection.read("t5"), 0))


def test_a_batch_of_a_loader_is_one_read(filled, monkeypatch):
    dataset = filled.select().to_torch(columns=["clip"])
    asked: list[int] = []
    read = type(dataset._reader).read

    def counted(own, rows):
        asked.append(len(rows))
        return read(own, rows)

    monkeypatch.setattr(type(dataset._reader), "read", counted)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=3, rank=1, shuffle=False
    )
    sizes = [len(batch["clip"]) for batch in DataLoader(dataset, batch_size=5, sampler=sampler)]
    assert asked == sizes == [5, 5, 2]


# Where processes are spawned each imports torch anew.
@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_load_each_record_once(filled, how):
    script = Path(__file__).with_name("loading.py")
    done = finished([sys.executable, str(script), str(filled.path), how])
    told = json.loads(done.stdout)
    selection = filled.select()
    values = selection.read("t5")[:, 0, 0].tolist()
    labels = [selection.classes.index(name) for name in selection.records["class_name"]]
    everything = [list(pair) for pair in zip(labels, values, strict=True)]
    first, second = told["ranks"]
    assert len(first) == len(second) == 18
    assert sorted(first + second) == sorted(everything)
    places = {key: place for place, key in enumerate(selection.keys())}
    order = order_of(selection.batches(4, shuffle=True, seed=5))
    assert told["seeded"] == [everything[places[key]] for key in order]
    one, two = told["free"]
    assert sorted(one) == sorted(two) == sorted(everything)
    assert one != two


# Parts


def test_brackets_take(filled):
    selection = filled.select()
    frame = selection.records
    mask = frame["class_name"] == "dog"
    assert selection[mask].keys() == selection.take(mask).keys()
    assert selection[3:9:2].keys() == selection.keys()[3:9:2]
    assert selection[[5, -1]].keys() == [selection.keys()[5], selection.keys()[-1]]
    assert selection[np.int64(4)].keys() == [selection.keys()[4]]
    with pytest.raises(SchemaMismatchError, match="expected positions below 36, got 36"):
        selection[36]
    with pytest.raises(SchemaMismatchError, match=r"got 't5': read\('t5'\) reads a tensor column"):
        selection["t5"]
    with pytest.raises(TypeError, match="not iterable"):
        iter(selection)
    with pytest.raises(SchemaMismatchError, match=r"expected DataLoader\(selection\.to_torch"):
        next(iter(DataLoader(selection, batch_size=4)))


def test_select_narrows_in_the_records_order(filled):
    selection = filled.select(round=5)[::-1]
    narrow = selection.select(class_name=["dog", "cat"], index=range(2), node=0)
    frame = selection.records
    keep = frame.class_name.isin(["dog", "cat"]) & (frame["index"] < 2) & (frame.node == "0")
    assert narrow.keys() == selection.take(keep.to_numpy()).keys()
    assert len(selection.select(round=1)) == 0
    firsts = selection.select(per_class=1)
    assert {key.index for key in firsts.keys()} == {0}
    assert len(firsts) == 6
    assert len(selection.select()) == len(selection)
    with pytest.raises(SchemaMismatchError, match="round: expected whole numbers"):
        selection.select(round="x")


# Stores of parts


def test_a_part_becomes_a_store_of_its_own(filled, tmp_path):
    part = filled.select(node="0", class_name=["dog", "cat"])[[7, 3, 3, 0]]
    done: list[int] = []
    made = EmbeddingStore.create_from(tmp_path / "part.zarr", part, progress=done.append)
    assert (len(made), sum(done), made.commit) == (3, 4, 1)
    again = EmbeddingStore.open(tmp_path / "part.zarr")
    assert again.schema == filled.schema
    assert again.id != filled.id
    right = part[[0, 1, 3]]
    for name in SMALL.columns:
        assert again.select().read(name).tobytes() == right.read(name).tobytes()
    ours, theirs = again.select().records, right.records
    same = [name for name in theirs.columns if name != "recorded_in"]
    assert ours[same].equals(theirs[same])
    assert not again.verify().problems
    with pytest.raises(ConflictError):
        EmbeddingStore.create_from(tmp_path / "part.zarr", part)
    with pytest.raises(SchemaMismatchError, match="create_from: expected a selection"):
        EmbeddingStore.create_from(tmp_path / "no.zarr", filled)
    assert not (tmp_path / "no.zarr").exists()


def test_a_damaged_record_makes_no_store_of_some(store, tmp_path):
    fill(store, node=0, round=1)
    (store.path / "t5" / "c.1.0.0").unlink()
    with pytest.raises(DamagedDataError):
        store.select().to_store(tmp_path / "part.zarr")
    assert len(EmbeddingStore.open(tmp_path / "part.zarr")) == 0
