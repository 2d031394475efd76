"""The engine ``"fedgfe"`` of `xarray.open_dataset`: a store's visible records, lazily."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from fedgfe_store.errors import SchemaMismatchError

# xarray imports this module whenever it looks for an engine, so zarr and pandas wait.


class FedgfeBackendEntrypoint(BackendEntrypoint):
    """Opens an embedding store, for ``xr.open_dataset("embeddings.zarr", engine="fedgfe")``."""

    description = "Open embedding stores of fedgfe-store: visible records, indexed by their keys"

    def open_dataset(  # type: ignore[override]  # the parameters of each engine are its own
        self,
        filename_or_obj: str | os.PathLike[str],
        *,
        drop_variables: str | Iterable[str] | None = None,
        as_of: int | None = None,
    ) -> xr.Dataset:
        """Return the visible records of a store as `Selection.to_xarray` does.

        Parameters
        ----------
        filename_or_obj : path-like
            The store's folder.
        drop_variables : str or iterable of str, optional
            Variables to leave out; names that are not there are ignored. Without one of the keys
            the others are plain coordinates and no longer index the records.
        as_of : int, optional
            See the store as this commit left it.

        Raises
        ------
        NotFoundError
            If there is no store, or no such commit.
        DamagedDataError
            If its ``zarr.json`` or key columns are damaged.
        """
        from fedgfe_store.store import EmbeddingStore

        store = EmbeddingStore.open(_path(filename_or_obj), as_of=as_of)
        return _without(store.select().to_xarray(), drop_variables)

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Tell whether `filename_or_obj` names a Zarr group that is an embedding store."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        path = _path(filename_or_obj)
        if not path.is_dir():
            return False
        from fedgfe_store._group import is_store

        return is_store(path)


def _path(name: Any) -> Path:
    if not isinstance(name, str | os.PathLike):
        raise SchemaMismatchError(f"engine fedgfe: expected the path of a store, got {name!r}")
    return Path(name).expanduser()


def _without(dataset: xr.Dataset, names: str | Iterable[str] | None) -> xr.Dataset:
    from fedgfe_store.records import KEY_COLUMNS

    dropped = {names} if isinstance(names, str) else set(names or ())
    if dropped & {"record", *KEY_COLUMNS}:
        dataset = dataset.reset_index("record")
    return dataset.drop_vars(dropped, errors="ignore")
