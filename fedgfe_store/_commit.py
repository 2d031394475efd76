"""The write protocol: every change of a store is one commit, and one rename publishes it.

Order of a commit: take the writer's lock; roll back what a dead writer left; write ``pending``;
write tensor files, whole granules that nothing refers to yet; rewrite key columns, and the arrays'
own metadata with their new shapes; publish ``zarr.json``; remove ``pending``. Everything is flushed
to the disk before the next step begins.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from filelock import FileLock, Timeout

from fedgfe_store import _files, _key_files, _workers
from fedgfe_store._group import GROUP_FILE, CommitPoint, Group
from fedgfe_store._layout import KEY_CHUNK, key_columns
from fedgfe_store._snapshot import Snapshot
from fedgfe_store.errors import BusyError, ConflictError, FedgfeStoreError
from fedgfe_store.records import RecordBatch, to_milliseconds
from fedgfe_store.schema import Schema

PENDING = "pending"
Stamp = tuple[int, ...]
"""What changes when someone else writes a file."""
CommitKind = Literal["append", "replace", "delete", "compact"]
_PATIENCE = 1.0
"""Seconds of waiting for another writer that go without saying."""

_log = logging.getLogger("fedgfe_store")


class WriterLock:
    """The lock of a store: one writer at a time, over threads and processes.

    A dead process's lock is free at once. Beside the lock lies a note on who holds it.

    Parameters
    ----------
    path : Path
        The store; two names of one folder share one lock.
    timeout : float
        Seconds to wait for another writer.

    Raises
    ------
    BusyError
        If another writer still holds it then; says which process, where and since when.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        real = path.resolve()
        self._lock = FileLock(real.with_name(f".{real.name}.lock"))
        self._note = real.with_name(f".{real.name}.writer")
        try:
            self._lock.acquire(timeout=min(timeout, _PATIENCE))
        except Timeout:
            self._wait(path, timeout)
        try:
            self._note.write_text(_signature())
        except OSError:
            self._lock.release()
            raise

    def _wait(self, path: Path, timeout: float) -> None:
        if timeout > _PATIENCE:
            _log.warning("%s: waiting up to %g s for %s", path, timeout, self._holder())
        try:
            self._lock.acquire(timeout=max(0, timeout - _PATIENCE))
        except Timeout:
            raise BusyError(
                f"{path} is being written by {self._holder()}: gave up after {timeout:g} s"
            ) from None

    def _holder(self) -> str:
        try:
            return self._note.read_text() or "another writer"
        except FileNotFoundError:
            return "another writer"

    def release(self) -> None:
        """Let the next writer in."""
        self._note.unlink(missing_ok=True)
        self._lock.release()


def _signature() -> str:
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def create(path: Path, schema: Schema, *, timeout: float) -> None:
    """Make an empty store at `path`, on the disk up to the folder's name."""
    _files.make_folders(path.resolve().parent)
    lock = WriterLock(path, timeout)
    try:
        group = Group.new(schema)
        _refuse_occupied(path, group.arrays)
        for name in group.arrays:
            _files.make_folders(path / name)
        _files.write_files(_shape_files(path, group))
        _files.write_file(path / GROUP_FILE, group.encode())
    finally:
        lock.release()


def _refuse_occupied(path: Path, names: Iterable[str]) -> None:
    """Allow a new folder, an empty one, and what a killed `create` left."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConflictError(f"cannot make a store at {path}: a file is there")
    if (path / GROUP_FILE).exists():
        raise ConflictError(f"cannot make a store at {path}: a Zarr group is there already")
    expected = {path / name for name in names}
    expected |= {folder / GROUP_FILE for folder in expected}
    for entry in path.rglob("*"):
        if entry not in expected and not _files.is_temporary(entry):
            raise ConflictError(
                f"cannot make a store at {path}: the folder holds something else ({entry})"
            )


class Transaction:
    """One commit in the making; as a context, it rolls back unless `publish` was reached.

    Parameters
    ----------
    path : Path
        The store.
    timeout : float
        Seconds to wait for another writer.
    known : Snapshot
        What the caller has read of the store; used on if no one wrote in the meantime.
    """

    def __init__(self, path: Path, *, timeout: float, known: Snapshot) -> None:
        self.path = path
        try:
            self._lock = WriterLock(path, timeout)
            group = self._recovered()
        except Exception as error:
            _add_outcome(error, path, None)
            raise
        same = known.as_of is None and known.group.raw == group.raw
        self.snapshot = known if same else Snapshot(path, group)
        self._token, self._encoded = "", b""
        self._tail = group.point.records
        self._rows: list[Mapping[str, np.ndarray]] = []
        self._written: dict[Path, Stamp] = {}
        self._published = False

    def _recovered(self) -> Group:
        try:
            roll_back(self.path)
            return Group.read(self.path)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            published = self._published or (error is not None and self._is_published())
            if self._token and not published:
                self._abort(error)
            if error is not None and self._token:
                _add_outcome(error, self.path, self.commit if published else None)
        finally:
            self._lock.release()

    def _is_published(self) -> bool:
        """Whether the rename that publishes took place, as when only the flush after it failed."""
        return self._encoded == (self.path / GROUP_FILE).read_bytes()

    @property
    def schema(self) -> Schema:
        """Schema of the store as the latest commit left it."""
        return self.snapshot.schema

    @property
    def commit(self) -> int:
        """Number of the commit in the making."""
        return self.snapshot.point.commit + 1

    def write(self, records: RecordBatch) -> None:
        """Write `records` as the next granules; all but the last one of a commit are whole."""
        self._begin()
        granule, n = self.schema.granule, len(records)
        starts = range(0, n, granule)
        work = (
            (name, self._tail + start, records.take(slice(start, start + granule)))
            for start in starts
            for name in self.schema.columns
        )
        for stamps in _workers.run(_workers.writers(), self._write_file, work):
            self._written.update(stamps)
        skipped = -n % granule
        self._rows.append(_padded(self.schema, records.columns, self.commit, skipped))
        self._tail += n + skipped

    def _begin(self) -> None:
        if self._token:
            return
        self._token = uuid.uuid4().hex
        note = {
            "token": self._token,
            "commit": self.commit,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _files.write_file(self.path / PENDING, json.dumps(note).encode())

    def _write_file(self, name: str, first: int, records: RecordBatch) -> dict[Path, Stamp]:
        """Write the granule from row `first` on; an optional column without a value has no file."""
        values, column = records.tensors.get(name), self.schema.column(name)
        if values is None:
            return {}
        present = records.columns[f"has_{name}"] if column.optional else None
        if present is not None and not present.any():
            return {}
        files = self.snapshot.tensor_files[name]
        number = first // files.granule
        files.write(number, values, present)
        file = Path(files.file(number))
        return {file: _stamp(file)}

    def publish(self, kind: CommitKind, *, deleted: np.ndarray | None = None) -> Snapshot:
        """Commit what was written, and mark the rows `deleted` as deleted, in one step.

        Raises
        ------
        ConflictError
            If another writer came in between, as it can where the disk does not honour locks.
        """
        self._begin()
        marked = np.empty(0, np.int64) if deleted is None else deleted
        rows = self._gathered() | _commit_row(kind)
        group = self._next_group(kind, rows, len(marked))
        self._check_untouched()
        _files.sync_folders(self._written)
        keys = self._key_contents(group, rows, marked)
        _files.write_files(_shape_files(self.path, group) | keys)
        self._written.update({file: _stamp(file) for file in keys})
        self._check_untouched()
        self._encoded = group.encode()
        _files.write_file(self.path / GROUP_FILE, self._encoded)
        self._published = True
        self._remove_pending()
        return self.snapshot.extended(Group.read(self.path), rows, marked)

    def _gathered(self) -> dict[str, np.ndarray]:
        if not self._rows:
            return {}
        return {name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]}

    def _next_group(self, kind: CommitKind, rows: Mapping[str, np.ndarray], deleted: int) -> Group:
        old = self.snapshot.group
        created = rows.get("created_in", np.empty(0)) > 0
        point = CommitPoint(
            commit=self.commit,
            records=self._tail,
            live=old.point.live + int(created.sum()) - deleted,
            compacted=self.commit if kind == "compact" else old.point.compacted,
        )
        names = rows["class_name"][created].tolist() if created.any() else []
        return old.at(point, old.schema.with_classes(names))

    def _key_contents(
        self, group: Group, rows: Mapping[str, np.ndarray], marked: np.ndarray
    ) -> dict[Path, bytes]:
        """Return the files of key columns with `rows` behind the old ones, and those `marked`."""
        contents = {}
        for name, column in key_columns(group.schema).items():
            chunks = self._key_chunks(name, rows[name]) if name in rows else {}
            if name == "deleted_in":
                self._mark(chunks, marked)
            for number, values in chunks.items():
                file = _key_files.key_file(self.path, name, number)
                contents[file] = _key_files.encode(column, values)
        return contents

    def _key_chunks(self, name: str, values: np.ndarray) -> dict[int, np.ndarray]:
        """Return the chunks that `values` fall into, with the rows before them as read."""
        first = self.snapshot.group.rows(name) // KEY_CHUNK
        kept = self.snapshot.unfinished(name)
        return dict(enumerate(_chunks(np.concatenate([kept, values])), first))

    def _mark(self, chunks: dict[int, np.ndarray], rows: np.ndarray) -> None:
        """Set ``deleted_in`` of `rows` to this commit, in `chunks` or in those that lie there."""
        total = self.snapshot.group.rows("deleted_in")
        for number in np.unique(rows // KEY_CHUNK).tolist():
            start = number * KEY_CHUNK
            if number not in chunks:
                there = np.arange(start, min(start + KEY_CHUNK, total))
                chunks[number] = self.snapshot.column_at("deleted_in", there)
            chunks[number][rows[rows // KEY_CHUNK == number] - start] = self.commit

    def _check_untouched(self) -> None:
        """Fail where someone else wrote: the lock narrows this to what it does not cover."""
        try:
            published = (self.path / GROUP_FILE).read_bytes()
            pending = json.loads((self.path / PENDING).read_bytes())
            same = published == self.snapshot.group.raw and pending["token"] == self._token
            same = same and all(_stamp(file) == stamp for file, stamp in self._written.items())
        except (FileNotFoundError, ValueError):
            same = False
        if not same:
            raise ConflictError(
                f"{self.path}: another writer came in between while commit {self.commit} was "
                f"written (does this disk honour file locks?); nothing of it was published"
            )

    def _remove_pending(self) -> None:
        (self.path / PENDING).unlink()
        _files.sync_folder(self.path)

    def _abort(self, error: BaseException | None) -> None:
        try:
            pending = json.loads((self.path / PENDING).read_bytes())
            if pending["token"] == self._token:
                roll_back(self.path)
        except FileNotFoundError:  # who came in between has cleared it
            return
        except (OSError, ValueError) as failure:
            note = f"the next writer will clear what this commit left in {self.path}: {failure}"
            if error is None:
                raise
            error.add_note(note)


def _add_outcome(error: BaseException, path: Path, published: int | None) -> None:
    """Note on an error that does not say so itself what readers see after it."""
    if isinstance(error, FedgfeStoreError):
        return
    if published is not None:
        error.add_note(f"commit {published} of {path} was published before this failed")
        return
    commit = Group.read(path).point.commit
    error.add_note(f"nothing of this commit was published: {path} is at commit {commit}")


def roll_back(path: Path) -> None:
    """Clear what a writer that died, or gave up, left beyond the commit point of `path`."""
    if not (path / PENDING).exists():
        for begun in path.glob(f"{PENDING}.*"):  # of a writer that died before it wrote anything
            begun.unlink(missing_ok=True)
        return
    group = Group.read(path)
    schema, point = group.schema, group.point
    for tensor in schema.tensors:
        _drop_chunks(path / tensor.name, point.records // schema.granule)
    for name in key_columns(schema):
        _drop_chunks(path / name, -(-group.rows(name) // KEY_CHUNK))
    for name in group.arrays:
        _files.remove_temporary(path / name)
    _files.remove_temporary(path)
    # A file for each array: this flushes the folders in which files were unlinked, too.
    _files.write_files(_shape_files(path, group) | _unmarked(path, group))
    (path / PENDING).unlink()
    _files.sync_folder(path)


def _unmarked(path: Path, group: Group) -> dict[Path, bytes]:
    """Return the files of ``deleted_in`` that hold marks beyond the commit point, without them."""
    column = key_columns(group.schema)["deleted_in"]
    contents = {}
    for number, kept in enumerate(_chunks(Snapshot(path, group).column("deleted_in"))):
        there = _key_files.read_chunk(path, column, number, len(kept))
        if (kept != there).any():
            file = _key_files.key_file(path, "deleted_in", number)
            contents[file] = _key_files.encode(column, kept)
    return contents


def _drop_chunks(folder: Path, first: int) -> None:
    """Unlink the chunk files of `folder` from number `first` of the record axis on."""
    for entry in os.scandir(folder):
        parts = entry.name.split(".")
        if parts[0] == "c" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= first:
            Path(entry.path).unlink()


def _shape_files(path: Path, group: Group) -> dict[Path, bytes]:
    """Return the arrays' own metadata, which other Zarr readers use, with committed shapes."""
    return {path / name / GROUP_FILE: json.dumps(m).encode() for name, m in group.shaped().items()}


def _padded(
    schema: Schema, columns: Mapping[str, np.ndarray], commit: int, skipped: int
) -> dict[str, np.ndarray]:
    """Return one granule of key columns: the records' own and what skipped rows hold."""
    n = len(columns["index"])
    marks = {
        "created_in": np.full(n, commit, np.int32),
        "deleted_in": np.zeros(n, np.int32),
        "recorded_in": columns.get("recorded_in", np.full(n, commit, np.int32)),
    }
    given = {**columns, **marks}
    return {
        c.name: np.concatenate([given[c.name], np.full(skipped, c.skipped, c.dtype)])
        for c in key_columns(schema).values()
        if c.dim == "record"
    }


def _commit_row(kind: CommitKind) -> dict[str, np.ndarray]:
    return {
        "commit_time": np.array([to_milliseconds(datetime.now(UTC))], np.int64),
        "commit_kind": np.array([kind], np.dtypes.StringDType()),
    }


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    """Cut a key column that begins with a chunk into its chunks."""
    return [values[start : start + KEY_CHUNK] for start in range(0, len(values), KEY_CHUNK)]
