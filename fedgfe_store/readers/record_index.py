"""The keys of records as an index of xarray: plain coordinates that ``sel`` goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
import xarray as xr
from xarray.core.indexes import PandasIndex
from xarray.core.indexing import IndexSelResult

from fedgfe_store.common.filters import NUMBERS, matches, wanted_values
from fedgfe_store.errors import SchemaMismatchError


class RecordIndex(xr.Index):
    """Selects records of a Dataset by their keys, as `EmbeddingStore.select` does.

    A key that one value is given of becomes a scalar coordinate, and the others index what is left;
    of a key of which there are several, all stay. Unlike those of a MultiIndex, the coordinates
    can be written to netCDF and Zarr, and grouped by. ``set_xindex`` puts it back on a Dataset
    that was read from there: ``ds.set_xindex(["node", "round"], RecordIndex)``.

    Parameters
    ----------
    keys : mapping of str to ndarray
        Some of the key columns, ``[n]`` each: objects or numbers.
    dim : str
        The dimension that they lie along.
    """

    def __init__(self, keys: Mapping[str, np.ndarray], dim: str = "record") -> None:
        self._keys, self._dim = dict(keys), dim

    @classmethod
    def from_variables(
        cls, variables: Mapping[Any, xr.Variable], *, options: Mapping[str, Any]
    ) -> Self:
        """Make it of coordinates along one dimension, for ``set_xindex``."""
        dims = {variable.dims for variable in variables.values()}
        if len(dims) != 1 or len(next(iter(dims))) != 1:
            raise SchemaMismatchError(
                f"record index: expected coordinates along one dimension, got {sorted(dims)}"
            )
        return cls({n: np.asarray(v.values) for n, v in variables.items()}, str(*next(iter(dims))))

    def create_variables(
        self, variables: Mapping[Any, xr.Variable] | None = None
    ) -> dict[Any, xr.Variable]:
        """Return the keys as coordinates; those of `variables` keep attributes and encoding."""
        given = variables or {}
        return {
            name: xr.Variable(self._dim, values, *_told(given.get(name)))
            for name, values in self._keys.items()
        }

    def to_pandas_index(self) -> pd.MultiIndex:
        """Return the keys as a MultiIndex."""
        return pd.MultiIndex.from_arrays(list(self._keys.values()), names=list(self._keys))

    def isel(self, indexers: Mapping[Any, Any]) -> Self | None:
        """Return the index of records at some positions; None of a single one."""
        at = indexers[self._dim]
        at = at.values if isinstance(at, xr.Variable) else at
        if np.ndim(at) == 0 and not isinstance(at, slice):
            return None
        return type(self)({name: values[at] for name, values in self._keys.items()}, self._dim)

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> Any:
        """Return where the records are whose keys are as `labels` say.

        Raises
        ------
        KeyError
            If there are none.
        SchemaMismatchError
            If a value is of the wrong type, or a nearest one is asked for.
        """
        if method is not None or tolerance is not None:
            raise SchemaMismatchError("sel: expected values of keys, got method or tolerance")
        wanted = {name: _wanted(name, label) for name, label in labels.items()}
        mask = np.ones(len(next(iter(self._keys.values()))), bool)
        for name, values in wanted.items():
            mask &= matches(_comparable(self._keys[name]), values)
        places = np.flatnonzero(mask)
        if not len(places):
            raise KeyError(f"no record of {', '.join(f'{n} {v!r}' for n, v in labels.items())}")
        single = {n: v[0] for n, v in wanted.items() if _is_single(labels[n], v)}
        rest = {n: values[places] for n, values in self._keys.items() if n not in single}
        index = type(self)(rest, self._dim)
        variables = index.create_variables() if rest else {}
        scalars = {name: xr.Variable((), value) for name, value in single.items()}
        # All keys together name one record, which has no axis; unless it is there several times.
        at: Any = int(places[0]) if not rest and len(places) == 1 else places
        return IndexSelResult(
            {self._dim: at},
            indexes=dict.fromkeys(rest, index),
            variables={**variables, **scalars},
            drop_indexes=list(single),
        )

    def equals(self, other: xr.Index, **_: Any) -> bool:
        """Whether `other` has the same keys, in the same order."""
        return (
            isinstance(other, RecordIndex)
            and self._dim == other._dim
            and self._keys.keys() == other._keys.keys()
            and all(np.array_equal(v, other._keys[n]) for n, v in self._keys.items())
        )

    def join(self, other: Self, how: Any = "inner") -> Self:
        """Return the keys that both have, or either: what arithmetic aligns records by."""
        ours, theirs = self._unique(), other._unique()
        found = ours.join(theirs, how=how)
        return type(self)({name: _level(found, name) for name in self._keys}, self._dim)

    def reindex_like(self, other: Self) -> dict[Any, Any]:
        """Return where the records of `other` are among these; -1 where one is not."""
        return {self._dim: self._unique().get_indexer(other._unique())}

    def _unique(self) -> pd.MultiIndex:
        index = self.to_pandas_index()
        if not index.is_unique:
            raise SchemaMismatchError(
                f"expected each record once to align them by {', '.join(self._keys)}, got "
                f"{index[index.duplicated()][0]} several times"
            )
        return index

    @classmethod
    def concat(
        cls,
        indexes: Sequence[Self],
        dim: Any,
        positions: Iterable[Iterable[int]] | None = None,
    ) -> Self:
        """Return the keys of several Datasets one after the other, or at `positions`."""
        keys = {n: np.concatenate([each._keys[n] for each in indexes]) for n in indexes[0]._keys}
        if positions is not None:
            order = np.argsort(np.concatenate([np.asarray(list(each)) for each in positions]))
            keys = {name: values[order] for name, values in keys.items()}
        return cls(keys, indexes[0]._dim)

    def unstack(self) -> tuple[dict[Any, xr.Index], pd.MultiIndex]:
        """Return an index of each key: for ``unstack``, which makes an axis of each."""
        found = self._unique().remove_unused_levels()
        levels = zip(found.names, found.levels, strict=True)
        return {name: PandasIndex(level, name) for name, level in levels}, found

    def rename(self, name_dict: Mapping[Any, Any], dims_dict: Mapping[Any, Any]) -> Self:
        """Return the index along a dimension of another name; keys keep theirs."""
        if name_dict.keys() & self._keys.keys():
            raise SchemaMismatchError(
                f"rename: expected {', '.join(self._keys)} to keep their names, which select the "
                f"records; drop_indexes({sorted(self._keys)}) makes them plain coordinates"
            )
        return type(self)(self._keys, dims_dict.get(self._dim, self._dim))

    def __repr__(self) -> str:
        return f"RecordIndex of {', '.join(self._keys)} along {self._dim}"

    def _repr_inline_(self, max_width: int) -> str:
        return f"RecordIndex ({', '.join(self._keys)})"[:max_width]


def _told(variable: xr.Variable | None) -> tuple[Any, ...]:
    return () if variable is None else (variable.attrs, variable.encoding)


def _wanted(name: str, label: Any) -> list[Any]:
    """Return the values of a key that a label names; a slice names both its ends."""
    if not isinstance(label, slice):
        return wanted_values(name, label)
    if name not in NUMBERS or label.start is None or label.stop is None:
        raise SchemaMismatchError(
            f"{name}: expected values, or a slice of numbers with both ends, got {label}"
        )
    return [range(label.start, label.stop + 1, label.step or 1)]


def _is_single(label: Any, values: list[Any]) -> bool:
    is_listed = isinstance(label, list | tuple | slice | range) or np.ndim(label) > 0
    return not is_listed and len(values) == 1


def _comparable(values: np.ndarray) -> np.ndarray:
    return values if values.dtype.kind == "i" else values.astype(np.dtypes.StringDType())


def _level(index: pd.Index[Any], name: str) -> np.ndarray:
    values = index.get_level_values(name).to_numpy()
    return values if values.dtype.kind == "i" else values.astype(object)
