"""Recording from a training loop: what is kept, what is not, and what training feels of it."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import SMALL, values
from interruptions import strikes
from places import TESTS
from processes import finished, meanwhile, until
from torch.multiprocessing.reductions import StorageWeakRef

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.errors import (
    BusyError,
    ConflictError,
    SchemaMismatchError,
)
from fedgfe_store.recording import Recorder
from fedgfe_store.recording import pages as page_buffers
from fedgfe_store.storage.lock import WriterLock


def opened(recorder: Recorder) -> EmbeddingStore:
    return EmbeddingStore.open(recorder.path)


def put(recorder: Recorder, node: str | int, round: int, n: int = 4, seed: int = 0, **more: Any):
    """Record `n` records of known values in one call; return the batch and the values."""
    tensors = values(n, seed)
    with recorder.record(node=node, round=round) as batch:
        batch.add(split="train", class_name="dog", index=range(n), **(tensors | more))
    return batch, tensors


@pytest.fixture
def recorder(store):
    with Recorder(store) as made:
        yield made


# which rounds


@pytest.mark.parametrize(
    ("every", "due"), [(5, [0, 5, 10]), (1, list(range(11))), (0, []), (11, [0])]
)
def test_due_as_the_guide_has_it(store, every, due):
    with Recorder(store, every=every) as recorder:
        assert [n for n in range(11) if recorder.due(n)] == due


# what is kept


def test_records_are_kept_with_key_notes_and_values(store):
    tensors = values(3, 1)
    before = datetime.now(UTC)
    with Recorder(store) as recorder, recorder.record(node=2, round=5) as batch:
        batch.add(
            split="train",
            class_name=["dog", "dog", "cat"],
            index=[0, 1, 0],
            sample_id=["a", "b", "c"],
            audio_path="/data/x.wav",
            file_id=["x", "", None],
            extra={"take": 7},
            **{name: torch.from_numpy(array) for name, array in tensors.items()},
        )
    assert (batch.added, batch.replaced, batch.skipped, batch.left_out) == (3, 0, 0, ())
    store.refresh()
    found = store.select(node=2, round=5)
    assert store.commit == 1
    for name, array in tensors.items():
        assert np.array_equal(found.read(name), array)
    records = found.records
    assert records["class_name"].tolist() == ["dog", "dog", "cat"]
    assert records["sample_id"].tolist() == ["a", "b", "c"]
    assert records["image_filename"].tolist() == [
        "node_2_train_dog_0_r5.png",
        "node_2_train_dog_1_r5.png",
        "node_2_train_cat_0_r5.png",
    ]
    assert records["file_id"].tolist() == ["x", "", ""]
    assert set(records["extra"]) == {'{"take": 7}'}
    assert records["timestamp"].nunique() == 1
    assert abs((records["timestamp"][0] - before).total_seconds()) < 60


def test_given_names_of_images_stay(recorder):
    put(recorder, "server", 1, 1, image_filename="mine.png")
    recorder.flush()
    assert opened(recorder).select().records["image_filename"].tolist() == ["mine.png"]


def test_records_without_index_are_counted_by_split_and_class(recorder):
    with recorder.record(node=0, round=0) as batch:
        batch.add(split="train", class_name=["dog", "cat", "dog"], **values(3, 1))
        batch.add(split="val", class_name="dog", **values(2, 2))
        batch.add(split="train", class_name="dog", **values(1, 3))
    recorder.flush()
    keys = [(k.split, k.class_name, k.index) for k in opened(recorder).select().keys()]
    assert keys == [
        ("train", "dog", 0),
        ("train", "cat", 0),
        ("train", "dog", 1),
        ("val", "dog", 0),
        ("val", "dog", 1),
        ("train", "dog", 2),
    ]


def same_values(kind: str, t5: torch.Tensor) -> Any:
    """Return `t5`, which holds what bfloat16 can, as training might have it."""
    if kind == "parameter":
        return torch.nn.Parameter(t5.clone())
    if kind == "part of a graph":
        return t5.clone().requires_grad_() * 1
    if kind == "view of a larger one":
        return torch.stack([t5, t5 + 1, t5 + 2], 1)[:, 0]
    if kind == "transposed":
        return t5.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "negative view":
        return torch.complex(torch.zeros_like(t5), -t5).conj().imag
    if kind == "of inference":
        with torch.inference_mode():
            return t5 * 1
    if kind == "numpy":
        return t5.numpy()
    return t5.to(getattr(torch, kind))


@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "parameter",
        "part of a graph",
        "view of a larger one",
        "transposed",
        "negative view",
        "of inference",
        "numpy",
    ],
)
def test_any_tensor_of_training(recorder, kind):
    tensors = {k: torch.from_numpy(v).bfloat16().half().float() for k, v in values(3).items()}
    put(recorder, 0, 1, 3, **{name: same_values(kind, t) for name, t in tensors.items()})
    recorder.flush()
    for name, expected in tensors.items():
        assert np.array_equal(opened(recorder).select().read(name), expected.numpy())


def test_float64_is_rounded_and_it_says_so_once(recorder, caplog):
    exact = np.full((1, 3, 8), 1 / 3)
    for round in (1, 2):
        put(recorder, 0, round, 1, t5=torch.from_numpy(exact))
    recorder.flush()
    assert (opened(recorder).select().read("t5") == np.float32(1 / 3)).all()
    assert [m for m in caplog.messages if "float64 is rounded to float32 (t5)" in m] == [
        f"{recorder.path}: float64 is rounded to float32 (t5)"
    ]


def test_what_training_does_to_its_tensors_afterwards_changes_nothing(recorder):
    tensors = {name: torch.from_numpy(array) for name, array in values(3).items()}
    with recorder.record(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(3), **tensors)
        for tensor in tensors.values():
            tensor.fill_(9)
    recorder.flush()
    for name, array in values(3).items():
        assert np.array_equal(opened(recorder).select().read(name), array)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_one_record_with_or_without_batch_axes(recorder, lead):
    one = {name: array.reshape(*lead, *array.shape[1:]) for name, array in values(1).items()}
    with recorder.record(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=3, **one)
    recorder.flush()
    assert np.array_equal(opened(recorder).select().read("t5"), values(1)["t5"])


def test_records_with_a_batch_axis_each(recorder):
    many = {name: array[:, None] for name, array in values(4).items()}
    with recorder.record(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(4), **many)
    recorder.flush()
    assert np.array_equal(opened(recorder).select().read("t5"), values(4)["t5"])


def test_tensors_under_each_others_name(recorder):
    tensors = values(2)
    with recorder.record(node=0, round=1) as batch:
        batch.add(
            split="train", class_name="dog", index=[0, 1], t5=tensors["clip"], clip=tensors["t5"]
        )
    recorder.flush()
    for name, array in tensors.items():
        assert np.array_equal(opened(recorder).select().read(name), array)


@pytest.mark.parametrize("small_pages", [False, True])
def test_any_division_into_calls_and_pages_is_the_same(store, tmp_path, monkeypatch, small_pages):
    if small_pages:
        monkeypatch.setattr(page_buffers, "PAGE_BYTES", 3 * SMALL.record_nbytes)
    tensors = values(50)
    rng = np.random.default_rng(0)
    with Recorder(store, buffer_bytes=0) as recorder, recorder.record(node=0, round=1) as batch:
        start = 0
        while start < 50:
            part = slice(start, start + int(rng.integers(0, 12)))
            numbers = range(50)[part]
            given = {name: array[part] for name, array in tensors.items()}
            batch.add(split="train", class_name="dog", index=numbers, **given)
            start = part.stop
    store.refresh()
    assert (store.commit, len(store)) == (1, 50)
    for name, array in tensors.items():
        assert np.array_equal(store.select().read(name), array)


def test_optional_audio_of_some_records(tmp_path):
    schema = Schema.flux(3, width=8, clip=(4,), audio=(2, 5), granule=4)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    audio = np.random.default_rng(0).standard_normal((2, 2, 5), dtype=np.float32)
    with Recorder(store) as recorder, recorder.record(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=[0, 1], **values(2))
        batch.add(split="train", class_name="dog", index=[2, 3], audio=audio, **values(2, 1))
    store.refresh()
    assert store.select().records["has_audio"].tolist() == [False, False, True, True]
    assert np.array_equal(store.select(index=[2, 3]).read("audio"), audio)


# the store


@pytest.mark.parametrize(
    ("t5", "clip", "expected"),
    [
        ([4, 17, 4096], [4, 768], Schema.flux(17)),
        ([4, 1, 17, 4096], [4, 1, 768], Schema.flux(17)),
        ([4, 768], [4, 17, 4096], Schema.flux(17)),
        ([4, 17, 4096], [4, 77, 768], Schema.flux(17, clip=(77, 768))),
        ([17, 4096], [768], Schema.flux(17)),
        ([1, 512, 4096], [1, 77, 768], Schema.flux(512, clip=(77, 768))),
        (None, [4, 77, 768], Schema.sd(77)),
        (None, [1, 77, 768], Schema.sd(77)),
    ],
)
def test_a_new_store_is_made_from_the_shapes_seen(tmp_path, t5, clip, expected):
    given = {"t5": None if t5 is None else torch.zeros(t5), "clip": torch.zeros(clip)}
    metadata = Metadata(experiment="run", classes=("cat",), model="tiny")
    with Recorder(tmp_path / "new" / "s.zarr", metadata=metadata) as recorder:
        with recorder.record(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", **given)
    schema = opened(recorder).schema
    assert (schema.kind, schema.columns) == (expected.kind, expected.columns)
    assert (schema.precision, schema.granule) == ("float32", expected.granule)
    assert schema.metadata == Metadata("run", expected.kind, ("cat", "dog"), None, "tiny")
    assert len(opened(recorder)) == (4 if 4 in (t5 or clip)[:1] else 1)


@pytest.mark.parametrize(
    ("t5", "clip", "message"),
    [
        (None, [8, 768], r"got clip \[8, 768\]"),
        (None, [768], r"got clip \[768\]"),
        ([17, 4096], None, r"got t5 \[17, 4096\]"),
        (None, None, "got none"),
        (None, [4, 77, 768], "diffusion_type: expected 'sd', as the tensors are, got 'flux'"),
        ([4, 17, 4096], [3, 768], "clip has 3 rows, expected 4"),
        ([17, 2048], [768], r"t5 has shape \[17, 2048\], neither T5 \[tokens, 4096\] nor"),
        ([17, 4096], [17, 4096], "ambiguous: two of the tensors look like t5"),
        ([2, 3, 17, 4096], [2, 768], "t5 has a batch axis longer than 1"),
    ],
)
def test_shapes_that_make_no_store(tmp_path, t5, clip, message):
    given = {k: None if s is None else torch.zeros(s) for k, s in (("t5", t5), ("clip", clip))}
    metadata = Metadata(diffusion_type="flux")
    with Recorder(tmp_path / "s.zarr", metadata=metadata) as recorder:
        with pytest.raises(SchemaMismatchError, match=message):
            with recorder.record(node=0, round=1) as batch:
                batch.add(split="train", class_name="dog", **given)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"t5": np.zeros((2, 4, 8), "f4")}, r"t5: expected \[n, 3, 8\] as in the store .* got"),
        ({"t5": None}, r"t5: expected a tensor \[3, 8\], got None"),
        ({"t5": np.zeros((3, 3, 8), "f4")}, "as many records in every tensor, got"),
        ({"t5": np.zeros((2, 3, 8), int)}, "t5 is a ndarray, not a tensor"),
        (
            {"t5": torch.zeros(2, 3, 8, dtype=torch.int64)},
            "t5 is not an ordinary tensor of floating-point",
        ),
        ({"image": np.zeros((2, 3, 9), "f4")}, "image: expected no such tensor as in the store"),
        ({"index": 0}, "index: expected 2 values, one per record, got 0"),
        ({"index": [0]}, "index: expected 2 values, one per record, got 1"),
        ({"index": [0, -1]}, "index: expected a whole number from 0"),
        ({"class_name": ["dog", None]}, "class_name: expected text"),
        ({"split": ""}, "split: expected text that is not empty"),
        ({"extra": {1j}}, "extra"),
    ],
)
def test_what_does_not_fit_is_refused_at_once_and_adds_nothing(recorder, more, message):
    good = {"split": "train", "class_name": "dog", "index": [0, 1], **values(2)}
    with recorder.record(node=0, round=1) as batch:
        with pytest.raises(SchemaMismatchError, match=message):
            batch.add(**(good | more))
        batch.add(**good)
    recorder.flush()
    assert len(opened(recorder)) == 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"node": 0, "round": -1}, "round: expected a whole number from 0"),
        ({"node": 0, "round": 1.5}, "round: expected a whole number from 0"),
        ({"node": "", "round": 1}, "node: expected text that is not empty"),
    ],
)
def test_a_bad_node_or_round(recorder, key, message):
    with pytest.raises(SchemaMismatchError, match=message):
        recorder.record(**key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1}, "every: expected a whole number from 0, got -1"),
        ({"every": True}, "every: expected a whole number from 0, got True"),
        ({"on_error": "ignore"}, "on_error: expected one of raise, warn, got 'ignore'"),
        ({"if_exists": "add"}, "if_exists: expected one of error, replace, skip, got 'add'"),
        ({"precision": "bfloat16"}, "precision: expected 'float32' as in .*, got 'bfloat16'"),
    ],
)
def test_bad_options(store, options, message):
    with pytest.raises(SchemaMismatchError, match=message):
        Recorder(store, **options)


def test_a_restart_replaces_a_round_as_a_whole_and_one_that_comes_again_alike_not_at_all(store):
    for seed, n in ((0, 4), (1, 3)):
        with Recorder(store) as recorder:
            batch, _ = put(recorder, 0, 1, n, seed)
            put(recorder, 0, 2, 2, 7)
    assert (batch.added, batch.replaced, batch.removed) == (0, 3, 1)
    store.refresh()
    found = store.select(round=1)
    order = np.argsort(found.records["index"])
    assert np.array_equal(found.read("t5")[order], values(3, 1)["t5"])
    assert (len(store), store.commit) == (5, 3), "round 2 came again unchanged"


def test_if_exists_error_and_skip(store):
    with Recorder(store) as recorder:
        put(recorder, 0, 1)
    with Recorder(store, if_exists="skip") as recorder:
        batch, _ = put(recorder, 0, 1, seed=1)
    assert (batch.added, batch.skipped) == (0, 4)
    with pytest.raises(ConflictError, match="node 0, round 1, split train, class dog, index 0"):
        with Recorder(store, if_exists="error") as recorder:
            put(recorder, 0, 1, seed=1)


# blocks


@pytest.mark.parametrize("streaming", [False, True])
def test_a_block_that_raises_commits_nothing_and_its_exception_passes(
    store, monkeypatch, streaming
):
    if streaming:
        monkeypatch.setattr(page_buffers, "PAGE_BYTES", SMALL.record_nbytes)
    mine = KeyError("mine")
    with Recorder(store, buffer_bytes=0) as recorder:
        with pytest.raises(KeyError) as caught:
            with recorder.record(node=0, round=1) as batch:
                batch.add(split="train", class_name="dog", index=range(40), **values(40))
                raise mine
        assert caught.value is mine
        put(recorder, 0, 2)
    store.refresh()
    assert store.select().records["round"].tolist() == [2] * 4
    assert not recorder.missing
    assert store.verify().sound


def test_an_exception_in_the_recorders_own_block_passes_and_what_is_done_is_written(store):
    with pytest.raises(ZeroDivisionError):
        with Recorder(store) as recorder:
            put(recorder, 0, 1)
            1 / 0  # noqa: B018
    store.refresh()
    assert len(store) == 4


def test_a_block_without_records_says_so(recorder, caplog):
    with recorder.record(node=0, round=1):
        pass
    recorder.flush()
    assert f"{recorder.path}: nothing to record of node 0, round 1" in caplog.messages
    assert opened(recorder).commit == 0


def test_wrong_use_is_told(store):
    recorder = Recorder(store)
    batch = recorder.record(node=0, round=1)
    with pytest.raises(ConflictError, match="node 0, round 1 is not open: use it as a context"):
        batch.add(split="train", class_name="dog", index=[0], **values(1))
    with recorder.record(node=0, round=1):
        for call in (recorder.flush, recorder.close, lambda: recorder.record(node=1, round=1)):
            with pytest.raises(ConflictError, match="node 0, round 1 is still open in this"):
                call()
    recorder.close()
    recorder.close()
    for call in (recorder.flush, lambda: recorder.record(node=0, round=1)):
        with pytest.raises(ConflictError, match="is closed"):
            call()


def test_closed_while_another_threads_block_is_open(store):
    recorder = Recorder(store)
    entered, go, errors = threading.Event(), threading.Event(), []

    def work():
        try:
            with recorder.record(node=0, round=1) as batch:
                batch.add(split="train", class_name="dog", index=[0], **values(1))
                entered.set()
                go.wait(30)
        except ConflictError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(30)
    recorder.close()
    go.set()
    thread.join(30)
    assert errors == ["node 0, round 1: the recorder was closed before this block ended"]


# values that are not finite


def test_records_that_are_not_finite_are_left_out_by_key_and_the_rest_is_committed(store, caplog):
    tensors: dict[str, Any] = {**values(6)}
    tensors["t5"][1, 0, 0] = np.nan
    tensors["clip"][4, 3] = -np.inf
    with Recorder(store) as recorder:
        batch, _ = put(recorder, 3, 2, 6, **tensors)
    told = [
        "node 3, round 2, split train, class dog, index 1: t5 has values that are not finite",
        "node 3, round 2, split train, class dog, index 4: clip has values that are not finite",
    ]
    assert sorted(map(str, batch.left_out)) == told
    assert batch.left_out == recorder.left_out
    assert f"{store.path}: left out of node 3, round 2: {'; '.join(told)}" in caplog.messages
    store.refresh()
    assert store.select().records["index"].tolist() == [0, 2, 3, 5]
    assert np.array_equal(store.select().read("t5"), tensors["t5"][[0, 2, 3, 5]])
    assert not recorder.missing


def test_values_beyond_the_precision(tmp_path):
    schema = Schema.flux(3, width=8, clip=(4,), precision="bfloat16")
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    tensors: dict[str, Any] = {**values(3)}
    tensors["t5"][0, 0, 0] = np.finfo(np.float32).max
    with Recorder(store) as recorder:
        put(recorder, 0, 1, 3, **tensors)
        put(recorder, 0, 2, 1, t5=torch.full((1, 3, 8), 1e300, dtype=torch.float64))
    assert [each.reason for each in recorder.left_out] == [
        "t5 has values beyond bfloat16",
        "t5 has values that are not finite",
    ]
    store.refresh()
    assert store.select().records["index"].tolist() == [1, 2]


def test_what_rounds_to_the_largest_bfloat16_is_recorded_as_append_keeps_it(tmp_path):
    schema = Schema.flux(3, width=8, clip=(4,), precision="bfloat16")
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    largest = torch.finfo(torch.bfloat16).max
    tensors: dict[str, Any] = {**values(2)}
    tensors["t5"][0, 0, 0] = np.float32(largest) * np.float32(1.001)
    assert tensors["t5"][0, 0, 0] > largest
    with Recorder(store) as recorder:
        put(recorder, 0, 1, 2, **tensors)
    store.refresh()
    assert (len(store), recorder.left_out) == (2, ())
    rounded = torch.from_numpy(tensors["t5"]).bfloat16().float().numpy()
    assert rounded[0, 0, 0] == largest
    assert np.array_equal(store.select().read("t5"), rounded)


def test_a_note_that_a_path_makes_too_long_is_not_recorded(store):
    with Recorder(store, images_dir="x" * 2**15, on_error="warn") as recorder:
        put(recorder, 0, 1, 2)
        put(recorder, 0, 2, 2, extra={"note": "y" * 2**15})
        put(recorder, 0, 3, 2)
    store.refresh()
    assert sorted(set(store.select().records["round"])) == [1, 3]
    (missing,) = recorder.missing
    assert missing.round == 2
    expected = "extra: expected at most 65,536 bytes of UTF-8, got "
    assert missing.reason.startswith(expected)
    assert "node 0, round 2, split train, class dog, index 0" in missing.reason


# problems of the store


def full(monkeypatch):
    """From now on the disk is full, until the returned function is called."""

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: monkeypatch.setattr(os, "fsync", real)


@pytest.mark.parametrize("call", ["record", "flush", "close"])
def test_an_error_of_the_store_is_raised_from_the_next_call(store, monkeypatch, call):
    recorder = Recorder(store)
    mend = full(monkeypatch)
    put(recorder, 0, 1)
    while not recorder.missing:
        time.sleep(0.01)
    mend()
    calls = {"record": lambda: recorder.record(node=0, round=2)}
    with pytest.raises(OSError, match="No space left") as caught:
        calls.get(call, getattr(recorder, call))()
    assert f"while node 0, round 1 was recorded to {store.path}" in caught.value.__notes__
    if call != "close":
        put(recorder, 0, 2)
        recorder.close()
    store.refresh()
    assert len(store) == (0 if call == "close" else 4)
    assert [(each.node, each.round) for each in recorder.missing] == [("0", 1)]


def test_under_warn_training_goes_on_and_the_round_is_listed(store, monkeypatch, caplog):
    with Recorder(store, on_error="warn") as recorder:
        put(recorder, 0, 1)
        recorder.flush()
        mend = full(monkeypatch)
        put(recorder, 0, 2)
        put(recorder, "server", 2)
        recorder.flush()
        mend()
        put(recorder, 0, 3)
        recorder.flush()
        full_disk = f"[Errno 28] No space left on device: '{store.path / 'claim.2.0'}'"
        assert [str(each) for each in recorder.missing] == [
            f"node 0, round 2 ({full_disk})",
            f"node server, round 2 ({full_disk})",
        ]
        put(recorder, "server", 2)
    assert [str(each) for each in recorder.missing] == [f"node 0, round 2 ({full_disk})"]
    assert caplog.messages[-1] == f"{store.path}: not recorded: {recorder.missing[0]}"
    store.refresh()
    kept = store.select().records[["node", "round"]].drop_duplicates().to_numpy().tolist()
    assert kept == [["0", 1], ["0", 3], ["server", 2]]


def test_an_error_that_nobody_expects_says_of_what_it_is_also_under_warn(store, monkeypatch):
    recorder = Recorder(store, on_error="warn")
    with monkeypatch.context() as patched:
        patched.setattr(page_buffers.Page, "records", lambda page: {"y": 1}["x"])
        put(recorder, 3, 7)
        with pytest.raises(KeyError) as caught:
            recorder.flush()
    assert caught.value.__notes__[-1] == f"while node 3, round 7 was recorded to {store.path}"
    assert [str(each) for each in recorder.missing] == ["node 3, round 7 (KeyError: 'x')"]
    recorder.flush()
    put(recorder, 3, 7)
    recorder.close()
    assert not recorder.missing


def test_a_busy_store(store, caplog):
    lock = WriterLock(store.path, 1)
    try:
        with pytest.raises(BusyError, match="gave up after 0.1 s"):
            with Recorder(store, timeout=0.1) as recorder:
                put(recorder, 0, 1)
        with Recorder(store, timeout=0.1, on_error="warn") as recorder:
            put(recorder, 0, 1)
    finally:
        lock.release()
    assert [each.round for each in recorder.missing] == [1]


def test_without_background_the_block_itself_raises(store, monkeypatch):
    recorder = Recorder(store, background=False)
    put(recorder, 0, 1)
    store.refresh()
    assert len(store) == 4
    full(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        put(recorder, 0, 2)
    recorder.close()


def test_an_error_in_the_middle_of_a_block_larger_than_the_buffer(store, monkeypatch):
    monkeypatch.setattr(page_buffers, "PAGE_BYTES", SMALL.record_nbytes)
    lock = WriterLock(store.path, 1)
    try:
        with Recorder(store, buffer_bytes=0, timeout=0.1, on_error="warn") as recorder:
            put(recorder, 0, 1, 100)
            recorder.flush()
    finally:
        lock.release()
    assert [each.round for each in recorder.missing] == [1]


# training does not wait


def test_training_goes_on_while_another_writer_holds_the_store(store):
    lock = WriterLock(store.path, 1)
    recorder = Recorder(store)
    for round in range(1, 6):
        put(recorder, 0, round)  # would wait for the lock, which is released below, for 10 minutes
    store.refresh()
    assert len(store) == 0
    lock.release()
    recorder.close()
    store.refresh()
    assert store.select().records["round"].tolist() == [n for n in range(1, 6) for _ in range(4)]
    assert store.commit == 5


def test_it_waits_when_the_buffer_is_full(store, monkeypatch):
    monkeypatch.setattr(page_buffers, "PAGE_BYTES", 4 * SMALL.record_nbytes)
    lock = WriterLock(store.path, 1)
    recorder = Recorder(store, buffer_bytes=3 * 4 * SMALL.record_nbytes)
    recorded = []

    def work():
        for round in range(1, 9):
            put(recorder, 0, round)
            recorded.append(round)

    with meanwhile(work):
        until(lambda: len(recorded) >= 3)
        time.sleep(0.3)  # more would come now, if nothing held them back
        held_back = len(recorded)
        lock.release()
    recorder.close()
    store.refresh()
    assert held_back <= 4
    assert (len(recorded), store.commit) == (8, 8)


def test_threads_with_blocks_larger_than_the_buffer_get_through(store, monkeypatch):
    monkeypatch.setattr(page_buffers, "PAGE_BYTES", SMALL.record_nbytes)
    together = threading.Barrier(4)

    def work(recorder, node):
        with recorder.record(node=node, round=1) as batch:
            together.wait(30)
            for i in range(20):
                batch.add(split="train", class_name="dog", index=i, **values(1, 100 * node + i))

    with Recorder(store, buffer_bytes=0) as recorder:
        threads = [threading.Thread(target=work, args=(recorder, node)) for node in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    store.refresh()
    assert (store.commit, len(store)) == (4, 80)
    for node in range(4):
        found = store.select(node=node).read("t5")
        expected = [values(1, 100 * node + i)["t5"][0] for i in range(20)]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interruption_at_any_step_leaves_whole_blocks_and_nobody_waiting(
    store, monkeypatch, streaming
):
    if streaming:
        monkeypatch.setattr(page_buffers, "PAGE_BYTES", SMALL.record_nbytes)
    begun: list[Any] = []
    flushed: list[Any] = []

    def train():
        with Recorder(store, buffer_bytes=0) as recorder:
            begun.append(len(begun))
            put(recorder, 0, begun[-1])
            recorder.flush()
            flushed.append(begun[-1])

    for _ in strikes(
        train,
        ("threads.py", "recorder.py", "block.py", "recording/writer.py", "pages.py"),
        every=37,
    ):
        pass
    store.refresh()
    counts = store.select().records["round"].value_counts()
    assert set(counts) == {4}
    assert set(flushed) <= set(counts.index) <= set(begun)
    assert begun[-1] in flushed


def test_a_block_that_an_interruption_kept_from_ending_is_dropped_with_its_recorder(store):
    with pytest.raises(KeyboardInterrupt), Recorder(store) as recorder:
        block = recorder.record(node=0, round=1).__enter__()
        block.add(split="train", class_name="dog", index=[0], **values(1))
        raise KeyboardInterrupt
    with pytest.raises(ConflictError, match="is closed"):
        recorder.flush()
    store.refresh()
    assert len(store) == 0


def test_a_call_of_add_that_was_broken_off_keeps_its_block_from_being_recorded(
    recorder, monkeypatch
):
    def broken(self, columns, tensors):
        raise RuntimeError("CUDA error")

    with pytest.raises(ConflictError, match="node 0, round 1: a call of add was broken off"):
        with recorder.record(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", index=[0], **values(1))
            with monkeypatch.context() as patched, pytest.raises(RuntimeError):
                patched.setattr(page_buffers.Page, "put", broken)
                batch.add(split="train", class_name="cat", index=[0], **values(1))
    put(recorder, 0, 2)
    recorder.flush()
    assert set(opened(recorder).select().records["round"]) == {2}


def test_flush_means_on_the_disk(recorder):
    for round in range(3):
        put(recorder, 0, round)
        recorder.flush()
        assert len(opened(recorder)) == 4 * (round + 1)


# memory


def test_views_of_large_storages_leave_memory_flat(tmp_path):
    """200 batches, each a view of a storage of 4.5 MB: keeping them would take 900 MB."""
    process = psutil.Process()
    schema = Schema.flux(17, width=64, clip=(32,))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    resident = []
    with Recorder(store, buffer_bytes=0) as recorder:
        for round in range(10):
            with recorder.record(node=0, round=round) as batch:
                for i in range(20):
                    large = torch.ones(1024, 17, 64), torch.ones(1024, 32)
                    index = range(2 * i, 2 * i + 2)
                    t5, clip = (tensor[5:7] for tensor in large)
                    batch.add(split="train", class_name="dog", index=index, t5=t5, clip=clip)
                    del large, t5, clip
            recorder.flush()
            resident.append(process.memory_info().rss)
    grown = np.median(resident[5:]) - np.median(resident[:5])
    assert grown < 50e6, [f"{n / 1e6:.0f}" for n in resident]
    store.refresh()
    assert len(store) == 400


def test_storages_are_free_while_the_block_is_still_open(recorder):
    storages = []
    with recorder.record(node=0, round=1) as batch:
        for i in range(3):
            large = torch.ones(100, 3, 8)
            storages.append(StorageWeakRef(large.untyped_storage()))
            batch.add(split="train", class_name="dog", index=i, t5=large[3], clip=torch.ones(4))
            assert not storages[-1].expired()
            del large
        assert all(storage.expired() for storage in storages)


@pytest.mark.slow
def test_the_buffer_is_used_again_and_freed_by_close(store, monkeypatch):
    monkeypatch.setattr(page_buffers, "PAGE_BYTES", 2 * SMALL.record_nbytes)

    def pages():
        gc.collect()
        return sum(type(each) is page_buffers.Page for each in gc.get_objects())

    assert pages() == 0
    recorder = Recorder(store, buffer_bytes=10 * SMALL.record_nbytes)
    for round in range(8):
        put(recorder, 0, round, 20)
    recorder.flush()
    assert 0 < pages() <= 6
    recorder.close()
    assert pages() == 0


# the ends of processes

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from conftest import values
from fedgfe_store.recording import Recorder
recorder = Recorder({path!r})
def put(round):
    with recorder.record(node=0, round=round) as batch:
        batch.add(split="train", class_name="dog", index=range(4), **values(4))
"""


def run(store: EmbeddingStore, code: str) -> subprocess.CompletedProcess[str]:
    head = SCRIPT.format(tests=str(TESTS), path=str(store.path))
    command = [sys.executable, "-c", head + code]
    return finished(command, check=False)


@pytest.mark.slow
def test_a_forgotten_close_loses_nothing_but_a_block_that_never_ended(store):
    code = """
for round in range(5): put(round)
block = recorder.record(node=0, round=9).__enter__()
block.add(split="train", class_name="dog", index=[0], **values(1))
raise SystemExit(7)
"""
    done = run(store, code)
    assert done.returncode == 7
    assert "the block of node 0, round 9 never ended: not recorded" in done.stderr
    assert "the recorder was not closed: writing what waits" in done.stderr
    store.refresh()
    assert store.select().records["round"].tolist() == [n for n in range(5) for _ in range(4)]


@pytest.mark.slow
def test_a_recorder_that_nobody_holds_any_more_is_written(store):
    code = "for round in range(3): put(round)\ndel recorder, put\nimport gc; gc.collect()"
    done = run(store, code)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    store.refresh()
    assert len(store) == 12


@pytest.mark.slow
def test_a_forked_process_that_leaves_an_open_block_touches_nothing_of_its_parents(store):
    code = """
import torch
from torch.utils.data import DataLoader
before = os.getpid()
try:
    with recorder:
        put(1)
        with recorder.record(node=0, round=2) as batch:
            batch.add(split="train", class_name="dog", index=range(4), **values(4))
            loader = DataLoader([1, 2, 3], num_workers=2, multiprocessing_context="fork")
            print(torch.stack(list(loader)).sum().item(), flush=True)
            for way in ("raise", "leave", "exit"):
                child = os.fork()
                if child == 0:
                    try:
                        batch.add(split="train", class_name="cat", index=0, **values(1))
                    except Exception as error:
                        print(type(error).__name__, flush=True)
                    recorder.missing, recorder.left_out
                    if way == "raise":
                        raise KeyError
                    if way == "exit":
                        sys.exit(5)
                    break
                _, status = os.waitpid(child, 0)
                print(way, os.waitstatus_to_exitcode(status), flush=True)
except KeyError:
    sys.exit(6)
if os.getpid() != before:
    sys.exit(7)
"""
    done = run(store, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "6",
        "ConflictError",
        "raise 6",
        "ConflictError",
        "leave 7",
        "ConflictError",
        "exit 5",
    ]
    store.refresh()
    assert store.commit == 2
    assert store.select().records["round"].tolist() == [1] * 4 + [2] * 4
    assert store.verify().sound


@pytest.mark.slow
def test_a_forked_process_leaves_the_recorder_alone(store):
    code = """
put(1)
child = os.fork()
if child == 0:
    recorder.close()
    try:
        recorder.record(node=0, round=2)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    sys.exit(5)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 5
put(2)
recorder.close()
"""
    done = run(store, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ConflictError this recorder of {store.path} belongs to process")
    store.refresh()
    assert store.select().records["round"].tolist() == [1] * 4 + [2] * 4
