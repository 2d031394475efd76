"""The engine ``"fedgfe"`` of `xarray.open_dataset`: a store's visible records, lazily."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from fedgfe_store.common.location import Address, Location, location
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
            The store's folder, or its URL, see `EmbeddingStore.open`.
        drop_variables : str or iterable of str, optional
            Variables to leave out; names that are not there are ignored. Without one of the keys
            the others are plain coordinates and no longer index the records.
        as_of : int, optional
            See the store as this commit left it.

        Raises
        ------
        NotFoundError
            If there is no store, or no such commit.
        SchemaMismatchError
            If an argument is of the wrong type.
        DamagedDataError
            If its ``zarr.json`` or key columns are damaged.
        """
        from fedgfe_store.common.words import is_whole
        from fedgfe_store.store import EmbeddingStore

        if as_of is not None and not is_whole(as_of):
            raise SchemaMismatchError(f"as_of: expected the number of a commit, got {as_of!r}")
        store = EmbeddingStore.open(_path(filename_or_obj), as_of=as_of)
        return _without(store.select().to_xarray(), drop_variables)

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Tell whether `filename_or_obj` names a Zarr group that is an embedding store."""
        try:
            path = _path(filename_or_obj)
        except SchemaMismatchError:
            return False
        # Other engines open URLs, too: nothing is asked of a server to guess.
        if not (isinstance(path, Path) and path.is_dir()):
            return False
        from fedgfe_store.storage.metadata import is_store
        from fedgfe_store.storage.places import place_of

        return is_store(place_of(path))


def _path(name: Any) -> Location:
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise SchemaMismatchError(f"engine fedgfe: expected the path of a store, got {name!r}")
    found = location(text)
    if isinstance(found, Address):
        return found
    try:
        return found.expanduser()
    except RuntimeError as error:  # of someone who has no home here
        raise SchemaMismatchError(f"engine fedgfe: {text}: {error}") from None


def _without(dataset: xr.Dataset, names: str | Iterable[str] | None) -> xr.Dataset:
    from fedgfe_store.records import KEY_COLUMNS

    try:
        dropped = {names} if isinstance(names, str) else set(names or ())
    except TypeError:
        raise SchemaMismatchError(
            f"drop_variables: expected a name, or several, got {names!r}"
        ) from None
    if dropped & {*KEY_COLUMNS}:
        dataset = dataset.drop_indexes(list(KEY_COLUMNS))
    return dataset.drop_vars(dropped, errors="ignore")
