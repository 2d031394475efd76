"""Files of keys: Parquet in and out, and the table's columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fedgfe_store.common.filters import matches
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.schema import Schema
from fedgfe_store.storage.layout import KeyColumn, key_columns
from fedgfe_store.storage.place import Place, RemoteError
from fedgfe_store.storage.shared.facts import KeyFile

TABLE = "records.delta"
"""Folder of the Delta table within a store."""
PARTITIONS = ("commit", "part", "about", "sum")
"""Columns that stand in the log alone: a commit's number is known when its files are written."""
_FILE_BYTES = 2**30
_MARKS = ("created_in", "deleted_in", "recorded_in")
_TYPES = {"string": pa.string(), "bool": pa.bool_(), "int32": pa.int32(), "int64": pa.int64()}
# Delta has no numbers without a sign: digests keep their bits.
_TYPES["uint64"] = pa.int64()


def table_name(name: str) -> str:
    """Return what a key column is called in the table: Delta takes no spaces and dots."""
    return re.sub(r"[^A-Za-z0-9_]", lambda sign: f"_x{ord(sign[0]):02x}", name)


def record_columns(schema: Schema) -> dict[str, KeyColumn]:
    """Return the key columns that have a value for each record."""
    return {n: c for n, c in key_columns(schema).items() if c.dim == "record"}


def arrow_schema(schema: Schema) -> pa.Schema:
    """Return the schema of the table's files."""
    fields = [pa.field("row", pa.int64()), pa.field("facts", pa.string())]
    for name, column in record_columns(schema).items():
        fields.append(pa.field(table_name(name), _TYPES[column.data_type]))
    return pa.schema(fields)


def table_schema(schema: Schema) -> pa.Schema:
    """Return the schema of the whole table."""
    kept = [pa.field(n, pa.int64() if n == "commit" else pa.string()) for n in PARTITIONS]
    return pa.schema([*kept, *arrow_schema(schema)])


def arrow_table(schema: Schema, columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Return `columns`, of one length, as a table in which all others are missing."""
    wanted, n = arrow_schema(schema), len(next(iter(columns.values())))
    names = {table_name(name): name for name in columns}
    arrays = [
        _array(columns[names[field.name]], field.type)
        if field.name in names
        else pa.nulls(n, field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.dtype.kind == "T":
        return pa.array(values.tolist(), kind)
    return pa.array(values.view(np.int64) if values.dtype == np.uint64 else values, kind)


def encode(table: pa.Table, token: str) -> tuple[str, bytes]:
    """Return a file's name, which no other file has and which tells its digest, and its bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=True)
    data = sink.getvalue().to_pybytes()
    return f"{token}-{xxhash.xxh3_128_hexdigest(data)}.parquet", data


def read_bytes(place: Place, file: KeyFile) -> bytes:
    """Return a file of the table.

    Raises
    ------
    DamagedDataError
        If it is missing, or not what was committed.
    """
    name = f"{TABLE}/{file.path}"
    try:
        data = place.read(name, _FILE_BYTES)
    except RemoteError:
        raise
    except FileNotFoundError:
        raise DamagedDataError(
            f"{place}/{name}, of commit {file.commit}, is missing (if it was compacted away, "
            f"refresh the store)"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedDataError(f"{place}/{name} is damaged: {error}") from error
    if not file.path.endswith(f"-{xxhash.xxh3_128_hexdigest(data)}.parquet"):
        raise DamagedDataError(
            f"{place}/{name}, of commit {file.commit}, is damaged: not what was committed there"
        )
    return data


class Columns:
    """The columns of one file, decoded as they are asked for.

    Parameters
    ----------
    file : KeyFile
        What the log tells of it.
    data : bytes
        Its contents.
    columns : mapping of str to KeyColumn
        The store's key columns.
    """

    def __init__(self, file: KeyFile, data: bytes, columns: Mapping[str, KeyColumn]) -> None:
        self.file, self._columns = file, columns
        self._data = data
        self._numbers: dict[str, np.ndarray] = {}
        self._texts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def arrow(self, names: Sequence[str] | None = None, *, coded: Sequence[str] = ()) -> pa.Table:
        """Return some columns, or all, as they stand in the file; those of `coded` as codes."""
        source = pq.ParquetFile(pa.BufferReader(self._data), read_dictionary=list(coded))
        return source.read(None if names is None else list(names), use_threads=False)

    @cached_property
    def row(self) -> np.ndarray:
        """Row numbers, int64 ``[n]``."""
        return self._raw("row", np.dtype(np.int64))

    @cached_property
    def by_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers, ascending, and the positions at which they stand."""
        order = np.argsort(self.row, kind="stable")
        return self.row[order], order

    @cached_property
    def created(self) -> np.ndarray:
        """Commit of each record."""
        return self._or_else("created_in", np.int32(self.file.commit))

    @cached_property
    def recorded(self) -> np.ndarray:
        """Commit that first wrote each record."""
        return self._or_else("recorded_in", self.created)

    @cached_property
    def deleted(self) -> np.ndarray:
        """Of records the commit by which they were deleted when the file was made, 0 for none."""
        return self._or_else("deleted_in", np.int32(0))

    @cached_property
    def marked(self) -> np.ndarray:
        """Of marks the commit that deleted."""
        return self._or_else("deleted_in", np.int32(self.file.commit))

    def _or_else(self, name: str, other: Any) -> np.ndarray:
        values = self._raw(name, np.dtype(np.int32))
        return np.where(values > 0, values, other)

    def _raw(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        if name not in self._numbers:
            array = self.arrow([table_name(name)]).column(0).combine_chunks()
            array = array.fill_null(False if dtype.kind == "b" else 0)
            values = array.to_numpy(zero_copy_only=False)
            self._numbers[name] = values.view(dtype) if dtype == np.uint64 else values.astype(dtype)
        return self._numbers[name]

    def _coded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a text column as codes, and what they mean."""
        if name not in self._texts:
            column = self.arrow([table_name(name)], coded=[table_name(name)]).column(0)
            array = column.unify_dictionaries().combine_chunks()
            if isinstance(array, pa.ChunkedArray):  # of no chunks
                array = pa.array([], pa.dictionary(pa.int32(), pa.string()))
            meanings = np.array(array.dictionary.to_pylist(), np.dtypes.StringDType())
            self._texts[name] = array.indices.to_numpy(zero_copy_only=False), meanings
        return self._texts[name]

    def at(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Return the values of a key column at `positions`."""
        found: np.ndarray
        if name in _MARKS:
            attribute = {"created_in": "created", "recorded_in": "recorded"}.get(name, "deleted")
            found = getattr(self, attribute)[positions]
            return found
        column = self._columns[name]
        if column.data_type == "string":
            codes, meanings = self._coded(name)
            found = meanings[codes[positions]]
        else:
            found = self._raw(name, column.dtype)[positions]
        return found

    def matches(self, name: str, wanted: Sequence[Any]) -> np.ndarray:
        """Return which rows have one of the `wanted` values, bool ``[n]``."""
        column = self._columns[name]
        if column.data_type == "string":  # each distinct text is compared once
            codes, meanings = self._coded(name)
            mask: np.ndarray = matches(meanings, wanted)[codes]
            return mask
        return matches(self._raw(name, column.dtype), wanted)
