"""Selection: the right records, nothing read before it is asked for, and views of them."""

from __future__ import annotations

import itertools
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.readers.torch import prefetch
from fedgfe_store.storage.layout import KEY_CHUNK

NODES = ("0", "1", "server")
ROUNDS = (1, 2, 10)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of 3 nodes x 3 rounds x 3 classes x 3 samples, and its records as a plain dict."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    model: dict[Any, Any] = {}
    for node, round_ in itertools.product(NODES, ROUNDS):
        given = fill(store, node=node, round=round_, classes="dog cat bird")
        model |= {(node, round_, name, i): tensors for (name, i), tensors in given.items()}
    return EmbeddingStore.open(store.path), model


def expected(model, **filters):
    fields = ("node", "round", "class_name", "index")
    return {
        key
        for key in model
        if all(key[fields.index(name)] in wanted for name, wanted in filters.items())
    }


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"node": "server"},
        {"node": ["0", "server"]},
        {"round": 2},
        {"round": [10, 1, 99]},
        {"round": range(2, 11)},
        {"round": range(10, 0, -9)},
        {"class_name": "dog"},
        {"class_name": ["cat", "bird", "zebra"]},
        {"index": [0, 2]},
        {"index": range(0)},
        {"node": []},
        {"node": "1", "round": 10, "class_name": "cat", "index": 1},
    ],
)
def test_filters_agree_with_a_plain_dict(filled, filters):
    store, model = filled
    wanted = {k: [v] if isinstance(v, str | int) else v for k, v in filters.items()}
    selection = store.select(**filters)
    keys = [(k.node, k.round, k.class_name, k.index) for k in selection.keys()]
    assert len(keys) == len(set(keys)) == len(selection)
    assert set(keys) == expected(model, **wanted)
    for name in SMALL.columns:
        read = selection.read(name)
        assert all(np.array_equal(v, model[k][name]) for k, v in zip(keys, read, strict=True))


def test_numbers_name_nodes_too(filled):
    store, _ = filled
    assert len(store.select(node=0)) == len(store.select(node="0")) == 27
    assert len(store.select(node=range(2))) == 54
    assert len(store.select(node=np.int64(1), round=np.array([1, 2]))) == 18


def test_sample_id(filled):
    store, _ = filled
    assert {k.index for k in store.select(sample_id="train_2").keys()} == {2}
    assert len(store.select(sample_id=["train_0", "train_1"], round=1)) == 18


def test_per_class_takes_the_lowest_indices(store):
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=[7, 3, 5, 1], **values(4))
        batch.add(split="val", class_name="dog", index=[9], **values(1))
        batch.add(split="train", class_name="cat", index=[2, 0], **values(2))
    selection = store.select(per_class=2)
    found = {(k.split, k.class_name, k.index) for k in selection.keys()}
    assert found == {("train", "dog", 1), ("train", "dog", 3), ("val", "dog", 9),
                     ("train", "cat", 0), ("train", "cat", 2)}  # fmt: skip
    assert len(store.select(class_name="dog", index=range(5, 100), per_class=1)) == 2


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"round": "5"}, "round: expected whole numbers"),
        ({"round": True}, "round"),
        ({"round": 1.0}, "round"),
        ({"class_name": 3}, "class_name: expected text"),
        ({"node": [None]}, "node: expected text"),
        ({"per_class": 0}, "per_class"),
    ],
)
def test_wrong_filters_are_named(filled, filters, words):
    with pytest.raises(SchemaMismatchError, match=words):
        filled[0].select(**filters)


def test_nothing_is_read_before_it_is_asked_for(filled, reads):
    store = EmbeddingStore.open(filled[0].path)
    selection = store.select(round=2, class_name="dog")
    assert [key for key in reads if "/c." in key] == []
    assert len(selection) == 9
    assert {key.split("/")[0] for key in reads if "/c." in key} == {
        "created_in", "deleted_in", "round", "class_name"
    }  # fmt: skip
    dataset = selection.to_xarray()
    dataset.sel(node="0").t5.isel(token=0)
    assert sum(len(batch) for batch in [selection.batches(4)]) == 3
    assert not [key for key in reads if key.startswith(("t5/", "clip/"))]
    dataset.sel(node="0").isel(record=[0]).t5.load()
    tensors = {key for key in reads if key.startswith(("t5/", "clip/"))}
    assert len(tensors) == 1
    assert tensors.pop().startswith("t5/c.")


def test_scattered_records_read_only_their_shards(filled, reads):
    store, model = filled
    selection = EmbeddingStore.open(store.path).select()
    picked = selection.take([60, 3, 4, 60, 17])
    read = picked.read("t5")
    touched = {key for key in reads if key.startswith("t5/")}
    assert touched == {f"t5/c.{row // SMALL.granule}.0.0" for row in picked.rows}
    for key, values_ in zip(picked.keys(), read, strict=True):
        assert np.array_equal(values_, model[key.node, key.round, key.class_name, key.index]["t5"])


@pytest.mark.slow
def test_scattered_selection_of_a_large_store_stays_small(tmp_path):  # cases.md c19
    schema = Schema.flux(64, width=1024, clip=(768,))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    record = np.ones((64, 1024), np.float32)
    clip = np.ones(768, np.float32)
    with store.append(node=0, round=0) as batch:
        for index in range(1500):
            batch.add(split="train", class_name="dog", index=index, t5=record, clip=clip)
    positions = np.random.default_rng(0).permutation(1500)[:20]
    tracemalloc.start()
    lazy = EmbeddingStore.open(store.path).select().to_xarray().isel(record=positions)
    opened = tracemalloc.get_traced_memory()[0]
    loaded = lazy.t5.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 5e6
    assert loaded.shape == (20, 64, 1024)
    assert peak < loaded.nbytes * 2 + 8 * 4 * record.nbytes


def test_records_is_a_frame_of_everything_but_tensors(filled):
    frame = filled[0].select(round=1, node="0").records
    assert list(frame.columns) == [
        "node", "round", "split", "class_name", "index", "sample_id", "file_id",
        "image_filename", "audio_path", "timestamp", "extra", "t5_digest", "clip_digest",
        "recorded_in",
    ]  # fmt: skip
    assert frame.index.tolist() == list(range(9))
    assert frame.groupby("class_name").size().to_dict() == {"bird": 3, "cat": 3, "dog": 3}
    assert str(frame["timestamp"].dt.tz) == "UTC"


def test_xarray_is_indexed_by_key_and_equal_to_numpy(filled):
    store, model = filled
    dataset = store.select().to_xarray()
    one = dataset.sel(node="1", round=10, class_name="cat", index=2, split="train")
    assert np.array_equal(one.t5.to_numpy().squeeze(), model["1", 10, "cat", 2]["t5"])
    dogs = dataset.sel(round=10, class_name="dog")
    assert dogs.sizes["record"] == 9
    whole = store.select().read("t5")
    for key in [
        (slice(3, 40, 5), 1, slice(None)),
        (7, slice(None), -1),
        ([5, 1, 80], [2, 0], slice(1, 3)),
        (slice(None, None, -1), -1, 0),
    ]:
        lazy = dataset.t5.isel(record=key[0], token=key[1], t5_feature=key[2])
        picked = whole[key[0]]
        one = isinstance(key[0], int)
        oracle = picked[key[1], key[2]] if one else picked[:, key[1]][..., key[2]]
        assert np.array_equal(lazy.to_numpy(), oracle), key
    mean = dataset.t5.groupby("class_name").mean()
    dogs_by_hand = np.mean([t["t5"] for k, t in model.items() if k[2] == "dog"], axis=0)
    np.testing.assert_allclose(mean.sel(class_name="dog"), dogs_by_hand, atol=1e-6)


@pytest.mark.parametrize("storage", ["python", "pyarrow"])
def test_xarray_whatever_pandas_keeps_text_in(filled, storage):
    with pd.option_context("mode.string_storage", storage):
        dataset = filled[0].select(round=2).to_xarray()
        dogs = dataset.sel(node="0", class_name="dog")
        assert dogs.t5.load().shape == (3, 3, 8)
        assert dataset.chunk({"record": 4}).isel(record=[0, 5]).sample_id.values.tolist() == [
            *filled[0].select(round=2).take([0, 5]).records["sample_id"]
        ]
        assert dataset.class_name.dtype == dataset.sample_id.dtype == object


def test_xarray_works_with_dask(filled):
    store, _ = filled
    dataset = store.select().to_xarray().chunk(record=10)
    np.testing.assert_allclose(dataset["clip"].mean("record").compute(),
                               store.select().read("clip").mean(0), atol=1e-6)  # fmt: skip


def test_an_empty_selection_is_empty_everywhere(filled):
    selection = filled[0].select(round=99)
    assert len(selection) == 0
    assert selection.records.empty
    assert selection.read("t5").shape == (0, 3, 8)
    assert selection.to_xarray().t5.shape == (0, 3, 8)
    assert list(selection.batches(4)) == []
    assert selection.keys() == []


@pytest.mark.parametrize("size", [1, 4, 27, 100])
def test_parts_are_all_records_in_order_and_nothing_is_read(filled, reads, size):
    store, model = filled
    selection = store.select(node=["0", "1"], round=[1, 10], class_name=["dog", "cat"])
    keys = selection.keys()
    before = len(reads)
    parts = list(selection.parts(size))
    assert len(reads) == before
    assert [n for at, _ in parts for n in range(at.start, at.stop)] == list(range(len(keys)))
    assert [key for _, part in parts for key in part.keys()] == keys
    assert all(len(part) == at.stop - at.start <= size for at, part in parts)
    found = {(k.node, k.round, k.class_name, k.index) for k in keys}
    assert found == expected(model, node=["0", "1"], round=[1, 10], class_name=["dog", "cat"])


@pytest.mark.parametrize(("size", "depth"), [(1, 2), (4, 1), (7, 0), (100, 2)])
def test_batches_are_torch_tensors_in_order(filled, size, depth):
    store, _ = filled
    selection = store.select(class_name=["dog", "bird"])
    batches = selection.batches(size, dtype=torch.bfloat16, prefetch=depth)
    seen = list(batches)
    assert len(batches) == len(seen) == -(-len(selection) // size)
    assert torch.equal(
        torch.cat([b["t5"] for b in seen]), torch.from_numpy(selection.read("t5")).bfloat16()
    )
    frames = pd.concat([b.records for b in seen], ignore_index=True)
    pd.testing.assert_frame_equal(frames, selection.records)
    assert len(list(batches)) == len(seen), "a second pass reads again"


def test_tensors_are_decoded_where_they_are_wanted(filled):
    selection = filled[0].select(class_name="dog").take([7, 0, 0, 3])
    out = np.full((4, *SMALL.columns["t5"]), 9, np.float32)
    assert selection.read("t5", out=out) is out
    assert np.array_equal(out, selection.read("t5"))
    read_only = out.copy()
    read_only.flags.writeable = False
    for wrong in (out[:3], out.astype(np.float64), np.asfortranarray(out), read_only):
        with pytest.raises(
            SchemaMismatchError, match=r"out: expected contiguous, writable, float32 \[4, 3, 8\]"
        ):
            selection.read("t5", out=wrong)


def test_pinned_memory_needs_an_accelerator_and_holds_what_was_decoded(filled, monkeypatch):
    selection = filled[0].select()
    if not torch.accelerator.is_available():
        with pytest.raises(SchemaMismatchError, match="pin_memory: expected .* accelerator"):
            selection.batches(4, pin_memory=True)
    pinned = []
    empty = torch.empty

    def pin(*args, pin_memory, **options):  # what a machine with a GPU does, but for the pinning
        pinned.append(empty(*args, **options))
        return pinned[-1]

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", pin)
    for dtype in (None, torch.bfloat16):
        pinned.clear()
        batches = list(selection.batches(4, dtype=dtype, pin_memory=True))
        tensors = [batch[name] for batch in batches for name in ("t5", "clip")]
        assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in pinned]
        expected = torch.from_numpy(selection.read("t5")).to(dtype or torch.float32)
        assert torch.equal(torch.cat([batch["t5"] for batch in batches]), expected)


def test_batches_of_one_column(filled):
    batch = next(iter(filled[0].select().batches(5, columns=["clip"])))
    assert set(batch.tensors) == {"clip"}
    with pytest.raises(SchemaMismatchError, match="t5, clip, got 'audio'"):
        filled[0].select().batches(5, columns=["audio"])
    with pytest.raises(SchemaMismatchError, match="batch_size"):
        filled[0].select().batches(0)


def test_leaving_a_loop_ends_the_reading_thread(filled):
    for _ in filled[0].select().batches(2):
        break
    names = [thread.name for thread in threading.enumerate()]
    assert "fedgfe-store-prefetch" not in names


def test_prefetch_hands_on_errors_after_the_items_before_them():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    seen: list[Any] = []
    with pytest.raises(ValueError, match="third"):
        seen.extend(prefetch(items(), 1))
    iterator = prefetch(items(), 5)
    with pytest.raises(ValueError, match="third"):
        for item in iterator:
            seen.append(item)
    assert seen[-2:] == [1, 2]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_is_never_further_ahead_than_asked(depth):
    begun: list[int] = []

    def items():
        for number in range(40):
            begun.append(number)
            yield number

    for taken, item in enumerate(prefetch(items(), depth), start=1):
        time.sleep(0.002)  # the thread would come far ahead
        assert item == taken - 1
        assert len(begun) <= taken + (depth + 1 if depth else 0)
    assert begun == list(range(40))


def test_key_columns_are_picked_in_any_order(store):
    """Across chunks of key columns, with repeats, gaps and runs; as numpy picks from the whole."""
    snapshot = store.select()._snapshot
    total = 3 * KEY_CHUNK + 5
    whole = {
        "round": np.arange(total, dtype=np.int32),
        "class_name": np.array([f"class {i}" for i in range(total)], np.dtypes.StringDType()),
    }
    for name, column in whole.items():
        for start in range(0, total, KEY_CHUNK):
            snapshot.mend({(name, start // KEY_CHUNK): column[start : start + KEY_CHUNK]})
    rng = np.random.default_rng(0)
    edges = np.concatenate([np.arange(-2, 3) + k * KEY_CHUNK for k in range(4)])
    edges = edges[edges >= 0]
    picks = [np.sort(rng.choice(edges, n)) for n in (1, 3, 9)]
    picks += [rng.choice(edges, n, replace=replace) for n in (5, 9) for replace in (True, False)]
    picks += [edges[:0], edges, edges[::-1], np.arange(total), np.arange(7, KEY_CHUNK + 7)]
    picks += [np.array([0, 0, 2, 2]), np.array([total - 1, 0])]
    for rows in picks:
        for name, column in whole.items():
            np.testing.assert_array_equal(snapshot.column_at(name, rows), column[rows])
