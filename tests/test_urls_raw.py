"""Stores without compression behind URLs: every reader gives what came, or names the damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
import xarray as xr
from conftest import BUCKET, values
from obstore.store import S3Store
from proxy import Proxy, proxied
from servers import file_server, serving

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.selection import Selection
from fedgfe_store.storage import objects

RAW = Schema.flux(3, width=8, clip=(4,), granule=4, compression="none")
COUNT = 11
"""Records: two whole files of a column, and one with a hole."""
Reader = Callable[[Selection, Path], np.ndarray]


@dataclass(frozen=True)
class Served:
    """The URL of a store, the proxy before its server, and what was appended."""

    url: str
    proxy: Proxy
    given: dict[str, np.ndarray]

    def select(self, **filters: Any) -> Selection:
        return EmbeddingStore.open(self.url).select(**filters)


@pytest.fixture(params=["s3", "web"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    monkeypatch.setattr("fedgfe_store.schema._CHUNK_BYTES", 2 * 3 * 8 * 4)  # of t5 two records
    monkeypatch.setitem(objects.RETRIES, "max_retries", 2)
    store, given = EmbeddingStore.create(tmp_path / "raw.zarr", RAW), values(COUNT, 0, RAW)
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(COUNT), **given)
    if request.param == "web":
        with serving(file_server(tmp_path)) as files, proxied(files) as proxy:
            yield Served(f"{proxy.url}/raw.zarr", proxy, given)
        return
    s3, aws = request.getfixturevalue("s3"), request.getfixturevalue("aws")
    name = f"raw/{tmp_path.name}.zarr"
    client = S3Store(BUCKET, prefix=name, endpoint=s3, client_options={"allow_http": True})
    for path in filter(Path.is_file, store.path.rglob("*")):
        obstore.put(client, path.relative_to(store.path).as_posix(), path.read_bytes())
    yield Served(f"s3://{BUCKET}/{name}", aws(), given)


def _parquet(selection: Selection, folder: Path) -> np.ndarray:
    (file,) = selection.to_parquet(folder, tensors=["t5"])
    if file.error is not None:
        raise DamagedDataError(file.error)
    return np.array(pq.read_table(file.path)["t5"].to_pylist(), np.float32)


def _safetensors(selection: Selection, folder: Path) -> np.ndarray:
    (file,) = selection.to_safetensors(folder)
    if file.error is not None:
        raise DamagedDataError(file.error)
    return safetensors.numpy.load_file(file.path)["t5"]


def _copied(selection: Selection, folder: Path) -> np.ndarray:
    selection.to_store(folder / "copy.zarr")
    return EmbeddingStore.open(folder / "copy.zarr").select().read("t5")


def _one_by_one(selection: Selection, folder: Path) -> np.ndarray:
    dataset = selection.to_torch()
    return torch.stack([dataset[at]["t5"] for at in range(len(dataset))]).numpy()


READERS: dict[str, Reader] = {
    "read": lambda selection, folder: selection.read("t5"),
    "batches": lambda selection, folder: torch.cat([b["t5"] for b in selection.batches(3)]).numpy(),
    "to_torch": _one_by_one,
    "to_xarray": lambda selection, folder: selection.to_xarray().t5.values,
    "dask": lambda selection, folder: selection.to_xarray(chunks=2).t5.values,
    "parquet": _parquet,
    "safetensors": _safetensors,
    "to_store": _copied,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_what_came(served: Served, tmp_path: Path, reader: str) -> None:
    found = READERS[reader](served.select(), tmp_path / "out")
    assert found.tobytes() == served.given["t5"].tobytes()


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_damaged_record(served: Served, tmp_path: Path, reader: str) -> None:
    wrong = served.given["t5"][6].tobytes()
    changed = bytes([wrong[0] ^ 1]) + wrong[1:]
    served.proxy.harm = lambda path, status, body: (status, body.replace(wrong, changed))
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 1, .* index [67] "):
        READERS[reader](served.select(), tmp_path / "out")


def test_any_order_and_any_part(served: Served) -> None:
    rng = np.random.default_rng(0)
    orders = [np.arange(COUNT)[::-1], np.array([3]), *(rng.integers(0, COUNT, 9) for _ in range(5))]
    selection = served.select()
    for order in orders:
        for name, given in served.given.items():
            assert selection.take(order).read(name).tobytes() == given[order].tobytes()
    assert served.select(index=[2, 9]).read("t5").tobytes() == served.given["t5"][[2, 9]].tobytes()


def test_means_and_the_engine_of_xarray(served: Served) -> None:
    expected = served.given["t5"].mean(axis=0, dtype=np.float64)
    (found,) = served.select().mean(["class_name"]).read("t5")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    dataset = xr.open_dataset(served.url, engine="fedgfe")
    assert dataset["clip"].values.tobytes() == served.given["clip"].tobytes()


def test_verify_finds_the_damage_and_nothing_else(served: Served) -> None:
    store = EmbeddingStore.open(served.url)
    assert store.verify().sound
    wrong = served.given["t5"][6].tobytes()
    served.proxy.harm = lambda path, status, body: (status, body.replace(wrong, wrong[::-1]))
    damaged = EmbeddingStore.open(served.url).verify().damaged
    assert [record.key.index for record in damaged] == [6, 7]  # two records share a checksum
    assert {record.reason for record in damaged} == {f"{served.url}/t5/c.1.0.0 is damaged"}
