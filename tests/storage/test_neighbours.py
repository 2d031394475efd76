"""A received store, whatever stands in it, is read and written in its own folder and nowhere else.

A neighbour lies beside it, with the arrays that each name would lead to.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from any_columns import ANY, add, check
from test_columns import rewritten

from fedgfe_store import EmbeddingStore, FedgfeStoreError
from fedgfe_store.checkpoints import export_checkpoints
from fedgfe_store.errors import DamagedDataError

NAMES = [
    *("../v.zarr/ids", "../v.zarr", "..", ".", "", "/", "a/../../v.zarr/ids", "./ids", "ids/"),
    *("..\\v.zarr\\ids", "C:ids", "\\\\host\\ids", "~/ids\0", "ids\n", "zarr.json", ".ids"),
    *("claim.3.0", "pending", "node", "sizes_digest"),
]
"""Of a column: the last one is that of a column of digests."""


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that lies in a folder, links as where they lead."""
    found: dict[str, bytes | str] = {}
    for entry in sorted(folder.rglob("*")):
        name = str(entry.relative_to(folder))
        if entry.is_symlink():
            found[name] = os.readlink(entry)
        else:
            found[name] = entry.read_bytes() if entry.is_file() else "folder"
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store with commits, deletions and what a compaction would free."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("made") / "s.zarr", ANY)
    for number in (1, 2, 3):
        add(store, range(9), round=number)
    store.delete(round=2)
    return store.path


@pytest.fixture
def received(made: Path, tmp_path: Path) -> Path:
    """A store with neighbours."""
    for name in ("r.zarr", "v.zarr", "above"):
        shutil.copytree(made, tmp_path / "received" / name)
    return tmp_path / "received" / "r.zarr"


def work(path: Path, folder: Path) -> None:
    """Do all that a store is for: each step where the one before was refused, too."""

    def opened() -> EmbeddingStore:
        return EmbeddingStore.open(path)

    steps: list[Any] = [
        lambda: opened().verify(),
        lambda: opened().verify(repair=True),
        lambda: [opened().select().read(name) for name in opened().schema.columns],
        lambda: xr.open_dataset(path, engine="fedgfe").load(),
        lambda: list(opened().select().batches(4)),
        lambda: opened()._repr_html_(),
        lambda: add(opened(), range(4), round=7),
        lambda: add(opened(), range(4), round=7, seed=1, if_exists="replace"),
        lambda: opened().delete(round=1),
        lambda: opened().compact(),
        lambda: opened().upgrade(),
        lambda: opened().backup(folder / "copy.zarr"),
        lambda: EmbeddingStore.create(folder / "m.zarr", ANY).merge(opened()),
        lambda: export_checkpoints(opened().select(), folder / "out"),
        lambda: opened().history(),
    ]
    for step in steps:
        try:
            step()
        except (FedgfeStoreError, FileNotFoundError):
            continue


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_column_that_leads_out_of_a_store_leads_nowhere(received, tmp_path, name):
    column = "ids"

    def change(ours, arrays):
        ours["tensors"][name] = ours["tensors"].pop(column)
        for form in ("{}", "{}_digest", "length_{}", "has_{}"):
            arrays[form.format(name)] = arrays.pop(form.format(column))
            if form != "{}":
                key_digests = ours["key_digests"]
                key_digests[form.format(name)] = key_digests.pop(form.format(column))

    rewritten(received, change)
    neighbours = [received.parent / "v.zarr", received.parent / "above"]
    before = [contents(folder) for folder in neighbours]
    with pytest.raises(FedgfeStoreError, match=r"expected|damaged"):
        EmbeddingStore.open(received)
    work(received, tmp_path / "mine")
    assert [contents(folder) for folder in neighbours] == before
    # A lock beside each store is all else that lies here.
    there = {entry.name for entry in received.parent.iterdir()}
    assert {name for name in there if not name.startswith(".")} == {"r.zarr", "v.zarr", "above"}
    assert not list((tmp_path / "mine").rglob("c.*"))


@pytest.mark.parametrize("array", ["ids", "length_ids", "sizes", "deleted_in"])
def test_a_folder_that_is_a_link_is_not_written_to(received, tmp_path, array):
    shutil.rmtree(received / array)
    (received / array).symlink_to(f"../v.zarr/{array}")
    neighbour = received.parent / "v.zarr"
    before = contents(neighbour)
    work(received, tmp_path / "mine")
    assert contents(neighbour) == before
    with pytest.raises(DamagedDataError, match=f"{array} is a link, and a store's files lie in"):
        add(EmbeddingStore.open(received), range(4), round=8)
    copy = shutil.copytree(neighbour, tmp_path / "copy.zarr")
    shutil.rmtree(copy / array)
    (copy / array).symlink_to(neighbour / array)
    with pytest.raises(DamagedDataError, match="is a link"):
        EmbeddingStore.open(neighbour).backup(copy)
    check(EmbeddingStore.open(neighbour), range(9), round=1)
    assert contents(neighbour) == before


def test_a_new_store_is_not_made_through_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "ids").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedDataError, match="ids is a link"):
        EmbeddingStore.create(tmp_path / "s.zarr", ANY)
    assert not contents(tmp_path / "elsewhere")
