"""One committed state of a store as a reader sees it: rows, key columns, checked tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store.common import threads
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
from fedgfe_store.storage import key_files
from fedgfe_store.storage.checksums import UnreadableError, digest, row_digests
from fedgfe_store.storage.gather import gather, portions
from fedgfe_store.storage.layout import KEY_CHUNK, KeyColumn
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
        self._columns = group.known_columns
        self._whole: dict[str, np.ndarray] = {}
        self._chunks: dict[tuple[str, int], np.ndarray] = {}
        self.stale: set[tuple[str, int]] = set()
        """Key chunks whose files do not hold what is shown here: the next commit writes them."""
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

    def column(self, name: str) -> np.ndarray:
        """Return the whole key column `name`, skipped and deleted rows included."""
        if name not in self._whole:
            self.fetch([name])
            rows = self.group.rows(name)
            parts = [self._chunk(name, chunk) for chunk in range(-(-rows // KEY_CHUNK))]
            empty = np.empty(0, self._columns[name].dtype)
            self._whole[name] = np.concatenate([empty, *parts])
        return self._whole[name]

    def column_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the key column `name` at `rows`, reading only the chunks that hold them."""
        if name in self._whole:
            picked: np.ndarray = self._whole[name][rows]
            return picked
        values = np.empty(len(rows), self._columns[name].dtype)
        if not len(rows):
            return values
        # Rows of a selection ascend, which is seen sooner than sorted.
        order = None if (rows[1:] >= rows[:-1]).all() else np.argsort(rows, kind="stable")
        ascending = rows if order is None else rows[order]
        single = bool((ascending[1:] > ascending[:-1]).all())
        self.fetch([name], ascending)
        first, last = ascending[[0, -1]] // KEY_CHUNK
        bounds = np.searchsorted(ascending, np.arange(first, last + 2) * KEY_CHUNK)
        for chunk, (start, stop) in enumerate(pairwise(bounds.tolist()), int(first)):
            if start == stop:
                continue
            here = slice(start, stop) if order is None else order[start:stop]
            places: Any = ascending[start:stop] - chunk * KEY_CHUNK
            if single and places[-1] - places[0] == stop - start - 1:
                # numpy copies a run of text 20 times faster than as many single rows.
                places = slice(places[0], places[-1] + 1)
            values[here] = self._chunk(name, chunk)[places]
        return values

    def fetch(self, names: Iterable[str], rows: np.ndarray | None = None) -> None:
        """Read chunks of key columns that will be asked for, where each one asks a server.

        Parameters
        ----------
        names : iterable of str
            The columns.
        rows : ndarray of int64, shape [n], optional
            Row numbers whose chunks are wanted; by default all.
        """
        if not self.place.distant:
            return
        wanted: list[tuple[str, int]] = []
        for name in names:
            chunks = np.arange(-(-self.group.rows(name) // KEY_CHUNK))
            chunks = chunks if rows is None else np.unique(rows // KEY_CHUNK)
            wanted += [(name, chunk) for chunk in chunks.tolist() if name not in self._whole]
        missing = [each for each in wanted if each not in self._chunks]
        if len(missing) > 1:
            threads.run(threads.fetchers(), self._chunk, missing)

    def unfinished(self, name: str) -> np.ndarray:
        """Return the key column `name` from where its last chunk begins, if that is not full."""
        chunk, n = divmod(self.group.rows(name), KEY_CHUNK)
        return self._chunk(name, chunk) if n else np.empty(0, self._columns[name].dtype)

    def _chunk(self, name: str, chunk: int) -> np.ndarray:
        if (name, chunk) not in self._chunks:
            self._chunks[name, chunk] = self._read_chunk(name, chunk)
        return self._chunks[name, chunk]

    def _read_chunk(self, name: str, chunk: int) -> np.ndarray:
        total, column = self.group.rows(name), self._columns[name]
        start, stop = chunk * KEY_CHUNK, min((chunk + 1) * KEY_CHUNK, total)
        if name not in self.group.arrays:  # the store is of a version that did not have it
            return np.full(stop - start, column.skipped, column.dtype)
        where = f"{self.path}: key column {name}, rows {start} to {stop} (file {name}/c.{chunk})"
        try:
            values = key_files.read_chunk(self.place, column, chunk, stop - start)
        except FileNotFoundError:
            raise DamagedDataError(f"{where} is missing") from None
        except (ValueError, RuntimeError) as error:
            raise DamagedDataError(f"{where} is damaged: {error}") from error
        if name == "deleted_in" and (beyond := values > self.point.commit).any():
            self.stale.add((name, chunk))
            values[beyond] = 0
        if column.largest is not None and (wrong := key_files.gap(column, values, None)):
            raise DamagedDataError(
                f"{where} is damaged: expected lengths to {column.largest}, got {wrong}"
            )
        if self.group.version > 1:
            if key_files.digest(column, values) != self.group.digests[name][chunk]:
                raise DamagedDataError(f"{where} is damaged: not what was committed there")
        elif wrong := self._gap(column, chunk, values):
            raise DamagedDataError(f"{where} is missing or damaged: {wrong}")
        return values

    def _gap(self, column: KeyColumn, chunk: int, values: np.ndarray) -> str | None:
        """Return what no writer leaves among `values`, as where their file is missing."""
        has = None
        if column.data_type == "bool":  # has no value to spare; a record without one has digest 0
            has = self._chunk(column.digest, chunk) != 0
        return key_files.gap(column, values, has)

    def extended(
        self, group: Group, rows: Mapping[str, np.ndarray], marked: np.ndarray
    ) -> Snapshot:
        """Return the state that `group` published by adding `rows` and marking rows as deleted.

        Chunks of key columns that are known stay known, so that a long-lived writer reads none.
        """
        # Committed chunks never change but for the last one, which grows, and for marks. To read
        # them back would make each commit of a long run slower than the one before.
        new = self.at(group)
        tails = {name: self.group.rows(name) // KEY_CHUNK for name in rows}
        for (name, chunk), values in self._chunks.copy().items():
            if chunk != tails.get(name):
                new._chunks[name, chunk] = values
        for name, added in rows.items():
            start = self.group.rows(name)
            known = self._chunks.get((name, tails[name]))
            # Its beginning was not read yet; it is when it is asked for, with what was added.
            if start % KEY_CHUNK and known is None:
                continue
            values = added if known is None else np.concatenate([known, added])
            for chunk in range(-(-len(values) // KEY_CHUNK)):
                new._chunks[name, tails[name] + chunk] = values[chunk * KEY_CHUNK :][:KEY_CHUNK]
        # Who sees the old state shares these arrays: read anew, not marked in place.
        for chunk in np.unique(marked // KEY_CHUNK):
            new._chunks.pop(("deleted_in", int(chunk)), None)
        return new

    def mend(self, chunks: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Show `chunks` of key columns in place of what their files hold."""
        for name, number in chunks:
            self._whole.pop(name, None)
            self.stale.add((name, number))
        self._chunks.update(chunks)
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
    created, deleted = snapshot.column("created_in"), snapshot.column("deleted_in")
    alive: np.ndarray = (created > 0) & (created <= commit)
    alive &= ~((deleted > 0) & (deleted <= commit))
    return alive
