"""What `add` accepts: what every reader can show; the rest in one line, and nothing written."""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import SMALL, fill, values
from torch._subclasses import FakeTensorMode

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording import Recorder

GIVEN = {"split": "train", "class_name": "dog", "index": [0, 1], "node": 1, "round": 1}
EAST, WEST = timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no")


class Kind(str, Enum):  # noqa: UP042 - one that says its own name
    DOG = "dog"


def refused(store, **change) -> str:
    """What `add` says of two records with `change`, in one line, with nothing written."""
    before = {file: file.read_bytes() for file in store.path.rglob("*") if file.is_file()}
    with pytest.raises(SchemaMismatchError) as error, store.append() as batch:
        batch.add(**(GIVEN | values(2) | change))
    assert {f: f.read_bytes() for f in store.path.rglob("*") if f.is_file()} == before
    assert str(error.value).isprintable(), "a message is one line"
    return str(error.value)


def added(store, **change) -> pd.DataFrame:
    with store.append() as batch:
        batch.add(**(GIVEN | values(2) | change))
    return EmbeddingStore.open(store.path).select().records


@contextmanager
def earlier_rules(monkeypatch):
    """Let in what earlier releases let in."""
    with monkeypatch.context() as patch:
        patch.setattr("fedgfe_store.storage.entry.check_entry", lambda columns, record: None)
        patch.setattr("fedgfe_store.storage.incoming.FIRST_ENTRY", -(2**63))
        patch.setattr("fedgfe_store.storage.incoming.LAST_ENTRY", 2**63 - 1)
        yield


MOMENTS = [
    datetime.max,
    datetime.max.replace(tzinfo=EAST),
    datetime.max.replace(tzinfo=WEST),
    datetime.min,
    datetime.min.replace(tzinfo=EAST),
    datetime(1677, 9, 21, tzinfo=UTC),
    datetime(2262, 4, 12),
    pd.Timestamp("3000-01-01"),
    *(
        np.datetime64(n, unit)
        for unit in ("Y", "M", "W", "D", "s", "ms")
        for n in (2**62, -(2**62))
    ),
    np.datetime64(2**62 + 1, ("us", 1500)),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_time_that_readers_cannot_show_is_refused(store, moment):
    words = refused(store, timestamp=[datetime(2026, 1, 1), moment])
    assert words.startswith("timestamp: expected a moment from 1677-09-22 to 2262-04-11")
    assert words.endswith("(node 1, round 1, split train, class dog, index 1)")


def test_the_first_and_the_last_time_open_in_every_reader(store):
    bounds = [np.datetime64(-9_223_372_036_854, "ms"), np.datetime64(9_223_372_036_854, "ms")]
    frame = added(store, timestamp=bounds)
    shown = xr.open_zarr(store.path)["timestamp"].to_numpy()[:2]
    assert shown.dtype == "M8[ns]"
    assert shown.tolist() == [n * 10**6 for n in (-9_223_372_036_854, 9_223_372_036_854)]
    assert frame["timestamp"].dt.as_unit("ns").dt.year.tolist() == [1677, 2262]
    for beyond in (bounds[0] - 1, bounds[1] + 1):
        refused(store, timestamp=beyond, round=2)


@pytest.mark.parametrize(
    "moment", [pd.NaT, np.datetime64("NaT"), np.datetime64("NaT", "s"), "2026", 5, [5, 5]], ids=str
)
def test_what_is_no_time_is_refused(store, moment):
    assert refused(store, timestamp=moment).startswith("timestamp: expected a datetime, got ")


@pytest.mark.parametrize("unit", ["Y", "M", "D", "h", "s", "ms", "us", "ns"])
def test_times_of_every_unit_are_kept(store, unit):
    frame = added(store, timestamp=np.datetime64("2026-01-01", unit))
    assert frame["timestamp"].tolist() == [pd.Timestamp("2026-01-01", tz="UTC")] * 2


def test_a_store_with_times_from_before_the_bounds_is_read_as_ever(store, monkeypatch):
    with earlier_rules(monkeypatch):
        added(store, timestamp=datetime(1500, 1, 1))
    opened = EmbeddingStore.open(store.path)
    assert opened.select().records["timestamp"].dt.year.tolist() == [1500, 1500]
    opened.delete(index=1)
    opened.compact()
    assert opened.verify().sound


CONTROLS = ["a\0", "\0", "a\0b", "a\n", "\t", "a\x1f", "a\x7f"]


@pytest.mark.parametrize("text", CONTROLS, ids=repr)
@pytest.mark.parametrize("name", ["node", "split", "class_name"])
def test_control_characters_are_refused_in_keys(store, name, text):
    words = refused(store, **{name: ["a", text]})
    assert words.startswith(f"{name}: expected text without control characters, got {text!r} (node")
    assert "index 1" in words


@pytest.mark.parametrize("name", ["sample_id", "image_filename", "audio_path"])
def test_notes_may_hold_any_text_but_u0000(store, name):
    assert refused(store, **{name: "a\0"}).startswith(f"{name}: expected text without U+0000, got")
    assert added(store, **{name: "a\tb\n\x7f"})[name].tolist() == ["a\tb\n\x7f"] * 2


def test_a_filter_with_u0000_means_no_other_key(store):
    fill(store, node=0, round=1, classes="a b")
    for wanted in ("a\0", ["a\0"], ["a\0", "b\0"], [f"a{chr(0) * n}" for n in range(1, 40)]):
        assert len(store.select(class_name=wanted)) == 0
        assert len(store.select(sample_id=wanted)) == 0
    assert len(store.select(class_name=["a\0", "b"])) == 3


def test_keys_of_old_stores_that_end_in_u0000_stay_apart(store, monkeypatch):
    with earlier_rules(monkeypatch):
        added(store, class_name=["a\0", "a"], index=[0, 0])
        added(store, class_name=["a\0b", "a\tb"], index=[0, 0], split="val")
    opened = EmbeddingStore.open(store.path)
    for name in ("a", "a\0", "a\0b", "a\tb"):
        for wanted in (name, [name, "other"], [name, *map(str, range(40))]):
            assert [key.class_name for key in opened.select(class_name=wanted).keys()] == [name]
    assert opened.delete(class_name="a\0") == 1
    assert len(opened.select(class_name="a")) == 1
    assert opened.verify().sound


LENGTHS = {"sample_id": "ü" * 32_769, "audio_path": "x" * 65_537, "class_name": "x" * 65_537}


@pytest.mark.parametrize("name", LENGTHS)
def test_texts_longer_than_64_kb_are_refused(store, name):
    words = refused(store, **{name: ["a", LENGTHS[name]]})
    assert words.startswith(f"{name}: expected at most 65,536 bytes of UTF-8, got 65,53")
    assert "node 1, round 1, split train, class " in words
    assert len(words) < 1000
    assert len(added(store, **{name: LENGTHS[name][:-1]})) == 2


def test_extra_longer_than_64_kb_is_refused(store):
    words = refused(store, extra=[{"a": "x" * 65_527}, {"a": "x" * 65_528}])
    assert words.startswith("extra: expected at most 65,536 bytes of UTF-8, got 65,537: ")
    assert words.endswith("index 1)")
    assert added(store, extra={"a": "x" * 65_527})["extra"].str.len().tolist() == [65_536] * 2


def test_stores_with_longer_notes_open_and_compact_but_do_not_merge(store, monkeypatch, tmp_path):
    note = "x" * 200_000
    with earlier_rules(monkeypatch):
        added(store, extra=[{"a": note}, None])
    opened = EmbeddingStore.open(store.path)
    opened.delete(index=1)
    fill(opened, node=7, round=7)
    assert opened.compact().records_moved == 3
    again = EmbeddingStore.open(store.path)
    assert len(again.select(node=1).records["extra"][0]) == 200_009
    assert again.verify().sound
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    with pytest.raises(
        SchemaMismatchError, match="extra: expected at most .*node 1, round 1.*ex 0"
    ):
        other.merge(again)
    assert (other.commit, len(other)) == (0, 0)


ODD = {
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x[0].to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "scalar": lambda x: torch.tensor(1.0),
    "masked": lambda x: np.ma.masked_greater(x.numpy(), 0),
    "objects": lambda x: x.numpy().astype(object),
    "structured": lambda x: np.zeros((2, 3, 8), [("a", "f4")]),
    "one number": lambda x: np.float32(1),
    "unshowable": lambda x: Unshowable(),
}


@pytest.mark.filterwarnings("ignore")  # torch's, on what it calls prototypes
@pytest.mark.parametrize("kind", ODD)
def test_tensors_without_plain_values_are_refused(store, kind):
    given = ODD[kind](torch.from_numpy(values(2)["t5"]))
    assert refused(store, t5=given).startswith("t5: expected ")


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.astype(">f4"),
        lambda x: x.view(np.recarray),
        lambda x: np.broadcast_to(x, x.shape),
        np.asfortranarray,
        lambda x: torch.complex(torch.zeros(x.shape), torch.from_numpy(-x)).conj().imag,
        lambda x: torch.from_numpy(np.repeat(x, 2, axis=2))[..., ::2],
    ],
    ids=["big endian", "subclass", "read-only", "by columns", "negated", "strided"],
)
@pytest.mark.filterwarnings("ignore")
def test_values_arrive_whatever_their_layout(store, make):
    given = values(2)["t5"]
    added(store, t5=make(given))
    assert np.array_equal(store.select().read("t5"), given)


LOOP: list[object] = []
LOOP.append(LOOP)
DEEP: dict[str, object] = {}
for _ in range(3000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": [0, 10**5000]}, "index: expected a whole number from 0 to 9223372036854775807"),
        ({"round": 10**5000}, "round: expected a whole number from 0 to 2147483647, got a value"),
        ({"node": 10**5000}, "node: expected text or a whole number, got a value of type int"),
        ({"index": [torch.tensor(1.5), 1]}, "index: expected a whole number"),
        ({"index": torch.zeros(2, dtype=torch.int64, device="meta")}, "index: expected"),
        ({"index": np.ma.array([0, 1], mask=[False, True])}, "index: expected a whole number"),
        ({"index": np.array(3)}, "index: expected a whole number"),
        ({"index": range(10**30)}, "index: expected 2 values, one per record, got range(0, 1000"),
        ({"index": range(10**12)}, "index: expected 2 values, one per record, got 1000000000000"),
        ({"node": torch.tensor([1, 2, 3])}, "node: expected 2 values, one per record, got 3"),
        ({"class_name": ["dog", ""]}, "class_name: expected text that is not empty, got ''"),
        ({"class_name": ["dog", pd.NA]}, "class_name: expected text that is not empty"),
        ({"class_name": {"a", "b"}}, "class_name: expected values in an order, got"),
        ({"class_name": Unshowable()}, "class_name: expected text that is not empty, got a value"),
        ({"timestamp": date(2026, 1, 1)}, "timestamp: expected a datetime, got datetime.date("),
        ({"extra": [{"a": 1}, {"a": math.nan}]}, "extra: {'a': nan} cannot be kept as JSON"),
        ({"extra": {"a": [math.inf]}}, "extra: {'a': [inf]} cannot be kept as JSON"),
        ({"extra": {"a": DEEP}}, "extra: expected at most 100 levels of dicts and lists, got"),
        ({"extra": {"a": LOOP}}, "extra: expected at most 100 levels of dicts and lists, got"),
        ({"extra": {"a": 10**5000}}, "extra: a value of type dict that cannot be shown cannot be"),
        ({"extra": {"a": Unshowable()}}, "extra: a value of type dict that cannot be shown"),
        ({"extra": {"a": "\ud800"}}, "is not valid UTF-8: surrogates not allowed (node 1"),
    ],
    ids=itertools.count(),
)
def test_odd_values_are_refused_in_one_line(store, change, words):
    assert words in refused(store, **change)


def test_keys_are_what_their_types_say(store):
    frame = added(store, class_name=Kind.DOG, node=torch.tensor(3), index=list(torch.arange(2)))
    assert frame["class_name"].tolist() == ["dog", "dog"]
    assert frame["node"].tolist() == ["3", "3"]
    assert frame["index"].tolist() == [0, 1]


def test_a_recorder_says_so_while_the_block_is_open(store):
    with Recorder(store.path, every=1) as recorder:
        with pytest.raises(SchemaMismatchError, match="class_name: expected text without control"):
            with recorder.record(node=0, round=1) as batch:
                batch.add(split="train", class_name="a\n", index=[0, 1], **values(2))
        with pytest.raises(SchemaMismatchError, match="timestamp: expected a moment from"):
            with recorder.record(node=0, round=1) as batch:
                batch.add(split="train", class_name="a", timestamp=datetime.max, **values(2))
    assert len(EmbeddingStore.open(store.path)) == 0
