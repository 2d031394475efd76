"""What a received store may claim: values whose checksums fit may still be anyone's.

A checksum tells accidents, not intent. What is read here is checked before memory is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from fedgfe_store.common.words import shown
from fedgfe_store.schema import Schema
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.layout import KEY_CHUNK, KeyColumn
from fedgfe_store.storage.shard_files import TensorFiles

GROUP_BYTES = 2**28
"""Longest ``zarr.json``: other people's arrays and attributes are in it, too."""
KEY_FILE_BYTES = 2**32
"""Longest file of a key column; the codec of texts counts in 32 bits."""
_LAST_COMMIT = 2**31 - 2
"""Commit numbers are int32, and one more is compared with."""
# The digests of one column would take 8 TiB of memory: no writer of ours has come that far.
_MOST_ROWS = 2**40

_ALWAYS = 2**26
_RATIO = 2**14
"""Bytes that texts may become in any case, and per byte of the file. Zstd packs the same note in
each row 5,000 to 12,000 times smaller; a file made to fill memory is packed 32,000 times."""
# RFC 8878: Magic_Number in 3.1.1, Block_Maximum_Size in 3.1.1.2.
_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 2**17
_COUNTERS = ("commit", "records", "live", "compacted")


def parsed_group(raw: bytes) -> dict[str, Any]:
    """Return what stands in a ``zarr.json``.

    Raises
    ------
    ValueError
        If it is not JSON, is nested too deep, or is no object.
    """
    try:
        document = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected an object, got {shown(document)}")
    return document


def check_group_values(
    schema: Schema,
    point: Mapping[str, Any],
    arrays: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuse a commit point and metadata of arrays that no writer can have left.

    Parameters
    ----------
    schema : Schema
        The store's.
    point : mapping
        The commit point as it stands in ``zarr.json``.
    arrays : mapping
        The consolidated metadata of our arrays, as it stands there.
    expected : mapping
        What it is in a new store of this schema.

    Raises
    ------
    ValueError
        If a type or a range is wrong.
    """
    _check_point(schema, point)
    for name, wanted in expected.items():
        _check_array(name, arrays[name], wanted)
    for column in schema.tensors:
        files = TensorFiles.of(Path(), arrays[column.name])
        if (files.granule, files.shape) != (schema.granule, column.shape):
            raise ValueError(
                f"{column.name}: expected {schema.granule} records of {list(column.shape)} a file, "
                f"got {files.granule} of {list(files.shape)}"
            )


def _check_point(schema: Schema, point: Mapping[str, Any]) -> None:
    for name in _COUNTERS:
        if type(point[name]) is not int:
            raise ValueError(f"{name}: expected a whole number, got {shown(point[name])}")
    commit, records, live, compacted = (point[name] for name in _COUNTERS)
    bounds = {
        "commit": (0, commit, _LAST_COMMIT),
        "records": (0, records, _MOST_ROWS if commit else 0),
        "live": (0, live, records),
        "compacted": (0, compacted, commit),
    }
    for name, (low, value, high) in bounds.items():
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {shown(value)}")
    if records % schema.granule:
        raise ValueError(f"records: expected whole files of {schema.granule}, got {records}")


def _check_array(name: str, found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected an object, got {shown(found)}")
    shape = found["shape"]
    if not (isinstance(shape, list) and shape and type(shape[0]) is int):
        raise ValueError(f"{name}: expected a shape, got {shown(shape)}")
    for key, got, due in (
        ("shape", shape[1:], wanted["shape"][1:]),
        ("data type", found["data_type"], wanted["data_type"]),
        ("axes", found["dimension_names"], wanted["dimension_names"]),
    ):
        if got != due:
            raise ValueError(f"{name}: expected the {key} {shown(due)}, got {shown(got)}")


def unpacked(column: KeyColumn, packed: np.ndarray) -> bytes:
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
        texts: bytes = Zstd().decode(packed)
        return texts
    due = KEY_CHUNK * column.stored.itemsize
    if size < due or (is_said and size > due):
        raise UnreadableError(f"expected {KEY_CHUNK} values in {due:,} bytes, got {size:,}")
    numbers: np.ndarray = Zstd().decode(packed, np.empty(due, np.uint8))
    return numbers.tobytes()


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
