"""One committed state of a shared store: key columns of those files that a question needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from fedgfe_store.common import threads
from fedgfe_store.common.filters import NUMBERS
from fedgfe_store.common.location import Address, Location
from fedgfe_store.errors import DamagedDataError, SchemaMismatchError
from fedgfe_store.storage.metadata import CommitPoint, Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.shared.facts import Facts, KeyFile, classes_in_order
from fedgfe_store.storage.shared.key_table import Columns, read_bytes, record_columns
from fedgfe_store.storage.shared.session import Session
from fedgfe_store.storage.state import Filters, State

_PLACES = 8
"""Sets of rows of which it is kept where they stand: a query asks for several columns of one."""


class SharedSnapshot(State):
    """The store at `path` as the files `files` of its table show it, at commit `as_of`.

    Files of keys are read when a question needs them, and kept.
    """

    engine = "shared"

    def __init__(
        self,
        path: Location,
        place: Place,
        base: Group,
        files: tuple[KeyFile, ...],
        as_of: int | None = None,
        *,
        session: Session | None = None,
    ) -> None:
        self.files, self._base = files, base
        self._facts = {file.commit: Facts.parse(file.about) for file in files}
        super().__init__(path, place, _group(base, files, self._facts), as_of)
        self.session = session or Session(path, place)
        self._columns = record_columns(base.schema)
        self._places: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: another process reads it anew."""
        names = {"path": self.path, "place": self.place, "base": self._base}
        return {**names, "files": self.files, "as_of": self.as_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @classmethod
    def latest(
        cls, path: Location, place: Place, base: Group, as_of: int | None = None
    ) -> SharedSnapshot:
        """Return the latest state of the store whose ``zarr.json`` is `base`."""
        session = Session(path, place)
        return cls._of(path, place, base, session, as_of)

    @classmethod
    def _of(
        cls, path: Location, place: Place, base: Group, session: Session, as_of: int | None
    ) -> SharedSnapshot:
        log = session.log
        files = log.files()
        try:
            found = cls(path, place, base, files, session=session)
            if as_of is not None:
                found.check_commit(as_of)
                found = cls(path, place, base, files, as_of, session=session)
        except (ValueError, KeyError, TypeError) as error:
            raise log.damaged(f"an entry does not parse ({error})") from error
        if found.point.commit != log.version and not log.foreign_since(found.point.commit):
            raise log.damaged(f"commit {log.version} has no files")
        live = sum(file.unmarked if file.part == "records" else 0 for file in files)
        live -= sum(file.n for file in files if file.part == "marks")
        if live != found.point.live:
            raise log.damaged(
                f"its files show {live} live records, and commit {found.point.commit} published "
                f"{found.point.live}"
            )
        return found

    def refreshed(self) -> SharedSnapshot:
        """Return the latest state of the same store."""
        self.session.log.refresh()
        return self._of(self.path, self.place, self._base, self.session, None)

    def check_writable(self) -> None:
        """Refuse a state that was asked for by its commit, and what a web server has."""
        if isinstance(self.path, Address) and self.path.url.startswith("http"):
            raise SchemaMismatchError(f"{self.path} can be read only: it is on a web server")
        self.check_latest()

    @cached_property
    def facts(self) -> Mapping[int, Facts]:
        """What each commit did, also those whose files were gathered by a compaction."""
        found: dict[int, Facts] = {}
        for file in self.files:
            if file.part == "commits":
                table = self.columns(file).arrow(["created_in", "facts"])
                numbers, texts = (column.to_pylist() for column in table.columns)
                found |= {n: Facts.parse(text) for n, text in zip(numbers, texts, strict=True)}
        return dict(sorted((found | self._facts).items()))

    def commit_times(self) -> Mapping[int, int]:
        """Return when each commit up to this one was made, in milliseconds since 1970 UTC."""
        return {n: facts.time for n, facts in self.facts.items() if n <= self.commit}

    @property
    def live(self) -> int:
        """Number of records at this commit; no file is read for that of the latest one."""
        if self.commit == self.point.commit:
            return self.point.live
        return next((f.live for n, f in reversed([*self.facts.items()]) if n <= self.commit), 0)

    def columns(self, file: KeyFile) -> Columns:
        """Return the columns of a file of keys."""
        known = self.session.known.get(file.path)
        if known is None:
            known = self.session.known[file.path] = self.read_columns(file)
        return known

    def read_columns(self, file: KeyFile) -> Columns:
        """Return the columns of a file of keys, without keeping it."""
        return Columns(file, read_bytes(self.place, file), self._columns)

    def _load(self, files: Sequence[KeyFile]) -> list[Columns]:
        missing = [(file,) for file in files if file.path not in self.session.known]
        if self.place.distant and len(missing) > 1:
            threads.run(threads.fetchers(), self.columns, missing)
        return [self.columns(file) for file in files]

    def rows_matching(self, filters: Filters, *, deleted: bool = False) -> np.ndarray:
        """Return the rows of the records that meet every filter, in the order of their commits."""
        wanted = [f for f in self.files if f.part != "commits" and f.may_hold(filters)]
        found = [np.empty((2, 0), np.int64)]
        marked = [np.empty(0, np.int64)]
        # Numbers first: they are compared faster, and text only where they leave any.
        names = sorted(filters, key=NUMBERS.__contains__, reverse=True)
        for columns in self._load(wanted):
            if columns.file.part == "marks":
                marked.append(columns.row[columns.marked <= self.commit])
                continue
            mask = columns.created <= self.commit
            if not deleted and columns.file.unmarked < columns.file.n:
                mask &= (columns.deleted == 0) | (columns.deleted > self.commit)
            for name in names:
                if not mask.any():
                    break
                mask &= columns.matches(name, filters[name])
            found.append(np.stack([columns.created[mask], columns.row[mask]]))
        created, rows = np.concatenate(found, axis=1)
        if not deleted:
            stays = ~np.isin(rows, np.concatenate(marked))
            created, rows = created[stays], rows[stays]
        ordered: np.ndarray = rows[np.lexsort((rows, created))]
        return ordered

    def fetch(self, names: Iterable[str], rows: np.ndarray | None = None) -> None:
        """Do nothing: a file is brought whole, with all its columns."""

    def column_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the key column `name` at `rows`, in their order."""
        column = self._columns[name]
        values = np.empty(len(rows), column.dtype)
        for columns, here, positions in self._pieces(rows):
            values[here] = columns.at(name, positions)
        if name == "deleted_in":
            self._mark(rows, values)
        return values

    def _mark(self, rows: np.ndarray, values: np.ndarray) -> None:
        for columns in self._load([f for f in self.files if f.part == "marks"]):
            ordered, order = columns.by_row
            places = np.searchsorted(ordered, rows).clip(max=len(ordered) - 1)
            hit = ordered[places] == rows
            values[hit] = columns.marked[order[places[hit]]]

    def _pieces(self, rows: np.ndarray) -> Iterator[tuple[Columns, np.ndarray, np.ndarray]]:
        """Yield files, which of `rows` they hold, and at which of their positions."""
        numbers, positions = self._placed(rows)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            yield self.columns(self.files[number]), here, positions[here]

    def _placed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each of `rows` the number of its file and its position there."""
        key = xxhash.xxh3_64_intdigest(np.ascontiguousarray(rows).data) ^ len(rows)
        if key not in self._places:
            found = self._find(rows)
            while len(self._places) >= _PLACES:
                self._places.pop(next(iter(self._places)), None)
            self._places[key] = found
        return self._places[key]

    def _find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, positions = np.full(len(rows), -1), np.zeros(len(rows), np.int64)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        known = [n for n, file in enumerate(self.files) if file.part == "records"]
        # What was read already first: a query's own files, mostly, and no other one is needed.
        known.sort(key=lambda n: self.files[n].path not in self.session.known)
        missing = len(rows)
        for number in known:
            if not missing:
                break
            low, high = self.files[number].bounds["row"]
            first, last = np.searchsorted(ascending, [low, high + 1])
            wanted = order[first:last][numbers[order[first:last]] < 0]
            if not len(wanted):
                continue
            there, places = self.columns(self.files[number]).by_row
            at = np.searchsorted(there, rows[wanted]).clip(max=len(there) - 1)
            hit = there[at] == rows[wanted]
            numbers[wanted[hit]], positions[wanted[hit]] = number, places[at[hit]]
            missing -= int(hit.sum())
        if missing:
            raise DamagedDataError(
                f"{self.path} is damaged: no file of keys has row {rows[numbers < 0][0]}"
            )
        return numbers, positions


def _group(base: Group, files: Sequence[KeyFile], facts: Mapping[int, Facts]) -> Group:
    """Return what ``zarr.json`` says, and what commits have made of it since."""
    granule = base.schema.granule
    ends = [(first + n) * granule for told in facts.values() for first, n in told.granules]
    ends += [(f.bounds["row"][1] // granule + 1) * granule for f in files if f.part == "records"]
    commit = max(facts, default=0)
    point = CommitPoint(
        commit=commit,
        records=max(ends, default=0),
        live=facts[commit].live if facts else 0,
        compacted=max((n for n, told in facts.items() if told.kind == "compact"), default=0),
    )
    told = [facts[number] for number in sorted(facts)]
    group = base.at(point, base.schema.with_classes(classes_in_order(told)))
    return group.with_negatives() if any(each.negatives for each in told) else group
