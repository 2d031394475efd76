"""The key columns of a store as one commit published them, read by chunks and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.common.location import Location
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage import key_files
from fedgfe_store.storage.layout import KEY_CHUNK, KeyColumn
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.place import Place

_MOST_KEPT = 2**20
"""Bytes of a column's texts that are kept packed for the next commit: notes may be of any size."""


class KeyChunks:
    """Key columns of the store at `path` as `group` published them.

    Attributes
    ----------
    stale : set of (str, int)
        Chunks whose files do not hold what is shown here: the next commit writes them.
    """

    def __init__(self, path: Location, place: Place, group: Group) -> None:
        self._path, self._place, self._group = path, place, group
        self._columns = group.known_columns
        self._whole: dict[str, np.ndarray] = {}
        self._chunks: dict[tuple[str, int], np.ndarray] = {}
        self._last: dict[str, tuple[bytes, str, np.ndarray]] = {}
        self._packed: dict[tuple[str, int], bytes] = {}
        self.stale: set[tuple[str, int]] = set()

    def column(self, name: str) -> np.ndarray:
        """Return the whole key column `name`, skipped and deleted rows included."""
        if name not in self._whole:
            self.look_at(name)
            numbers = self.numbers(name)
            empty = np.empty(0, self._columns[name].dtype)
            whole = np.concatenate([empty, *(self.chunk(name, chunk) for chunk in numbers)])
            # Not twice in memory.
            self._chunks |= key_files.numbered(name, 0, whole)
            self._whole[name] = whole
        return self._whole[name]

    def numbers(self, name: str) -> range:
        """Return the numbers of the chunks of the key column `name`."""
        return range(-(-self._group.rows(name) // KEY_CHUNK))

    def look_at(self, name: str) -> None:
        """Read the key column `name`, such as to see what is stale in it."""
        self.fetch([name])
        for chunk in self.numbers(name):
            self.chunk(name, chunk)

    def column_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the key column `name` at `rows`, reading only the chunks that hold them."""
        if name in self._whole:
            picked: np.ndarray = self._whole[name][rows]
            return picked
        if not len(rows):
            return np.empty(0, self._columns[name].dtype)
        # Rows of a selection ascend, which is seen sooner than sorted.
        order = None if (rows[1:] >= rows[:-1]).all() else np.argsort(rows, kind="stable")
        ascending = rows if order is None else rows[order]
        self.fetch([name], ascending)
        first, last = (ascending[[0, -1]] // KEY_CHUNK).tolist()
        if first == last:
            found = self.chunk(name, first)[_as_run(rows - first * KEY_CHUNK)]
            return found if found.base is None else found.copy()
        values = np.empty(len(rows), self._columns[name].dtype)
        bounds = np.searchsorted(ascending, np.arange(first, last + 2) * KEY_CHUNK)
        for chunk, (start, stop) in enumerate(pairwise(bounds.tolist()), first):
            if start == stop:
                continue
            here = slice(start, stop) if order is None else order[start:stop]
            values[here] = self.chunk(name, chunk)[
                _as_run(ascending[start:stop] - chunk * KEY_CHUNK)
            ]
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
        if not self._place.distant:
            return
        wanted: list[tuple[str, int]] = []
        for name in names:
            chunks = np.arange(-(-self._group.rows(name) // KEY_CHUNK))
            chunks = chunks if rows is None else np.unique(rows // KEY_CHUNK)
            wanted += [(name, chunk) for chunk in chunks.tolist() if name not in self._whole]
        missing = [each for each in wanted if each not in self._chunks]
        if len(missing) > 1:
            threads.run(threads.fetchers(), self.chunk, missing)

    def unfinished(self, name: str) -> np.ndarray:
        """Return the key column `name` from where its last chunk begins, if that is not full."""
        chunk, n = divmod(self._group.rows(name), KEY_CHUNK)
        return self.chunk(name, chunk) if n else np.empty(0, self._columns[name].dtype)

    def chunk(self, name: str, chunk: int, *, keep: bool = True) -> np.ndarray:
        """Return one chunk of the key column `name`, its committed rows; `keep` it in memory."""
        known = self._chunks.get((name, chunk))
        if known is not None:
            return known
        values = self._read_chunk(name, chunk)
        if keep:
            self._chunks[name, chunk] = values
        return values

    def readable(self, names: Sequence[str], chunk: int) -> list[np.ndarray] | None:
        """Return one chunk of several key columns, not kept; None where one is damaged."""
        try:
            return [self.chunk(name, chunk, keep=False) for name in names]
        except DamagedDataError:  # `verify` tells of it, and whoever needs what is there
            return None

    def _read_chunk(self, name: str, chunk: int) -> np.ndarray:
        total, column = self._group.rows(name), self._columns[name]
        start, stop = chunk * KEY_CHUNK, min((chunk + 1) * KEY_CHUNK, total)
        if name not in self._group.arrays:  # the store is of a version that did not have it
            return np.full(stop - start, column.skipped, column.dtype)
        committed = self._group.digest(name, chunk)
        where = f"{self._path}: key column {name}, rows {start} to {stop} (file {name}/c.{chunk})"
        try:
            data = key_files.contents(self._place, column, chunk)
            # Marks of no deletion, notes of nobody: chunks of one value are one file, told at once.
            last = self._last.get(name)
            if last and last[:2] == (data, committed) and len(last[2]) == stop - start:
                return last[2]
            found = key_files.decoded(column, data, stop - start)
        except FileNotFoundError:
            raise DamagedDataError(f"{where} is missing") from None
        except (ValueError, RuntimeError) as error:
            raise DamagedDataError(f"{where} is damaged: {error}") from error
        values, digest = found.values, found.digest
        if name == "deleted_in" and (beyond := values > self._group.point.commit).any():
            self.stale.add((name, chunk))
            values[beyond] = 0
            digest = key_files.digest(column, values)
        if column.largest is not None and (wrong := key_files.gap(column, values, None)):
            raise DamagedDataError(
                f"{where} is damaged: expected lengths to {column.largest}, got {wrong}"
            )
        if self._group.version == 1:
            if wrong := self._gap(column, chunk, values):
                raise DamagedDataError(f"{where} is missing or damaged: {wrong}")
        elif digest != committed:
            raise DamagedDataError(f"{where} is damaged: not what was committed there")
        elif (name, chunk) not in self.stale:
            self._last[name] = data, committed, values
        return values

    def _gap(self, column: KeyColumn, chunk: int, values: np.ndarray) -> str | None:
        """Return what no writer leaves among `values`, as where their file is missing."""
        has = None
        if column.data_type == "bool":  # has no value to spare; a record without one has digest 0
            has = self.chunk(column.digest, chunk) != 0
        return key_files.gap(column, values, has)

    def packed(self, name: str, chunk: int) -> bytes:
        """Return the texts of a chunk as they were packed for its file; empty if not known."""
        return self._packed.get((name, chunk), b"")

    def follow(
        self,
        before: KeyChunks,
        chunks: Mapping[tuple[str, int], np.ndarray],
        packed: Mapping[tuple[str, int], bytes],
    ) -> None:
        """Know what `before` knows, and `chunks`, which a commit has written, texts as `packed`."""
        # Committed chunks never change but for the last one, which grows, and for marks. To read
        # them back would make each commit of a long run slower than the one before.
        rows = {name: self._group.rows(name) for name in self._columns}
        kept = {
            (name, chunk): values
            for (name, chunk), values in before._chunks.copy().items()
            # Not the last one of a column that grew, but that this format version does not have.
            if len(values) == min(KEY_CHUNK, rows[name] - chunk * KEY_CHUNK)
        }
        self._chunks = {**kept, **chunks}
        # Of what was before nothing will grow: each commit adds to every column.
        self._packed = {
            (name, chunk): texts
            for (name, chunk), texts in packed.items()
            if self._columns[name].data_type == "string" and len(texts) <= _MOST_KEPT
        }

    def mend(self, chunks: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Show `chunks` in place of what their files hold."""
        for name, number in chunks:
            self._whole.pop(name, None)
            self._packed.pop((name, number), None)
            self.stale.add((name, number))
        self._chunks.update(chunks)


def _as_run(places: np.ndarray) -> np.ndarray | slice:
    """Return `places` as a slice where they are one: numpy copies text 20 times faster then."""
    first, n = int(places[0]), len(places)
    if places[-1] - first == n - 1 and (places[1:] > places[:-1]).all():
        return slice(first, first + n)
    return places
