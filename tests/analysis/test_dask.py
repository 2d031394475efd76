"""Dask's workers read and sum: to the last bit as one process does, whatever becomes of them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import SMALL, fill
from distributed import Client, LocalCluster
from processes import HANG, started

from fedgfe_store import EmbeddingStore
from fedgfe_store.analysis import centroids, class_spread, summarize
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError

NODES, ROUNDS = ("0", "1", "server"), (1, 2)
BATCH = 200
"""Bytes of a batch: of `SMALL`'s t5 two records."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for node in NODES:
        for number in ROUNDS:
            fill(store, node=node, round=number, n=5)
    return store


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("fedgfe_store.analysis.scan._BATCH_BYTES", BATCH)


@pytest.fixture(scope="module")
def client():
    """Workers that are threads of this process."""
    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=False, dashboard_address=":0"
    ) as cluster:
        with Client(cluster) as client:
            yield client


@pytest.mark.parametrize(
    ("by", "options"),
    [
        (("round", "class_name"), {}),
        (("node",), {"column": "clip"}),
        (("round", "index"), {"tokens": "flat"}),
    ],
)
def test_centroids_are_the_same_to_the_last_bit(store, client, by, options):
    read: list[int] = []
    here = centroids(store.select(), by, **options)
    there = centroids(store.select(), by, client=client, progress=read.append, **options)
    xr.testing.assert_identical(there, here)
    assert sum(read) == len(store)
    assert len(read) > 4


def test_centroids_from_workers_are_those_of_numpy(store, client):
    selection = store.select(round=2)
    found = class_spread(centroids(selection, ["class_name"], column="clip", client=client))
    values = selection.read("clip").astype(np.longdouble)
    names = selection.records["class_name"].to_numpy()
    own = np.array([values[names == name].mean(0) for name in names])
    within = np.sqrt(((values - own) ** 2).sum(1).mean())
    between = np.sqrt(((own - values.mean(0)) ** 2).sum(1).mean())
    np.testing.assert_allclose(found["within"], float(within), rtol=1e-14)
    np.testing.assert_allclose(found["between"], float(between), rtol=1e-14)


def test_a_summary_is_the_same(store, client):
    read: list[int] = []
    here = summarize(store.select(), ["round", "node"])
    there = summarize(store.select(), ["round", "node"], client=client, progress=read.append)
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert there["drift"].notna().sum() == len(NODES)
    assert sum(read) == len(store)


def test_no_records_are_no_groups(store, client):
    found = centroids(store.select(round=99), client=client)
    assert found.sizes["group"] == 0
    assert len(summarize(store.select(round=99), client=client)) == 0


def test_a_damaged_record_is_named_and_nothing_goes_on(tmp_path, client):
    store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    fill(store, node=0, round=1, n=20)
    file = sorted((store.path / "t5").glob("c.*"))[2]
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1.* is not what was committed"):
        centroids(store.select(), client=client)
    assert not client.futures


def test_other_clients_are_refused(store):
    with pytest.raises(SchemaMismatchError, match=r"expected a dask\.distributed\.Client, got str"):
        centroids(store.select(), client="tcp://scheduler:8786")


def test_tensors_are_dask_arrays_of_as_many_records_as_asked_for(store, client, monkeypatch):
    selection = store.select(node="0")
    dataset = selection.to_xarray(chunks=8)
    assert dataset.chunks["record"] == (8, 8, 4)
    assert dataset["sample_id"].chunks is None
    for name, values in (("t5", selection.read("t5")), ("clip", selection.read("clip"))):
        assert np.array_equal(dataset[name].compute(scheduler=client), values)
    means = dataset["clip"].groupby("class_name").mean().compute(scheduler=client)
    exact = centroids(selection, ["class_name"], column="clip")
    np.testing.assert_allclose(means, exact["centroid"], rtol=1e-5)
    assert selection.to_xarray(chunks={"record": 10}).chunks["record"] == (10, 10)
    monkeypatch.setattr("fedgfe_store.readers.xarray._DASK_BYTES", 1)
    assert selection.to_xarray(chunks={}).chunks["record"] == (4,) * 5, "a file each"


@pytest.mark.parametrize("chunks", [0, -1, True, 2.5, "auto", {"token": 1}, {"record": "auto"}])
def test_odd_chunks_are_refused(store, chunks):
    with pytest.raises(SchemaMismatchError, match="chunks: expected a number of records such as"):
        store.select().to_xarray(chunks=chunks)


def test_without_dask_it_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(NotFoundError, match=r"needs dask: pip install 'fedgfe-store\[dask\]'"):
        store.select().to_xarray(chunks={})


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.kill
def test_what_a_killed_worker_had_is_read_again(store):
    here = centroids(store.select())
    options: dict[str, Any] = {"threads_per_worker": 1, "processes": False, "protocol": "tcp"}
    with LocalCluster(n_workers=1, dashboard_address=":0", **options) as cluster:
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny"]
        worker += ["--nthreads", "1", "--no-dashboard", cluster.scheduler_address]
        with started(worker, stderr=subprocess.STDOUT) as other, Client(cluster) as client:
            client.wait_for_workers(2, timeout=HANG)
            read: list[int] = []

            def progress(records: int) -> None:
                read.append(records)
                if len(read) == 3:
                    other.kill()

            there = centroids(store.select(), client=client, progress=progress)
            xr.testing.assert_identical(there, here)
            assert sum(read) == len(store)
            assert len(client.nthreads()) == 1
