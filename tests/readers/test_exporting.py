"""Parquet and safetensors: what their own readers read is what the store has, to the last bit."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.schema import TensorColumn

pq = pytest.importorskip("pyarrow.parquet")

MANY_KINDS = Schema.of(
    "custom",
    TensorColumn("sequence", (5, 3), ragged=True),
    TensorColumn("tokens", (4,), dtype="int64", ragged=True, optional=True),
    TensorColumn("mask", (5,), dtype="bool"),
    TensorColumn("audio", (2, 2), optional=True),
    clip=(4,),
    granule=4,
    metadata=Metadata("vegas", classes=("dog",)),
)


@pytest.fixture
def many(tmp_path):
    """Two rounds of a node with a dot in its name, of columns of every kind."""
    store = EmbeddingStore.create(tmp_path / "s.zarr", MANY_KINDS)
    rng = np.random.default_rng(0)
    for number in (1, 2):
        with store.append(node="site.a", round=number) as batch:
            for i in range(11):
                some = {
                    "audio": rng.standard_normal((2, 2), np.float32),
                    "tokens": np.arange(i % 4 + 1),
                }
                batch.add(
                    split="train", class_name="dog", index=i,
                    sequence=rng.standard_normal((i % 5 + 1, 3), np.float32),
                    mask=rng.random(5) > 0.5, clip=rng.standard_normal(4, np.float32),
                    extra={"é": i}, **(some if i % 3 else {}),
                )  # fmt: skip
    return store


def test_parquet_has_the_frame_and_the_tensors(many, tmp_path, monkeypatch):
    monkeypatch.setattr("fedgfe_store.readers.parquet._GROUP_ROWS", 4)  # several row groups
    selection = many.select(round=2)
    (file,) = selection.to_parquet(tmp_path / "out", tensors=None)
    assert (file.path.name, file.records) == ("node_site.a_embeddings_r2.parquet", 11)
    assert pq.ParquetFile(file.path).num_row_groups == 3
    back = pd.read_parquet(file.path)
    frame = selection.records
    pd.testing.assert_frame_equal(back[frame.columns], frame, check_dtype=False)
    table = pq.read_table(file.path)
    for column in MANY_KINDS.tensors:
        expected = selection.read(column.name)
        has = selection.read(f"has_{column.name}") if column.optional else np.ones(11, bool)
        lengths = selection.read(f"length_{column.name}") if column.ragged else [None] * 11
        found = table[column.name].to_pylist()
        assert [value is not None for value in found] == has.tolist()
        for value, right, length, is_there in zip(found, expected, lengths, has, strict=True):
            if is_there:
                assert np.array_equal(np.array(value, column.dtype), right[:length])
    assert "fixed_size_list<element: float>[4]" in str(table.schema.field("clip").type)
    told = json.loads(table.schema.metadata[b"fedgfe_store"])
    assert told == {"experiment": "vegas", "kind": "custom", "precision": "float32",
                    "store_id": many.id, "commit": 2}  # fmt: skip


def test_parquet_without_tensors_reads_none(many, tmp_path, reads):
    files = many.select().to_parquet(tmp_path / "out")
    assert [file.round for file in files] == [1, 2]
    assert not [name for name in reads if name.startswith("clip/")]
    frame = pd.read_parquet(tmp_path / "out")
    pd.testing.assert_frame_equal(frame, many.select().records, check_dtype=False)


def test_safetensors_have_what_read_gives(many, tmp_path):
    selection = many.select(round=1)
    (file,) = selection.to_safetensors(tmp_path / "out")
    tensors = safetensors.torch.load_file(file.path)
    names = [*MANY_KINDS.columns, *MANY_KINDS.marks]
    assert sorted(tensors) == sorted(names)
    for name in names:
        right = selection.read(name)
        assert tensors[name].numpy().tobytes() == right.tobytes()
        assert tensors[name].numpy().dtype == right.dtype
    with safetensors.safe_open(file.path, "pt") as opened:
        told = opened.metadata()
    records = pd.DataFrame(json.loads(told["records"]))
    assert records["extra"].tolist() == selection.records["extra"].tolist()
    assert records["clip_digest"].tolist() == selection.records["clip_digest"].tolist()
    assert pd.to_datetime(records["timestamp"]).tolist() == selection.records["timestamp"].tolist()
    assert (told["experiment"], told["commit"]) == ("vegas", "2")


def test_rounded_stores_are_exact_in_either(tmp_path):
    store = EmbeddingStore.create(
        tmp_path / "s.zarr", Schema.flux(3, width=8, clip=(4,), precision="bfloat16")
    )
    given = values(3)
    given["clip"][0] = [-0.0, 1e-40, -3.3e38, 1.005]
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(3), **given)
    selection = store.select()
    (file,) = selection.to_safetensors(tmp_path / "out", tensors=["clip"])
    (clip,) = safetensors.torch.load_file(file.path).values()
    assert clip.dtype == torch.bfloat16
    assert clip.float().numpy().tobytes() == selection.read("clip").tobytes()
    (file,) = selection.to_parquet(tmp_path / "out", tensors=["t5"])
    found = np.array(pq.read_table(file.path)["t5"].to_pylist(), np.float32)
    assert found.tobytes() == selection.read("t5").tobytes()


def test_files_are_whole_or_not_there(store, tmp_path):
    for number in (1, 5):
        fill(store, node=0, round=number)
    (store.path / "t5" / "c.1.0.0").unlink()  # in the second file of the first round
    for write in (store.select().to_safetensors, store.select().to_parquet):
        bad, good = write(tmp_path / write.__name__, tensors=None)
        assert "t5 of node 0, round 1" in str(bad.error)
        assert (good.error, good.bytes) == (None, good.path.stat().st_size)
        assert [path.name for path in (tmp_path / write.__name__).iterdir()] == [good.path.name]
        with pytest.raises(ConflictError, match="1 of 2 files are there already"):
            write(tmp_path / write.__name__)
        again = write(tmp_path / write.__name__, overwrite=True, tensors=["clip"])
        assert [file.error for file in again] == [None, None]
        with pytest.raises(SchemaMismatchError, match="tensor column: expected one of t5, clip"):
            write(tmp_path / "no", tensors=["t6"])
        with pytest.raises(SchemaMismatchError, match="expected a list of columns, got 't5'"):
            write(tmp_path / "no", tensors="t5")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_memory_is_that_of_a_piece(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("fedgfe_store.readers.parquet._GROUP_BYTES", 2**20)
    schema = Schema.of("custom", values=(64, 256), granule=4)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    with store.append(node=0, round=1) as batch:
        for start in range(0, 320, 64):
            tensors = values(64, start, schema)
            batch.add(split="train", class_name="dog", index=range(start, start + 64), **tensors)
    selection = EmbeddingStore.open(store.path).select()
    write = selection.to_parquet if kind == "parquet" else selection.to_safetensors
    tracemalloc.start()
    (file,) = write(tmp_path / "out", tensors=None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.bytes > 15e6
    assert peak < 6e6


@pytest.mark.long
def test_datasets_of_hugging_face_read_it(many, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    selection = many.select()
    selection.to_parquet(tmp_path / "out", tensors=None)
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=cache
    )
    assert found["clip_digest"][:] == selection.records["clip_digest"].tolist()
    arrays = found.select_columns(["clip"]).with_format("numpy")[:]
    assert np.array_equal(arrays["clip"], selection.read("clip"))
    found.save_to_disk(str(tmp_path / "disk"))
    again = datasets.load_from_disk(str(tmp_path / "disk"))
    assert again.column_names == found.column_names


def test_the_command_writes_them(store, tmp_path):
    fill(store, node=0, round=1)
    fill(store, node="server", round=1)

    def run(*arguments):
        command = [
            "--store",
            str(store.path),
            "export",
            "-q",
            "--output-dir",
            str(tmp_path / "out"),
        ]
        return CliRunner().invoke(group, [*command, *arguments])

    told = run("--to", "parquet", "--tensors", "clip")
    assert told.exit_code == 0, told.output
    assert "2 files" in told.stdout
    table = pq.read_table(tmp_path / "out" / "server_embeddings_r1.parquet")
    assert "clip" in table.column_names
    assert "t5" not in table.column_names
    assert run("--to", "safetensors", "--node", "0").exit_code == 0
    tensors = safetensors.torch.load_file(tmp_path / "out" / "node_0_embeddings_r1.safetensors")
    assert {name: tuple(t.shape[1:]) for name, t in tensors.items()} == SMALL.columns
    for wrong, words in (
        (["--tensors", "clip"], "--tensors is of --to parquet"),
        (["--to", "parquet", "--layout", "guide"], "--layout is of --to pt"),
        (["--to", "parquet", "--tensors", "t6"], "expected one of t5, clip, got 't6'"),
    ):
        told = run(*wrong)
        assert told.exit_code in (1, 2)
        assert words in told.stderr
