"""Names of tensor columns and axes: a folder of the store and no other place, on any system."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import xxhash
from conftest import SMALL, fill

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError, SchemaMismatchError
from fedgfe_store.schema import TensorColumn


def with_columns(*columns: TensorColumn, **options) -> Schema:
    return Schema("flux", (TensorColumn("t5", (3, 8), ("token", "width")), *columns), **options)


def named(*names: str) -> Schema:
    return with_columns(*(TensorColumn(n, (4,), (f"{i}",)) for i, n in enumerate(names)))


PATHS = ["../v.zarr/t5", "a/b", "/tmp/x", "a\\b", "C:x", "", ".", "..", ".hidden", "a\0b", "a\n"]
TAKEN = ["node", "round", "index", "extra", "timestamp", "row_digest", "created_in", "commit_time"]
TAKEN += ["commit_kind", "file_id", "commit_source", "zarr.json", "pending", "pending.x", "t5"]
TAKEN += ["t5_digest", "has_t5", "\ud800", "x" * 101]
UNWISE = ["Node", "T5", "CON", "aux.x", "lpt1", "record", "commit", "a b ", "a.", "a*", "has_x"]
UNWISE += ["x_digest", "Commit_Time", "commit_note", "-a", "File_ID"]


@pytest.mark.parametrize("name", [*PATHS, *TAKEN, *UNWISE], ids=ascii)
def test_a_column_cannot_be_called(name):
    with pytest.raises(SchemaMismatchError, match="^tensor column: expected ") as error:
        named(name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", [3, None, b"t5", ("a",)], ids=str)
def test_a_column_is_called_by_a_text(name):
    with pytest.raises(SchemaMismatchError, match="^tensor column: expected the name of a folder"):
        named(name)


def test_columns_are_told_apart_on_every_file_system():
    for names in (["a", "A"], ["é", "É"], ["straße", "STRASSE"]):
        with pytest.raises(SchemaMismatchError, match="differ in more than case"):
            named(*names)
    with pytest.raises(SchemaMismatchError, match="expected each name once, got 2 times, got 'a'"):
        named("a", "a")


def test_columns_of_other_names_are_as_good(tmp_path):
    schema = named("clip", "clap-htsat", "größe", "layer.12", "a b", "x_digests", "hash_a", "c")
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    fill(store, node=0, round=1)
    assert EmbeddingStore.open(store.path).select().read("größe").shape == (6, 4)
    assert EmbeddingStore.open(store.path).verify().sound


AXES: dict[str, list[Any]] = {
    "lengths": [("a", (4,), ("x",)), ("b", (5,), ("x",))],
    "with t5": [("a", (4,), ("token",))],
    "record": [("a", (4,), ("record",))],
    "commit": [("a", (4,), ("commit",))],
    "a column": [("a", (4,), ("t5",))],
    "a key": [("a", (4,), ("node",))],
    "twice": [("a", (4, 4), ("x", "x"))],
    "empty": [("a", (4,), ("",))],
}


@pytest.mark.parametrize("kind", AXES)
def test_one_axis_has_one_length_and_a_name_of_its_own(kind):
    with pytest.raises(SchemaMismatchError, match="axis '.*' to be|axes with names of their own"):
        with_columns(*(TensorColumn(*column) for column in AXES[kind]))


def test_columns_may_share_an_axis(tmp_path):
    schema = with_columns(TensorColumn("mask", (3,), ("token",)))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    fill(store, node=0, round=1)
    assert xr.open_zarr(store.path).sizes["token"] == 3
    assert store.select().to_xarray().sizes["token"] == 3


@pytest.mark.parametrize(
    "column",
    [
        ("a", (2**30,), ("x",)),
        ("a", (2**16, 2**16), ("x", "y")),
        ("a", (10**5000,), ("x",)),
        ("a", (0,), ("x",)),
        ("a", (True,), ("x",)),
        ("a", (2.0,), ("x",)),
        ("a", [4], ("x",)),
        ("a", 4, ("x",)),
        ("a", (4,), (3,)),
        ("a", (4,), "x"),
        ("a", (4,), ("x", "y")),
        ("a", (1,) * 32, tuple(f"x{i}" for i in range(32))),
        ("a", (4,), ("x",), "no"),
    ],
    ids=lambda column: str(column[2])[:20],
)
def test_shapes_that_no_file_can_hold_are_refused(column):
    with pytest.raises(SchemaMismatchError, match="^a: expected "):
        with_columns(TensorColumn(*column))


def test_a_granule_is_a_number():
    wrong: tuple[Any, ...] = (True, 16385, 0, 4.0, "4", 10**5000)
    for granule in wrong:
        with pytest.raises(SchemaMismatchError, match="granule: expected 1 to 16384 records, got"):
            Schema.flux(granule=granule)


def rewritten(path: Path, change) -> None:
    """Change the attribute of ours of a store, and make its checksum fit."""
    file = path / "zarr.json"
    document = json.loads(file.read_bytes())
    ours, arrays = (
        document["attributes"]["fedgfe_store"],
        document["consolidated_metadata"]["metadata"],
    )
    change(ours, arrays)
    ours.pop("checksum")
    text = json.dumps(
        {
            "attributes": ours,
            "arrays": {n: {**m, "shape": m["shape"][1:]} for n, m in arrays.items()},
        },
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
    )
    ours["checksum"] = f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"
    file.write_text(json.dumps(document))


def renamed(old: str, new: str):
    def change(ours, arrays):
        ours["tensors"][new] = ours["tensors"].pop(old)
        for form in ("{}", "{}_digest"):
            arrays[form.format(new)] = arrays.pop(form.format(old))

    return change


def test_a_store_whose_columns_lead_out_of_it_does_not_open(store, tmp_path):
    neighbour = EmbeddingStore.create(tmp_path / "v.zarr", SMALL)
    fill(neighbour, node=0, round=1)
    before = {f: f.read_bytes() for f in neighbour.path.rglob("*") if f.is_file()}
    fill(store, node=0, round=1)
    rewritten(store.path, renamed("t5", "../v.zarr/t5"))
    with pytest.raises((DamagedDataError, SchemaMismatchError), match="the name of a folder"):
        EmbeddingStore.open(store.path)
    assert {f: f.read_bytes() for f in neighbour.path.rglob("*") if f.is_file()} == before


def test_old_stores_with_names_that_new_ones_may_not_have_are_read_and_written(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Schema, "check_new", lambda self: None)
        schema = with_columns(
            TensorColumn("a", (5,), ("token",)), TensorColumn("A b", (4, 4), ("x", "x"))
        )
        store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
        fill(store, node=0, round=1)
    opened = EmbeddingStore.open(store.path)
    fill(opened, node=0, round=2, classes="new")
    opened.delete(round=1)
    opened.compact()
    again = EmbeddingStore.open(store.path)
    assert again.schema.metadata.classes == ("dog", "cat", "new")
    assert np.isfinite(again.select().read("A b")).all()
    assert again.verify().sound
    shutil.rmtree(store.path)
    with pytest.raises(SchemaMismatchError, match="axis 'token' to be 3 long, as in t5, got 5"):
        with_columns(TensorColumn("a", (5,), ("token",)))
