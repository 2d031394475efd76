"""One committed state of a store with one writer: key columns by chunks of Zarr arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.common.filters import NUMBERS, matches
from fedgfe_store.common.location import Location, own_folder
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage import key_files
from fedgfe_store.storage.layout import KEY_CHUNK, KeyColumn
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.places import place_of
from fedgfe_store.storage.state import Filters, State


class Snapshot(State):
    """The store at `path` as its group `group` published it, seen at commit `as_of`.

    Key columns are read when first asked for, by chunks, and kept; tensors are not kept.
    """

    engine = "local"

    def __init__(
        self,
        path: Location,
        group: Group,
        as_of: int | None = None,
        *,
        place: Place | None = None,
    ) -> None:
        super().__init__(path, place or place_of(path), group, as_of)
        self._columns = group.known_columns
        self._whole: dict[str, np.ndarray] = {}
        self._chunks: dict[tuple[str, int], np.ndarray] = {}
        self.stale: set[tuple[str, int]] = set()
        """Key chunks whose files do not hold what is shown here: the next commit writes them."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: another process, such as a DataLoader's, reads it anew."""
        return {"path": self.path, "group": self.group, "as_of": self.as_of, "place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def at(self, group: Group) -> Snapshot:
        """Return the same store as `group` published it, nothing read yet."""
        return Snapshot(self.path, group, place=self.place)

    def refreshed(self) -> Snapshot:
        """Return the latest state of the same store."""
        return self.at(Group.read(self.place))

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
        self.check_latest()

    @property
    def count(self) -> int:
        """How many records are visible."""
        return int(self.visible.sum())

    def commit_times(self) -> Mapping[int, int]:
        """Return when each commit up to this one was made, in milliseconds since 1970 UTC."""
        times = self.column("commit_time")[: self.commit].tolist()
        return dict(enumerate(times, 1))

    def matching(self, filters: Filters, *, deleted: bool = False) -> np.ndarray:
        """Return the rows of the records that meet every filter, in the order of their commits."""
        # From a server, all at once: what a filter leaves out costs less than waiting in turn.
        self.fetch(("created_in", "deleted_in", *filters))
        rows = np.flatnonzero(self._written if deleted else self.visible)
        # Numbers first: they are compared faster, and text only where they leave any.
        for name in sorted(filters, key=NUMBERS.__contains__, reverse=True):
            rows = rows[matches(self.column_at(name, rows), filters[name])]
        return rows

    @property
    def _written(self) -> np.ndarray:
        created = self.column("created_in")
        return np.asarray((created > 0) & (created <= self.commit))

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


def _at(snapshot: Snapshot, commit: int) -> np.ndarray:
    snapshot.fetch(("created_in", "deleted_in"))
    created, deleted = snapshot.column("created_in"), snapshot.column("deleted_in")
    alive: np.ndarray = (created > 0) & (created <= commit)
    alive &= ~((deleted > 0) & (deleted <= commit))
    return alive
