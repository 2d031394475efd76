"""A commit of a shared store: files that nobody refers to yet, then one entry of the log."""

from __future__ import annotations

import io
import logging
import os
import random
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from fedgfe_store.common import threads
from fedgfe_store.errors import BusyError, ConflictError, DamagedDataError
from fedgfe_store.records import KEY_COLUMNS, RecordBatch, are_negatives, joined, to_milliseconds
from fedgfe_store.schema import Schema
from fedgfe_store.storage.finishing import parts_of
from fedgfe_store.storage.place import RemoteError
from fedgfe_store.storage.shared.facts import Facts, KeyFile, Part, bounds_of, nodes_sorted
from fedgfe_store.storage.shared.key_table import TABLE, arrow_table, encode
from fedgfe_store.storage.shared.snapshot import SharedSnapshot
from fedgfe_store.storage.writing import Change, OvertakenError

LIFETIME = 24 * 3600.0
"""Seconds for which files that no commit refers to are left alone: their writer may be at work."""

_log = logging.getLogger("fedgfe_store")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0
"""Seconds to wait, at most and at random, after another writer was faster."""


@dataclass(frozen=True)
class Prepared:
    """A file of keys that lies in its place, and is not committed."""

    path: str
    size: int
    n: int
    unmarked: int
    part: Part
    bounds: Mapping[str, tuple[Any, Any]]


class SharedTransaction:
    """One commit in the making; as a context, it removes what it wrote unless it was committed.

    Parameters
    ----------
    known : SharedSnapshot
        What the caller has read of the store.
    timeout : float
        Seconds for which others may come first.
    """

    def __init__(self, known: SharedSnapshot, *, timeout: float) -> None:
        self.snapshot = known.refreshed()
        self._timeout, self._process = timeout, os.getpid()
        # One commit is made under it, so that it answers whether that was made.
        self._token = uuid.uuid4().hex
        self._rows: list[Mapping[str, np.ndarray]] = []
        self._shards: list[str] = []
        self._prepared: dict[bytes, Prepared] = {}
        self._begun: float | None = None
        self._tries = 0
        self._committed = self._unknown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process or self._committed:
            return
        if error is not None and self._unknown:
            error.add_note(f"whether this commit of {self.snapshot.path} was made is not known")
            return
        names = [*self._shards, *(f"{TABLE}/{each.path}" for each in self._prepared.values())]
        try:
            for name in names:
                self.snapshot.place.remove(name)
        except (RemoteError, OSError) as failure:  # compact removes them later
            _log.info("%s: what an unfinished commit wrote stays: %s", self.snapshot.path, failure)

    @property
    def schema(self) -> Schema:
        """Schema of the store as the latest commit left it."""
        return self.snapshot.schema

    def write(self, granules: Sequence[RecordBatch]) -> None:
        """Write `granules` as shards that nobody else writes to."""
        self._begun = self._begun or time.monotonic()
        columns = joined([records.columns for records in granules])
        numbers = self.snapshot.session.granules.take(len(granules), self._beyond())
        work = (
            (name, number, records)
            for number, records in zip(numbers, granules, strict=True)
            for name in self.schema.columns
        )
        threads.run(threads.writers(), self._write_shard, work)
        granule, within = self.schema.granule, np.arange(len(columns["index"]))
        rows = np.array(numbers, np.int64)[within // granule] * granule + within % granule
        self._rows.append({**columns, "row": rows})

    def _beyond(self) -> int:
        own = [int(rows["row"].max()) // self.schema.granule + 1 for rows in self._rows]
        return max([self.snapshot.point.records // self.schema.granule, *own])

    def _write_shard(self, name: str, number: int, records: RecordBatch) -> None:
        column = self.schema.column(name)
        present = records.columns[f"has_{name}"] if column.optional else None
        if name not in records.tensors or (present is not None and not present.any()):
            return
        files, place = self.snapshot.tensor_files[name], self.snapshot.place
        buffer = io.BytesIO()
        files.write(buffer, len(records), parts_of(records, self.schema, name), present)
        file, data = files.file_name(number), buffer.getvalue()
        self._shards.append(file)
        # One that is there is this very one, whose answer was lost: its number is nobody else's.
        if not place.put_new(file, data) and place.read(file, len(data)) != data:
            self._shards.remove(file)
            raise DamagedDataError(f"{place}/{file}: another writer has used this number")

    def commit_change(self, change: Change) -> SharedSnapshot:
        """Commit what was written, and `change`, in one step; return the state after it."""
        return self.commit_files(change, (), ())

    def commit_files(
        self, change: Change, added: Sequence[Prepared], removed: Sequence[KeyFile]
    ) -> SharedSnapshot:
        """Commit `change` and put files of keys in place of others, in one step.

        Raises
        ------
        OvertakenError
            If another writer has committed meanwhile.
        BusyError
            If others came first for longer than the timeout.
        """
        self._check_age()
        started = self._begun = self._begun or time.monotonic()
        log, snapshot = self.snapshot.session.log, self.snapshot
        written, files = self._files(change)
        about = self._facts(change, written).encode()
        number = log.version + 1
        entries = [KeyFile(**vars(each), commit=number, about=about) for each in [*files, *added]]
        failure: Exception | None = None
        self._unknown = True
        try:
            done = log.commit(self._token, entries, removed)
        except (RemoteError, DamagedDataError) as error:
            done, failure = False, error
        latest = snapshot.refreshed()
        if done or log.made_in(self._token) is not None:
            self._committed, self.snapshot = True, latest
            return latest
        self._unknown = False
        if failure is not None:
            raise failure
        self.snapshot = latest
        self._pause(started)
        raise OvertakenError

    def _check_age(self) -> None:
        if self._begun is not None and time.monotonic() - self._begun > LIFETIME / 2:
            raise ConflictError(
                f"{self.snapshot.path}: this commit was begun {LIFETIME / 7200:g} hours ago, and "
                f"what it wrote may be taken for a dead writer's: begin it anew"
            )

    def _pause(self, started: float) -> None:
        waited = time.monotonic() - started
        if waited > self._timeout:
            raise BusyError(
                f"{self.snapshot.path}: other writers came first for {waited:.0f} s; "
                f"nothing was committed"
            )
        time.sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._tries)))
        self._tries = min(self._tries + 1, 16)

    def _files(self, change: Change) -> tuple[dict[str, np.ndarray], list[Prepared]]:
        """Return the columns of the records that are committed, and the commit's files of keys."""
        written, files = self._kept(change.dropped), []
        if len(written.get("row", ())):
            files.append(self.put(arrow_table(self.schema, written), "records", written))
        if len(change.deleted):
            marks = {n: self.snapshot.column_at(n, change.deleted) for n in KEY_COLUMNS}
            marks["row"] = change.deleted
            files.append(self.put(arrow_table(self.schema, marks), "marks", marks))
        return written, files

    def _kept(self, dropped: np.ndarray) -> dict[str, np.ndarray]:
        if not self._rows:
            return {}
        joined = {n: np.concatenate([rows[n] for rows in self._rows]) for n in self._rows[0]}
        if not len(dropped):
            return joined
        return {name: np.delete(values, dropped) for name, values in joined.items()}

    def put(self, table: pa.Table, part: Part, columns: Mapping[str, np.ndarray]) -> Prepared:
        """Write a file of keys whose bounds are those of `columns`; one written before is used."""
        path, data = encode(table, self._token)
        key = path.encode()
        if key not in self._prepared:
            unmarked = table.column("deleted_in").null_count
            bounds = bounds_of(columns) if columns else {}
            found = Prepared(path, len(data), len(table), unmarked, part, bounds)
            # Where it is there already, its answer was lost: the name tells what is in it.
            self.snapshot.place.put_new(f"{TABLE}/{path}", data)
            self._prepared[key] = found
        return self._prepared[key]

    def _facts(self, change: Change, written: Mapping[str, np.ndarray]) -> Facts:
        names = ("node", "round")
        touched = {name: set(written.get(name, np.empty(0)).tolist()) for name in names}
        for name in names:
            touched[name] |= set(self.snapshot.column_at(name, change.deleted).tolist())
        added, deleted = len(written.get("row", ())), len(change.deleted)
        negatives = are_negatives(written) if added else np.zeros(0, bool)
        classes = written["class_name"][~negatives].tolist() if added else []
        moved = change.kind == "compact"
        found = Facts(
            time=to_milliseconds(datetime.now(UTC)),
            kind=change.kind,
            source=change.source or "",
            nodes=nodes_sorted(touched["node"]),
            rounds=tuple(sorted(touched["round"])),
            added=0 if moved else added,
            deleted=0 if moved else deleted,
            live=self.snapshot.point.live + added - deleted,
            classes=tuple(dict.fromkeys(classes)),
            negatives=bool(negatives.any()),
            granules=_runs(np.unique(written["row"] // self.schema.granule) if added else ()),
        )
        if not moved:
            return found
        # Of a compaction, since it takes the place of the commits before: all up to then.
        known, schema = self.snapshot.group.may_have_negatives, self.schema
        return replace(found, negatives=known, classes=schema.metadata.classes)


def _runs(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending numbers as runs: the first one, and how many follow one another."""
    runs: list[tuple[int, int]] = []
    for number in map(int, numbers):
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return tuple(runs)
