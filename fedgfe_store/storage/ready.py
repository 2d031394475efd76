"""What a batch was given: what it has seen, and what it is to write next."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedgfe_store.errors import ConflictError
from fedgfe_store.records import RecordBatch, RecordKey

Prints = Mapping[RecordKey, tuple[int, ...]]
"""Digests of records' tensors by key."""


class Ready:
    """Records that wait for enough others to fill files; `len` counts them."""

    def __init__(self) -> None:
        self._parts: list[RecordBatch] = []
        self.nbytes = 0
        """Bytes of their tensors, counted as they come: there may be thousands of parts."""

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def append(self, records: RecordBatch) -> None:
        """Add `records` behind those that are there."""
        if len(records):
            self._parts.append(records)
            self.nbytes += records.nbytes

    def pop(self, n: int, size: int) -> list[RecordBatch]:
        """Take the first `n` records in pieces of `size`; only what joins two parts is copied."""
        return [self._first(min(size, n - start)) for start in range(0, n, size)]

    def _first(self, n: int) -> RecordBatch:
        taken = []
        while n and self._parts:
            first = self._parts.pop(0)
            taken.append(first.take(slice(n)))
            if len(first) > n:
                self._parts.insert(0, first.take(slice(n, None)))
            n -= len(taken[-1])
            self.nbytes -= taken[-1].nbytes
        return RecordBatch.concatenate(taken)

    def settle(self, finish: Callable[[RecordBatch], RecordBatch]) -> None:
        """Have what lies in a caller's memory copied by `finish`."""
        self._parts = [finish(part) if part.unfinished else part for part in self._parts]
        self.nbytes = sum(part.nbytes for part in self._parts)


class Seen:
    """Keys and digests of the records that a batch was given."""

    def __init__(self) -> None:
        self._prints: dict[RecordKey, tuple[int, ...]] = {}

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._prints

    def new(self, records: RecordBatch) -> tuple[RecordBatch, Prints]:
        """Return those of `records` that were not given before, and what `add` is to be told.

        Raises
        ------
        ConflictError
            If one was given with other tensors.
        """
        fresh: list[int] = []
        prints: dict[RecordKey, tuple[int, ...]] = {}
        found_prints = zip(records.keys(), _digests(records.columns), strict=True)
        for position, (key, found) in enumerate(found_prints):
            before = self._prints.get(key, prints.get(key))
            if before is None:
                prints[key] = found
                fresh.append(position)
            elif before != found:
                raise ConflictError(f"{key} was added twice to this batch, with other tensors")
        if len(fresh) == len(records):
            return records, prints
        return records.take(np.array(fresh, np.int64)), prints

    def add(self, prints: Prints) -> None:
        """Know these records from now on."""
        self._prints.update(prints)


def digest_names(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Return the columns of digests of tensors; that of the row differs with the timestamp."""
    return [name for name in columns if name.endswith("_digest") and name != "row_digest"]


def _digests(columns: Mapping[str, np.ndarray]) -> list[tuple[int, ...]]:
    """Return the digests of each record's tensors."""
    names = digest_names(columns)
    return list(zip(*(columns[name].tolist() for name in names), strict=True))
