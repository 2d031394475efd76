"""Means and walks as tensors: numpy's and scipy's numbers, read lazily, in bounded memory."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, fill, values
from scipy.spatial import geometric_slerp

from fedgfe_store import EmbeddingStore, Schema, Selection, walk
from fedgfe_store.derived.again import derive
from fedgfe_store.derived.walk import between
from fedgfe_store.derived_keys import Key, MeanKey, WalkKey
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.names import image_name, key_json, read_key
from fedgfe_store.records import RecordKey
from fedgfe_store.schema import TensorColumn

NO_MODE: Any = "cubic"


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    for node in (0, "server"):
        for number in (1, 20):
            fill(store, node=node, round=number)
    return store


def one(store: EmbeddingStore, **keys: Any) -> Selection:
    return store.select(**{"node": 0, "round": 1, "class_name": "dog", "index": 0, **keys})


def test_means_are_numpys_in_float64(store: EmbeddingStore) -> None:
    means = store.select(round=20).mean(by=["node", "class_name"])
    assert [str(key) for key in means.keys()] == [
        "mean of node 0, round 20, cat",
        "mean of node 0, round 20, dog",
        "mean of server, round 20, cat",
        "mean of server, round 20, dog",
    ]
    assert means.records["sources"].tolist() == [3] * 4
    assert means.records["split"].tolist() == [None] * 4
    for key, found in zip(means.keys(), means.read("t5"), strict=True):
        chosen = store.select(node=key.value("node"), round=20, class_name=key.value("class_name"))
        expected = chosen.read("t5").mean(axis=0, dtype=np.float64).astype(np.float32)
        np.testing.assert_array_equal(found, expected)
    picked = means.take([2, 0]).read("clip")
    np.testing.assert_array_equal(picked, means.read("clip")[[2, 0]])


def test_nothing_is_read_before_it_is_asked_for(store: EmbeddingStore, reads: list[str]) -> None:
    opened = EmbeddingStore.open(store.path)
    means = opened.select().mean(by=["class_name", "round"])
    frames = walk(means.take([0]), means.take([1]), 7)
    assert len(means.records) == 4
    assert len(frames.records) == 7
    assert not [name for name in reads if name.startswith(("t5/", "clip/"))]
    frames.take([3]).read("t5")
    assert [name for name in reads if name.startswith("t5/")]


def test_a_group_is_named_alike_however_it_was_asked_for(store: EmbeddingStore) -> None:
    """So that one image is not made twice, and none takes another's place."""
    asked = [
        store.select(round=20).mean(by=["class_name"]),
        store.select(round=[20], class_name=["dog", "cat"]).mean(by=["class_name", "round"]),
        store.select(round=[1, 20]).mean(by=["round", "class_name"]).take([2, 3]),
    ]
    assert [[image_name(key) for key in each.keys()] for each in asked] == [
        ["mean_r20_cat.png", "mean_r20_dog.png"]
    ] * 3
    others = [
        store.select(round=20, node=[0, "server"]),
        store.select(round=20, per_class=2),
        store.select(round=20).take(slice(0, 3)),
    ]
    names = [image_name(key) for each in others for key in each.mean(by=["round"]).keys()]
    assert len({name.casefold() for name in names} - {"mean_r20.png"}) == 3


@pytest.mark.parametrize("frames", [2, 5])
def test_directions_of_a_slerp_are_scipys_and_lengths_grow_evenly(frames: int) -> None:
    rng = np.random.default_rng(3)
    start, end = rng.standard_normal((2, 4, 8)).astype(np.float32)
    weights = np.linspace(0, 1, frames)
    for weight in weights:
        found = between(start, end, float(weight), "slerp")
        for token in range(4):
            a, b = start[token].astype(float), end[token].astype(float)
            lengths = np.linalg.norm(a), np.linalg.norm(b)
            (arc,) = geometric_slerp(a / lengths[0], b / lengths[1], [weight])
            expected = arc * ((1 - weight) * lengths[0] + weight * lengths[1])
            np.testing.assert_allclose(found[token], expected, rtol=1e-5, atol=1e-6)
        straight = (1 - weight) * start.astype(float) + weight * end
        np.testing.assert_array_equal(
            between(start, end, float(weight), "lerp"), straight.astype(np.float32)
        )


def test_a_walk_is_straight_where_there_is_no_arc() -> None:
    start = np.array([[1, 2], [1, 0], [0, 0], [1, 2]], np.float32)
    end = np.array([[3, 6], [-1, 0], [5, 1], [1, 2]], np.float32)
    found = between(start, end, 0.25, "slerp")
    np.testing.assert_array_equal(found, (0.75 * start + 0.25 * end).astype(np.float32))


def test_the_ends_of_a_walk_are_those_bits(store: EmbeddingStore) -> None:
    for ends in (
        (one(store), one(store, round=20)),
        (one(store), one(store, class_name="cat")),
        tuple(
            store.select(round=20, class_name=name).mean(by=["round"]) for name in ("dog", "cat")
        ),
    ):
        frames = walk(ends[0], ends[1], 4)
        for column in ("t5", "clip"):
            found = frames.read(column)
            assert found.shape == (4, *store.schema.columns[column])
            np.testing.assert_array_equal(found[0], ends[0].read(column)[0])
            np.testing.assert_array_equal(found[3], ends[1].read(column)[0])
            assert frames.digests(column)[0] == ends[0].digests(column)[0]
            again = pickle.loads(pickle.dumps(frames)).read(column)
            np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda s: walk(s.select(), one(s)), "start: expected one record or mean, got 24"),
        (lambda s: walk(one(s), one(s)), "two different ends, got node 0, round 1, .* twice"),
        (lambda s: walk(one(s), "dog"), "end: expected a record or a mean, .* got str"),
        (lambda s: walk(one(s), one(s, round=20), 1), "frames: expected .* from 2 up, got 1"),
        (lambda s: walk(one(s), one(s, round=20), mode=NO_MODE), "mode: .* got 'cubic'"),
        (lambda s: s.select().mean(by="round"), "mean: expected some of node, .* got str 'round'"),
        (lambda s: s.select().mean(by=["colour"]), "mean: expected some of node, .* got colour"),
    ],
)
def test_what_cannot_be_is_refused(store: EmbeddingStore, make: Any, error: str) -> None:
    with pytest.raises(SchemaMismatchError, match=error):
        make(store)


def test_sequences_of_different_lengths_and_masks_are_not_mixed(tmp_path: Path) -> None:
    schema = Schema.of(
        "custom",
        TensorColumn("words", (4, 2), ragged=True),
        TensorColumn("mask", (4,), dtype="bool"),
        TensorColumn("more", (2,), optional=True),
    )
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    rng = np.random.default_rng(0)
    words = [rng.standard_normal((n, 2)).astype(np.float32) for n in (3, 3, 2)]
    mask = np.arange(4) < np.array([[3], [3], [2]])
    with store.append(node=0, round=0) as batch:
        batch.add(split="a", class_name="dog", index=range(3), words=words, mask=mask)
    everything = store.select().mean(by=["class_name"])
    for column, said in {
        "words": "mean of dog: expected records of one length in words, .* from 2 to 3",
        "mask": "mean of dog: expected the same mask in each record, got 2 different",
        "more": "mean of dog: expected more in each record, got 3 of 3 without",
    }.items():
        with pytest.raises(SchemaMismatchError, match=said):
            everything.read(column)
    alike = store.select(index=[0, 1]).mean(by=["class_name"])
    assert alike.read("length_words").tolist() == [3]
    np.testing.assert_array_equal(alike.read("mask"), mask[:1])
    expected = np.mean(words[:2], axis=0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(alike.read("words")[0, :3], expected)
    ends = [store.select(index=n) for n in range(3)]
    assert walk(ends[0], ends[1], 3).read("length_words").tolist() == [3] * 3
    with pytest.raises(SchemaMismatchError, match="one length in words, .* got 3 and 2"):
        walk(ends[0], ends[2]).read("words")
    with pytest.raises(SchemaMismatchError, match="ends of the same mask"):
        walk(ends[0], ends[2]).read("mask")


ODD = [
    "dog",
    "dog_i1",
    "r5_dog",
    "Dog",
    "a/b",
    "server",
    "node-0",
    "split-a",
    "ü",
    "x" * 300,
    "a:b",
]


def test_names_are_of_one_key_each_and_keys_are_read_back() -> None:
    means = [
        MeanKey(fixed, others)
        for name in ODD
        for fixed in (
            (("class_name", name),),
            (("round", 5), ("class_name", name)),
            (("node", name),),
            (("split", name), ("class_name", "dog")),
            (("round", 5), ("split", name), ("class_name", "dog"), ("index", 1)),
        )
        for others in ("{}", '{"node": ["0", [1, 4, 1]]}')
    ]
    records = [RecordKey("0", 5, "train", name, 0) for name in ODD]
    walks = [
        WalkKey(start, end, mode, frames, frame)
        for start, end in ((means[0], means[1]), (records[0], records[1]), (records[1], records[0]))
        for mode in ("slerp", "lerp")
        for frames in (9, 101)
        for frame in (0, 7, 8)
    ]
    keys: list[Key] = [*means, *records, *walks]
    names = [image_name(key, number) for key in keys for number in (0, 1)]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert name.isascii()
        assert len(name) <= 255
        assert not set(name) & set('/\\:*?"<>|')
    assert [read_key(key_json(key)) for key in keys] == keys
    assert len({key.rank for key in keys}) == len(keys)
    ranks = [key.rank for key in keys]
    assert sorted(ranks) == sorted(ranks[::2] + ranks[1::2])
    assert image_name(walks[0]).endswith("_0.png")
    assert sorted(image_name(k) for k in walks[3:6]) == [image_name(k) for k in walks[3:6]]


@pytest.mark.parametrize(
    "fields",
    [
        {"mean": {"round": "5"}, "of": {}},
        {"mean": {"colour": "red"}, "of": {}},
        {"mean": [], "of": {}},
        {"mean": {}, "of": None},
        {"walk": {}, "frame": 0},
        {"walk": {"from": {}, "to": {}, "mode": "slerp", "frames": 3}, "frame": 0},
        {"walk": None, "frame": "a"},
    ],
)
def test_what_is_no_key_is_none(fields: dict[str, Any]) -> None:
    assert read_key(fields) is None


def test_a_derived_record_is_made_anew_from_its_key(store: EmbeddingStore) -> None:
    by_class = store.select(node=[0, "server"], round=range(0, 30), per_class=2).mean(
        by=["class_name"]
    )
    frames = walk(by_class.take([0]), by_class.take([1]), 3)
    for known in (by_class.take([1]), frames.take([1])):
        (key,) = known.keys()
        (read,) = (read_key(key_json(key)),)
        assert isinstance(read, MeanKey | WalkKey)
        again = derive(EmbeddingStore.open(store.path).select(), read)
        assert again.keys() == [key]
        np.testing.assert_array_equal(again.read("t5"), known.read("t5"))
        np.testing.assert_array_equal(again.digests("t5"), known.digests("t5"))
    taken = store.select().take([0, 1]).mean(by=["class_name"])
    with pytest.raises(SchemaMismatchError, match="taken by position"):
        derive(store.select(), taken.keys()[0])


def test_the_mean_of_any_number_of_records_takes_the_memory_of_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = Schema.flux(32, width=1024, clip=(2,))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    record, count = np.ones((32, 1024), np.float32), 300
    with store.append(node=0, round=0) as batch:
        for index in range(count):
            tensors = {"t5": record * index, "clip": np.ones(2, np.float32)}
            batch.add(split="train", class_name="dog", index=index, **tensors)
    monkeypatch.setattr("fedgfe_store.derived.mean._PIECE_BYTES", 2**21)
    means = EmbeddingStore.open(store.path).select().mean(by=["round"])
    means.take([0]).read("clip")
    tracemalloc.start()
    found = means.read("t5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found[0], record * np.float32((count - 1) / 2))
    assert peak < 8 * 2**20 < count * record.nbytes / 4


def test_records_of_one_key_have_one_digest_in_any_order(store: EmbeddingStore) -> None:
    chosen = store.select(round=1)
    (mean,) = chosen.mean(by=["round"]).digests("t5")
    (shuffled,) = chosen.take(np.arange(len(chosen))[::-1]).mean(by=["round"]).digests("t5")
    assert mean == shuffled
    with store.append(node=0, round=1, if_exists="replace") as batch:
        batch.add(split="train", class_name="dog", index=[0], **values(1, 5))
    assert store.select(round=1).mean(by=["round"]).digests("t5")[0] != mean
