"""The key of a record, and what is known of a record besides its tensors."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import xxhash

from fedgfe_store.common import threads
from fedgfe_store.common.entry import (
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
from fedgfe_store.common.words import is_whole, numbers_first, shown
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema, TensorColumn

KEY_COLUMNS = ("node", "round", "split", "class_name", "index")
"""The columns that together identify a record, in the order in which they are shown."""

NOTE_COLUMNS = ("sample_id", "file_id", "image_filename", "audio_path", "timestamp", "extra")
"""What is kept of a record besides its key and its tensors."""

_DIGESTED = tuple(name for name in (*KEY_COLUMNS, *NOTE_COLUMNS) if name != "file_id")
"""What a row's digest covers, in this order: the columns of format version 1."""

SERVER = "server"
"""Node of the federation's server."""

TEXT_NODE, TEXT_ROUND, TEXT_SPLIT = "text", 0, "reference"
"""Where reference text embeddings are kept: what adapters are trained towards."""

EARLIEST, LATEST = -62_135_596_800_000, 253_402_300_799_999
"""The moments that a stored record can have, years 1 to 9999, in milliseconds since 1970 UTC. New
ones come in within narrower bounds: see `_entry.FIRST_ENTRY`."""

_GROUP_BYTES = 2**22
"""Bytes of records that are worked on at once: they stay in the processor's cache."""
_WORTH_THREADS = 2**23
"""Bytes from which several threads are faster than one."""


@dataclass(frozen=True, order=True)
class RecordKey:
    """What identifies one record of a store.

    Parameters
    ----------
    node : str
        Federated node: ``"0"``, ``"1"``, ... or ``"server"``.
    round : int
        Federated round, from 0.
    split : str
        ``"train"``, ``"val"``, ``"test"`` or any other name.
    class_name : str
        Class of the sample.
    index : int
        Number of the sample within node, split and class, from 0.
    """

    node: str
    round: int
    split: str
    class_name: str
    index: int

    def __str__(self) -> str:
        return (
            f"node {self.node}, round {self.round}, split {self.split}, "
            f"class {self.class_name}, index {self.index}"
        )


@dataclass(frozen=True)
class RecordBatch:
    """Records that fit a schema: what `EmbeddingStore.append` writes.

    Parameters
    ----------
    columns : mapping of str to ndarray
        Key columns, notes and digests, each ``[n]``.
    tensors : mapping of str to ndarray
        Tensor columns, float32 ``[n, *shape]``, already rounded to the schema's precision.
    """

    columns: Mapping[str, np.ndarray]
    tensors: Mapping[str, np.ndarray]

    @classmethod
    def check(
        cls,
        schema: Schema,
        keys: Mapping[str, Any],
        notes: Mapping[str, Any],
        tensors: Mapping[str, Any],
    ) -> RecordBatch:
        """Return the records given by `keys`, `notes` and `tensors` if they fit `schema`.

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
            tensors on any device or numpy arrays, of float16, bfloat16 or float32. Optional
            columns may be None.

        Raises
        ------
        SchemaMismatchError
            If a name, shape, data type or value does not fit; the message names the record.
        """
        arrays = {t.name: _tensor(schema, t, tensors.get(t.name)) for t in schema.tensors}
        counts = {name: len(array) for name, array in arrays.items() if array is not None}
        n = next(iter(counts.values()))
        if len(set(counts.values())) > 1:
            raise SchemaMismatchError(f"expected as many records in every tensor, got {counts}")
        unknown = set(tensors) - set(schema.columns)
        if any(tensors[name] is not None for name in unknown):
            raise SchemaMismatchError(
                f"expected the tensor columns {', '.join(schema.columns)}, got also "
                f"{', '.join(sorted(unknown))}"
            )
        columns = checked_columns(keys, notes, n)
        given = {name: array for name, array in arrays.items() if array is not None}
        return cls(columns, given).conformed(schema)

    def conformed(self, schema: Schema) -> RecordBatch:
        """Return a copy of the records as they stand under `schema`: rounded, finite, digested.

        Only keys, notes and tensors are taken over, not the marks of another store's commits.

        Raises
        ------
        SchemaMismatchError
            If a value is not finite in the schema's precision, or a key or note is one that does
            not come into a store any more; names the record.
        """
        columns = {name: self.columns[name] for name in (*KEY_COLUMNS, *NOTE_COLUMNS)}
        check_entry(columns, lambda position: named(self.key(position)))
        tensors = {}
        for tensor in schema.tensors:
            given = self.tensors.get(tensor.name)
            present = np.full(len(self), given is not None)
            digests = np.zeros(len(self), np.uint64)
            if given is not None:
                present &= self.columns.get(f"has_{tensor.name}", True)
                finish = _Finishing(schema, tensor, columns, given, present, digests)
                tensors[tensor.name] = finish.run()
            columns[f"{tensor.name}_digest"] = digests
            if tensor.optional:
                columns[f"has_{tensor.name}"] = present
        columns["row_digest"] = row_digests(columns)
        return RecordBatch(columns, tensors)

    def __len__(self) -> int:
        return len(self.columns["index"])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(array.nbytes for array in self.tensors.values())

    def key(self, position: int) -> RecordKey:
        """Return the key of the record at `position`."""
        return key_at(self.columns, position)

    def keys(self) -> list[RecordKey]:
        """Return the records' keys."""
        return keys_of(self.columns)

    def take(self, positions: np.ndarray | slice) -> RecordBatch:
        """Return the records at `positions`; a slice shares their memory."""
        return RecordBatch(
            {name: values[positions] for name, values in self.columns.items()},
            {name: values[positions] for name, values in self.tensors.items()},
        )

    @classmethod
    def concatenate(cls, batches: Sequence[RecordBatch]) -> RecordBatch:
        """Return the records of `batches` as one; a single batch is returned as it is."""
        if len(batches) == 1:
            return batches[0]
        columns = {
            name: np.concatenate([batch.columns[name] for batch in batches])
            for name in batches[0].columns
        }
        shapes = {name: v.shape[1:] for batch in batches for name, v in batch.tensors.items()}
        tensors = {
            name: np.concatenate([batch._values(name, shape) for batch in batches])
            for name, shape in shapes.items()
        }
        return cls(columns, tensors)

    def _values(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in self.tensors:
            return self.tensors[name]
        return np.full((len(self), *shape), np.nan, np.float32)


def check_keys(name: str, columns: Sequence[str]) -> None:
    """Refuse `columns`, the value of `name`, unless they are some key columns, each once.

    Raises
    ------
    SchemaMismatchError
        If they are not.
    """
    listed = isinstance(columns, Sequence) and not isinstance(columns, str)
    known = listed and all(each in KEY_COLUMNS for each in columns)
    if not known or not columns or len(set(columns)) < len(columns):
        got = ", ".join(map(str, columns)) if listed else f"{type(columns).__name__} {columns!r}"
        raise SchemaMismatchError(
            f"{name}: expected some of {', '.join(KEY_COLUMNS)}, each once, got {got or 'none'}"
        )


def key_order(columns: Iterable[str]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """Return a key for `sorted` that puts values of key columns in order: nodes by number."""
    nodes = [name == "node" for name in columns]
    return lambda values: [
        numbers_first(value) if node else value for value, node in zip(values, nodes, strict=True)
    ]


def key_at(columns: Mapping[str, np.ndarray], position: int) -> RecordKey:
    """Return the key that stands at `position` of the key columns `columns`."""
    return RecordKey(
        node=str(columns["node"][position]),
        round=int(columns["round"][position]),
        split=str(columns["split"][position]),
        class_name=str(columns["class_name"][position]),
        index=int(columns["index"][position]),
    )


def keys_of(columns: Mapping[str, np.ndarray]) -> list[RecordKey]:
    """Return the keys that stand in the key columns `columns`, one for each row."""
    rows = zip(*(columns[name].tolist() for name in KEY_COLUMNS), strict=True)
    return [RecordKey(*row) for row in rows]


def to_milliseconds(moment: datetime) -> int:
    """Return `moment` in milliseconds since 1970 UTC; one without a time zone is taken as UTC."""
    if moment.utcoffset() is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def from_milliseconds(value: int) -> datetime:
    """Return the moment `value` milliseconds after 1970 UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=value)


def checked_columns(
    keys: Mapping[str, Any], notes: Mapping[str, Any], n: int
) -> dict[str, np.ndarray]:
    """Return keys and notes of `n` records from what a caller gave, as in `RecordBatch.check`."""
    columns = checked_keys(keys, n)

    def record(position: int) -> str:
        return named(key_at(columns, position))

    columns |= checked_notes(notes, n, record)
    check_entry(columns, record)
    return columns


def checked_keys(keys: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """Return `KEY_COLUMNS` of `n` records from what a caller gave, as in `RecordBatch.check`."""
    missing = [name for name in KEY_COLUMNS if keys.get(name) is None]
    if missing:
        raise SchemaMismatchError(f"expected a value for {', '.join(missing)}, got None")
    return {
        "node": _strings("node", _nodes(_spread("node", keys["node"], n)), empty=False),
        "round": _integers("round", keys["round"], n, np.dtype(np.int32)),
        "split": _strings("split", _spread("split", keys["split"], n), empty=False),
        "class_name": _strings(
            "class_name", _spread("class_name", keys["class_name"], n), empty=False
        ),
        "index": _integers("index", keys["index"], n, np.dtype(np.int64)),
    }


def checked_notes(
    notes: Mapping[str, Any], n: int, record: Record | None = None
) -> dict[str, np.ndarray]:
    """Return `NOTE_COLUMNS` of `n` records from what a caller gave, as in `RecordBatch.check`."""
    record = record or _numbered(n)
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
    return value.tolist() if _is_tensor(value) and _is_dense(value) else value


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


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "numpy")


def _tensor(schema: Schema, column: TensorColumn, value: Any) -> np.ndarray | None:
    """Return `value` as float32 ``[n, *shape]``, in the caller's memory if it is so there."""
    if value is None:
        if column.optional:
            return None
        raise SchemaMismatchError(
            f"{column.name}: expected a tensor {list(column.shape)}, got None"
        )
    _check_values(column, value)
    shape = tuple(value.shape)
    if shape == column.shape:
        shape = (1, *shape)
    if shape[1:] != column.shape:
        raise SchemaMismatchError(
            f"{column.name}: expected [n, {', '.join(map(str, column.shape))}] as in the store "
            f"({schema.describe()}), got {list(value.shape)}"
        )
    try:
        plain = value.detach().cpu().float().resolve_neg().numpy() if _is_tensor(value) else value
        return np.asarray(plain, np.float32).reshape(shape)
    except (TypeError, ValueError) as error:  # of a kind that has its values elsewhere
        raise SchemaMismatchError(
            f"{column.name}: expected values in memory, got {_kind(value)}: {error}"
        ) from None


def _check_values(column: TensorColumn, value: Any) -> None:
    """Refuse what is no tensor of floating-point values, or one of which some are not there."""
    dtype = getattr(value, "dtype", None)
    name = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        got = type(value).__name__ if dtype is None else name
        raise SchemaMismatchError(
            f"{column.name}: expected float32, float16 or bfloat16, got {got}; "
            f"convert it first, so that what is lost is your choice"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise SchemaMismatchError(
            f"{column.name}: expected an array without a mask, which a store cannot keep, got a "
            f"masked array; fill it first"
        )
    if _is_tensor(value) and not _is_dense(value):
        raise SchemaMismatchError(
            f"{column.name}: expected a dense tensor with its values in memory, got {_kind(value)}"
        )


def _is_dense(tensor: Any) -> bool:
    """Whether torch has the values of `tensor`, one after another."""
    names = {kind.__name__ for kind in type(tensor).__mro__}
    return (
        str(tensor.layout) == "torch.strided"
        and not (tensor.is_nested or tensor.is_meta)
        and not names & {"FakeTensor", "FunctionalTensor"}
    )


def _kind(value: Any) -> str:
    """Return what sort of tensor `value` is."""
    if not _is_tensor(value):
        return type(value).__name__
    return f"a {type(value).__name__} of layout {value.layout} on device {value.device}"


@dataclass(frozen=True)
class _Finishing:
    """A tensor column on its way in: copied, checked, rounded and digested, group by group.

    A group of records stays in the processor's cache through all of it.
    """

    schema: Schema
    tensor: TensorColumn
    keys: Mapping[str, np.ndarray]
    given: np.ndarray
    present: np.ndarray
    digests: np.ndarray

    def run(self) -> np.ndarray:
        """Return the finished values, NaN where a record has none, and fill in the digests."""
        values = np.empty((len(self.given), *self.tensor.shape), np.float32)
        step = max(1, _GROUP_BYTES // self.tensor.nbytes)
        groups = [slice(start, start + step) for start in range(0, len(values), step)]
        if values.nbytes < _WORTH_THREADS:
            self._finish(values, groups)
        else:
            # In order, so that of several bad records the first is named.
            share = -(-len(groups) // threads.count())
            pieces = ((values, groups[i : i + share]) for i in range(0, len(groups), share))
            threads.run(threads.readers(), self._finish, pieces)
        return values

    def _finish(self, values: np.ndarray, groups: Sequence[slice]) -> None:
        for group in groups:
            some, present = values[group], self.present[group]
            some[...] = self.given[group]
            some[~present] = np.nan
            if self.schema.precision == "bfloat16":
                self._check_finite(some, group, "not finite")
                _round_to_bfloat16(some)
            self._check_finite(some, group, f"not finite in {self.schema.precision}")
            pairs = zip(some, present.tolist(), strict=True)
            self.digests[group] = [digest(record) if here else 0 for record, here in pairs]

    def _check_finite(self, values: np.ndarray, group: slice, what: str) -> None:
        if np.isfinite(values).all():
            return
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        wrong = np.flatnonzero(~finite & self.present[group])
        if len(wrong):
            key = key_at(self.keys, group.start + int(wrong[0]))
            raise SchemaMismatchError(f"{self.tensor.name} of {key} has values that are {what}")


def _round_to_bfloat16(values: np.ndarray) -> None:
    """Round finite float32 `values` in place to the nearest bfloat16, ties to even.

    numcodecs' BitRound gives the same bits in twice the time, for the memory that it takes anew.
    """
    bits = values.view(np.uint32)
    carry = bits >> 16
    carry &= 1
    carry += 0x7FFF
    bits += carry
    bits &= 0xFFFF0000


def row_digests(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the xxh3 digest of each row's key and notes, uint64 ``[n]``.

    It ties the columns together: each has checksums of its own, which a file that took another
    column's place passes.
    """
    rows = zip(*(columns[name].tolist() for name in _DIGESTED), strict=True)
    digests = [xxhash.xxh3_64_intdigest("\0".join(map(str, row)).encode()) for row in rows]
    return np.array(digests, np.uint64)


def digest(values: np.ndarray) -> int:
    """Return the xxh3 digest of one record's float32 values in one tensor column."""
    return xxhash.xxh3_64_intdigest(values.data)
