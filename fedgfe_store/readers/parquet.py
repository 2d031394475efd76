"""Records as Parquet files: what is known of them, and tensors as lists of fixed sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedgfe_store.common.extra import extra
from fedgfe_store.names import Origin
from fedgfe_store.readers.exporting import ExportedFile, R, export, exported_columns
from fedgfe_store.rows import Rows
from fedgfe_store.schema import Schema, TensorColumn

# Readers hold a row group of the columns that they use: so much of tensors, or so many rows.
_GROUP_BYTES, _GROUP_ROWS = 64 * 2**20, 100_000


def to_parquet(
    rows: R,
    folder: str | Path,
    tensors: Sequence[str] | None,
    *,
    overwrite: bool = False,
    on_file: Callable[[ExportedFile], object] | None = None,
) -> tuple[ExportedFile, ...]:
    """Write files as `Selection.to_parquet` describes them."""
    parquet = extra("pyarrow.parquet", "Parquet", "parquet")
    columns = exported_columns(rows.schema, tensors)

    def write(part: Rows, origin: Origin, file: BinaryIO) -> tuple[str, ...]:
        schema = _arrow_schema(part, columns)
        split = [path for path in _leaves(schema) if path.startswith(_floats(columns))]
        with parquet.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=[name for name in schema.names if name not in rows.schema.columns],
            use_byte_stream_split=split or False,
        ) as writer:
            for table in _tables(part, columns, schema):
                writer.write_table(table)
        return ()

    return export(rows, Path(folder), ".parquet", write, overwrite=overwrite, on_file=on_file)


def _arrow_schema(rows: Rows, columns: Sequence[TensorColumn]) -> Any:
    pa = extra("pyarrow", "Parquet", "parquet")
    known = {
        **dict.fromkeys(("node", "split", "class_name"), pa.string()),
        "round": pa.int32(),
        "index": pa.int64(),
        "timestamp": pa.timestamp("ms", "UTC"),
        "recorded_in": pa.int32(),
        **dict.fromkeys((n for n in rows.schema.marks if n.startswith("has_")), pa.bool_()),
        **dict.fromkeys((n for n in rows.schema.marks if n.startswith("length_")), pa.int32()),
    }
    frame = rows.take(slice(0)).records
    fields = [pa.field(str(name), known.get(str(name), pa.string())) for name in frame.columns]
    fields += [pa.field(column.name, _type(pa, column)) for column in columns]
    return pa.schema(fields, {"fedgfe_store": json.dumps(origin_of(rows))})


def origin_of(rows: Rows) -> dict[str, Any]:
    """Return what tells where records are from."""
    schema: Schema = rows.schema
    return {
        "experiment": schema.metadata.experiment,
        "kind": schema.kind,
        "precision": schema.precision,
        "store_id": rows.store_id,
        "commit": rows.commit,
    }


def _type(pa: Any, column: TensorColumn) -> Any:
    found = getattr(pa, "bool_" if column.dtype == "bool" else column.dtype)()
    inner = column.shape[1:] if column.ragged else column.shape
    for length in reversed(inner):
        found = pa.list_(found, length)
    return pa.list_(found) if column.ragged else found


def _floats(columns: Sequence[TensorColumn]) -> tuple[str, ...]:
    return tuple(f"{column.name}." for column in columns if column.dtype == "float32")


def _leaves(schema: Any) -> Iterator[str]:
    """Yield the names that Parquet gives to the values of nested columns."""
    for field in schema:
        name, inner = field.name, field.type
        while hasattr(inner, "value_type") and "list" in str(inner):
            name, inner = f"{name}.list.element", inner.value_type
        yield name


def _tables(rows: Rows, columns: Sequence[TensorColumn], schema: Any) -> Iterator[Any]:
    pa = extra("pyarrow", "Parquet", "parquet")
    nbytes = sum(column.nbytes for column in columns)
    granule = rows.schema.granule
    size = max(granule, _GROUP_BYTES // max(1, nbytes) // granule * granule)
    for _, part in rows.parts(min(size, _GROUP_ROWS)):
        known = pa.Table.from_pandas(
            part.records, pa.schema(list(schema)[: -len(columns) or None]), preserve_index=False
        )
        for column in columns:
            known = known.append_column(schema.field(column.name), _array(pa, part, column))
        yield known.cast(schema)


def _array(pa: Any, rows: Rows, column: TensorColumn) -> Any:
    values = rows.read(column.name)
    gone = ~rows.read(f"has_{column.name}") if column.optional else None
    if column.ragged:
        lengths = rows.read(f"length_{column.name}").astype(np.int64)
        if gone is not None:
            lengths[gone] = 0
        kept = np.arange(column.shape[0]) < lengths[:, None]
        inner = _fixed(pa, values[kept], column.shape[1:])
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        mask = None if gone is None else pa.array(gone)
        return pa.ListArray.from_arrays(offsets, inner, mask=mask)
    return _fixed(pa, values, column.shape, gone)


def _fixed(
    pa: Any, values: np.ndarray, shape: tuple[int, ...], gone: np.ndarray | None = None
) -> Any:
    """Return values ``[n, *shape]`` as lists of fixed sizes, one in another; NULL where `gone`."""
    found = pa.array(values.reshape(-1))
    for length in reversed(shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, length)
    if not shape:
        return found
    mask = None if gone is None else pa.array(gone)
    return pa.FixedSizeListArray.from_arrays(found, shape[0], mask=mask)
