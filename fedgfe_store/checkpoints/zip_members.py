"""Members of a zip file that is mapped: their bytes as they lie there, and their checksums."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np

from fedgfe_store.common.igzip import isal_zlib

_WINDOW_BYTES = 128 << 20
"""Bytes of a mapping that are read before its pages are let go of: they stay until then."""
_PIECE = 8 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before a member's name; the lengths are those of the name and of what follows it."""
_crc32: Any = (isal_zlib or zlib).crc32


class Mapped:
    """A file that is mapped, of which a bounded part stays in memory.

    Parameters
    ----------
    file : binary file
        The file, which may be closed then.
    """

    def __init__(self, file: BinaryIO) -> None:
        # torch takes writable memory only; a copy on write leaves the file alone.
        self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._begin = np.frombuffer(self.memory, np.uint8).ctypes.data
        self._passed = 0

    def pass_by(self, nbytes: int) -> None:
        """Note that so many bytes were read; once they are many, let go of all pages.

        What lies in them stays as it is, and is read from the file again.
        """
        self._passed += nbytes
        if self._passed >= _WINDOW_BYTES:
            self._passed = 0
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, which keeps them as it likes
                self.memory.madvise(mmap.MADV_DONTNEED)

    def stacked(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return arrays of one shape as one; not copied where the file has them evenly spaced."""
        first, *rest = arrays
        offsets = [array.ctypes.data - self._begin for array in arrays]
        steps = {b - a for a, b in pairwise(offsets)}
        alike = all(a.strides == first.strides and a.dtype == first.dtype for a in rest)
        inside = offsets[0] >= 0 and offsets[-1] + first.nbytes <= len(self.memory)
        if not (alike and inside and len(steps) == 1 and min(steps) > 0):
            return np.stack(arrays)
        shape, strides = (len(arrays), *first.shape), (*steps, *first.strides)
        return np.ndarray(shape, first.dtype, self.memory, offsets[0], strides)


def is_plain(item: zipfile.ZipInfo) -> bool:
    """Whether a member's bytes lie in the file as they are."""
    is_stored = item.compress_type == zipfile.ZIP_STORED and not item.flag_bits & 1
    return is_stored and item.file_size == item.compress_size


def span(mapped: Mapped, item: zipfile.ZipInfo) -> slice:
    """Return where in the file the bytes of a plain member lie.

    Raises
    ------
    BadZipFile
        If they would lie beyond it, or no member begins there.
    """
    # Not as the directory at the file's end has it: torch pads the local header of a member, so
    # that its values are aligned.
    mark, *lengths = _LOCAL_HEADER.unpack_from(mapped.memory, item.header_offset)
    start = item.header_offset + _LOCAL_HEADER.size + sum(lengths)
    if mark != b"PK\3\4" or start + item.file_size > len(mapped.memory):
        raise zipfile.BadZipFile(f"{item.filename!a} is not where it should be")
    return slice(start, start + item.file_size)


def check(mapped: Mapped, item: zipfile.ZipInfo) -> None:
    """Compare the bytes of a plain member with its checksum; torch need not write one.

    Raises
    ------
    BadZipFile
        If they differ.
    """
    here, found = span(mapped, item), 0
    if not item.CRC:
        return
    content = memoryview(mapped.memory)
    for start in range(here.start, here.stop, _PIECE):
        piece = content[start : min(start + _PIECE, here.stop)]
        found = _crc32(piece, found)
        mapped.pass_by(len(piece))
    if found != item.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {item.filename!r}")
