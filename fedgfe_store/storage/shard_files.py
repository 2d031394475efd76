"""Files of tensor columns: one Zarr shard each, of whole records, written once and read in part.

A shard is its inner chunks, one after another in any order, and behind them an index of their
places. Each chunk is compressed by blosc, unless the store is not, and followed by its crc32c, and
so is the index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, Self, get_args

import numpy as np
from numcodecs import blosc

from fedgfe_store.common.words import shown
from fedgfe_store.schema import LARGEST_CHUNK, ColumnDtype
from fedgfe_store.storage import checksums
from fedgfe_store.storage.checksums import UnreadableError, checksum, unsealed
from fedgfe_store.storage.place import Place

_ABSENT = 2**64 - 1
"""Place and size of a chunk that a shard does not hold."""
NOWHERE, BROKEN = -1, -2
"""In place of where a record begins: it has no value there, or cannot be found."""
_HEADER = 16
"""Bytes of blosc before the data: at 4 the size that they become, at 12 theirs with the header."""
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_CODERS = ("blosclz", "lz4", "lz4hc", "snappy", "zlib", "zstd")
_MOST_RECORDS = 16384
_GROUP_BYTES = 2**22


@dataclass(frozen=True)
class TensorFiles:
    """The files of one tensor column: records per file and per inner chunk, shape of a record."""

    place: Place
    name: str
    granule: int
    chunk: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: blosc.Blosc | None
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
        codec = _coder(sharding["codecs"])
        return cls(place, name, granule, chunk, tuple(shape), dtype, codec)

    def file(self, number: int) -> str:
        """Return the path, or URL, of the file of the records from ``number * granule`` on."""
        return f"{self.place}/{self.file_name(number)}"

    def file_name(self, number: int) -> str:
        """Return the name of that file within the store."""
        return f"{self.name}/c.{number}{'.0' * len(self.shape)}"

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of the values of an inner chunk."""
        return self.dtype.itemsize * self.chunk * prod(self.shape)

    @property
    def record_nbytes(self) -> int:
        """Bytes of the values of a record."""
        return self.chunk_nbytes // self.chunk

    @property
    def compression(self) -> str:
        """How values are packed, as `Schema` names it, or what else blosc was told."""
        if self.codec is None:
            return "none"
        names = {number: name for name, number in _SHUFFLES.items()}
        shuffle = names[self.codec.shuffle]
        return shuffle if self.codec.cname == "lz4" else f"{self.codec.cname} with {shuffle}"

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
        index = np.full((self.granule // self.chunk, 2), _ABSENT, "<u8")
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
        encoded: Any = _bytes_of(values) if self.codec is None else self.codec.encode(values)
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


def _coder(codecs: Sequence[Mapping[str, Any]]) -> blosc.Blosc | None:
    """Return what packs an inner chunk between its codecs ``bytes`` and ``crc32c``."""
    if [codec["name"] for codec in codecs] == ["bytes", "crc32c"]:
        return None
    codec = codecs[1]["configuration"]
    _check_coder(codec)
    return blosc.Blosc(
        cname=codec["cname"],
        clevel=codec["clevel"],
        shuffle=_SHUFFLES[codec["shuffle"]],
        blocksize=codec["blocksize"],
        typesize=codec["typesize"],
    )


def _check_coder(codec: Mapping[str, Any]) -> None:
    bounds = {"clevel": 9, "blocksize": 2**31 - 1, "typesize": 255}
    for name, most in bounds.items():
        if type(codec[name]) is not int or not 0 <= codec[name] <= most:
            raise ValueError(f"{name}: expected 0 to {most}, got {codec[name]!r}")
    if codec["cname"] not in _CODERS or codec["shuffle"] not in [*_SHUFFLES]:
        raise ValueError(f"expected a codec of blosc, got {codec['cname']!r}, {codec['shuffle']!r}")


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """Return the bytes of contiguous `values`, which are not copied."""
    flat: np.ndarray = values.reshape(-1).view(np.uint8)
    return flat


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
        nbytes = files.granule // files.chunk * 16 + checksums.SIZE
        self._file = files.place.open(files.file_name(number), nbytes)
        try:
            self._index_at, self._index = self._read_index(nbytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _read_index(self, nbytes: int) -> tuple[int, np.ndarray]:
        begin = self._file.size - nbytes
        if begin < 0:
            raise UnreadableError("it is too short")
        return begin, unsealed(self._file.read(nbytes, begin)).view("<u8").reshape(-1, 2)

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
            most = self._files.chunk_nbytes + _HEADER + checksums.SIZE
            found = [(offset, size) for offset, size in self._index[list(chunks)].tolist()]
            # What cannot be is refused when it is read, and not asked for.
            self._file.fetch([r for r in found if sum(r) <= self._index_at and r[1] <= most])

    def locate(self, records: np.ndarray) -> np.ndarray:
        """Return where records of a store that is not compressed begin in the file.

        Parameters
        ----------
        records : ndarray of int64, shape [n]
            Their numbers within the file.

        Returns
        -------
        ndarray of int64, shape [n]
            Bytes from its beginning; `NOWHERE` where it holds no value, `BROKEN` where its index
            is of no file that a writer left.
        """
        files = self._files
        chunks, within = np.divmod(records, files.chunk)
        offsets, sizes = self._index[chunks].T
        due = files.chunk_nbytes + checksums.SIZE
        is_sound = (sizes == due) & (offsets <= max(self._index_at - due, 0))
        places: np.ndarray = (
            np.where(is_sound, offsets, 0).astype(np.int64) + within * files.record_nbytes
        )
        places[~is_sound] = BROKEN
        places[(offsets == _ABSENT) & (sizes == _ABSENT)] = NOWHERE
        return places

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Fill pieces of memory, one after another, with what lies from `offset` on.

        Raises
        ------
        UnreadableError
            If the file ends before.
        """
        self._file.read_into(memory, offset)

    def read(self, chunk: int, out: np.ndarray) -> None:
        r"""Decode the inner chunk number `chunk` into `out`, NaN where the file has none.

        Parameters
        ----------
        chunk : int
            Number of the chunk within the file.
        out : ndarray, shape [chunk, \*shape]
            Where to; contiguous.

        Raises
        ------
        UnreadableError
            If the chunk is damaged; what is in `out` is then undefined.
        """
        offset, size = map(int, self._index[chunk])
        if offset == size == _ABSENT:
            out[...] = self._files.fill
            return
        if offset + size > self._index_at:
            raise UnreadableError("its index points beyond it")
        if size > out.nbytes + _HEADER + checksums.SIZE:  # blosc adds no more than its header
            raise UnreadableError("it holds a chunk of another size")
        encoded = unsealed(self._file.read(size, offset))
        if self._files.codec is None:
            if len(encoded) != out.nbytes:
                raise UnreadableError("it holds a chunk of another size")
            _bytes_of(out)[:] = encoded
            return
        sizes = encoded[4:_HEADER].view("<u4").tolist() if len(encoded) >= _HEADER else []
        if sizes[::2] != [out.nbytes, len(encoded)]:
            raise UnreadableError("it holds a chunk of another size")
        try:
            blosc.decompress(encoded, out)
        except RuntimeError as error:
            raise UnreadableError(str(error)) from error
