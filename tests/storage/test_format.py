"""The format seen from outside: other readers, killed writers, damaged and missing files."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from conftest import SMALL, fill, values
from places import DATA, TESTS
from processes import Process, finished, started

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import (
    BusyError,
    ConflictError,
    DamagedDataError,
    SchemaMismatchError,
)


def plain(path: Path) -> xr.Dataset:
    """Open the store as README shows for any Zarr reader: the mask of the last commit."""
    dataset = xr.open_zarr(path)
    commit = dataset.attrs["fedgfe_store"]["commit_point"]["commit"]
    created, deleted = dataset["created_in"], dataset["deleted_in"]
    visible = (created > 0) & (created <= commit) & ~((deleted > 0) & (deleted <= commit))
    return dataset.isel(record=np.flatnonzero(visible))


def zarr_array(path: Path, name: str) -> zarr.Array:
    """Open a column as zarr-python finds it in the store."""
    array = zarr.open_group(path, mode="r")[name]
    assert isinstance(array, zarr.Array)
    return array


def zarr_values(array: zarr.Array) -> np.ndarray:
    return np.asarray(array[:])


def raw_tensor(path: Path, name: str):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return tensorstore.open(spec, read=True).result()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_readers_see_the_same_numbers(tmp_path, precision):
    schema = Schema.flux(17, precision=precision)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    fill(store, node=0, round=1, n=5)
    fill(store, node="server", round=1, n=20)
    selection = EmbeddingStore.open(store.path).select()
    other = plain(store.path)
    rows = selection.rows
    for name in schema.columns:
        ours = selection.read(name)
        assert np.array_equal(raw_tensor(store.path, name)[rows].read().result(), ours)
        assert np.array_equal(other[name].to_numpy(), ours)
        assert np.array_equal(zarr_values(zarr_array(store.path, name))[rows], ours)
    frame = selection.records
    for name in ("node", "round", "split", "class_name", "index", "sample_id"):
        assert other[name].to_numpy().tolist() == frame[name].tolist()
    digests = [f"{digest:016x}" for digest in other["t5_digest"].to_numpy().tolist()]
    assert digests == frame["t5_digest"].tolist()
    times = other["timestamp"].to_numpy()
    assert times.dtype.kind == "M"
    assert (times == frame["timestamp"].dt.tz_localize(None).to_numpy()).all()


def zarr_rewrites(path: Path, name: str) -> None:
    array = zarr.open_array(path / name, mode="r+")
    array[:] = array[:]


def tensorstore_rewrites(path: Path, name: str) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    array = tensorstore.open(spec, open=True).result()
    array.write(array.read().result()).result()


@pytest.mark.parametrize("rewrite", [zarr_rewrites, tensorstore_rewrites])
def test_what_other_writers_encode_is_read(tmp_path, rewrite):
    schema = Schema.flux(17, audio=(3, 5))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    audio = np.ones((6, 3, 5), np.float32)
    fill(store, node=0, round=1, n=40)
    with store.append(node=0, round=2) as batch:
        batch.add(
            split="val", class_name="dog", index=range(6), audio=audio, **values(6, 1, schema)
        )
    fill(store, node=0, round=3, n=2)
    before = {name: store.select().read(name) for name in schema.columns}
    frame = store.select().records
    for name in (*schema.columns, "round", "index", "t5_digest", "has_audio", "created_in"):
        files = {f: f.read_bytes() for f in (store.path / name).glob("c.*")}
        rewrite(store.path, name)
        written = {f: f.read_bytes() for f in (store.path / name).glob("c.*")}
        assert name == "has_audio" or written.keys() == files.keys()
    if rewrite is zarr_rewrites:  # TensorStore has no text in Zarr v3
        for name in ("node", "class_name", "sample_id", "extra"):
            rewrite(store.path, name)
    again = EmbeddingStore.open(store.path)
    for name, expected in before.items():
        assert np.array_equal(again.select().read(name), expected, equal_nan=True)
    assert again.select().records.equals(frame)
    assert again.verify().sound


@pytest.mark.parametrize("records", [1, 2, 4])
def test_the_size_of_chunks_is_that_of_the_store(tmp_path, monkeypatch, records):
    with monkeypatch.context() as patched:
        patched.setattr("fedgfe_store.schema._CHUNK_BYTES", records * 3 * 8 * 4)
        store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    given = fill(store, node=0, round=1, n=5)
    array = zarr_array(store.path, "t5")
    assert array.shards is not None
    assert (array.shards[0], array.chunks[0]) == (4, records)
    selection = EmbeddingStore.open(store.path).select()
    order = np.random.default_rng(0).integers(0, 10, 25)
    for part in (selection, selection.take(order), selection.take([3]), selection.take([5, 4])):
        expected = [given[key.class_name, key.index]["t5"] for key in part.keys()]
        assert np.array_equal(part.read("t5"), expected)
    assert np.array_equal(zarr_values(array)[selection.rows], selection.read("t5"))


def sealed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("entry", "words"),
    [((2**40, 100), "points beyond"), ((0, 2**63), "points beyond"), ((0, 3), "another size")],
)
def test_an_index_with_a_sound_checksum_is_still_not_trusted(store, entry, words):
    fill(store, node=0, round=1)
    file = store.path / "t5" / "c.0.0.0"
    content = file.read_bytes()
    index = np.array([entry], "<u8").tobytes()
    file.write_bytes(content[: -len(sealed(index))] + sealed(index))
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1") as error:
        EmbeddingStore.open(store.path).select().read("t5")
    assert words in str(error.value.__cause__)


@pytest.mark.parametrize("field", [4, 12])  # what it becomes, and what it is
def test_a_chunk_of_another_size_is_not_decoded(store, field):
    fill(store, node=0, round=1)
    file = store.path / "t5" / "c.0.0.0"
    content = file.read_bytes()
    (place, size) = np.frombuffer(content[-20:-4], "<u8").tolist()
    chunk = bytearray(content[place : place + size - 4])
    chunk[field : field + 4] = (2**30).to_bytes(4, "little")
    file.write_bytes(content[:place] + sealed(bytes(chunk)) + content[place + size :])
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1") as error:
        EmbeddingStore.open(store.path).select().read("t5")
    assert "another size" in str(error.value.__cause__)


def test_integers_keep_their_type_and_zero(store):  # cases.md c15
    fill(store, node=0, round=0)
    other = plain(store.path)
    assert other["round"].dtype == np.int32
    assert other["index"].dtype == np.int64
    assert (other["round"] == 0).all()
    assert other["index"].to_numpy().tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.slow
def test_every_way_to_open_agrees_after_appends(store):  # cases.md c16, c17
    for round_ in range(3):
        fill(store, node=0, round=round_)
    inside = xr.open_zarr(store.path)
    code = f"import xarray as xr; print(dict(xr.open_zarr({str(store.path)!r}).sizes))"
    out = finished([sys.executable, "-c", code])
    assert out.stdout.strip() == str(dict(inside.sizes))
    shapes = {name: array.shape for name, array in zarr.open_group(store.path, mode="r").arrays()}
    unconsolidated = zarr.open_group(store.path, mode="r", use_consolidated=False)
    assert {name: array.shape for name, array in unconsolidated.arrays()} == shapes
    lengths = {shape[0] for name, shape in shapes.items() if not name.startswith("commit_")}
    assert lengths == {24}


def test_other_peoples_attributes_and_arrays_are_kept(store):
    fill(store, node=0, round=1)
    group = zarr.open_group(store.path, mode="r+")
    group.attrs["note"] = "mine"
    group.create_array("labels", shape=(2,), dtype="int64")[:] = [4, 5]
    if group.metadata.consolidated_metadata is None:
        pytest.fail("zarr dropped the consolidated metadata")
    reopened = EmbeddingStore.open(store.path)
    fill(reopened, node=0, round=2)
    group = zarr.open_group(store.path, mode="r")
    assert group.attrs["note"] == "mine"
    assert zarr_values(zarr.open_array(store.path / "labels")).tolist() == [4, 5]


def published(path: Path) -> str:
    """What a store's zarr.json says, in its order, but for what differs by time and by chance."""
    document = json.loads((path / "zarr.json").read_bytes())
    ours = document["attributes"]["fedgfe_store"]
    del ours["checksum"], ours["id"], ours["key_digests"]["commit_time"]
    return json.dumps(document)


@pytest.mark.parametrize("version", [1, 2])
def test_a_writer_that_stays_open_publishes_what_one_that_opens_anew_does(tmp_path, version):
    here, there = tmp_path / "here.zarr", tmp_path / "there.zarr"
    if version == 1:
        shutil.copytree(DATA / "federation_v1.zarr", here)
    else:
        EmbeddingStore.create(here, SMALL)
    zarr.open_group(here, mode="r+").attrs["note"] = "mine"
    shutil.copytree(here, there)
    stays = EmbeddingStore.open(here)
    for number in range(3):
        for writer in (stays, EmbeddingStore.open(there)):
            given = values(3, schema=writer.schema)
            with writer.append(node=0, round=900 + number) as batch:
                batch.add(
                    split="train",
                    class_name=f"class {number}",
                    index=range(3),
                    file_id=["a", "b", "c"],
                    timestamp=datetime(2026, 1, 2, tzinfo=UTC),
                    **given,
                )
            writer.delete(round=900 + number, index=1)
    assert "mine" in published(here)
    assert published(here) == published(there)
    assert EmbeddingStore.open(here).verify().sound


WRITER = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from conftest import values
from fedgfe_store import EmbeddingStore
from fedgfe_store.storage import append
append._BUFFER_BYTES = 4000
store = EmbeddingStore.open({path!r})
print("ready", flush=True)
for round in range(100, 10_000):
    with store.append(node=0, round=round) as batch:
        for i in range(40):
            batch.add(split="train", class_name="dog", index=i,
                      **{{k: v[0] for k, v in values(1, round * 100 + i).items()}})
    print(round, flush=True)
"""


@contextmanager
def writing(path: Path) -> Iterator[Process]:
    code = WRITER.format(path=str(path), tests=str(TESTS))
    with started([sys.executable, "-c", code]) as process:
        assert process.line() == "ready"
        yield process


def check_commits(path: Path, acknowledged: int) -> int:
    """All of every acknowledged round, nothing of a partial one, in our reader and in xarray."""
    other = plain(path)
    # The writer goes on between two openings: look at the same commit through both.
    commit = other.attrs["fedgfe_store"]["commit_point"]["commit"]
    store = EmbeddingStore.open(path, as_of=commit)
    rounds = sorted({k.round for k in store.select().keys()} - {1})
    assert len(store) == 6 + 40 * len(rounds)
    assert len(rounds) >= acknowledged
    assert rounds == list(range(100, 100 + len(rounds)))
    assert other["round"].to_numpy().tolist() == store.select().records["round"].tolist()
    for round_ in rounds[-2:]:
        selection = store.select(round=round_)
        expected = np.stack([values(1, round_ * 100 + i)["t5"][0] for i in range(40)])
        assert np.array_equal(selection.read("t5"), expected)
        here = other["round"].to_numpy() == round_
        assert np.array_equal(other["t5"].isel(record=here).to_numpy(), expected)
    return len(rounds)


@pytest.mark.slow
@pytest.mark.kill
def test_readers_while_a_writer_appends_and_after_it_was_killed(store):  # cases.md c5
    fill(store, node=0, round=1)
    done = 0
    rng = random.Random(5)
    for _ in range(3):
        with writing(store.path) as writer:
            for _ in range(rng.randint(1, 5)):
                check_commits(store.path, 0)
            writer.kill()
            numbers = list(map(int, writer.lines()))
        acknowledged = max(numbers, default=99) - 99
        done = check_commits(store.path, max(done, acknowledged))
    last = EmbeddingStore.open(store.path)
    fill(last, node=7, round=5000)
    assert not (store.path / "pending").exists()
    assert not [f for f in store.path.rglob("*") if f.name.endswith((".tmp", ".partial"))]
    granules = last._snapshot.point.records // SMALL.granule
    for name in SMALL.columns:
        assert {int(f.name.split(".")[1]) for f in store.path.glob(f"{name}/c.*")} == set(
            range(granules)
        )


def test_a_reader_of_the_last_commit_is_right_while_a_writer_holds_the_tail(store):
    fill(store, node=0, round=1)
    with store.append(node=1, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        batch._write(rest=True)
        reader, other = EmbeddingStore.open(store.path), plain(store.path)
        assert (len(reader), reader.commit, other.sizes["record"]) == (6, 1, 6)
        assert np.array_equal(reader.select().read("t5"), other["t5"].to_numpy())
    assert len(EmbeddingStore.open(store.path)) == 15
    assert len(reader) == 6


@pytest.mark.slow
def test_two_writers_at_once_lose_nothing(store):
    code = """
import sys; sys.path.insert(0, {tests!r})
from conftest import fill
from fedgfe_store import EmbeddingStore
store = EmbeddingStore.open({path!r})
for round in range(5): fill(store, node={node}, round=round)
"""
    sources = [code.format(tests=str(TESTS), path=str(store.path), node=node) for node in (0, 1)]
    with ExitStack() as stack:
        writers = [stack.enter_context(started([sys.executable, "-c", s])) for s in sources]
        assert [writer.wait() for writer in writers] == [0, 0]
    opened = EmbeddingStore.open(store.path)
    assert (opened.commit, len(opened)) == (10, 60)
    opened.select().read("t5")


@pytest.fixture
def no_locks(monkeypatch):
    class NoLock:
        def release(self):
            pass

    monkeypatch.setattr("fedgfe_store.storage.commit.WriterLock", lambda path, timeout: NoLock())


def test_without_locks_a_writer_still_waits_for_the_other(store, no_locks):
    other = EmbeddingStore.open(store.path)
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        batch._write(rest=True)
        with pytest.raises(BusyError, match="is being written by process .*: gave up after 0.1 s"):
            other.delete(node=0, timeout=0.1)
    fill(other, node=1, round=1)
    assert {k.node for k in other.select().keys()} == {"0", "1"}
    assert other.verify().sound


def test_a_writer_taken_for_dead_finds_out_and_hurts_nothing(store, no_locks, monkeypatch):
    fill(store, node=5, round=1, n=1)
    other = EmbeddingStore.open(store.path)
    with pytest.raises(ConflictError, match="another writer came in between"):
        with store.append(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", index=range(9), **values(9))
            batch._write(rest=True)
            monkeypatch.setattr("fedgfe_store.storage.claim_files.TAKEOVER_SECONDS", -1)
            fill(other, node=1, round=1)
    opened = EmbeddingStore.open(store.path)
    assert {k.node for k in opened.select().keys()} == {"1", "5"}
    found = opened.verify()
    assert (found.sound, found.leftovers) == (True, ())
    fill(opened, node=2, round=1)
    assert opened.verify().sound


def damage(path: Path, name: str, offset: int) -> None:
    file = path / name
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x40
    file.write_bytes(data)


def test_a_flipped_bit_is_an_error_that_names_the_record(store):  # cases.md d3
    fill(store, node=3, round=9, classes="dog")
    file = store.path / "t5" / "c.0.0.0"
    good = file.read_bytes()
    named = 0
    for offset in range(0, len(good), 7):
        damage(store.path, "t5/c.0.0.0", offset)
        try:
            read = EmbeddingStore.open(store.path).select().read("t5")
        except DamagedDataError as error:
            assert "t5 of node 3, round 9, split train, class dog, index" in str(error)
            named += 1
        else:
            assert np.array_equal(read, values(3, 40900)["t5"])
        file.write_bytes(good)
    assert named > len(good) / 7 / 2


def test_a_missing_file_is_an_error_and_never_numbers(store):  # cases.md c13
    fill(store, node=0, round=1)
    (store.path / "clip" / "c.1.0").unlink()
    selection = EmbeddingStore.open(store.path).select()
    assert selection.take([0]).read("clip").shape == (1, 4)
    with pytest.raises(DamagedDataError, match="clip of node 0, round 1.*is missing"):
        selection.read("clip")
    with pytest.raises(DamagedDataError, match="clip of node 0, round 1"):
        selection.to_xarray()["clip"].load()
    with pytest.raises(DamagedDataError, match="clip of node 0, round 1"):
        list(selection.batches(2))


@pytest.mark.parametrize("name", ["round", "node", "created_in", "deleted_in", "t5_digest"])
def test_missing_and_damaged_key_chunks(store, name):
    fill(store, node=0, round=1)
    file = store.path / name / "c.0"
    good = file.read_bytes()
    for bad in (None, good[: len(good) // 2], b"", bytes(len(good))):
        if bad is None:
            file.unlink()
        else:
            file.write_bytes(bad)
        with pytest.raises(DamagedDataError, match=name):
            EmbeddingStore.open(store.path).select(round=1, node=0).read("t5")
        file.write_bytes(good)
    assert len(EmbeddingStore.open(store.path).select(round=1)) == 6


def test_a_damaged_group_file_is_never_a_raw_error(store):
    fill(store, node=0, round=1)
    file = store.path / "zarr.json"
    good = file.read_bytes()
    rng = random.Random(1)
    for _ in range(150):
        damage(store.path, "zarr.json", rng.randrange(len(good)))
        try:
            opened = EmbeddingStore.open(store.path)
            assert len(opened) == 6
            assert opened.select().read("t5").shape == (6, 3, 8)
        except (DamagedDataError, SchemaMismatchError, FileNotFoundError):
            pass
        file.write_bytes(good)


def test_a_newer_format_is_refused_by_number(store):
    document = json.loads((store.path / "zarr.json").read_text())
    document["attributes"]["fedgfe_store"]["version"] = 3
    (store.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(SchemaMismatchError, match="format version 3, and this release reads"):
        EmbeddingStore.open(store.path)


def test_lost_consolidated_metadata_is_damage_that_says_so(store):
    fill(store, node=0, round=1)
    document = json.loads((store.path / "zarr.json").read_text())
    del document["consolidated_metadata"]
    (store.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(DamagedDataError, match="did another tool rewrite it"):
        EmbeddingStore.open(store.path)


def test_a_store_of_version_1_opens_for_ever():
    """The fixture was written by the first release and must never be written again."""
    path = DATA / "version1.zarr"
    store = EmbeddingStore.open(path)
    assert (store.commit, len(store), store.schema.precision) == (4, 4, "float32")
    assert store.schema.metadata.classes == ("dog", "cat", "müll")
    assert store.schema.columns == {"t5": (3, 8), "clip": (4,), "audio": (2, 5)}
    assert [str(key) for key in store.select().keys()] == [
        "node 0, round 1, split train, class müll, index 5",
        "node server, round 5, split test, class dog, index 0",
        "node server, round 5, split test, class dog, index 1",
        "node 0, round 1, split train, class dog, index 0",
    ]
    t5 = store.select().read("t5")
    first = np.arange(24, dtype=np.float32).reshape(3, 8)
    assert np.array_equal(t5, np.stack([first + k for k in (48, 100, 124, 200)]))
    assert store.select().records["has_audio"].tolist() == [True, False, False, False]
    assert (store.select(class_name="müll").read("audio") == 1).all()
    assert store.history()["kind"].tolist() == ["append", "append", "replace", "delete"]
    past = EmbeddingStore.open(path, as_of=1).select()
    assert np.array_equal(past.read("clip"), np.arange(12, dtype=np.float32).reshape(3, 4))
    assert past.records["extra"].tolist() == ['{"x": 1}'] * 3
    assert store.verify().sound
    assert np.array_equal(plain(path)["t5"].to_numpy(), t5)
