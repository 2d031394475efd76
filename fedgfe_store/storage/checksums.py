"""The Zarr codec ``crc32c``: four bytes behind the data that tell whether it is intact."""

from __future__ import annotations

import google_crc32c
import numpy as np

SIZE = 4
"""Bytes of a checksum."""


class UnreadableError(ValueError):
    """A file, or a part of it, is not what a writer left."""


def checksum(data: bytes | np.ndarray) -> bytes:
    """Return the crc32c of `data` as it stands behind it in a file."""
    # What numcodecs' CRC32C calls as well, and does not bring along; the codec itself would copy
    # each chunk to put four bytes behind it.
    return int(google_crc32c.value(data)).to_bytes(SIZE, "little")


def unsealed(data: bytes) -> np.ndarray:
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
