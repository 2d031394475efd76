"""One committed state of a store as a reader sees it, whatever keeps its key columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal, Self

import numpy as np

from fedgfe_store.common.location import Location
from fedgfe_store.errors import (
    DamagedDataError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)
from fedgfe_store.records import (
    KEY_COLUMNS,
    NOTE_COLUMNS,
    RecordKey,
    from_milliseconds,
    key_at,
    keys_of,
)
from fedgfe_store.schema import Schema
from fedgfe_store.storage.checksums import digest, row_digests
from fedgfe_store.storage.gather import gather
from fedgfe_store.storage.metadata import CommitPoint, Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.shard_files import TensorFiles, bytes_of
from fedgfe_store.storage.whole_files import Expected

Filters = Mapping[str, Sequence[Any]]
"""For each column the values that are wanted, as `common.filters.wanted_values` gives them."""


class State(ABC):
    """The store at `path` as its group `group` published it, seen at commit `as_of`.

    A row number says where a record's tensors lie: in the shard ``row // granule``, and there the
    record ``row % granule``. What else is known of rows is asked for by column.
    """

    engine: ClassVar[Literal["local", "shared"]]
    """Which of `storage.engines` writes to it."""

    def __init__(self, path: Location, place: Place, group: Group, as_of: int | None) -> None:
        self.path, self.place, self.group, self.as_of = path, place, group, as_of
        self.commit = group.point.commit if as_of is None else as_of
        self.tensor_files = {
            name: TensorFiles.of(place, name, group.arrays[name]) for name in group.schema.columns
        }

    @abstractmethod
    def refreshed(self) -> Self:
        """Return the latest state of the same store."""

    @abstractmethod
    def rows_matching(self, filters: Filters, *, deleted: bool = False) -> np.ndarray:
        """Return the rows of the records that meet every filter, in the order of their commits.

        Parameters
        ----------
        filters : mapping
            Wanted values of key columns and notes; without any all records.
        deleted : bool
            Also of those that were written up to this commit and are not visible any more.

        Returns
        -------
        ndarray of int64, shape [n]
            Row numbers.
        """

    @abstractmethod
    def column_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the key column `name` at `rows`, in their order, reading only what holds them."""

    @abstractmethod
    def fetch(self, names: Iterable[str], rows: np.ndarray | None = None) -> None:
        """Read what will be asked for of key columns, where each piece asks a server.

        Parameters
        ----------
        names : iterable of str
            The columns.
        rows : ndarray of int64, shape [n], optional
            Row numbers that are wanted; by default all.
        """

    @property
    @abstractmethod
    def live(self) -> int:
        """Number of records at this commit."""

    @abstractmethod
    def commit_times(self) -> Mapping[int, int]:
        """Return when each commit up to this one was made, in milliseconds since 1970 UTC."""

    @abstractmethod
    def check_writable(self) -> None:
        """Refuse a store that cannot be written to, or a state that was asked for by its commit.

        Raises
        ------
        SchemaMismatchError
            If it is one.
        """

    def check_latest(self) -> None:
        """Refuse a state that was asked for by its commit."""
        if self.as_of is not None:
            raise SchemaMismatchError(
                f"{self.path} was opened as of commit {self.commit}: "
                f"open it without as_of to change it"
            )

    def check_commit(self, number: int) -> None:
        """Refuse a commit that there is not.

        Raises
        ------
        NotFoundError
            If it is one.
        """
        if not 0 <= number <= self.point.commit:
            raise NotFoundError(
                f"as_of: expected a commit from 0 to {self.point.commit} of {self.path}, "
                f"got {number}"
            )

    @property
    def schema(self) -> Schema:
        """Schema of the store."""
        return self.group.schema

    @property
    def point(self) -> CommitPoint:
        """Commit point of the store when this state was read."""
        return self.group.point

    @property
    def committed_at(self) -> datetime | None:
        """When the commit that is seen was made, UTC; None for a store without commits."""
        if not self.commit:
            return None
        times = self.commit_times()
        return from_milliseconds(times[max(number for number in times if number <= self.commit)])

    def keys(self, rows: np.ndarray) -> list[RecordKey]:
        """Return the keys of the records at `rows`."""
        return keys_of(self.notes(rows))

    def notes(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the key columns and notes of the records at `rows`, checked against each other.

        Raises
        ------
        DamagedDataError
            If they are not those that were committed together.
        """
        self.fetch((*KEY_COLUMNS, *NOTE_COLUMNS, "row_digest"), rows)
        columns = {name: self.column_at(name, rows) for name in (*KEY_COLUMNS, *NOTE_COLUMNS)}
        wrong = np.flatnonzero(row_digests(columns) != self.column_at("row_digest", rows))
        if len(wrong):
            raise DamagedDataError(
                f"{self.path}: the key or notes of row {rows[wrong[0]]}, which reads as "
                f"{key_at(columns, int(wrong[0]))}, are not what was committed"
            )
        return columns

    def read(
        self,
        name: str,
        rows: np.ndarray,
        *,
        out: np.ndarray | None = None,
        sealed: bool = False,
    ) -> np.ndarray:
        r"""Return the tensor column `name` at `rows`, in their order.

        Parameters
        ----------
        name : str
            Tensor column.
        rows : ndarray of int64, shape [n]
            Row numbers, in any order, repeats allowed.
        out : ndarray, shape [n, \*shape], optional
            Memory to decode into, of the column's data type; contiguous.
        sealed : bool
            Also ask the checksums that other Zarr readers ask, where digests cover the same bytes.

        Returns
        -------
        ndarray, shape [n, \*shape]
            NaN, or 0 in a column of whole numbers, where a record has no value.

        Raises
        ------
        DamagedDataError
            If a record's values are not those that were committed; names the record.
        """
        column = self.schema.column(name)
        if out is None:
            out = np.empty((len(rows), *column.shape), column.dtype)
        digests = self.column_at(f"{name}_digest", rows).tolist()
        lengths = [0] * len(rows)
        if column.ragged:
            lengths = self.column_at(f"length_{name}", rows).tolist()

        memory, nbytes = bytes_of(out), column.nbytes

        def check(places: Sequence[int], error: Exception | None) -> None:
            for place in places:
                values = memory[place * nbytes : (place + 1) * nbytes]
                if error is None and digest(values, lengths[place]) == digests[place]:
                    continue
                if self._has(name, rows[place]):
                    raise self._lost(name, rows[place]) from error
                out[place] = column.fill

        gather(self.tensor_files[name], rows, out, check, sealed=sealed)
        return out

    def expected(self, name: str, granule: int, rows: np.ndarray) -> Expected:
        """Return what the file of `granule` must hold of the records at `rows`, which lie in it."""
        column = self.schema.column(name)
        if column.optional:
            rows = rows[self.column_at(f"has_{name}", rows)]
        digests = self.column_at(f"{name}_digest", rows)
        lengths = np.zeros(len(rows), np.int32)
        if column.ragged:
            lengths = self.column_at(f"length_{name}", rows)
        return Expected(self.tensor_files[name], granule, rows, digests, lengths)

    def _has(self, name: str, row: int) -> bool:
        if not self.schema.column(name).optional:
            return True
        return bool(self.column_at(f"has_{name}", np.array([row]))[0])

    def _lost(self, name: str, row: int) -> FedgfeStoreError:
        key = self.keys(np.array([row]))[0]
        compacted = self.refreshed().point.compacted
        if compacted > self.commit:
            return NotFoundError(
                f"{name} of {key}: commit {self.commit} was compacted away in commit {compacted}; "
                f"refresh the store"
            )
        files, number = self.tensor_files[name], int(row) // self.schema.granule
        state = "is damaged" if self.place.exists(files.file_name(number)) else "is missing"
        return DamagedDataError(
            f"{name} of {key} is not what was committed: {files.file(number)} {state}"
        )
