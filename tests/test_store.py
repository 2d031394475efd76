"""Create, open, append: what goes in comes out, once, under its own key."""

from __future__ import annotations

import math
import sys
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import SMALL, fill, values
from processes import finished

from fedgfe_store import EmbeddingStore, FedgfeStoreError, Metadata, Schema
from fedgfe_store.errors import (
    BusyError,
    ConflictError,
    DamagedDataError,
    NotFoundError,
    SchemaMismatchError,
)


def add(store, n=1, *, node=0, round=0, index=None, if_exists="error", **given):
    tensors = values(n, 1, store.schema) | given
    with store.append(node=node, round=round, if_exists=if_exists) as batch:
        batch.add(split="train", class_name="dog", index=index or range(n), **tensors)
    return batch


def test_error_tree_is_pinned():
    assert {c.__name__: c.__bases__ for c in FedgfeStoreError.__subclasses__()} == {
        "NotFoundError": (FedgfeStoreError, FileNotFoundError),
        "SchemaMismatchError": (FedgfeStoreError, ValueError),
        "ConflictError": (FedgfeStoreError, FileExistsError),
        "DamagedDataError": (FedgfeStoreError, OSError),
        "BusyError": (FedgfeStoreError, TimeoutError),
    }


def test_exact_round_trip_at_real_width(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema.flux(17))
    given = values(5, schema=store.schema)
    given["t5"][0, 0, :4] = [-0.0, 1e-45, np.finfo(np.float32).max, np.finfo(np.float32).tiny]
    add(store, 5, **given)
    selection = EmbeddingStore.open(store.path).select()
    for name, array in given.items():
        assert selection.read(name).tobytes() == array.tobytes()


def test_bfloat16_precision_rounds_as_torch_does(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema.flux(2, precision="bfloat16"))
    given = values(7, schema=store.schema)
    given["t5"][0, 0, :3] = [-0.0, 1e-45, 1.00390625]
    before = {name: array.copy() for name, array in given.items()}
    add(store, 7, **given)
    for name, array in before.items():
        expected = torch.from_numpy(array).bfloat16().float().numpy()
        assert store.select().read(name).tobytes() == expected.tobytes()
        assert given[name].tobytes() == array.tobytes(), "the caller's array was changed"


@pytest.mark.slow
def test_bfloat16_tensors_widen_exactly_also_in_a_fresh_process(store):  # cases.md b6
    t5 = torch.from_numpy(values(1)["t5"]).bfloat16()
    t5.view(-1)[:3] = torch.tensor([-0.0, 1e-40, 3e38])
    add(store, 1, t5=t5)
    code = (
        "import sys, torch; from fedgfe_store import EmbeddingStore\n"
        f"x = torch.from_numpy(EmbeddingStore.open({str(store.path)!r}).select().read('t5'))\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "print(x.bfloat16().view(torch.int16).flatten().tolist())"
    )
    out = finished([sys.executable, "-c", code])
    assert out.stdout.strip() == str(t5.view(torch.int16).flatten().tolist())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.nn.Parameter(torch.from_numpy(x)),
        lambda x: torch.from_numpy(x).requires_grad_() * 1,
        lambda x: torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))).transpose(1, 2),
        lambda x: torch.from_numpy(np.concatenate([x, x]))[: len(x)],
        lambda x: x[::-1][::-1],
    ],
)
def test_grad_views_and_transposed_tensors(store, make):  # cases.md b7
    given = values(3)["t5"]
    add(store, 3, t5=make(given))
    assert np.array_equal(store.select().read("t5"), given)


def test_a_single_record_needs_no_leading_axis(store):
    given = values(1)
    with store.append(node="server", round=2) as batch:
        batch.add(split="val", class_name="cat", index=7, t5=given["t5"][0], clip=given["clip"][0])
    assert [str(k) for k in store.select().keys()] == [
        "node server, round 2, split val, class cat, index 7"
    ]
    assert np.array_equal(store.select().read("clip"), given["clip"])


def test_notes_come_back(store):
    when = datetime(2026, 1, 22, 12, 0, 0, 250_000, tzinfo=UTC)
    with store.append(node=0, round=5) as batch:
        batch.add(
            split="train", class_name="dog", index=0, sample_id="train_0", timestamp=when,
            image_filename="node_0_train_dog_0_r5.png", audio_path="/data/ü/audio.wav",
            extra={"image_path": "/x/y.png", "n": 3}, **values(1),
        )  # fmt: skip
    record = store.select().records.iloc[0]
    assert record["sample_id"] == "train_0"
    assert record["audio_path"] == "/data/ü/audio.wav"
    assert record["timestamp"] == when
    assert record["extra"] == '{"image_path": "/x/y.png", "n": 3}'


LONG = [
    "hospital-münchen-042",
    "black-footed ferret",
    "x" * 300,
    "🦊 fox",
    "a/b:c",
    "\u2028 \x85",
]


def test_names_of_any_length_and_script_are_kept_whole(store):  # cases.md c11
    add(store, 1, node="a")
    for name in LONG:
        with store.append(node=name, round=0) as batch:
            batch.add(split=name, class_name=name, index=0, sample_id=name, **values(1))
    opened = EmbeddingStore.open(store.path)
    assert opened.select().records["class_name"].tolist() == ["dog", *LONG]
    for name in LONG:
        assert [k.node for k in opened.select(class_name=name, node=name).keys()] == [name]


def test_zero_is_a_value_and_not_a_gap(store):  # cases.md c14, c15
    add(store, 2, round=0, clip=np.zeros((2, 4), np.float32))
    selection = EmbeddingStore.open(store.path).select(round=0, index=0)
    assert np.array_equal(selection.read("clip"), np.zeros((1, 4)))
    assert selection.records["round"].dtype == np.int32
    assert selection.records["index"].dtype == np.int64


def test_append_twice_changes_nothing(store):  # cases.md c1
    fill(store, node=0, round=5)
    with store.append(node=0, round=5) as batch:
        given = store.select()
        batch.add(
            split="train",
            class_name=given.records["class_name"],
            index=given.records["index"].to_numpy(),
            t5=given.read("t5"),
            clip=given.read("clip"),
        )
    assert (batch.added, batch.skipped) == (0, 6)
    fill(store, node=0, round=5)
    assert (store.commit, len(store), len(EmbeddingStore.open(store.path))) == (1, 6, 6)


def test_a_key_with_other_tensors_refuses_the_whole_commit(store):
    given = values(3)
    add(store, 2, **{name: array[:2] for name, array in given.items()})
    given["t5"][1, 0, 0] += 1
    with pytest.raises(ConflictError, match="node 0, round 0, split train, class dog, index 1"):
        add(store, 3, **given)
    assert (store.commit, len(EmbeddingStore.open(store.path))) == (1, 2)
    assert len(EmbeddingStore.open(store.path).select(index=2)) == 0


def test_new_records_join_those_that_are_the_same(store):
    add(store, 2)
    batch = add(store, 2, index=[1, 2], **{k: v[[1, 0]] for k, v in values(2, 1).items()})
    assert (batch.added, batch.skipped, len(store)) == (1, 1, 3)


def test_replace_and_skip(store):
    add(store, 2)
    new = values(2, 9)
    assert add(store, 2, if_exists="skip", **new).skipped == 2
    assert np.array_equal(store.select().read("t5"), values(2, 1)["t5"])
    batch = add(store, 2, if_exists="replace", **new)
    assert (batch.added, batch.replaced, len(store)) == (0, 2, 2)
    assert np.array_equal(EmbeddingStore.open(store.path).select().read("t5"), new["t5"])
    old = EmbeddingStore.open(store.path, as_of=1).select()
    assert np.array_equal(old.read("t5"), values(2, 1)["t5"])
    assert store.history()["kind"].tolist() == ["append", "replace"]


def test_a_key_twice_in_one_batch(store):
    given = values(1)
    with store.append(node=0, round=0) as batch:
        for _ in range(2):
            batch.add(split="train", class_name="dog", index=0, **given)
    assert (batch.added, batch.skipped) == (1, 1)
    with pytest.raises(ConflictError, match="added twice"), store.append(node=1, round=0) as batch:
        batch.add(split="train", class_name="dog", index=[0, 0], **values(2))
    assert store.commit == 1


def test_an_error_in_the_block_commits_nothing(store):
    with pytest.raises(ZeroDivisionError), store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        1 / 0  # noqa: B018
    assert len(EmbeddingStore.open(store.path)) == 0
    assert add(store, 1).added == 1


def test_an_error_after_data_was_written_rolls_back(store, monkeypatch):
    monkeypatch.setattr("fedgfe_store.storage.append._BUFFER_BYTES", 1)
    add(store, 5)
    before = sorted(store.path.rglob("*"))
    with pytest.raises(ZeroDivisionError), store.append(node=1, round=0) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        assert len(list(store.path.glob("t5/c.*"))) == 4
        1 / 0  # noqa: B018
    assert sorted(store.path.rglob("*")) == before
    assert np.array_equal(EmbeddingStore.open(store.path).select().read("t5"), values(5, 1)["t5"])


def test_a_stream_of_small_adds_is_one_commit(store, monkeypatch):
    monkeypatch.setattr("fedgfe_store.storage.append._BUFFER_BYTES", 500)
    given = values(23)
    with store.append(node=0, round=1) as batch:
        for i in range(23):
            one = {k: v[i] for k, v in given.items()}
            batch.add(split="train", class_name=f"c{i % 3}", index=i, **one)
    opened = EmbeddingStore.open(store.path)
    assert (batch.added, opened.commit, len(opened)) == (23, 1, 23)
    assert np.array_equal(opened.select().read("t5"), given["t5"])


def test_an_append_of_nothing_is_no_commit(store):
    with store.append(node=0, round=0) as batch:
        pass
    assert (batch.added, store.commit) == (0, 0)
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=[], **values(0))
    assert EmbeddingStore.open(store.path).commit == 0


def test_late_rounds_are_found_whatever_their_order(store):  # cases.md c2
    given = {r: fill(store, node=0, round=r) for r in (7, 6)}
    late = fill(store, node=3, round=5)
    selection = EmbeddingStore.open(store.path).select(round=range(5, 7))
    assert sorted({(k.node, k.round) for k in selection.keys()}) == [("0", 6), ("3", 5)]
    for key, t5 in zip(selection.keys(), selection.read("t5"), strict=True):
        source = late if key.node == "3" else given[key.round]
        assert np.array_equal(t5, source[key.class_name, key.index]["t5"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t5": None}, "t5: expected a tensor [3, 8], got None"),
        ({"clip": np.zeros((2, 5), np.float32)}, "clip: expected [n, 4]"),
        ({"t5": np.zeros((2, 3, 8))}, "t5: expected float32, float16 or bfloat16, got float64"),
        ({"t5": [[1.0]]}, "t5: expected float32"),
        ({"clip": np.zeros((3, 4), np.float32)}, "as many records"),
        ({"audio": np.zeros((2, 4), np.float32)}, "audio"),
        ({"index": [0]}, "index: expected 2 values"),
        ({"index": [0, -1]}, "index: expected a whole number"),
        ({"index": [0, 1.5]}, "index: expected a whole number"),
        ({"round": -1}, "round: expected a whole number"),
        ({"round": True}, "round"),
        ({"node": ""}, "node: expected text that is not empty"),
        ({"node": None}, "expected a value for node"),
        ({"split": 3}, "split: expected text"),
        ({"class_name": "a\ud800"}, "not valid UTF-8"),
        ({"class_name": "\ufffd"}, "class_name"),
        ({"sample_id": [1, 2]}, "sample_id: expected text"),
        ({"timestamp": "yesterday"}, "timestamp: expected a datetime"),
        ({"extra": {"x": object()}}, "extra"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(store, change, words):
    add(store, 1)
    before = {f: f.read_bytes() for f in store.path.rglob("*") if f.is_file()}
    given = {"split": "train", "class_name": "dog", "index": [0, 1], "node": 1, "round": 1}
    with pytest.raises(SchemaMismatchError) as error, store.append() as batch:
        batch.add(**(given | values(2) | change))
    assert words in str(error.value)
    assert {f: f.read_bytes() for f in store.path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["t5", "clip"])
def test_non_finite_values_are_refused_and_named(store, column, bad):  # cases.md a16
    given = values(3)
    given[column].reshape(3, -1)[1, 2] = bad
    with pytest.raises(SchemaMismatchError, match=f"{column} of node 0.*index 1 .*not finite"):
        add(store, 3, **given)
    assert EmbeddingStore.open(store.path).commit == 0


def test_values_that_bfloat16_cannot_hold_are_refused(tmp_path):  # cases.md a16
    schema = Schema.flux(3, width=8, clip=(4,), precision="bfloat16")
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    given = values(1, schema=schema)
    given["clip"][0, 0] = np.finfo(np.float32).max
    with pytest.raises(SchemaMismatchError, match="not finite in bfloat16"):
        add(store, 1, **given)


def test_optional_audio(tmp_path):
    schema = Schema.flux(3, width=8, clip=(4,), audio=(2, 5), granule=4)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    audio = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=[0, 1], audio=audio, **values(2))
        batch.add(split="val", class_name="dog", index=[0, 1, 2, 3, 4], **values(5))
    with store.append(node=1, round=0) as batch:
        batch.add(split="val", class_name="dog", index=0, **values(1))
    opened = EmbeddingStore.open(store.path)
    assert opened.select().records["has_audio"].tolist() == [True, True] + [False] * 6
    assert np.array_equal(opened.select(split="train").read("audio"), audio)
    assert np.isnan(opened.select(split="val").read("audio")).all()
    (store.path / "audio" / "c.0.0.0").unlink()
    with pytest.raises(DamagedDataError, match="audio of node 0.*index 0"):
        EmbeddingStore.open(store.path).select(split="train").read("audio")
    (store.path / "has_audio" / "c.0").unlink()
    with pytest.raises(DamagedDataError, match="key column has_audio"):
        _ = EmbeddingStore.open(store.path).select().records


def test_create_refuses_what_is_there(store, tmp_path):
    with pytest.raises(ConflictError, match="already"):
        EmbeddingStore.create(store.path, SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConflictError, match="a file is there"):
        EmbeddingStore.create(tmp_path / "file", SMALL)
    (tmp_path / "home" / "photos").mkdir(parents=True)
    with pytest.raises(ConflictError, match="photos"):
        EmbeddingStore.create(tmp_path / "home", SMALL)


def test_create_takes_over_what_a_killed_create_left(store, tmp_path):
    (store.path / "zarr.json").unlink()
    (store.path / "t5" / "zarr.json.123.tmp").write_text("{")
    assert EmbeddingStore.create(store.path, SMALL).commit == 0
    add(store, 1)


def test_create_does_not_take_over_data(store):
    add(store, 1)
    (store.path / "zarr.json").unlink()
    with pytest.raises(ConflictError, match=r"c\.0"):
        EmbeddingStore.create(store.path, SMALL)


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(NotFoundError, match=r"no embedding store at .*nothing\.zarr"):
        EmbeddingStore.open(tmp_path / "nothing.zarr")
    (tmp_path / "zarr.json").write_text(
        '{"zarr_format": 3, "node_type": "group", "attributes": {}}'
    )
    with pytest.raises(NotFoundError, match="not an embedding store"):
        EmbeddingStore.open(tmp_path)


def test_as_of_shows_the_past_and_cannot_be_written(store):
    fill(store, node=0, round=1)
    fill(store, node=0, round=2)
    past = EmbeddingStore.open(store.path, as_of=1)
    assert {k.round for k in past.select().keys()} == {1}
    assert (past.commit, len(past)) == (1, 6)
    with pytest.raises(SchemaMismatchError, match="as of commit 1"):
        past.append(node=0, round=3)
    with pytest.raises(NotFoundError, match="from 0 to 2"):
        EmbeddingStore.open(store.path, as_of=3)


def test_an_open_store_keeps_its_commit_until_refresh(store):
    reader = EmbeddingStore.open(store.path)
    fill(store, node=0, round=1)
    assert len(reader) == 0
    reader.refresh()
    assert len(reader) == 6


def test_a_busy_store_says_so(store):
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=0, **values(1))
        batch._write(rest=True)
        code = (
            "import numpy as np; from fedgfe_store import EmbeddingStore\n"
            "from fedgfe_store.errors import BusyError\n"
            f"store = EmbeddingStore.open({str(store.path)!r})\n"
            "try:\n"
            "    with store.append(node=1, round=0, timeout=0.2) as b:\n"
            "        b.add(split='train', class_name='dog', index=0,\n"
            "              t5=np.ones((3, 8), np.float32), clip=np.ones(4, np.float32))\n"
            "except BusyError as error: print(error)\n"
        )
        out = finished([sys.executable, "-c", code])
        assert "gave up after 0.2 s" in out.stdout, out.stderr
    assert issubclass(BusyError, TimeoutError)
    assert len(EmbeddingStore.open(store.path)) == 1


def test_classes_join_by_name_in_order_of_arrival(tmp_path):  # cases.md c16
    schema = Schema.flux(3, width=8, clip=(4,), metadata=Metadata(classes=("dog", "cat")))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    first = fill(store, node=0, round=1, classes="cat dog")
    second = fill(store, node=1, round=1, classes="bird dog cat")
    assert store.schema.metadata.classes == ("dog", "cat", "bird")
    selection = EmbeddingStore.open(store.path).select(class_name="dog")
    for key, t5 in zip(selection.keys(), selection.read("t5"), strict=True):
        source = first if key.node == "0" else second
        assert np.array_equal(t5, source["dog", key.index]["t5"])


@pytest.mark.slow
def test_few_files_for_many_records(tmp_path):
    for tokens in (17, 512):
        schema = Schema.flux(tokens)
        store = EmbeddingStore.create(tmp_path / f"{tokens}.zarr", schema)
        before = sum(1 for f in store.path.rglob("*") if f.is_file())
        files = math.ceil(400 / schema.granule) * len(schema.tensors)
        assert files + 16 <= 80
        if tokens == 17:
            add(store, 400, **values(400, schema=schema))
            after = sum(1 for f in store.path.rglob("*") if f.is_file())
            assert after - before <= 64


def test_schema_survives_json():
    schemas = [
        Schema.flux(512, clip=(77, 768), audio=(1214, 768), precision="bfloat16"),
        Schema.sd(metadata=Metadata("exp", "sd", ("a", "b"), "enc", "tiny")),
    ]
    for schema in schemas:
        assert Schema.from_json(schema.to_json()) == schema


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schema.flux(0), "t5"),
        (lambda: Schema.flux(precision=cast(Any, "float8")), "precision"),
        (lambda: Schema.flux(clip=(1, 2, 3)), "clip"),
        (lambda: Schema.flux(granule=0), "granule"),
        (lambda: Metadata(experiment="a\ud800"), "experiment"),
    ],
)
def test_bad_schemas_are_refused(make, words):
    with pytest.raises(SchemaMismatchError, match=words):
        make()


def test_two_names_of_one_store_share_one_lock(store, tmp_path):
    link = tmp_path / "link.zarr"
    link.symlink_to(store.path)
    add(EmbeddingStore.open(link), 1)
    assert len(EmbeddingStore.open(store.path)) == 1
    assert [p.name for p in tmp_path.glob(".*.lock")] == [".embeddings.zarr.lock"]


def test_a_relative_path_means_the_same_after_a_change_of_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = EmbeddingStore.create("s.zarr", SMALL)
    given = fill(store, node=0, round=1)
    selection = store.select(class_name="dog", index=0)
    assert str(store.path) == "s.zarr"
    monkeypatch.chdir("elsewhere")
    assert np.array_equal(selection.read("t5")[0], given["dog", 0]["t5"])
    fill(store, node=0, round=2)
    store.delete(round=1)
    store.compact()
    store.refresh()
    assert (len(store), store.verify().sound, len(store.history())) == (6, True, 4)
    assert not list(tmp_path.glob("elsewhere/*"))


@pytest.mark.parametrize("path", ["a\0b", 7, None, b"x"])
def test_what_is_no_path_is_refused_in_one_line(path):
    for call in (EmbeddingStore.open, lambda p: EmbeddingStore.create(p, SMALL)):
        with pytest.raises(SchemaMismatchError, match="path: expected that of a folder"):
            call(path)
