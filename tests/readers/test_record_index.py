"""The keys as an index of xarray: `sel`, groups, alignment, and files that xarray writes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import xarray as xr
from conftest import SMALL, fill

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.readers.record_index import RecordIndex
from fedgfe_store.records import KEY_COLUMNS


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """Nodes 0, 1 and server, rounds 1, 5 and 10, two classes with three samples each."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for node, number in itertools.product(("0", "1", "server"), (1, 5, 10)):
        fill(store, node=node, round=number)
    return store.select()


@pytest.fixture
def ds(selection):
    return selection.to_xarray()


@pytest.mark.parametrize(
    ("labels", "query"),
    [
        ({"node": 0}, "node == '0'"),
        ({"node": ["1", "server"], "round": 5}, "node in ['1', 'server'] and round == 5"),
        ({"round": slice(2, 10)}, "round > 1"),
        ({"round": [10, 1, 99]}, "round in [1, 10]"),
        ({"class_name": "dog", "index": range(2)}, "class_name == 'dog' and index < 2"),
        ({"round": np.int64(5), "index": np.array([0, 2])}, "round == 5 and index != 1"),
    ],
)
def test_sel_takes_what_a_query_of_the_frame_takes(selection, ds, labels, query):
    expected = selection.records.query(query).index.to_numpy()
    found = ds.sel(labels)
    assert np.array_equal(found.t5, selection.read("t5")[expected])
    assert found.sel(split="train").sizes["record"] == len(expected)


def test_one_value_is_a_scalar_and_all_keys_are_one_record(selection, ds):
    found = ds.sel(round=5)
    assert found["round"].ndim == 0
    assert set(found.xindexes) == set(KEY_COLUMNS) - {"round"}
    one = ds.sel(node=1, round=5, split="train", class_name="cat", index=2)
    (place,) = selection.records.query(
        "node == '1' and round == 5 and class_name == 'cat' and index == 2"
    ).index
    assert np.array_equal(one.t5, selection.read("t5")[place])
    assert {name: one[name].item() for name in KEY_COLUMNS} == {
        "node": "1", "round": 5, "split": "train", "class_name": "cat", "index": 2,
    }  # fmt: skip


def test_what_is_not_there_or_of_another_type_is_named(ds):
    with pytest.raises(KeyError, match="no record of node 7, round 1"):
        ds.sel(node=7, round=1)
    with pytest.raises(SchemaMismatchError, match="round: expected whole numbers"):
        ds.sel(round="5")
    with pytest.raises(SchemaMismatchError, match="method or tolerance"):
        ds.sel(round=6, method="nearest")
    with pytest.raises(SchemaMismatchError, match="slice of numbers with both ends"):
        ds.sel(node=slice("0", "1"))


def test_two_keys_group_records(selection, ds):
    means = ds.t5.groupby(["node", "round"]).mean()
    values, frame = selection.read("t5"), selection.records
    for (node, number), rows in frame.groupby(["node", "round"]).indices.items():
        np.testing.assert_allclose(
            means.sel(node=node, round=number), values[rows].mean(0), rtol=1e-5
        )
    assert means.sizes == {"node": 3, "round": 3, "token": 3, "t5_feature": 8}


def test_arithmetic_goes_by_the_samples(selection, ds):
    late = ds.sel(round=10).isel(record=slice(None, None, -1))
    difference = (late.t5 - ds.sel(round=5).t5).sel(node=1, class_name="dog", index=2)
    frame = selection.records
    own = frame.query("node == '1' and class_name == 'dog' and index == 2").set_index("round")
    places = {number: frame.index[frame.t5_digest == own.t5_digest[number]] for number in (5, 10)}
    values = selection.read("t5")
    assert np.array_equal(difference.squeeze(), (values[places[10]] - values[places[5]])[0])
    twice = ds.isel(record=[0, 0, 1])
    with pytest.raises(SchemaMismatchError, match="each record once"):
        _ = twice.t5 + ds.t5


def test_parts_put_together_are_the_whole(ds):
    parts = [part for _, part in ds.groupby("node")]
    whole = xr.concat(parts, "record")
    assert np.array_equal(whole.t5, ds.t5)
    assert whole.sel(node="server", round=1).sizes["record"] == 6
    cube = ds[["clip"]].unstack("record")
    assert cube.sizes == {"node": 3, "round": 3, "split": 1, "class_name": 2, "index": 3,
                          "clip_feature": 4}  # fmt: skip
    one = {"node": "1", "round": 5, "split": "train", "class_name": "dog", "index": 1}
    assert np.array_equal(cube.sel(one)["clip"], ds.sel(one)["clip"])
    with pytest.raises(SchemaMismatchError, match="keep their names"):
        ds.rename(node="site")
    assert ds.rename(record="sample").sel(node=0).sizes["sample"] == 18


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_files_of_xarray_give_all_back(selection, ds, tmp_path, kind):
    path = tmp_path / f"out.{kind}"
    if kind == "netcdf":
        ds.to_netcdf(path, engine="scipy")  # which knows neither 64 bits nor unsigned numbers
        back = xr.open_dataset(path, engine="scipy").load()
    else:
        selection.to_xarray(chunks=8).to_zarr(path, zarr_format=2)
        back = xr.open_zarr(path).load()
    assert np.array_equal(back.t5, selection.read("t5"))
    frame = selection.records
    for name in (*KEY_COLUMNS, "sample_id", "t5_digest", "extra"):
        assert [*back[name].values] == frame[name].tolist()
    again = back.set_xindex(["node", "round"], RecordIndex)
    assert np.array_equal(again.sel(node=0, round=5)["clip"], ds.sel(node=0, round=5)["clip"])
    back.close()
