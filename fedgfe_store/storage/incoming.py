"""What a caller gives of records: refused, or as arrays that fit the store."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from fedgfe_store.common.words import is_whole, shown
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import RecordBatch, key_at, to_milliseconds
from fedgfe_store.schema import Schema
from fedgfe_store.storage.entry import (
    ENTRY_MOMENTS,
    EXTRA_DEPTH,
    FIRST_ENTRY,
    LAST_ENTRY,
    Record,
    check_entry,
    is_nested_deeper,
    milliseconds,
    named,
)
from fedgfe_store.storage.values import is_dense, is_tensor, taken

_NUMBERS: Mapping[str, np.dtype[Any]] = {"round": np.dtype(np.int32), "index": np.dtype(np.int64)}
"""Key columns of whole numbers."""


def checked(
    schema: Schema,
    keys: Mapping[str, Any],
    notes: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> RecordBatch:
    """Return the records given by `keys`, `notes` and `tensors`, for `conformed` to look into.

    Parameters
    ----------
    schema : Schema
        What the records must look like.
    keys : mapping
        A value for each of `KEY_COLUMNS`: one for all records, or a sequence of one each.
    notes : mapping
        The same for `NOTE_COLUMNS`; None where nothing is known.
    tensors : mapping
        For each tensor column ``[n, *shape]``, or ``[*shape]`` for a single record: torch
        tensors on any device or numpy arrays, of float16, bfloat16 or float32, or of whole
        numbers for such a column. A ragged column may be a sequence of ``[length, ...]``, or have
        its lengths as ``length_<name>``. Optional columns may be None.

    Raises
    ------
    SchemaMismatchError
        If a name, shape, data type or value does not fit; the message names the record.
    """
    found = {t.name: taken(schema, t, tensors.get(t.name)) for t in schema.tensors}
    given = {name: each for name, each in found.items() if each is not None}
    counts = {name: len(values) for name, (values, _) in given.items()}
    if not counts:
        raise SchemaMismatchError(f"expected one of {', '.join(schema.columns)}, got none")
    n = next(iter(counts.values()))
    if len(set(counts.values())) > 1:
        raise SchemaMismatchError(f"expected as many records in every tensor, got {counts}")
    lengths = {f"length_{t.name}" for t in schema.tensors if t.ragged}
    unknown = set(tensors) - set(schema.columns) - lengths
    if any(tensors[name] is not None for name in unknown):
        raise SchemaMismatchError(
            f"expected the tensor columns {', '.join(schema.columns)}, got also "
            f"{', '.join(sorted(unknown))}"
        )
    columns = _columns(keys, notes, n) | checked_lengths(tensors, given, n)
    return RecordBatch(columns, {name: values for name, (values, _) in given.items()})


def checked_lengths(
    tensors: Mapping[str, Any], given: Mapping[str, tuple[np.ndarray, np.ndarray | None]], n: int
) -> dict[str, np.ndarray]:
    """Return ``length_<name>`` of `n` records for each ragged column among `given`.

    Those that are in `tensors` go before those that `taken` found.
    """
    columns = {}
    for name, (_, known) in given.items():
        if known is None:
            continue
        said = tensors.get(f"length_{name}")
        columns[f"length_{name}"] = known
        if said is not None:
            lengths = _integers(f"length_{name}", said, n, np.dtype(np.int32))
            for position in np.flatnonzero(lengths > known)[:1].tolist():
                wanted = f"a length of at most {known[position]}, as {name} is long"
                record = _numbered(n)(position)
                raise _unfit(f"length_{name}", wanted, int(lengths[position]), record)
            columns[f"length_{name}"] = lengths
    return columns


def checked_columns(
    keys: Mapping[str, Any], notes: Mapping[str, Any], n: int
) -> dict[str, np.ndarray]:
    """Return keys and notes of `n` records from what a caller gave, all that there is to check."""
    columns = _columns(keys, notes, n)
    check_entry(columns, lambda position: named(key_at(columns, position)))
    return columns


def _columns(keys: Mapping[str, Any], notes: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    columns = checked_keys(keys, n)
    notes_of = _checked_notes(notes, n, lambda position: named(key_at(columns, position)))
    return columns | notes_of


def checked_keys(keys: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """Return the columns in `keys`, some of `KEY_COLUMNS`, of `n` records, as in `checked`."""
    missing = [name for name, value in keys.items() if value is None]
    if missing:
        raise SchemaMismatchError(f"expected a value for {', '.join(missing)}, got None")
    return {name: _key_column(name, value, n) for name, value in keys.items()}


def _key_column(name: str, value: Any, n: int) -> np.ndarray:
    if name in _NUMBERS:
        return _integers(name, value, n, _NUMBERS[name])
    values = _spread(name, value, n)
    return _strings(name, _nodes(values) if name == "node" else values, empty=False)


def _checked_notes(notes: Mapping[str, Any], n: int, record: Record) -> dict[str, np.ndarray]:
    columns = {}
    for name in ("sample_id", "file_id", "image_filename", "audio_path"):
        values = ["" if v is None else v for v in _spread(name, notes.get(name), n)]
        columns[name] = _strings(name, values, record)
    moments = enumerate(_spread("timestamp", notes.get("timestamp"), n))
    columns["timestamp"] = np.array([_moment(v, i, record) for i, v in moments], np.int64)
    extra = enumerate(_spread("extra", notes.get("extra"), n))
    columns["extra"] = _strings("extra", [_json(v, i, record) for i, v in extra], record)
    return columns


def checked_source(value: str | None) -> str:
    """Return where a commit comes from, as a commit column keeps it; empty for None."""
    return str(_strings("source", ["" if value is None else value])[0])


def _spread(name: str, value: Any, n: int) -> Sequence[Any]:
    """Return `n` values: those of a sequence, or as often `value`, of any type."""
    value = _plain(value)
    if value is None or isinstance(value, str | bytes | Mapping | datetime) or is_whole(value):
        return [value] * n
    if isinstance(value, np.datetime64):
        return [value] * n
    if isinstance(value, set | frozenset):
        raise _unfit(name, "values in an order", value)
    try:
        values = value if isinstance(value, range) else list(value)
        count = len(values)
    except TypeError:
        return [value] * n
    except OverflowError:  # a range longer than any list
        raise _unfit(name, f"{n} values, one per record", value) from None
    if count != n:
        raise SchemaMismatchError(f"{name}: expected {n} values, one per record, got {count}")
    return values


def _plain(value: Any) -> Any:
    """Return what a tensor holds as Python's own values, and all else as it is."""
    return value.tolist() if is_tensor(value) and is_dense(value) else value


def _unfit(name: str, wanted: str, value: Any, record: object = "") -> SchemaMismatchError:
    where = f" ({record})" if record else ""
    return SchemaMismatchError(f"{name}: expected {wanted}, got {shown(value)}{where}")


def _numbered(n: int) -> Record:
    """Return what names `n` records by position, a single one not at all."""
    return lambda position: f"record {position} of {n}" if n > 1 else ""


def _nodes(values: Sequence[Any]) -> list[Any]:
    """Return `values` with whole numbers as text."""
    texts, record = [], _numbered(len(values))
    for position, value in enumerate(map(_plain, values)):
        try:
            texts.append(str(operator.index(value)) if is_whole(value) else value)
        except ValueError:  # of more digits than Python prints
            raise _unfit("node", "text or a whole number", value, record(position)) from None
    return texts


def _strings(
    name: str, values: Sequence[Any], record: Record | None = None, *, empty: bool = True
) -> np.ndarray:
    record = record or _numbered(len(values))
    wanted = "text" if empty else "text that is not empty"
    for position, value in enumerate(values):
        if not isinstance(value, str) or value == "\ufffd" or not (value or empty):
            raise _unfit(name, wanted, value, record(position))
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SchemaMismatchError(
                f"{name}: {shown(value)} is not valid UTF-8: {error.reason} ({record(position)})"
            ) from None
    # numpy asks a subclass, such as an Enum, what it is called.
    return np.array([str.__str__(value) for value in values], np.dtypes.StringDType())


def _integers(name: str, value: Any, n: int, dtype: np.dtype[Any]) -> np.ndarray:
    largest = int(np.iinfo(dtype).max)
    numbers = []
    for position, each in enumerate(map(_plain, _spread(name, value, n))):
        number = operator.index(each) if is_whole(each) else -1
        if not 0 <= number <= largest:
            wanted = f"a whole number from 0 to {largest}"
            raise _unfit(name, wanted, each, _numbered(n)(position))
        numbers.append(number)
    return np.array(numbers, dtype)


def _moment(value: Any, position: int, record: Record) -> int:
    if value is None:
        return to_milliseconds(datetime.now(UTC))
    if isinstance(value, datetime) and value == value:  # pandas' NaT is a datetime, too
        moment = to_milliseconds(value)
    elif isinstance(value, np.datetime64) and not np.isnat(value):
        moment = milliseconds(value)
    else:
        raise _unfit("timestamp", "a datetime", value, record(position))
    if not FIRST_ENTRY <= moment <= LAST_ENTRY:
        raise _unfit("timestamp", ENTRY_MOMENTS, value, record(position))
    return moment


def _json(value: Any, position: int, record: Record) -> str:
    if value is None:
        return ""
    if is_nested_deeper(value, EXTRA_DEPTH):
        wanted = f"at most {EXTRA_DEPTH} levels of dicts and lists"
        raise _unfit("extra", wanted, value, record(position))
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SchemaMismatchError(
            f"extra: {shown(value)} cannot be kept as JSON: {error} ({record(position)})"
        ) from None
