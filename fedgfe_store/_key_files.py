"""Files of key columns: one Zarr chunk of `KEY_CHUNK` values each, in and out."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd

from fedgfe_store._checksums import checksum, unsealed
from fedgfe_store._layout import KEY_CHUNK, ZSTD_LEVEL, KeyColumn

_COUNT = struct.Struct("<I")


def key_file(path: Path, name: str, chunk: int) -> Path:
    """Return the file that holds chunk number `chunk` of the key column `name`."""
    return path / name / f"c.{chunk}"


def encode(column: KeyColumn, values: np.ndarray) -> bytes:
    """Return the contents of a file that holds `values`, up to a chunk of them."""
    compressed: bytes = Zstd(level=ZSTD_LEVEL).encode(_padded(column, values))
    return compressed + checksum(compressed)


def read_chunk(path: Path, column: KeyColumn, chunk: int, n: int) -> np.ndarray:
    """Return the first `n` values of a chunk.

    Raises
    ------
    ValueError
        If the file is damaged, or is not one of this column's type.
    OSError
        If there is no file, or it cannot be read.
    """
    data = Zstd().decode(unsealed(key_file(path, column.name, chunk).read_bytes()))
    return _decoded(column, data, n)


def _padded(column: KeyColumn, values: np.ndarray) -> bytes:
    """Return `values` and fill values up to a whole chunk, as the codec before zstd leaves them."""
    missing = KEY_CHUNK - len(values)
    if column.data_type != "string":
        return b"".join((values.astype(column.stored).tobytes(), column.padding * missing))
    texts = VLenUTF8().encode(np.array(values.tolist(), object))
    return b"".join((_COUNT.pack(KEY_CHUNK), texts[_COUNT.size :], column.padding * missing))


def _decoded(column: KeyColumn, data: bytes, n: int) -> np.ndarray:
    if column.data_type != "string":
        values = np.frombuffer(data, column.stored)
        if len(values) != KEY_CHUNK:
            raise ValueError(f"expected {KEY_CHUNK} values, got {len(values)}")
        return values[:n].astype(column.dtype)
    # The decoder makes room for as many texts as the first bytes say, whatever they are.
    if data[: _COUNT.size] != _COUNT.pack(KEY_CHUNK):
        raise ValueError(f"expected {KEY_CHUNK} texts, got something else")
    texts = VLenUTF8().decode(_COUNT.pack(n) + data[_COUNT.size :])
    return np.array(texts.tolist(), column.dtype)
