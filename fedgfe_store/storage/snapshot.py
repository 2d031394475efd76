"""One committed state of a store as a reader sees it: rows, key columns, checked tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store.common.filters import NUMBERS, matches
from fedgfe_store.common.location import Location, own_folder
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
from fedgfe_store.storage.checksums import UnreadableError, digest, row_digests
from fedgfe_store.storage.gather import gather, portions
from fedgfe_store.storage.key_chunks import KeyChunks
from fedgfe_store.storage.layout import KEY_CHUNK
from fedgfe_store.storage.metadata import CommitPoint, Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.places import place_of
from fedgfe_store.storage.shard_files import OpenFile, TensorFiles


class Snapshot:
    """The store at `path` as its group `group` published it, seen at commit `as_of`.

    Key columns are read when first asked for, by chunks, and kept; tensors are not kept.
    """

    def __init__(
        self,
        path: Location,
        group: Group,
        as_of: int | None = None,
        *,
        place: Place | None = None,
    ) -> None:
        self.path = path
        self.place = place or place_of(path)
        self.group = group
        self.as_of = as_of
        self.commit = group.point.commit if as_of is None else as_of
        self.chunks = KeyChunks(path, self.place, group)
        self.tensor_files = {
            name: TensorFiles.of(self.place, name, group.arrays[name])
            for name in group.schema.columns
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: another process, such as a DataLoader's, reads it anew."""
        return {"path": self.path, "group": self.group, "as_of": self.as_of, "place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @classmethod
    def latest(cls, path: Location, as_of: int | None = None) -> Snapshot:
        """Return the latest state of the store at `path`, seen at commit `as_of`."""
        place = place_of(path)
        group = Group.read(place)
        if as_of is not None and not 0 <= as_of <= group.point.commit:
            raise NotFoundError(
                f"as_of: expected a commit from 0 to {group.point.commit} of {path}, got {as_of}"
            )
        return cls(path, group, as_of, place=place)

    def at(self, group: Group) -> Snapshot:
        """Return the same store as `group` published it, nothing read yet."""
        return Snapshot(self.path, group, place=self.place)

    @property
    def root(self) -> Path:
        """The store's folder, for one who writes; SchemaMismatchError where it is none of ours."""
        return self.place.folder

    def check_writable(self) -> None:
        """Refuse a store that is not on this machine, or a state that was asked for by its commit.

        Raises
        ------
        SchemaMismatchError
            If it is one.
        """
        own_folder(self.path)
        if self.as_of is not None:
            raise SchemaMismatchError(
                f"{self.path} was opened as of commit {self.commit}: "
                f"open it without as_of to change it"
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
        return from_milliseconds(int(self.column("commit_time")[self.commit - 1]))

    @cached_property
    def visible(self) -> np.ndarray:
        """Which rows hold a record at this commit, bool ``[records]``."""
        mask = _at(self, self.commit)
        latest = mask if self.commit == self.point.commit else _at(self, self.point.commit)
        if int(latest.sum()) != self.point.live:
            raise DamagedDataError(
                f"{self.path} is damaged: its commit marks show {int(latest.sum())} live records, "
                f"and commit {self.point.commit} published {self.point.live}"
            )
        return mask

    @property
    def live(self) -> int:
        """Number of records at this commit; of the latest one nothing is read for it."""
        # Marks of version 1 have no digests: that they come to the published number tells damage.
        if self.group.version == 1 or self.commit != self.point.commit:
            return int(self.visible.sum())
        return self.point.live

    def rows_matching(
        self, filters: Mapping[str, Sequence[Any]], *, deleted: bool = False
    ) -> np.ndarray:
        """Return the rows of the records at this commit that meet every filter, ascending.

        Parameters
        ----------
        filters : mapping of str to sequence
            Values by key column, each a result of `filters.wanted_values`; without any, all
            records are meant.
        deleted : bool
            Find also records that were deleted before this commit.

        Returns
        -------
        ndarray of int64, shape [n]
        """
        chunks = self.group.zones.may_hold(filters)
        # From a server, all at once: what a filter leaves out costs less than waiting in turn.
        starts = np.array(chunks, np.int64) * KEY_CHUNK
        self.fetch(("created_in", "deleted_in", *filters), starts)
        if self.group.version == 1:
            _ = self.visible  # for its check, which is all that there is
        written = [
            number * KEY_CHUNK + np.flatnonzero(self._written(number, deleted=deleted))
            for number in chunks
        ]
        rows = np.concatenate([np.empty(0, np.int64), *written])
        # Numbers first: they are compared faster, and text only where they leave any.
        for name in sorted(filters, key=NUMBERS.__contains__, reverse=True):
            rows = rows[matches(self.column_at(name, rows), filters[name])]
        return rows

    def _written(self, number: int, *, deleted: bool) -> np.ndarray:
        """Return which rows of a key chunk hold a record at this commit, or held one before it."""
        created = self.chunks.chunk("created_in", number)
        if deleted:
            return (created > 0) & (created <= self.commit)
        return _alive(created, self.chunks.chunk("deleted_in", number), self.commit)

    def column(self, name: str) -> np.ndarray:
        """Return the whole key column `name`, skipped and deleted rows included."""
        return self.chunks.column(name)

    def column_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the key column `name` at `rows`, reading only the chunks that hold them."""
        return self.chunks.column_at(name, rows)

    def fetch(self, names: Iterable[str], rows: np.ndarray | None = None) -> None:
        """Read chunks of key columns that will be asked for, where each one asks a server."""
        self.chunks.fetch(names, rows)

    def extended(
        self, group: Group, rows: Mapping[str, np.ndarray], marked: np.ndarray
    ) -> Snapshot:
        """Return the state that `group` published by adding `rows` and marking rows as deleted.

        Chunks of key columns that are known stay known, so that a long-lived writer reads none.
        """
        new = self.at(group)
        new.chunks.follow(self.chunks, rows, marked)
        return new

    def mend(self, chunks: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Show `chunks` of key columns in place of what their files hold."""
        self.chunks.mend(chunks)
        self.__dict__.pop("visible", None)

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

    def read(self, name: str, rows: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        r"""Return the tensor column `name` at `rows`, in their order.

        Parameters
        ----------
        name : str
            Tensor column.
        rows : ndarray of int64, shape [n]
            Row numbers, in any order, repeats allowed.
        out : ndarray, shape [n, \*shape], optional
            Memory to decode into, of the column's data type; contiguous.

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

        def check(places: list[int], error: Exception | None) -> None:
            for place in places:
                if error is None and digest(out[place], lengths[place]) == digests[place]:
                    continue
                if self._has(name, rows[place]):
                    raise self._lost(name, rows[place]) from error
                out[place] = column.fill

        gather(self.tensor_files[name], rows, out, check)
        return out

    def check_file(self, name: str, granule: int) -> None:
        """Read a whole tensor file, so that the checksums of all its chunks are looked at."""
        files = self.tensor_files[name]
        decoded = np.empty((files.chunk, *files.shape), files.dtype)
        try:
            with OpenFile(files, granule) as file:
                for part in portions(files, range(files.granule // files.chunk)):
                    file.fetch(part)
                    for chunk in part:
                        file.read(chunk, decoded)
        except FileNotFoundError:
            return
        except UnreadableError as error:
            raise DamagedDataError(f"{files.file(granule)} is damaged: {error}") from error

    def _has(self, name: str, row: int) -> bool:
        if not self.schema.column(name).optional:
            return True
        return bool(self.column_at(f"has_{name}", np.array([row]))[0])

    def _lost(self, name: str, row: int) -> FedgfeStoreError:
        key = self.keys(np.array([row]))[0]
        compacted = Group.read(self.place).point.compacted
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


def _at(snapshot: Snapshot, commit: int) -> np.ndarray:
    snapshot.fetch(("created_in", "deleted_in"))
    return _alive(snapshot.column("created_in"), snapshot.column("deleted_in"), commit)


def _alive(created: np.ndarray, deleted: np.ndarray, commit: int) -> np.ndarray:
    """Return which rows hold a record at `commit`, bool ``[n]``."""
    alive: np.ndarray = (created > 0) & (created <= commit)
    alive &= ~((deleted > 0) & (deleted <= commit))
    return alive
