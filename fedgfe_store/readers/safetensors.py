"""Records as safetensors files: a stack of each tensor column, and the records in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.names import Origin
from fedgfe_store.readers.exporting import ExportedFile, R, export, exported_columns
from fedgfe_store.readers.parquet import origin_of
from fedgfe_store.rows import Rows
from fedgfe_store.schema import TensorColumn

# The format: its header's length in 8 bytes, the header in JSON, and then the tensors one after the
# other. The library writes from memory only, and a file may be larger.
_TYPES = {"float32": "F32", "bool": "BOOL", "int32": "I32", "int64": "I64"}
_ITEMSIZES = {"F32": 4, "BF16": 2, "BOOL": 1, "I32": 4, "I64": 8}
_LONGEST_HEADER = 100_000_000
"""Bytes that readers take."""


def to_safetensors(
    rows: R,
    folder: str | Path,
    tensors: Sequence[str] | None,
    *,
    overwrite: bool = False,
    on_file: Callable[[ExportedFile], object] | None = None,
) -> tuple[ExportedFile, ...]:
    """Write files as `Selection.to_safetensors` describes them."""
    columns = exported_columns(rows.schema, tensors)

    def write(part: Rows, origin: Origin, file: BinaryIO) -> tuple[str, ...]:
        types = _types(part, columns)
        file.write(_header(part, types))
        for name, (kind, _) in types.items():
            # A multiple of what a file holds, so that few files are opened twice.
            for _, piece in part.parts(part.schema.granule * 4):
                file.write(_bytes(piece.read(name), kind))
        return ()

    return export(rows, Path(folder), ".safetensors", write, overwrite=overwrite, on_file=on_file)


def _types(rows: Rows, columns: Sequence[TensorColumn]) -> dict[str, tuple[str, list[int]]]:
    """Return type and shape of each tensor, in an order in which all lie where they may."""
    rounded = rows.schema.precision == "bfloat16"
    found: dict[str, tuple[str, list[int]]] = {}
    for column in columns:
        kind = "BF16" if rounded and column.dtype == "float32" else _TYPES[column.dtype]
        found[column.name] = kind, [len(rows), *column.shape]
        for mark in column.marks:
            found[mark] = "BOOL" if mark.startswith("has_") else "I32", [len(rows)]
    # Each begins at a multiple of its item's size.
    return dict(sorted(found.items(), key=lambda each: -_ITEMSIZES[each[1][0]]))


def _header(rows: Rows, types: Mapping[str, tuple[str, list[int]]]) -> bytes:
    frame = rows.records
    frame["timestamp"] = frame["timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    records = {str(name): frame[name].tolist() for name in frame.columns}
    known = {**origin_of(rows), "records": records}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", **{n: _text(v) for n, v in known.items()}}
    }
    start = 0
    for name, (kind, shape) in types.items():
        end = start + _ITEMSIZES[kind] * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise SchemaMismatchError(
            f"safetensors: expected at most {_LONGEST_HEADER:,} bytes about the records of a node "
            f"and round, which its readers take, got {len(text):,}; select fewer, or write Parquet"
        )
    return len(text).to_bytes(8, "little") + text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _bytes(values: np.ndarray, kind: str) -> Any:
    if kind == "BF16":
        # What is rounded already has nothing in its lower half.
        values = values.view(np.uint32) >> 16
        values = values.astype("<u2")
    return np.ascontiguousarray(values).data
