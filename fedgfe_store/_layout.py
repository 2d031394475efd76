"""The arrays of a store in format version 1: their Zarr metadata, and opening them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.array import AsyncArray
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore, StorePath

from fedgfe_store._files import DurableStore
from fedgfe_store.schema import Schema, TensorColumn

try:
    from zarrs.pipeline import ZarrsCodecPipeline
except ImportError:  # no wheel for this platform: zarr's own pipeline reads and writes the same
    ZarrsCodecPipeline = None

_IMPORTED_IN = os.getpid()

KEY_CHUNK = 16384
"""Rows per chunk of a key column."""

_CRC32C = {"name": "crc32c"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_BLOSC = {
    "name": "blosc",
    "configuration": {
        "typesize": 4,
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "bitshuffle",
        "blocksize": 0,
    },
}
_ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
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

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the column's values in memory."""
        if self.data_type == "string":
            return np.dtypes.StringDType()
        return np.dtype(self.data_type)


def _text(name: str, **options: Any) -> KeyColumn:
    return KeyColumn(name, "string", "\ufffd", "", **options)


def _integer(name: str, data_type: str, skipped: int, **options: Any) -> KeyColumn:
    return KeyColumn(name, data_type, int(np.iinfo(data_type).min), skipped, **options)


def key_columns(schema: Schema) -> dict[str, KeyColumn]:
    """Return the columns of `schema` that are not tensors, those of commits included."""
    columns = [
        _text("node"),
        _integer("round", "int32", -1),
        _text("split"),
        _text("class_name"),
        _integer("index", "int64", -1),
        _text("sample_id"),
        _text("image_filename"),
        _text("audio_path"),
        _integer("timestamp", "int64", 0, attributes=_TIME),
        _text("extra"),
        KeyColumn("row_digest", "uint64", int(np.iinfo(np.uint64).max), 0),
        *_tensor_keys(schema),
        KeyColumn("created_in", "int32", -1, 0),
        KeyColumn("deleted_in", "int32", -1, 0),
        KeyColumn("recorded_in", "int32", -1, 0),
        _integer("commit_time", "int64", 0, dim="commit", attributes=_TIME),
        _text("commit_kind", dim="commit"),
    ]
    return {column.name: column for column in columns}


def _tensor_keys(schema: Schema) -> Iterator[KeyColumn]:
    for tensor in schema.tensors:
        yield KeyColumn(f"{tensor.name}_digest", "uint64", int(np.iinfo(np.uint64).max), 0)
        if tensor.optional:
            yield KeyColumn(f"has_{tensor.name}", "bool", False, False)


def array_metadata(schema: Schema) -> dict[str, dict[str, Any]]:
    """Return the Zarr v3 metadata of every array of a store, without rows."""
    metadata = {t.name: _tensor_metadata(schema, t) for t in schema.tensors}
    return metadata | {c.name: _key_metadata(c) for c in key_columns(schema).values()}


def _tensor_metadata(schema: Schema, column: TensorColumn) -> dict[str, Any]:
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [schema.chunk_records(column), *column.shape],
            "codecs": [_BYTES, _BLOSC, _CRC32C],
            "index_codecs": [_BYTES, _CRC32C],
            "index_location": "end",
        },
    }
    return _metadata(
        shape=[0, *column.shape],
        data_type="float32",
        chunk_shape=[schema.granule, *column.shape],
        fill_value="NaN",
        codecs=[sharding],
        dimension_names=["record", *column.dims],
    )


def _key_metadata(column: KeyColumn) -> dict[str, Any]:
    first = _BYTES
    if column.data_type == "string":
        first = {"name": "vlen-utf8", "configuration": {}}
    elif column.data_type == "bool":
        first = {"name": "bytes"}
    return _metadata(
        shape=[0],
        data_type=column.data_type,
        chunk_shape=[KEY_CHUNK],
        fill_value=column.fill,
        codecs=[first, _ZSTD, _CRC32C],
        dimension_names=[column.dim],
        attributes=dict(column.attributes),
    )


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


def open_tensor(path: Path, name: str, metadata: Mapping[str, Any], rows: int) -> Any:
    """Return the tensor column `name` of the store at `path` as a Zarr array of `rows` rows."""
    array = _open(LocalStore(path), name, metadata, rows)
    # The threads of zarrs do not survive a fork: without them it would wait for ever.
    if ZarrsCodecPipeline is not None and os.getpid() == _IMPORTED_IN:
        # On this array alone: the setting in `zarr.config` is the whole process's.
        inner = array.async_array
        pipeline = ZarrsCodecPipeline.from_array_metadata_and_store(
            inner.metadata, inner.store_path.store
        )
        object.__setattr__(inner, "codec_pipeline", pipeline)
    return array


def tensor_file(path: Path, column: TensorColumn, granule: int) -> Path:
    """Return the file that holds `column` of the records of `granule`."""
    return path / column.name / f"c.{granule}{'.0' * len(column.shape)}"


def open_keys(path: Path, name: str, metadata: Mapping[str, Any], rows: int) -> Any:
    """Return the key column `name` of the store at `path` as a Zarr array of `rows` rows."""
    # A chunk of nothing but fill values, as of has_<name>, must lie there too: readers take a
    # missing one for damage.
    return _open(DurableStore(path), name, metadata, rows, {"write_empty_chunks": True})


def _open(
    store: LocalStore,
    name: str,
    metadata: Mapping[str, Any],
    rows: int,
    config: ArrayConfigParams | None = None,
) -> Any:
    parsed = ArrayV3Metadata.from_dict({**metadata, "shape": [rows, *metadata["shape"][1:]]})
    location = StorePath(store, name)
    return zarr.Array(AsyncArray(metadata=parsed, store_path=location, config=config))
