"""A selection as a lazy xarray Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from fedgfe_store.common.column_names import check_axes
from fedgfe_store.common.extra import extra
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.readers.record_index import RecordIndex
from fedgfe_store.records import KEY_COLUMNS

if TYPE_CHECKING:
    from fedgfe_store.rows import Rows
    from fedgfe_store.schema import Schema

# Dask spends up to a millisecond on a task (its best practices: avoid very large graphs), which
# does not show beside reading this much; and a task for each core fits the memory of a laptop.
_DASK_BYTES = 64 * 2**20


class _TensorArray(BackendArray):
    """A tensor column of a selection; indexing it reads whole records and then cuts them."""

    def __init__(self, selection: Rows, name: str) -> None:
        self._selection = selection
        self._name = name
        column = selection.schema.column(name)
        self.shape = (len(selection), *column.shape)
        self.dtype = np.dtype(column.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        first, *rest = key
        positions = np.atleast_1d(np.arange(self.shape[0])[first])
        values = self._selection.take(positions).read(self._name)
        # From the last axis on: an axis that an integer drops then shifts none of the others.
        for axis in range(len(rest), 0, -1):
            values = values[(*(slice(None),) * axis, rest[axis - 1])]
        return values[0] if isinstance(first, int | np.integer) else values


def _chunk_records(schema: Schema) -> int:
    """Return the records of whole files that take near 64 MiB."""
    return schema.granule * max(1, _DASK_BYTES // (schema.granule * schema.record_nbytes))


def _chunks(schema: Schema) -> dict[str, dict[str, int]]:
    """Return dask's chunks for those who ask `xr.open_dataset` for `chunks={}`."""
    return {"preferred_chunks": {"record": _chunk_records(schema)}}


def _axes(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Return the names of each column's axes; those of some old stores no dataset can have."""
    axes = {t.name: t.dims for t in schema.tensors}
    try:
        check_axes({t.name: list(zip(t.dims, t.shape, strict=True)) for t in schema.tensors})
    except SchemaMismatchError:
        return {name: tuple(f"{name}_axis_{i}" for i in range(len(d))) for name, d in axes.items()}
    return axes


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with text as Python's own: xarray takes no strings of pyarrow."""
    texts = frame.columns[[isinstance(dtype, pd.StringDtype) for dtype in frame.dtypes]]
    return frame.astype(dict.fromkeys(texts, object))


def to_dataset(selection: Rows, chunks: int | Mapping[str, int] | None = None) -> xr.Dataset:
    """Return `selection` as `Selection.to_xarray` describes it."""
    wanted = None if chunks is None else _checked_chunks(chunks, selection.schema)
    frame = _plain(selection.records)
    # Arrays go to other processes with what they hold: the rows, but not the frame.
    rows = selection.take(slice(None))
    preferred, axes = _chunks(selection.schema), _axes(selection.schema)
    variables = {
        t.name: xr.Variable(
            ("record", *axes[t.name]),
            indexing.LazilyIndexedArray(_TensorArray(rows, t.name)),
            encoding=preferred,
        )
        for t in selection.schema.tensors
    }
    index = RecordIndex({name: frame[name].to_numpy() for name in KEY_COLUMNS})
    notes = frame.drop(columns=list(KEY_COLUMNS))
    # numpy's times, which xarray holds, know no zone; ours are UTC.
    notes["timestamp"] = notes["timestamp"].dt.tz_localize(None)
    coords = xr.Coordinates.from_xindex(index).assign(
        {name: xr.Variable("record", notes[name], encoding=preferred) for name in notes}
    )
    metadata = selection.schema.metadata
    attrs = {"experiment": metadata.experiment or "", "commit": selection.commit}
    dataset = xr.Dataset(variables, coords, attrs)
    if wanted is None:
        return dataset
    # Not what indexes the records or tells of them: that is in memory already.
    return dataset.assign({name: dataset.variables[name].chunk(wanted) for name in dataset})


def _checked_chunks(chunks: Any, schema: Schema) -> dict[str, int]:
    """Return the length of a chunk along ``record``: as asked for, or whole files."""
    extra("dask.array", "to_xarray with chunks", "dask")
    given = chunks if isinstance(chunks, Mapping) else {"record": chunks}
    number = given.get("record", _chunk_records(schema))
    if given.keys() - {"record"} or not is_whole(number) or number < 1:
        raise SchemaMismatchError(
            f"chunks: expected a number of records such as 256 or {{'record': 256}}, or {{}} for "
            f"whole tensor files, got {chunks!r}"
        )
    return {"record": int(number)}
