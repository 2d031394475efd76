"""Files of tensor columns: one Zarr shard each, of whole records, written once and read in part.

A shard is its inner chunks, one after another in any order, and behind them an index of their
places. Each chunk is compressed by blosc, unless the store is not, and followed by its crc32c, and
so is the index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from struct import Struct
from typing import Any, BinaryIO, Self, get_args

import numpy as np

from fedgfe_store.common.words import shown
from fedgfe_store.schema import LARGEST_CHUNK, ColumnDtype
from fedgfe_store.storage import checksums
from fedgfe_store.storage.checksums import UnreadableError, checksum, unsealed
from fedgfe_store.storage.packing import HEADER, Packing, decode
from fedgfe_store.storage.place import Place

_ABSENT = 2**64 - 1
"""Place and size of a chunk that a shard does not hold."""
_ENTRY = Struct("<QQ")
"""Of an index: where a chunk begins, and its bytes."""
_MOST_RECORDS = 16384
_GROUP_BYTES = 2**20
"""Bytes of records that are finished at once: they stay in the processor's cache."""

_own = threading.local()


@dataclass(frozen=True)
class TensorFiles:
    """The files of one tensor column: records per file and per inner chunk, shape of a record."""

    place: Place
    name: str
    granule: int
    chunk: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: Packing | None
    """What packs a chunk; None where its values are in the file as they are."""

    @classmethod
    def of(cls, place: Place, name: str, metadata: Mapping[str, Any]) -> TensorFiles:
        """Return the files of the array `name` of a store, whose Zarr metadata is `metadata`.

        Raises
        ------
        ValueError, TypeError, KeyError or IndexError
            If these are not files that this package writes.
        """
        granule, *shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        sharding = metadata["codecs"][0]["configuration"]
        chunk, *inner = sharding["chunk_shape"]
        dtype = _dtype(metadata["data_type"])
        sizes = [granule, chunk, *shape]
        if not all(type(size) is int and size > 0 for size in sizes) or inner != shape:
            raise ValueError(f"expected files of chunks of whole records, got {sizes} and {inner}")
        nbytes = dtype.itemsize * chunk * prod(shape)
        if granule > _MOST_RECORDS or granule % chunk or nbytes > LARGEST_CHUNK:
            raise ValueError(f"expected files of chunks that blosc can code, got {sizes}")
        packed = [codec["name"] for codec in sharding["codecs"]] != ["bytes", "crc32c"]
        codec = Packing.of(sharding["codecs"][1]["configuration"]) if packed else None
        return cls(place, name, granule, chunk, tuple(shape), dtype, codec)

    def file(self, number: int) -> str:
        """Return the path, or URL, of the file of the records from ``number * granule`` on."""
        return f"{self.place}/{self.file_name(number)}"

    def file_name(self, number: int) -> str:
        """Return the name of that file within the store."""
        return f"{self.name}/c.{number}{'.0' * len(self.shape)}"

    @cached_property
    def chunks(self) -> int:
        """Inner chunks of a file."""
        return self.granule // self.chunk

    @cached_property
    def chunk_nbytes(self) -> int:
        """Bytes of the values of an inner chunk."""
        return self.dtype.itemsize * self.chunk * prod(self.shape)

    @cached_property
    def record_nbytes(self) -> int:
        """Bytes of the values of a record."""
        return self.chunk_nbytes // self.chunk

    @property
    def compression(self) -> str:
        """How values are packed, as `Schema` names it, or what else blosc was told."""
        return "none" if self.codec is None else str(self.codec)

    @property
    def fill(self) -> float | int:
        """What stands where a file holds no value."""
        return float("nan") if self.dtype.kind == "f" else 0

    def write(
        self,
        file: BinaryIO,
        n: int,
        values: Callable[[slice], np.ndarray],
        present: np.ndarray | None,
    ) -> None:
        r"""Write the contents of a file.

        Parameters
        ----------
        file : binary file
            Where to, from its beginning.
        n : int
            How many records it holds, at most a granule.
        values : callable
            Gives some of them, ``[m, *shape]``, until it is called again.
        present : ndarray of bool, shape [n], optional
            Which records have a value; chunks without any are left out.
        """
        index = np.full((self.chunks, 2), _ABSENT, "<u8")
        for start in range(0, n, self._group):
            some = values(slice(start, min(start + self._group, n)))
            for first in range(0, len(some), self.chunk):
                place = (start + first) // self.chunk
                here = slice(start + first, start + first + self.chunk)
                if present is None or present[here].any():
                    chunk = some[first : first + self.chunk]
                    index[place] = file.tell(), self._write_chunk(file, chunk)
        entries = index.tobytes()
        file.write(entries + checksum(entries))

    @property
    def _group(self) -> int:
        """Records that are finished at once: whole chunks that stay in the processor's cache."""
        return self.chunk * max(1, _GROUP_BYTES // self.chunk_nbytes)

    def _write_chunk(self, file: BinaryIO, values: np.ndarray) -> int:
        if len(values) < self.chunk:
            missing = np.full((self.chunk - len(values), *self.shape), self.fill, self.dtype)
            values = np.concatenate([values, missing])
        encoded: Any = self.codec.encode(values) if self.codec else values.reshape(-1).view("u1")
        file.write(encoded)
        file.write(checksum(encoded))
        return len(encoded) + checksums.SIZE


def granule_of(name: str) -> int:
    """Return the granule that the tensor file called `name` holds, -1 for a file that is none."""
    parts = name.split(".")
    is_chunk = parts[0] == "c" and len(parts) > 1 and all(part.isdecimal() for part in parts[1:])
    return int(parts[1]) if is_chunk else -1


def _dtype(name: Any) -> np.dtype[Any]:
    if name not in get_args(ColumnDtype):
        raise ValueError(f"expected one of {', '.join(get_args(ColumnDtype))}, got {shown(name)}")
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def bytes_of(values: np.ndarray) -> memoryview:
    """Return the bytes of contiguous `values`, which are not copied."""
    return values.reshape(-1).view(np.uint8).data


def scratch(use: str, nbytes: int) -> memoryview:
    """Return memory of this thread that is used again: new memory costs as much as decoding."""
    kept: memoryview | None = getattr(_own, use, None)
    if kept is None or len(kept) < nbytes:
        kept = np.empty(nbytes, np.uint8).data
        setattr(_own, use, kept)
    return kept[:nbytes]


class OpenFile:
    """A tensor file that is open: its index, and its chunks when asked for; used as a context.

    Parameters
    ----------
    files : TensorFiles
        The column's files.
    number : int
        Which of them.

    Raises
    ------
    UnreadableError
        If its index is damaged, or it is no ordinary file.
    FileNotFoundError
        If there is no such file.
    """

    def __init__(self, files: TensorFiles, number: int) -> None:
        self._files = files
        nbytes = files.chunks * _ENTRY.size + checksums.SIZE
        self._file = files.place.open(files.file_name(number), nbytes)
        try:
            self._index_at = self._file.size - nbytes
            if self._index_at < 0:
                raise UnreadableError("it is too short")
            self._index = unsealed(self._file.read(nbytes, self._index_at)).data
        except BaseException:
            self._file.close()
            raise
        packed = files.chunk_nbytes + HEADER + checksums.SIZE  # blosc adds no more than its header
        self._most = packed if files.codec else files.chunk_nbytes + checksums.SIZE
        self._least = 0 if files.codec else self._most

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def fetch(self, chunks: Sequence[int]) -> None:
        """Bring the inner chunks that will be read next, where each read would ask a server.

        Raises
        ------
        FileNotFoundError
            If the file is not there any more.
        UnreadableError
            If it ends before they do.
        """
        if self._files.place.distant:
            found = [_ENTRY.unpack_from(self._index, chunk * _ENTRY.size) for chunk in chunks]
            # What cannot be is refused when it is read, and not asked for.
            possible = [r for r in found if sum(r) <= self._index_at and r[1] <= self._most]
            self._file.fetch(possible)

    def find(self, chunk: int) -> tuple[int, int] | None:
        """Return where an inner chunk begins and its bytes, those of its checksum included.

        Raises
        ------
        UnreadableError
            If the index is of no file that a writer left.
        """
        offset, size = _ENTRY.unpack_from(self._index, chunk * _ENTRY.size)
        if offset == size == _ABSENT:
            return None
        if offset + size > self._index_at:
            raise UnreadableError("its index points beyond it")
        if not self._least <= size <= self._most:
            raise UnreadableError("it holds a chunk of another size")
        return offset, size

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Fill pieces of memory, one after another, with what lies from `offset` on.

        Raises
        ------
        UnreadableError
            If the file ends before.
        """
        self._file.read_into(memory, offset)

    def read(self, chunk: int, out: memoryview, *, sealed: bool) -> None:
        """Decode the inner chunk number `chunk` into `out`, NaN where the file has none.

        Parameters
        ----------
        chunk : int
            Number of the chunk within the file.
        out : memoryview of bytes
            Where to; writable.
        sealed : bool
            Whether to ask the chunk's checksum.

        Raises
        ------
        UnreadableError
            If the chunk is damaged; what is in `out` is then undefined.
        """
        found = self.find(chunk)
        if found is None:
            np.frombuffer(out, self._files.dtype)[:] = self._files.fill
            return
        offset, size = found
        data = self._contents(offset, size)
        content = unsealed(data).data if sealed else data[: -checksums.SIZE]
        if self._files.codec is None:
            out[:] = content
        else:
            decode(content, out)

    def _contents(self, offset: int, size: int) -> memoryview:
        if self._files.place.distant:
            return memoryview(self._file.read(size, offset))
        memory = scratch("encoded", size)
        self._file.read_into([memory], offset)
        return memory
