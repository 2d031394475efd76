"""A received store of any contents with right checksums is read, or an error of ours says why."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import Any

import pytest
import xarray as xr
from conftest import SMALL, fill
from test_bounds import HOSTILE, ODD_FILES, sealed, values_in
from test_columns import rewritten

from fedgfe_store import EmbeddingStore, FedgfeStoreError
from fedgfe_store.errors import DamagedDataError

KEY_FILES = ["node/c.0", "round/c.0", "created_in/c.0", "extra/c.0", "t5_digest/c.0"]
VALUES: list[Any] = [
    *(None, True, 0, -1, 7, 2**31, 2**70, 0.5, float("nan"), "x", "\ud800", "a\0", [], {}, [[]]),
]


@pytest.fixture
def received(store):
    for number in (1, 2):
        fill(store, node=0, round=number)
    store.delete(round=1, index=0)
    return store.path


def use(path):
    """Look at all that a store tells, in every way."""
    store = EmbeddingStore.open(path)
    selection = store.select()
    assert len(selection.records) == len(store) == len(selection.keys())
    assert selection.read("t5").shape == (len(store), *SMALL.columns["t5"])
    store.history()
    store.verify()
    repr(store)
    xr.open_dataset(path, engine="fedgfe").load()


@pytest.mark.slow
def test_a_group_file_of_other_values(received):
    file, rng = received / "zarr.json", random.Random(1)
    good = file.read_bytes()
    document = json.loads(good)
    ours = document["attributes"]["fedgfe_store"]
    arrays = document["consolidated_metadata"]["metadata"]
    places = [("ours", path) for path in values_in(ours)][::2]
    for name in ("t5", "node"):
        places += [("arrays", (name, *path)) for path in values_in(arrays[name])]
    outcomes = {"read": 0, "refused": 0}
    for where, path in places:
        for value in rng.sample(VALUES, 1):

            def change(ours, arrays, where=where, path=path, value=value):
                data = ours if where == "ours" else arrays
                for step in path[:-1]:
                    data = data[step]
                data[path[-1]] = value

            try:
                rewritten(received, change)
            except (TypeError, AttributeError, KeyError, IndexError, UnicodeEncodeError):
                continue  # of which there is no checksum
            try:
                use(received)
                outcomes["read"] += 1
            except FedgfeStoreError:
                outcomes["refused"] += 1
            file.write_bytes(good)
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_file(received, kind):
    for name in ("zarr.json", "t5/c.1.0.0", *KEY_FILES):
        file = received / name
        good = file.read_bytes()
        file.unlink()
        ODD_FILES[kind](file)
        with pytest.raises(DamagedDataError):
            use(received)
        (shutil.rmtree if kind == "folder" else os.unlink)(file)
        file.write_bytes(good)
    use(received)


@pytest.mark.parametrize("kind", HOSTILE)
def test_key_files_that_become_too_large(received, kind):
    for name in KEY_FILES:
        file = received / name
        good = file.read_bytes()
        file.write_bytes(sealed(HOSTILE[kind]))
        with pytest.raises(DamagedDataError, match=file.parent.name):
            use(received)
        file.write_bytes(good)


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.parametrize("column", ["t5", "node"])
def test_what_is_no_folder(received, kind, column):
    shutil.rmtree(received / column)
    ODD_FILES[kind](received / column)
    with pytest.raises(DamagedDataError, match=f"{column}( of|.*rows) "):
        use(received)
    store = EmbeddingStore.open(received)
    store.history() if column == "t5" else None
    assert not store.verify().sound


@pytest.mark.parametrize("kind", ODD_FILES)
def test_metadata_of_arrays_that_is_no_file(received, kind):
    (received / "t5" / "zarr.json").unlink()
    ODD_FILES[kind](received / "t5" / "zarr.json")
    found = EmbeddingStore.open(received).verify()
    assert [problem for problem in found.problems if "t5/zarr.json is missing or diff" in problem]
    assert not found.damaged


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "loop"])
def test_a_claim_that_is_no_file_names_nobody(received, kind):
    store = EmbeddingStore.open(received)
    ODD_FILES[kind](received / f"claim.{store.commit + 1}.0")
    assert store.verify().sound
    with pytest.raises(DamagedDataError, match=r"claim.4.0: it is no ordinary file, .* remove it"):
        store.delete(round=2, index=1, timeout=5)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_what_is_no_file_is_not_backed_up(received, kind, tmp_path):
    for name in ("t5/c.1.0.0", "t5/zarr.json", "node/c.0"):
        file = received / name
        good = file.read_bytes()
        file.unlink()
        ODD_FILES[kind](file)
        with pytest.raises(DamagedDataError, match=f"{name} is damaged: it is no ordinary file"):
            EmbeddingStore.open(received).backup(tmp_path / "copy.zarr", timeout=5)
        (shutil.rmtree if kind == "folder" else os.unlink)(file)
        file.write_bytes(good)
    EmbeddingStore.open(received).backup(tmp_path / "copy.zarr", timeout=5)
    use(tmp_path / "copy.zarr")
