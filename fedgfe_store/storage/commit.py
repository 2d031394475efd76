"""The write protocol: every change of a store is one commit, and one rename publishes it.

Order of a commit: take the writer's lock; claim the commit's number; clear what a dead writer left;
write tensor files, whole granules that nothing refers to yet, under temporary names; write key
columns, and the arrays' own metadata with their new shapes, in the same way; make sure of the
claim and rename them into place; make sure of it again and rename ``zarr.json`` into place, which
publishes. Everything is flushed to the disk before the next step begins.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.errors import (
    ConflictError,
    NotFoundError,
)
from fedgfe_store.records import RecordBatch, are_negatives, joined, to_milliseconds
from fedgfe_store.schema import FORMAT_VERSION, Schema
from fedgfe_store.storage import array_files, files, key_files
from fedgfe_store.storage.claim import Claim
from fedgfe_store.storage.finishing import parts_of
from fedgfe_store.storage.layout import KEY_CHUNK, key_columns
from fedgfe_store.storage.lock import WriterLock
from fedgfe_store.storage.metadata import GROUP_FILE, CommitPoint, Group
from fedgfe_store.storage.outcome import add_outcome
from fedgfe_store.storage.recovery import clear, recover, remove_temporary
from fedgfe_store.storage.snapshot import Snapshot
from fedgfe_store.storage.staging import Staging
from fedgfe_store.storage.version_1 import PENDING, identities, pending_note, remove_pending
from fedgfe_store.storage.writing import Change, CommitKind

_log = logging.getLogger("fedgfe_store")


class Transaction:
    """One commit in the making; as a context, it rolls back unless `publish` was reached.

    Parameters
    ----------
    known : Snapshot
        What the caller has read of the store; used on if no one wrote in the meantime.
    timeout : float
        Seconds to wait for another writer.
    """

    def __init__(self, known: Snapshot, *, timeout: float) -> None:
        self.path, self._process = known.root, os.getpid()
        self._encoded = b""
        self._rows: list[Mapping[str, np.ndarray]] = []
        self._begun = self._upgrading = self._published = False
        try:
            self._open(timeout, known)
        except Exception as error:
            add_outcome(error, self.path, None)
            raise

    def _open(self, timeout: float, known: Snapshot) -> None:
        started = time.monotonic()
        # The lock makes waiting cheap, and a dead writer's is free at once; the claim holds where
        # the lock is refused, or granted to everyone: docs/decisions.md, "One writer".
        self._lock = WriterLock(self.path, timeout)
        claim, group = None, known.group

        def published() -> int:
            nonlocal group
            group = Group.read(self.path, group)
            return group.point.commit

        try:
            files.check_own_folders(self.path, {*group.arrays, *group.known_columns})
            # Asks what is published after the claim is made, too: that is the state it is on.
            claim = self._claim = Claim.take(
                self.path,
                timeout=timeout,
                since=started,
                published=published,
                clear=lambda: remove_temporary(self.path, group),
            )
            self._staging = Staging(claim.token)
            if claim.after_others or (self.path / PENDING).exists():
                self._tail = recover(self.path, group, claim)
            else:
                # Of writers that died before they claimed anything; one that waits makes its
                # file anew.
                files.remove_temporary(self.path)
                self._tail = group.point.records
            same = known.as_of is None and known.group.raw == group.raw
            self.snapshot = known if same else known.at(group)
            self._skip(self._tail - group.point.records)
        except BaseException:
            # The claim first: who gets the lock must not have to wait for one that nobody uses.
            try:
                if claim is not None:
                    claim.release()
            finally:
                self._lock.release()
            raise

    def _skip(self, rows: int) -> None:
        """Leave `rows` empty: tensor files of theirs may still be unlinked by a late writer."""
        if rows:
            nothing = {c.name: np.empty(0, c.dtype) for c in key_columns(self.schema).values()}
            self._rows = [key_files.padded(self.schema, nothing, self.commit, rows)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process:
            return  # a forked copy: the commit is its parent's
        try:
            published = self._published or (error is not None and self._is_published())
            if published:
                self._claim.release(published=True)
            else:
                self._abort(error)
            if error is not None and self._begun:
                add_outcome(error, self.path, self.commit if published else None)
        finally:
            # In any case, also where the disk refuses all else: a claim that is renewed by a
            # process that no longer works for it would lock everybody out.
            self._claim.abandon()
            self._lock.release()

    def _is_published(self) -> bool:
        """Whether the rename that publishes took place, as when only the flush after it failed."""
        # Asked of the disk: an interruption, too, may come between the rename and what notes it.
        try:
            return self._encoded == (self.path / GROUP_FILE).read_bytes()
        except FileNotFoundError:
            return False

    @property
    def schema(self) -> Schema:
        """Schema of the store as the latest commit left it."""
        return self.snapshot.schema

    @property
    def commit(self) -> int:
        """Number of the commit in the making."""
        return self.snapshot.point.commit + 1

    def write(self, granules: Sequence[RecordBatch]) -> None:
        """Write `granules` as the next ones; all but the last one of a call are whole."""
        self._begin()
        columns = joined([records.columns for records in granules])
        if (columns["file_id"] != "").any():
            self.upgrade()
        # Whole files that nothing refers to: no reader has one open, and to roll back is to unlink.
        granule, n = self.schema.granule, len(columns["index"])
        work = (
            (name, self._tail + number * granule, records)
            for number, records in enumerate(granules)
            for name in self.schema.columns
        )
        threads.run(threads.writers(), self._write_file, work)
        skipped = -n % granule
        self._rows.append(key_files.padded(self.schema, columns, self.commit, skipped))
        self._tail += n + skipped

    def _begin(self) -> None:
        # Set before the file is there: what an interruption leaves half done is cleared, too.
        first, self._begun = not self._begun, True
        if first and self.snapshot.group.version == 1:
            note = pending_note(token=self._claim.token, commit=self.commit)
            self._staging.write({self.path / PENDING: note})
            self._staging.place(self.make_sure)

    def _write_file(self, name: str, first: int, records: RecordBatch) -> None:
        """Write the granule from row `first` on; an optional column without a value has no file."""
        column = self.schema.column(name)
        shards = self.snapshot.tensor_files[name]
        path = Path(shards.file(first // shards.granule))
        present = records.columns[f"has_{name}"] if column.optional else None
        n, values = len(records), None
        if name in records.tensors and (present is None or present.any()):
            values = parts_of(records, self.schema, name)
        elif not path.exists():
            return
        if values is None:
            # A copy of a busy store brought it along. Replaced, not unlinked: a late writer may
            # not unlink what who took over has put there.
            n, values = 0, np.empty((0, *column.shape), column.dtype).__getitem__
        with self._staging.open(path) as file:
            shards.write(file, n, files.written_early(file, values), present)

    def upgrade(self) -> None:
        """Let this commit bring the store to the format version that new stores have."""
        self._upgrading = self.snapshot.group.version < FORMAT_VERSION

    def publish(
        self, kind: CommitKind, *, deleted: np.ndarray | None = None, source: str | None = None
    ) -> Snapshot:
        """Commit what was written, and mark the rows `deleted` as deleted, in one step.

        `source` says where it came from; a store of version 1 does not keep that.

        Raises
        ------
        ConflictError
            If another writer came in between.
        """
        self._begin()
        marked = np.empty(0, np.int64) if deleted is None else deleted
        rows = self._gathered() | _commit_row(kind, source or "")
        group = self._next_group(kind, rows, len(marked))
        # An upgrade adds arrays.
        for name in group.arrays.keys() - self.snapshot.group.arrays.keys():
            files.make_folders(self.path / name)
        chunks = self._key_chunks(group, rows, marked)
        # First what zarr.json will count. A reader by the old one takes no more of a key chunk than
        # that counts, and ignores marks of commits beyond it.
        written = array_files.write(self._staging, self.path, group, chunks, self.snapshot.chunks)
        total = -(-group.point.records // KEY_CHUNK)
        zones = group.zones.renewed(total, chunks, self.snapshot.chunks.readable)
        group = replace(group, digests=array_files.digests(group, written), zones=zones)
        self._staging.place(self.make_sure)
        # Then, once that is on the disk, the one rename that publishes: a crash before it leaves
        # the old commit, and one after it the new.
        self._encoded = group.encode()
        self._staging.write({self.path / GROUP_FILE: self._encoded})
        self._staging.place(self.make_sure)
        self._published = True
        if self.snapshot.group.version == 1:
            remove_pending(self.path)
        # As it stands there now: no need to read it again, nor to ask of it what was just asked.
        group = replace(group, raw=self._encoded)
        if self._upgrading:
            self._tell_of_the_upgrade()
            return self.snapshot.at(group)
        packed = {place: encoded.packed for place, encoded in written.items()}
        return self.snapshot.extended(group, chunks, packed)

    def commit_change(self, change: Change) -> Snapshot:
        """Commit what was written, and `change`; nobody can have come in between.

        Raises
        ------
        ConflictError
            If another writer took this one for dead.
        """
        return self.publish(change.kind, deleted=change.deleted, source=change.source)

    def restore_shapes(self) -> None:
        """Write the arrays' own metadata anew, as the latest commit left it."""
        self._staging.write(self.snapshot.group.shape_files(self.path))
        self._staging.place(self.make_sure)

    def make_sure(self) -> None:
        """Make sure that what `snapshot` shows is still the latest state, and this commit next.

        Raises
        ------
        ConflictError
            If another writer came in between.
        """
        self._claim.make_sure(self.snapshot.group)

    def _tell_of_the_upgrade(self) -> None:
        _log.warning(
            "%s is of format version %d now: releases that only know older ones cannot open it",
            self.path,
            FORMAT_VERSION,
        )

    def _gathered(self) -> dict[str, np.ndarray]:
        return joined(self._rows) if self._rows else {}

    def _next_group(self, kind: CommitKind, rows: Mapping[str, np.ndarray], deleted: int) -> Group:
        old = self.snapshot.group
        created = rows.get("created_in", np.empty(0)) > 0
        point = CommitPoint(
            commit=self.commit,
            records=self._tail,
            live=old.point.live + int(created.sum()) - deleted,
            compacted=self.commit if kind == "compact" else old.point.compacted,
        )
        names: list[str] = []
        has_negatives = False
        if self._upgrading:  # version 1 did not say
            before = {name: self.snapshot.column(name) for name in ("node", "split")}
            has_negatives = bool(are_negatives(before).any())
        if created.any():
            negatives = are_negatives(rows)
            has_negatives |= bool(negatives.any())
            names = rows["class_name"][created & ~negatives].tolist()
        group = old.upgraded() if self._upgrading else old
        if has_negatives:
            group = group.with_negatives()
        return group.at(point, old.schema.with_classes(names))

    def _key_chunks(
        self, group: Group, rows: Mapping[str, np.ndarray], marked: np.ndarray
    ) -> dict[tuple[str, int], np.ndarray]:
        """Return the chunks of key columns that change, by `rows` at the end or by marks."""
        chunks: dict[tuple[str, int], np.ndarray] = {}
        for name in group.key_columns:
            if self._upgrading:
                chunks |= key_files.numbered(name, 0, self._upgraded_column(name, rows))
            elif name in rows:
                first = self.snapshot.group.rows(name) // KEY_CHUNK
                kept = self.snapshot.chunks.unfinished(name)
                chunks |= key_files.numbered(name, first, np.concatenate([kept, rows[name]]))
        # All of them, so that marks of commits that were never published are seen and cleared.
        self.snapshot.chunks.look_at("deleted_in")
        for name, number in self.snapshot.chunks.stale:
            self._chunk(chunks, name, number)
        for number in np.unique(marked // KEY_CHUNK).tolist():
            here = marked[marked // KEY_CHUNK == number] - number * KEY_CHUNK
            self._chunk(chunks, "deleted_in", number)[here] = self.commit
        return chunks

    def _upgraded_column(self, name: str, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        values = self.snapshot.column(name)
        if name == "file_id":
            values = identities(self.snapshot.column("extra"))
        added = rows.get(name, np.empty(0, values.dtype))
        return np.concatenate([values, added])

    def _chunk(
        self, chunks: dict[tuple[str, int], np.ndarray], name: str, number: int
    ) -> np.ndarray:
        """Return a chunk of those that change, as it lies there if it is not among them yet."""
        if (name, number) not in chunks:
            start, total = number * KEY_CHUNK, self.snapshot.group.rows(name)
            there = np.arange(start, min(start + KEY_CHUNK, total))
            chunks[name, number] = self.snapshot.column_at(name, there).copy()
        return chunks[name, number]

    def _abort(self, error: BaseException | None) -> None:
        try:
            self._staging.discard()
            # Files with names of their own did no harm; those in place hold rows that nobody
            # committed, and shapes that other Zarr readers would believe.
            if self._staging.placed or (self._begun and self.snapshot.group.version == 1):
                clear(self.path, self.snapshot.group, self._claim)
            self._claim.release()
        except (ConflictError, NotFoundError):  # who took over clears it, or it is gone
            return
        except OSError as failure:
            if error is None:
                raise
            error.add_note(
                f"the next writer will clear what this commit left in {self.path}: {failure}"
            )


def _commit_row(kind: CommitKind, source: str) -> dict[str, np.ndarray]:
    return {
        "commit_time": np.array([to_milliseconds(datetime.now(UTC))], np.int64),
        "commit_kind": np.array([kind], np.dtypes.StringDType()),
        "commit_source": np.array([source], np.dtypes.StringDType()),
    }
