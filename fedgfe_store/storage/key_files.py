"""Files of key columns: one Zarr chunk of `KEY_CHUNK` values each, in and out."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd, decompress

from fedgfe_store.records import EARLIEST, LATEST
from fedgfe_store.schema import Schema
from fedgfe_store.storage.checksums import UnreadableError, checksum, unsealed
from fedgfe_store.storage.layout import KEY_CHUNK, ZSTD_LEVEL, KeyColumn, key_columns
from fedgfe_store.storage.place import Place

_COUNT = struct.Struct("<I")

_FILE_BYTES = 2**32
"""Longest file of a key column; the codec of texts counts in 32 bits."""
_ALWAYS = 2**26
_RATIO = 2**14
"""Bytes that texts may become in any case, and per byte of the file. Zstd packs the same note in
each row 5,000 to 12,000 times smaller; a file made to fill memory is packed 32,000 times."""
# RFC 8878: Magic_Number in 3.1.1, Block_Maximum_Size in 3.1.1.2.
_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 2**17


def key_file(path: Path, name: str, chunk: int) -> Path:
    """Return the file that holds chunk number `chunk` of the key column `name`."""
    return path / name / f"c.{chunk}"


@dataclass(frozen=True)
class EncodedChunk:
    """The contents of a key file, the digest of the values in it, and those before zstd."""

    contents: bytes
    digest: str
    packed: bytes


@dataclass(frozen=True)
class DecodedChunk:
    """Values of a key file, and their digest: 16 hex digits."""

    values: np.ndarray
    digest: str


def encode(column: KeyColumn, values: np.ndarray, known: bytes = b"") -> EncodedChunk:
    """Return the file that holds `values`, up to a chunk of them, and fill values behind.

    Parameters
    ----------
    column : KeyColumn
        The column.
    values : ndarray, shape [n]
        What is to be in the file.
    known : bytes, optional
        `EncodedChunk.packed` of the first ones of a column of texts, which are not packed again.
    """
    packed = _packed(column, values, known)
    padded = packed + column.padding * (KEY_CHUNK - len(values))
    # Zarr's edge chunks are whole. The digest covers the values alone: it can be asked for of a
    # chunk that has grown since, so that readers of an older commit find it there.
    if column.data_type == "string":
        padded = _COUNT.pack(KEY_CHUNK) + padded[_COUNT.size :]
    compressed: bytes = Zstd(level=ZSTD_LEVEL).encode(padded)
    return EncodedChunk(compressed + checksum(compressed), xxhash.xxh3_64_hexdigest(packed), packed)


def digest(column: KeyColumn, values: np.ndarray) -> str:
    """Return the digest of `values`: 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(_packed(column, values))


def cut(values: np.ndarray) -> list[np.ndarray]:
    """Cut a key column that begins with a chunk into its chunks."""
    return [values[start : start + KEY_CHUNK] for start in range(0, len(values), KEY_CHUNK)]


def numbered(name: str, first: int, values: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """Return the chunks of a key column that begins with chunk `first`, by name and number."""
    return {(name, first + i): chunk for i, chunk in enumerate(cut(values))}


def padded(
    schema: Schema, columns: Mapping[str, np.ndarray], commit: int, skipped: int
) -> dict[str, np.ndarray]:
    """Return one granule of key columns: the records' own and what skipped rows hold."""
    n = len(columns["index"])
    marks = {
        "created_in": np.full(n, commit, np.int32),
        "deleted_in": np.zeros(n, np.int32),
        "recorded_in": columns.get("recorded_in", np.full(n, commit, np.int32)),
    }
    given = {**columns, **marks}
    return {
        c.name: np.concatenate([given[c.name], np.full(skipped, c.skipped, c.dtype)])
        for c in key_columns(schema).values()
        if c.dim == "record"
    }


def gap(column: KeyColumn, values: np.ndarray, has: np.ndarray | None) -> str | None:
    """Return what is wrong with `values` of a key column, None where a reader takes them.

    A writer asks it of what it is about to publish; `has` is what a bool column must be.
    """
    if has is not None:
        return None if (values == has).all() else "it differs from the digests"
    wrong = values == column.dtype.type(column.fill)
    if column.attributes:
        wrong = wrong | (values < EARLIEST) | (values > LATEST)
    if column.largest is not None:
        wrong = (values < 0) | (values > column.largest)
    places = np.flatnonzero(wrong)
    return f"{values[places[0]]!r} at row {places[0]} of the chunk" if len(places) else None


def contents(place: Place, column: KeyColumn, chunk: int) -> bytes:
    """Return the file of a chunk; FileNotFoundError, OSError or ValueError where it cannot be."""
    return place.read(f"{column.name}/c.{chunk}", _FILE_BYTES)


def decoded(column: KeyColumn, data: bytes, n: int) -> DecodedChunk:
    """Return the first `n` values in the file `data` of a chunk.

    Raises
    ------
    ValueError or RuntimeError
        If it is damaged, or is not one of this column's type.
    """
    return _decoded(column, unpacked(column, unsealed(data)), n)


def _packed(column: KeyColumn, values: np.ndarray, known: bytes = b"") -> bytes:
    """Return `values` as the codec before zstd leaves them, the first of which are `known`."""
    if column.data_type != "string":
        return values.astype(column.stored).tobytes()
    if not known:
        return bytes(VLenUTF8().encode(np.array(values.tolist(), object)))
    (count,) = _COUNT.unpack_from(known)
    added = bytes(VLenUTF8().encode(np.array(values[count:].tolist(), object)))
    return b"".join([_COUNT.pack(len(values)), known[_COUNT.size :], added[_COUNT.size :]])


def _decoded(column: KeyColumn, data: bytes | memoryview, n: int) -> DecodedChunk:
    if column.data_type != "string":
        numbers = np.frombuffer(data, column.stored)
        if len(numbers) != KEY_CHUNK:
            raise ValueError(f"expected {KEY_CHUNK} values, got {len(numbers)}")
        known = numbers[:n]
        return DecodedChunk(known.astype(column.dtype), xxhash.xxh3_64_hexdigest(known.data))
    # The decoder makes room for as many texts as the first bytes say, whatever they are.
    if data[: _COUNT.size] != _COUNT.pack(KEY_CHUNK):
        raise ValueError(f"expected {KEY_CHUNK} texts, got something else")
    rest = memoryview(data)[_COUNT.size :]
    values, nbytes = _repeated(rest, n) or _different(rest, n)
    # As `_packed` has them, which would have to encode each anew: there is one UTF-8 of a text.
    packed = b"".join((_COUNT.pack(n), rest[:nbytes]))
    return DecodedChunk(values, xxhash.xxh3_64_hexdigest(packed))


def _repeated(packed: memoryview, n: int) -> tuple[np.ndarray, int] | None:
    """Return `n` texts and their bytes in `packed` if they are all the same, as a node or split."""
    size = _COUNT.size + int.from_bytes(packed[: _COUNT.size], "little")
    if size * n > len(packed) or bytes(packed[: size * n]) != bytes(packed[:size]) * n:
        return None
    text = np.array(str(packed[_COUNT.size : size], "utf-8"), np.dtypes.StringDType())
    return np.full(n, text, text.dtype), size * n


def _different(packed: memoryview, n: int) -> tuple[np.ndarray, int]:
    texts = VLenUTF8().decode(b"".join((_COUNT.pack(n), packed))).tolist()
    nbytes = _COUNT.size * n + len("".join(texts).encode())
    return np.array(texts, np.dtypes.StringDType()), nbytes


def unpacked(column: KeyColumn, packed: np.ndarray) -> bytes | memoryview:
    """Return what zstd made `packed` of, no more than a chunk of `column` can be.

    Parameters
    ----------
    column : KeyColumn
        The column whose chunk it is: numbers have a size, texts what their packed size allows.
    packed : ndarray of uint8
        The contents of its file without the checksum.

    Raises
    ------
    UnreadableError
        If it is no zstd frame, or says or shows that it becomes something larger.
    RuntimeError or ValueError
        If zstd cannot unpack it.
    """
    size, is_said = _unpacked_size(packed)
    if column.data_type == "string":
        allowed = max(_ALWAYS, _RATIO * len(packed))
        if size > allowed:
            raise UnreadableError(f"expected at most {allowed:,} bytes of text, got {size:,}")
        texts: bytes = decompress(packed)
        return texts
    due = KEY_CHUNK * column.stored.itemsize
    if size < due or (is_said and size > due):
        raise UnreadableError(f"expected {KEY_CHUNK} values in {due:,} bytes, got {size:,}")
    numbers: np.ndarray = decompress(packed, np.empty(due, np.uint8))
    return numbers.data


def _unpacked_size(packed: np.ndarray) -> tuple[int, bool]:
    """Return the bytes that a zstd frame becomes, as it says itself, or at most by its blocks.

    RFC 8878: magic number, a byte that describes the header, the header, and blocks.
    """
    head = packed[:18].tobytes()
    if len(head) < 6 or head[:4] != _MAGIC:
        raise UnreadableError("it is not compressed by zstd")
    described, is_single = head[4], bool(head[4] & 0x20)
    start = 5 + (not is_single) + (0, 1, 2, 4)[described & 3]
    nbytes = (int(is_single), 2, 4, 8)[described >> 6]
    if len(head) < start + nbytes:
        raise UnreadableError("it is not compressed by zstd: it ends in the header")
    if nbytes:
        size = int.from_bytes(head[start : start + nbytes], "little")
        return size + (256 if nbytes == 2 else 0), True
    return _blocks_size(packed, start), False


def _blocks_size(packed: np.ndarray, start: int) -> int:
    """Return the bytes that the blocks from `start` on become at most."""
    total, is_last = 0, False
    while not is_last and start + 3 <= len(packed):
        header = int.from_bytes(packed[start : start + 3].tobytes(), "little")
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        total += size if kind < 2 else _BLOCK
        start += 3 + (1 if kind == 1 else size)
    return total
