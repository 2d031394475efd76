"""What tells whether data is intact: the Zarr codec ``crc32c``, and digests of records."""

from __future__ import annotations

from collections.abc import Mapping

import google_crc32c
import numpy as np
import xxhash

from fedgfe_store.records import KEY_COLUMNS, NOTE_COLUMNS

SIZE = 4
"""Bytes of a checksum, which stands behind the data."""

_DIGESTED = tuple(name for name in (*KEY_COLUMNS, *NOTE_COLUMNS) if name != "file_id")
"""What a row's digest covers, in this order: the columns of format version 1."""


class UnreadableError(ValueError):
    """A file, or a part of it, is not what a writer left."""


def checksum(data: bytes | np.ndarray) -> bytes:
    """Return the crc32c of `data` as it stands behind it in a file."""
    # What numcodecs' CRC32C calls as well, and does not bring along; the codec itself would copy
    # each chunk to put four bytes behind it.
    return int(google_crc32c.value(data)).to_bytes(SIZE, "little")


def unsealed(data: bytes | memoryview) -> np.ndarray:
    """Return `data` without the checksum behind it, uint8, not copied.

    Raises
    ------
    UnreadableError
        If the checksum does not fit.
    """
    content = np.frombuffer(data, np.uint8, max(len(data) - SIZE, 0))
    if checksum(content) != data[-SIZE:]:
        raise UnreadableError("its checksum does not fit")
    return content


def row_digests(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the xxh3 digest of each row's key and notes, uint64 ``[n]``.

    It ties the columns together: each has checksums of its own, which a file that took another
    column's place passes.
    """
    values = (columns[name].tolist() for name in _DIGESTED)
    # Column by column: most are texts as they are.
    texts = (v if v and isinstance(v[0], str) else list(map(str, v)) for v in values)
    rows = zip(*texts, strict=True)
    digests = [xxhash.xxh3_64_intdigest("\0".join(row).encode()) for row in rows]
    return np.array(digests, np.uint64)


def hex_digests(digests: np.ndarray) -> list[str]:
    """Return digests, uint64 ``[n]``, as texts of 16 hex digits."""
    text = digests.astype(">u8").tobytes().hex()
    return [text[at : at + 16] for at in range(0, len(text), 16)]


def digest(values: np.ndarray | memoryview, length: int = 0) -> int:
    """Return the xxh3 digest of one record's values in one tensor column, or of their bytes.

    The seed is the record's `length` in a ragged column, whose padding is digested too.
    """
    data = values.data if isinstance(values, np.ndarray) else values
    return xxhash.xxh3_64_intdigest(data, length)
