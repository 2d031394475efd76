"""The engine ``fedgfe`` of xarray: what it shows, that it is lazy, and which folders it takes."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import xarray as xr
import zarr
import zarr.storage
from conftest import SMALL, fill, values
from processes import finished

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.schema import TensorColumn
from fedgfe_store.xarray_engine import FedgfeBackendEntrypoint


@pytest.fixture
def filled(store):
    """Two nodes and rounds of which one record was deleted, in a store of five commits."""
    for node in (0, "server"):
        for number in (1, 5):
            fill(store, node=node, round=number)
    store.delete(node=0, round=1, class_name="cat", index=2)
    return store


def test_it_shows_what_a_selection_shows(filled):
    dataset = xr.open_dataset(filled.path, engine="fedgfe")
    xr.testing.assert_identical(dataset, filled.select().to_xarray())
    assert dataset.sizes["record"] == 23
    cats = dataset.sel(round=1, class_name="cat", node="0")
    assert sorted(cats["index"].to_numpy()) == [0, 1]


def test_the_past(filled):
    before = xr.open_dataset(str(filled.path), engine="fedgfe", as_of=4)
    assert (before.sizes["record"], before.attrs["commit"]) == (24, 4)
    empty = xr.open_dataset(filled.path, engine="fedgfe", as_of=0)
    assert empty.t5.shape == (0, 3, 8)
    with pytest.raises(NotFoundError, match="as_of: expected a commit from 0 to 5"):
        xr.open_dataset(filled.path, engine="fedgfe", as_of=6)


def test_variables_can_be_dropped(filled):
    dataset = xr.open_dataset(filled.path, drop_variables="t5", engine="fedgfe")
    assert list(dataset.data_vars) == ["clip"]
    assert dataset.sel(class_name="dog").sizes["record"] == 12
    dataset = xr.open_dataset(filled.path, drop_variables=["node", "extra", "no"], engine="fedgfe")
    assert not {"node", "extra", "record"} & set(dataset.variables)
    assert dataset["class_name"].dims == ("record",)
    assert list(dataset.xindexes) == []


def test_values_are_read_only_when_they_are_used(filled, reads):
    dataset = xr.open_dataset(filled.path, engine="fedgfe").sel(node="server", round=5)
    assert reads
    assert not [key for key in reads if key.startswith(("t5/", "clip/"))]
    loaded = dataset.isel(record=[0]).t5.to_numpy()
    assert len({key for key in reads if key.startswith("t5/")}) == 1
    assert np.array_equal(loaded[0], filled.select(node="server", round=5).read("t5")[0])


def test_dask_takes_a_file_at_a_time_and_other_processes_get_no_frame(filled, monkeypatch):
    assert xr.open_dataset(filled.path, engine="fedgfe", chunks={}).chunks["record"] == (23,)
    monkeypatch.setattr("fedgfe_store.readers.xarray._DASK_BYTES", 1)
    dataset = xr.open_dataset(filled.path, engine="fedgfe", chunks={})
    assert dataset.chunks["record"] == (4,) * 5 + (3,)
    assert np.array_equal(dataset.t5.to_numpy(), filled.select().read("t5"))
    lazy = xr.open_dataset(filled.path, engine="fedgfe", cache=False)
    array = lazy.t5.variable._data
    sent = pickle.dumps(array)
    assert b"train_0" not in sent
    copy = pickle.loads(sent)
    assert np.array_equal(copy.get_duck_array(), filled.select().read("t5"))


def test_without_an_engine_named_a_store_is_known(filled):
    dataset = xr.open_dataset(filled.path)
    assert dataset.sizes["record"] == 23


def test_only_stores_of_ours_are_claimed(filled, tmp_path):
    claims = FedgfeBackendEntrypoint().guess_can_open
    zarr.create_group(tmp_path / "other.zarr", attributes={"a": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text('{"attributes": ["fedgfe_store"')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "zarr.json").write_text('{"attributes": ["fedgfe_store"]}')
    assert claims(filled.path)
    assert claims(str(filled.path))
    others = ["other.zarr", "empty", "broken", "list", "no", "embeddings.zarr/t5"]
    assert not any(claims(tmp_path / name) for name in others)
    assert not claims("s3://bucket/embeddings.zarr")
    assert not claims(filled)
    plain = xr.open_dataset(tmp_path / "other.zarr", consolidated=False)
    assert plain.attrs == {"a": 1}


def test_a_damaged_store_is_claimed_and_says_what_is_wrong(filled):
    group = filled.path / "zarr.json"
    group.write_text(group.read_text().replace('"precision": "float32"', '"precision": "bfloat16"'))
    with pytest.raises(DamagedDataError, match=r"zarr\.json is damaged: its checksum"):
        xr.open_dataset(filled.path)


def test_damaged_values_are_named(store):
    fill(store, node=0, round=1)
    dataset = xr.open_dataset(store.path, engine="fedgfe")
    (store.path / "t5" / "c.0.0.0").unlink()
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1, split train, class dog"):
        dataset.t5.load()


def test_what_is_not_a_path_is_refused(store):
    with pytest.raises(SchemaMismatchError, match="expected the path of a store"):
        xr.open_dataset(b"zarr", engine="fedgfe")
    with pytest.raises(NotFoundError, match="no embedding store"):
        xr.open_dataset(store.path / "no.zarr", engine="fedgfe")


def test_an_open_dataset_stays_at_its_commit(store):
    fill(store, node=0, round=1)
    dataset = xr.open_dataset(store.path, engine="fedgfe")
    with store.append(node=0, round=2) as batch:
        batch.add(split="train", class_name="dog", index=0, **values(1, schema=SMALL))
    assert dataset.t5.load().shape[0] == 6
    assert xr.open_dataset(store.path, engine="fedgfe").sizes["record"] == 7
    assert len(EmbeddingStore.open(store.path)) == 7


@pytest.mark.slow
def test_torch_is_not_imported(filled):
    code = (
        "import sys, xarray\n"
        f"dataset = xarray.open_dataset({str(filled.path)!r}, engine='fedgfe').load()\n"
        "print(dataset.sizes['record'], 'torch' in sys.modules)"
    )
    done = finished([sys.executable, "-c", code])
    assert done.stdout.split() == ["23", "False"]


def test_looking_for_engines_imports_little():
    code = (
        "import sys, xarray\nxarray.backends.list_engines()\n"
        "print({'zarr', 'torch', 'numcodecs'} & set(sys.modules))"
    )
    done = finished([sys.executable, "-c", code])
    assert done.stdout.strip() == "set()"


class Somewhere:
    def __fspath__(self):
        return b"embeddings.zarr"


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.zarr", "a\0b", Somewhere(), 5])
def test_names_that_are_no_path_are_no_store(name):
    assert not FedgfeBackendEntrypoint().guess_can_open(name)
    with pytest.raises(SchemaMismatchError, match="engine fedgfe: "):
        xr.open_dataset(name, engine="fedgfe")


@pytest.mark.parametrize(
    "options", [{"as_of": "1"}, {"as_of": 1.5}, {"as_of": [1]}, {"drop_variables": 5}], ids=str
)
def test_options_of_another_type_are_refused(store, options):
    with pytest.raises(SchemaMismatchError, match="^(as_of|drop_variables): expected a?"):
        xr.open_dataset(store.path, engine="fedgfe", **options)


@pytest.mark.parametrize(
    "column", [("a", (5,), ("token",)), ("a", (4, 4), ("x", "x")), ("a", (5,), ("record",))]
)
def test_old_stores_whose_axes_no_dataset_can_have_are_shown(tmp_path, monkeypatch, column):
    with monkeypatch.context() as patch:
        patch.setattr(Schema, "check_new", lambda self: None)
        tensors = (TensorColumn("t5", (3, 8), ("token", "width")), TensorColumn(*column))
        store = EmbeddingStore.create(tmp_path / "s.zarr", Schema("flux", tensors, granule=4))
        fill(store, node=0, round=1)
    dataset = xr.open_dataset(store.path, engine="fedgfe")
    assert dataset["t5"].dims == ("record", "t5_axis_0", "t5_axis_1")
    assert np.array_equal(dataset["a"].to_numpy(), store.select().read("a"))


def test_times_and_names_of_old_stores_are_shown(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fedgfe_store.storage.entry.check_entry", lambda columns, record: None)
        patch.setattr("fedgfe_store.storage.incoming.FIRST_ENTRY", -(2**63))
        with store.append(node=0, round=1) as batch:
            tensors, moment = values(2, schema=SMALL), np.datetime64("1500-01-01", "ms")
            batch.add(
                split="a", class_name=["a\0", "a\tb"], index=[0, 0], timestamp=moment, **tensors
            )
    dataset = xr.open_dataset(store.path, engine="fedgfe").load()
    assert dataset["timestamp"].dt.year.to_numpy().tolist() == [1500, 1500]
    assert dataset["class_name"].to_numpy().tolist() == ["a\0", "a\tb"]
