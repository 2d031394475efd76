"""Tensors on their way into a store: looked through, rounded, digested, and copied once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.records import RecordBatch
from fedgfe_store.schema import Schema, TensorColumn
from fedgfe_store.storage.checksums import digest

How = Literal["copied", "in place", "left"]
"""What becomes of the memory that values are given in."""

NOT_FINITE, BEYOND = 1, 2
"""What may be wrong with a record's values: as they come, or once they are rounded."""

_GROUP_BYTES = 2**22
"""Bytes of records that are worked on at once: they stay in the processor's cache."""
_WORTH_THREADS = 2**23
"""Bytes from which several threads are faster than one."""


@dataclass(frozen=True)
class Finishing:
    """A tensor column on its way in: copied, checked, rounded and digested, group by group.

    A group of records stays in the processor's cache through all of it.
    """

    schema: Schema
    tensor: TensorColumn
    given: np.ndarray
    present: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    states: np.ndarray
    is_known: bool = False
    """Whether the values were looked through before."""

    def run(self, how: How) -> np.ndarray:
        """Return the values, finished unless they are left; fill in the digests and states."""
        if self.tensor.dtype != "float32" and self.given.dtype != self.tensor.dtype:
            raise SchemaMismatchError(
                f"{self.tensor.name}: expected {self.tensor.dtype}, got {self.given.dtype}"
            )
        n, step = len(self.given), max(1, _GROUP_BYTES // self.tensor.nbytes)
        values = self.given
        if how == "copied":
            values = np.empty((n, *self.tensor.shape), self.tensor.dtype)
        work = self._survey if how == "left" else self._finish
        groups = [slice(start, start + step) for start in range(0, n, step)]
        if n * self.tensor.nbytes < _WORTH_THREADS:
            work(values, groups)
        else:
            share = -(-len(groups) // threads.count())
            pieces = ((values, groups[i : i + share]) for i in range(0, len(groups), share))
            threads.run(threads.readers(), work, pieces)
        return values

    @cached_property
    def is_final(self) -> bool:
        """Whether the values that were given are those that are written, as they lie there."""
        return (
            self.given.dtype == self.tensor.dtype
            and self.given.flags.c_contiguous
            and not self.tensor.ragged
            and bool(self.present.all())
            and (self.tensor.dtype != "float32" or self.schema.precision == "float32")
        )

    def _survey(self, values: np.ndarray, groups: Sequence[slice]) -> None:
        """Look through `groups` of the values that were given, which stay as they are."""
        room = np.empty((0, *self.tensor.shape), self.tensor.dtype)
        for group in groups:
            some = values[group]
            if self.is_final:
                if self.tensor.dtype == "float32":
                    self._mark(some, group, NOT_FINITE)
                self._digest(some, group)
                continue
            if len(room) < len(some):
                room = np.empty((len(some), *self.tensor.shape), self.tensor.dtype)
            self.finish(room[: len(some)], group)

    def _finish(self, values: np.ndarray, groups: Sequence[slice]) -> None:
        for group in groups:
            self.finish(values[group], group)

    def finish(self, some: np.ndarray, group: slice) -> None:
        """Make of `some` what is to be written of a group."""
        given = self.given[group]
        if not np.may_share_memory(some, given):  # in place they are there
            some[...] = given
        if self.is_final and self.is_known:
            # Looked through before; its digest tells whether it is still the same.
            self.digests[group] = [digest(record) for record in some]
            return
        lengths = self.lengths[group]
        if self.tensor.ragged:
            some[np.arange(self.tensor.shape[0]) >= lengths[:, np.newaxis]] = 0
        some[~self.present[group]] = self.tensor.fill
        if self.tensor.dtype == "float32":
            self._round(some, group)
        self._digest(some, group)

    def _digest(self, some: np.ndarray, group: slice) -> None:
        rows = zip(some, self.lengths[group].tolist(), self.present[group].tolist(), strict=True)
        self.digests[group] = [
            digest(record, length) if here else 0 for record, length, here in rows
        ]

    def _round(self, values: np.ndarray, group: slice) -> None:
        """Round float32 `values` in place as the schema says; note what is not finite."""
        self._mark(values, group, NOT_FINITE)
        if self.schema.precision == "bfloat16":
            _round_to_bfloat16(values)
            self._mark(values, group, BEYOND)

    def _mark(self, values: np.ndarray, group: slice, state: int) -> None:
        """Note which records have values that are not finite, unless that is noted already."""
        if np.isfinite(values).all():
            return
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        states = self.states[group]
        states[~finite & self.present[group] & (states == 0)] = state


class Finisher:
    """Gives one tensor column of `records`, which are unfinished, part by part as it is written.

    Raises
    ------
    ConflictError
        If values are not those that were looked through: somebody is writing to that memory.
    """

    def __init__(self, records: RecordBatch, schema: Schema, name: str) -> None:
        self._records, self._tensor = records, schema.column(name)
        given, columns, n = records.tensors[name], records.columns, len(records)
        self._found = np.zeros(n, np.uint64)
        self._finishing = Finishing(
            schema,
            self._tensor,
            given,
            np.broadcast_to(columns.get(f"has_{name}", np.True_), n),
            columns.get(f"length_{name}", np.zeros(n, np.int32)),
            self._found,
            np.zeros(n, np.uint8),
            is_known=True,
        )
        self._room = np.empty((0, *self._tensor.shape), self._tensor.dtype)

    def __call__(self, part: slice) -> np.ndarray:
        """Return the values of a part, which the next call overwrites."""
        n = len(self._found[part])
        if len(self._room) < n:
            self._room = np.empty((n, *self._tensor.shape), self._tensor.dtype)
        some = self._room[:n]
        self._finishing.finish(some, part)
        name = self._tensor.name
        wrong = self._found[part] != self._records.columns[f"{name}_digest"][part]
        for position in np.flatnonzero(wrong)[:1].tolist():
            key = self._records.key(part.start + position)
            raise ConflictError(f"{name} of {key}: its values changed while it was added")
        return some


def parts_of(records: RecordBatch, schema: Schema, name: str) -> Callable[[slice], np.ndarray]:
    """Return what gives parts of a tensor column of `records` as they are written."""
    if records.unfinished:
        return Finisher(records, schema, name)
    return records.tensors[name].__getitem__


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
