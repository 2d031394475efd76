"""Records on their way into a store: only what every reader can show, copied, rounded, digested."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedgfe_store.common.words import shortened, shown
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, NOTE_COLUMNS, RecordBatch, key_at
from fedgfe_store.schema import Schema, TensorColumn
from fedgfe_store.storage.checksums import row_digests
from fedgfe_store.storage.finishing import BEYOND, Finishing, How

FIRST_ENTRY, LAST_ENTRY = -9_223_372_036_854, 9_223_372_036_854
"""The moments that a new record can have, in milliseconds since 1970 UTC: those that nanoseconds in
64 bits can say, as pandas and `xarray.open_zarr` count. One beyond them and no other Zarr reader
opens the store. What old stores hold is read as ever: see `records.EARLIEST`."""

ENTRY_MOMENTS = "a moment from 1677-09-22 to 2262-04-11, as pandas and xarray can show it"

TEXT_BYTES = 2**16
"""Longest key or note, in bytes of UTF-8. An append writes the last chunk of each column anew, up
to 16,384 rows: notes of 150 kB would cost every append gigabytes, and the memory for them."""

EXTRA_DEPTH = 100
"""Most dicts and lists inside one another in `extra`: whoever reads it parses it recursively."""

Record = Callable[[int], str]
"""Names the record at a position, for messages."""

_KEY_TEXTS = ("node", "split", "class_name")
_CONTROL = re.compile("[\0-\x1f\x7f]")
_MILLISECONDS = {
    "W": (604_800_000, 1),
    "D": (86_400_000, 1),
    "h": (3_600_000, 1),
    "m": (60_000, 1),
    "s": (1000, 1),
    "ms": (1, 1),
    "us": (1, 10**3),
    "ns": (1, 10**6),
    "ps": (1, 10**9),
    "fs": (1, 10**12),
    "as": (1, 10**15),
}
"""By unit of numpy, milliseconds as a fraction."""


def conformed(records: RecordBatch, schema: Schema, *, how: How = "copied") -> RecordBatch:
    """Return `records` as they stand under `schema`: rounded, finite, digested.

    What is left as it is, see `finished`, is finished and compared with the digests as it is
    written: see `finishing.Finisher`.

    Raises
    ------
    SchemaMismatchError
        If a value is not finite in the schema's precision, or is missing, or a key or note is one
        that does not come into a store any more; names the record.
    """
    known = {name: records.columns[name] for name in (*KEY_COLUMNS, *NOTE_COLUMNS)}
    check_entry(known, lambda position: named(records.key(position)))
    fitting, unfit = finished(records, schema, how=how)
    for position, (name, is_beyond) in unfit.items():
        what = f"not finite in {schema.precision}" if is_beyond else "not finite"
        raise SchemaMismatchError(f"{name} of {records.key(position)} has values that are {what}")
    return fitting


def finished(
    records: RecordBatch, schema: Schema, *, how: How = "copied"
) -> tuple[RecordBatch, dict[int, tuple[str, bool]]]:
    """Return `records` as they stand under `schema`, and which do not.

    Only keys, notes and tensors are taken over, not the marks of another store's commits.

    Parameters
    ----------
    records : RecordBatch
        Records whose keys and notes were checked, see `check_entry`.
    schema : Schema
        The store's.
    how : {"copied", "in place", "left"}
        Whether the tensors are finished in memory of their own, in their own, or not yet.

    Returns
    -------
    fitting : RecordBatch
        All of them, digested and, unless they are left, rounded.
    unfit : dict of int to tuple of str and bool
        By position, in order: a tensor with values that are not finite, and whether they are so
        only in the schema's precision.
    """
    columns = {name: records.columns[name] for name in (*KEY_COLUMNS, *NOTE_COLUMNS)}
    tensors: dict[str, np.ndarray] = {}
    unfit: dict[int, tuple[str, bool]] = {}
    for tensor in schema.tensors:
        given = records.tensors.get(tensor.name)
        present = np.full(len(records), given is not None)
        digests = np.zeros(len(records), np.uint64)
        lengths = np.zeros(len(records), np.int32)
        if given is not None:
            present &= records.columns.get(f"has_{tensor.name}", True)
            _check_present(tensor, columns, present)
            if tensor.ragged:
                lengths = _lengths(tensor, records, present)
            states = np.zeros(len(records), np.uint8)
            finish = Finishing(schema, tensor, given, present, lengths, digests, states)
            tensors[tensor.name] = finish.run(how)
            for position in np.flatnonzero(states).tolist():
                unfit.setdefault(position, (tensor.name, states[position] == BEYOND))
        columns[f"{tensor.name}_digest"] = digests
        if tensor.optional:
            columns[f"has_{tensor.name}"] = present
        if tensor.ragged:
            columns[f"length_{tensor.name}"] = lengths
    columns["row_digest"] = row_digests(columns)
    return RecordBatch(columns, tensors, how == "left"), unfit


def _check_present(
    tensor: TensorColumn, keys: Mapping[str, np.ndarray], present: np.ndarray
) -> None:
    for position in [] if tensor.optional else np.flatnonzero(~present)[:1].tolist():
        key = key_at(keys, position)
        raise SchemaMismatchError(f"{tensor.name} of {key}: expected a value, got none")


def _lengths(tensor: TensorColumn, records: RecordBatch, present: np.ndarray) -> np.ndarray:
    """Return how long each record is in a ragged column, 0 where there is none."""
    longest = tensor.shape[0]
    given = records.columns.get(f"length_{tensor.name}", longest)
    lengths = np.where(present, given, 0).astype(np.int32)
    for position in np.flatnonzero((lengths < 0) | (lengths > longest))[:1].tolist():
        raise SchemaMismatchError(
            f"{tensor.name} of {records.key(position)}: expected a length from 0 to {longest}, got "
            f"{lengths[position]}"
        )
    return lengths


def check_entry(columns: Mapping[str, np.ndarray], record: Record) -> None:
    """Refuse keys and notes that a store may hold from earlier, but that no longer come in.

    Parameters
    ----------
    columns : mapping of str to ndarray
        Key columns and notes, each ``[n]``.
    record : callable
        Names the record at a position, for the message.

    Raises
    ------
    SchemaMismatchError
        If a text holds control characters, or is too long, or a moment is out of bounds.
    """
    for name, values in columns.items():
        if values.dtype.kind == "T":
            check_texts(name, values.tolist(), record)
    beyond = (columns["timestamp"] < FIRST_ENTRY) | (columns["timestamp"] > LAST_ENTRY)
    for position in np.flatnonzero(beyond)[:1].tolist():
        moment = np.datetime64(int(columns["timestamp"][position]), "ms")
        raise SchemaMismatchError(
            f"timestamp: expected {ENTRY_MOMENTS}, got {moment} ({record(position)})"
        )


def check_texts(name: str, texts: list[str], record: Record) -> None:
    """Refuse texts of one column, as `check_entry` does."""
    for text in dict.fromkeys(texts):  # of keys there are few
        wrong = _wrong_text(name, text)
        if wrong:
            raise SchemaMismatchError(f"{name}: {wrong} ({record(texts.index(text))})")


def _wrong_text(name: str, text: str) -> str:
    if len(text) * 4 > TEXT_BYTES and len(text.encode()) > TEXT_BYTES:
        size = len(text.encode())
        return f"expected at most {TEXT_BYTES:,} bytes of UTF-8, got {size:,}: {shown(text)}"
    if name == "class_name" and not text:
        return "expected text that is not empty, got ''"
    if name in _KEY_TEXTS and _CONTROL.search(text):
        return f"expected text without control characters, got {shown(text)}"
    if "\0" in text:
        return f"expected text without U+0000, got {shown(text)}"
    return ""


def named(record: object) -> str:
    """Return the key of a record in one line of bearable length, whatever is in it."""
    return shortened(_CONTROL.sub(lambda sign: repr(sign[0])[1:-1], str(record)), 300)


def milliseconds(value: np.datetime64) -> int:
    """Return `value`, of any unit and not NaT, in milliseconds since 1970, however many."""
    unit, step = np.datetime_data(value.dtype)
    count = int(value.astype(np.int64)) * step
    if unit in ("Y", "M"):
        month = count * 12 if unit == "Y" else count
        if abs(month) > 120_000:  # numpy's own numbers end soon after, without a word
            return month * 2_592_000_000
        return int(np.datetime64(month, "M").astype("datetime64[ms]").astype(np.int64))
    times, parts = _MILLISECONDS[unit]
    return count * times // parts


def is_nested_deeper(value: Any, most: int) -> bool:
    """Whether `value` has more than `most` dicts and lists inside one another."""
    inner = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        return False
    return most == 0 or any(is_nested_deeper(each, most - 1) for each in inner)
