"""Records on their way into a store: copied, checked, rounded and digested in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from fedgfe_store.common import threads
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, NOTE_COLUMNS, RecordBatch, key_at
from fedgfe_store.schema import Schema, TensorColumn
from fedgfe_store.storage.entry import check_entry, named

_DIGESTED = tuple(name for name in (*KEY_COLUMNS, *NOTE_COLUMNS) if name != "file_id")
"""What a row's digest covers, in this order: the columns of format version 1."""

_GROUP_BYTES = 2**22
"""Bytes of records that are worked on at once: they stay in the processor's cache."""
_WORTH_THREADS = 2**23
"""Bytes from which several threads are faster than one."""


def conformed(records: RecordBatch, schema: Schema) -> RecordBatch:
    """Return a copy of `records` as they stand under `schema`: rounded, finite, digested.

    Only keys, notes and tensors are taken over, not the marks of another store's commits.

    Raises
    ------
    SchemaMismatchError
        If a value is not finite in the schema's precision, or a key or note is one that does
        not come into a store any more; names the record.
    """
    columns = {name: records.columns[name] for name in (*KEY_COLUMNS, *NOTE_COLUMNS)}
    check_entry(columns, lambda position: named(records.key(position)))
    tensors = {}
    for tensor in schema.tensors:
        given = records.tensors.get(tensor.name)
        present = np.full(len(records), given is not None)
        digests = np.zeros(len(records), np.uint64)
        if given is not None:
            present &= records.columns.get(f"has_{tensor.name}", True)
            finish = _Finishing(schema, tensor, columns, given, present, digests)
            tensors[tensor.name] = finish.run()
        columns[f"{tensor.name}_digest"] = digests
        if tensor.optional:
            columns[f"has_{tensor.name}"] = present
    columns["row_digest"] = row_digests(columns)
    return RecordBatch(columns, tensors)


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
