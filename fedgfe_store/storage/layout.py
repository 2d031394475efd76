"""The arrays of a store in format versions 1 and 2, and their Zarr metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fedgfe_store.schema import FORMAT_VERSION, Schema, TensorColumn

# Smaller chunks make more files and slower queries of all records, larger ones slower appends:
# docs/performance.md, "Key columns".
KEY_CHUNK = 16384
"""Rows per chunk of a key column."""

DIGEST_DIGITS = 16
"""Hex digits of the digest of a key chunk, an xxh3 of 64 bits."""

_CRC32C = {"name": "crc32c"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
# lz4 is all but as small as zstd, and faster; the bit shuffle brings the zero bits of rounded
# values together: docs/performance.md, "Codec".
_BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
ZSTD_LEVEL = 1
_ZSTD = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
_TIME = {"units": "milliseconds since 1970-01-01", "calendar": "proleptic_gregorian"}


@dataclass(frozen=True)
class KeyColumn:
    """A column of one small value per row; its fill value never stands in a written row."""

    name: str
    data_type: str
    fill: Any
    skipped: Any
    dim: str = "record"
    attributes: Mapping[str, str] = field(default_factory=dict)
    since: int = 1
    """First format version that has the column; in older stores it reads as skipped values."""
    largest: int | None = None
    """Largest value of a column of lengths, the smallest of which is 0."""

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the column's values in memory."""
        if self.data_type == "string":
            return np.dtypes.StringDType()
        return np.dtype(self.data_type)

    @property
    def digest(self) -> str:
        """The column of digests whose values say what a column like ``has_t5`` must be."""
        return f"{self.name.removeprefix('has_')}_digest"

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """Data type of the values of a number column in a file, little-endian."""
        return self.dtype.newbyteorder("<")

    @cached_property
    def padding(self) -> bytes:
        """One fill value as it stands in a file, before compression."""
        if self.data_type != "string":
            return np.array(self.fill, self.stored).tobytes()
        text: bytes = self.fill.encode()
        return len(text).to_bytes(4, "little") + text


def _text(name: str, **options: Any) -> KeyColumn:
    return KeyColumn(name, "string", "\ufffd", "", **options)


def _integer(name: str, data_type: str, skipped: int, **options: Any) -> KeyColumn:
    return KeyColumn(name, data_type, int(np.iinfo(data_type).min), skipped, **options)


_BEFORE_TENSORS = (
    _text("node"),
    _integer("round", "int32", -1),
    _text("split"),
    _text("class_name"),
    _integer("index", "int64", -1),
    _text("sample_id"),
    _text("file_id", since=2),
    _text("image_filename"),
    _text("audio_path"),
    _integer("timestamp", "int64", 0, attributes=_TIME),
    _text("extra"),
    KeyColumn("row_digest", "uint64", int(np.iinfo(np.uint64).max), 0),
)
_BEHIND_TENSORS = (
    KeyColumn("created_in", "int32", -1, 0),
    KeyColumn("deleted_in", "int32", -1, 0),
    KeyColumn("recorded_in", "int32", -1, 0),
    _integer("commit_time", "int64", 0, dim="commit", attributes=_TIME),
    _text("commit_kind", dim="commit"),
    _text("commit_source", dim="commit", since=2),
)


def key_columns(schema: Schema, version: int = FORMAT_VERSION) -> Mapping[str, KeyColumn]:
    """Return the columns of `schema` that are not tensors, those of commits included."""
    return _key_columns(schema.tensors, version)


@lru_cache(maxsize=64)
def _key_columns(tensors: tuple[TensorColumn, ...], version: int) -> Mapping[str, KeyColumn]:
    # In the order in which they stand in zarr.json, which is part of the format.
    columns = (*_BEFORE_TENSORS, *_tensor_keys(tensors), *_BEHIND_TENSORS)
    return {column.name: column for column in columns if column.since <= version}


def _tensor_keys(tensors: Iterable[TensorColumn]) -> Iterator[KeyColumn]:
    for tensor in tensors:
        yield KeyColumn(f"{tensor.name}_digest", "uint64", int(np.iinfo(np.uint64).max), 0)
        if tensor.optional:
            yield KeyColumn(f"has_{tensor.name}", "bool", False, False)
        if tensor.ragged:
            yield _integer(f"length_{tensor.name}", "int32", 0, largest=tensor.shape[0])


def array_metadata(schema: Schema, version: int = FORMAT_VERSION) -> dict[str, dict[str, Any]]:
    """Return the Zarr v3 metadata of every array of a store, without rows."""
    metadata = {t.name: _tensor_metadata(schema, t) for t in schema.tensors}
    return metadata | {c.name: _key_metadata(c) for c in key_columns(schema, version).values()}


def _tensor_metadata(schema: Schema, column: TensorColumn) -> dict[str, Any]:
    itemsize = np.dtype(column.dtype).itemsize
    coding: dict[str, Any] = {"typesize": itemsize, **_BLOSC}
    if schema.compression == "shuffle":
        coding["shuffle"] = schema.compression
    packed = [] if schema.compression == "none" else [{"name": "blosc", "configuration": coding}]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [schema.chunk_records(column), *column.shape],
            "codecs": [_bytes(column.dtype), *packed, _CRC32C],
            "index_codecs": [_BYTES, _CRC32C],
            "index_location": "end",
        },
    }
    return _metadata(
        shape=[0, *column.shape],
        data_type=column.dtype,
        chunk_shape=[schema.granule, *column.shape],
        fill_value={"float32": "NaN", "bool": False}.get(column.dtype, 0),
        codecs=[sharding],
        dimension_names=["record", *column.dims],
    )


def _key_metadata(column: KeyColumn) -> dict[str, Any]:
    first = {"name": "vlen-utf8", "configuration": {}}
    if column.data_type != "string":
        first = _bytes(column.data_type)
    return _metadata(
        shape=[0],
        data_type=column.data_type,
        chunk_shape=[KEY_CHUNK],
        fill_value=column.fill,
        codecs=[first, _ZSTD, _CRC32C],
        dimension_names=[column.dim],
        attributes=dict(column.attributes),
    )


def _bytes(data_type: str) -> dict[str, Any]:
    return {"name": "bytes"} if data_type == "bool" else _BYTES


def _metadata(*, chunk_shape: list[int], **rest: Any) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "attributes": {},
        "storage_transformers": [],
        **rest,
    }
