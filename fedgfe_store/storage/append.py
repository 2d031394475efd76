"""Records gathered for one commit, and what becomes of keys that the store has already."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np

from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, RecordBatch, RecordKey, keys_of
from fedgfe_store.storage.entry import conformed, finished
from fedgfe_store.storage.incoming import checked, checked_keys, checked_source
from fedgfe_store.storage.ready import Ready, Seen, digest_names
from fedgfe_store.storage.sifting import IfExists, Sifter
from fedgfe_store.storage.state import State
from fedgfe_store.storage.writing import Change, CommitKind, Writing, committed

# Some 900 records of [17, 4096], 30 of [512, 4096]: fewer take the lock only to be committed.
_BUFFER_BYTES = 256 * 2**20
# Copying costs; but what comes in smaller calls may take an epoch, while others want the lock.
_AT_ONCE_BYTES = 64 * 2**20
"""Bytes of a call from which exact values are not copied; to round others twice costs more."""


class AppendBatch:
    """Records on their way into one commit; made by `EmbeddingStore.append`.

    As a context it commits on exit, or changes nothing if the block raises. Records are copied
    as they are added; once 256 MiB of them wait they are written, which takes the store's
    writer lock, where it has one, until the end of the block. 64 MiB of exact values in a call are
    written at once, without a copy.

    Attributes
    ----------
    added, replaced, skipped, removed : int
        After the block: records that are new, that took another's place, that were left out
        because the store has their key (with ``if_exists="error"``: and the same tensors), and
        that `supersede` deleted.
    """

    def __init__(
        self,
        known: State,
        *,
        begin: Callable[[State], Writing],
        node: str | int | None,
        round: int | None,
        if_exists: IfExists,
        source: str | None,
        done: Callable[[State], None],
    ) -> None:
        if if_exists not in get_args(IfExists):
            raise SchemaMismatchError(
                f"if_exists: expected error, replace or skip, got {if_exists!r}"
            )
        self.added = self.replaced = self.skipped = self.removed = 0
        self._known, self._begin_writing, self._done = known, begin, done
        self._source, self._process = checked_source(source), os.getpid()
        self._defaults = {"node": node, "round": round}
        self._if_exists: IfExists = if_exists
        self._waiting: list[RecordBatch] = []
        self._waiting_bytes = 0
        self._ready, self._seen = Ready(), Seen()
        self._failure: BaseException | None = None
        self._deleted: list[int] = []
        self._kept: set[RecordKey] = set()
        self._superseded: set[tuple[str, int, str]] = set()
        self._writing: Writing | None = None
        self._written: list[Mapping[str, np.ndarray]] = []
        self._dropped = np.empty(0, np.int64)
        self._known_by: Sifter | None = None
        self._open = True

    def add(
        self,
        *,
        split: Any,
        class_name: Any,
        index: Any,
        node: Any = None,
        round: Any = None,
        sample_id: Any = None,
        file_id: Any = None,
        image_filename: Any = None,
        audio_path: Any = None,
        timestamp: Any = None,
        extra: Any = None,
        **tensors: Any,
    ) -> None:
        """Add records: one, or `n` whose tensors have a leading axis of length `n`.

        Parameters
        ----------
        split, class_name : str or sequence of str
            One for all records, or one each.
        index : int or sequence of int
            Number of the sample within node, split and class.
        node, round : optional
            As in `EmbeddingStore.append`, for those not given there.
        sample_id, image_filename, audio_path : str or sequence of str, optional
            What else is known of the records.
        file_id : str or sequence of str, optional
            What tells the sample from every other one, in whatever order a round saw them. A
            store of format version 1 is upgraded to keep it.
        timestamp : datetime or sequence of datetime, optional
            When the embeddings were made, by default now; without a time zone it is UTC.
        extra : dict or sequence of dict, optional
            Any other metadata that JSON can hold.
        **tensors : Tensor or ndarray
            The store's tensor columns, such as ``t5=[n, 17, 4096]`` and ``clip=[n, 768]``, of
            float16, bfloat16 or float32 on any device.

        Raises
        ------
        SchemaMismatchError
            If something does not fit the store; nothing of this call is added.
        ConflictError
            If a key was added before in this block with other tensors.
        """
        given = {"node": node, "round": round, "split": split}
        given |= {"class_name": class_name, "index": index}
        keys = {k: self._defaults.get(k) if v is None else v for k, v in given.items()}
        notes = {
            "sample_id": sample_id,
            "file_id": file_id,
            "image_filename": image_filename,
            "audio_path": audio_path,
            "timestamp": timestamp,
            "extra": extra,
        }
        self.add_records(checked(self._known.schema, keys, notes, tensors))

    def add_records(self, records: RecordBatch) -> None:
        """Add records, such as another store's; they are rounded to this one's precision.

        Raises
        ------
        SchemaMismatchError
            If a key, note or value does not fit the store or its precision.
        ConflictError
            As for `add`.
        """
        schema = self._known.schema
        if records.nbytes < _AT_ONCE_BYTES or schema.precision != "float32":
            self._take(conformed(records, schema))
        else:
            self._take_at_once(conformed(records, schema, how="left"))

    def add_finite(self, records: RecordBatch, *, given: bool = False) -> dict[int, str]:
        """Add those of `records` whose values are finite in the store's precision.

        Parameters
        ----------
        records : RecordBatch
            Their keys and notes must be such as `add` takes: they are not looked at again.
        given : bool
            Whether the memory of their tensors is this batch's until the block has ended.

        Returns
        -------
        dict of int to str
            Positions of the others, and what is wrong: ``"t5 has values that are not finite"``.

        Raises
        ------
        ConflictError
            As for `add`.
        """
        schema = self._known.schema
        fitting, unfit = finished(records, schema, how="in place" if given else "copied")
        if unfit:
            rest = [position for position in range(len(records)) if position not in unfit]
            fitting = fitting.take(np.array(rest, np.int64))
        self._take(fitting)
        what = {False: "that are not finite", True: f"beyond {schema.precision}"}
        return {
            position: f"{name} has values {what[is_beyond]}"
            for position, (name, is_beyond) in unfit.items()
        }

    def _take(self, fitting: RecordBatch) -> None:
        """Let records wait; write what waits once it is much."""
        self._check_open()
        self._wait(fitting)
        if self._waiting_bytes >= _BUFFER_BYTES:
            self._write(rest=False)

    def _take_at_once(self, records: RecordBatch) -> None:
        """Write records that lie in a caller's memory, and all that waits."""
        self._check_open()
        # First what may fail of them: nothing of a refused call is added.
        self._begin()
        fresh, prints = self._seen.new(records)
        self._write(rest=False)
        some = self._sifted(fresh)
        self._seen.add(prints)
        self.skipped += len(records) - len(fresh)
        self._ready.append(some)
        # Half a file costs less than a copy of it; in one call all are written side by side.
        rest = len(self._ready) % self._known.schema.granule
        self._put(len(self._ready) - (rest if 2 * rest < self._known.schema.granule else 0))
        self._ready.settle(lambda rest: conformed(rest, self._known.schema))

    def unknown(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the positions of those records whose tensors must be read for `add_records`.

        The others are in the store as they would come, and are counted as skipped here; digests
        tell, so `columns` must be of tensors in this store's precision.
        """
        self._check_open()
        self._begin()
        fresh = []
        for position, key in enumerate(keys_of(columns)):
            if self._sifter.is_there(columns, position, key):
                self.skipped += 1
                self._kept.add(key)
            else:
                fresh.append(position)
        return np.array(fresh, np.int64)

    def supersede(self, *, node: str | int, round: int, split: str) -> None:
        """Delete what the store has of a node, round and split, in this same commit.

        What this batch adds stays; a record added again with the same tensors is not touched.

        Parameters
        ----------
        node : str or int
            Federated node.
        round : int
            Federated round.
        split : str
            Split.

        Raises
        ------
        SchemaMismatchError
            If one of them is not what a key can hold.
        """
        self._check_open()
        given = checked_keys({"node": node, "round": round, "split": split}, 1)
        self._superseded.add(
            (str(given["node"][0]), int(given["round"][0]), str(given["split"][0]))
        )

    def _check_open(self) -> None:
        if not self._open:
            raise ConflictError("this batch is closed: open another one with store.append()")
        if os.getpid() != self._process:
            raise ConflictError(
                f"this batch was opened by process {self._process}, and this is a fork of it: "
                f"open another one with store.append()"
            )
        self._check_whole()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process:
            return  # a forked copy leaves the commit to its parent
        self._open = False
        if error is None:
            try:
                self._check_whole()
                self._write(rest=True)
                self._publish()
            except BaseException as failure:
                self._leave(type(failure), failure, failure.__traceback__)
                raise
        self._leave(kind, error, traceback)

    def _check_whole(self) -> None:
        """Refuse to commit a part of what was added."""
        if self._failure is not None:
            raise ConflictError(
                f"records could not be written, nothing of the block is committed: {self._failure}"
            ) from self._failure

    def _leave(self, *error: Any) -> None:
        self._waiting, self._ready = [], Ready()
        if self._writing is not None:
            self._writing.__exit__(*error)
            self._writing = None

    def _wait(self, records: RecordBatch) -> None:
        """Put `records` among those that wait, less those that this batch has already."""
        fresh, prints = self._seen.new(records)
        self._seen.add(prints)
        self.skipped += len(records) - len(fresh)
        if len(fresh):
            self._waiting.append(fresh)
            self._waiting_bytes += fresh.nbytes

    def _write(self, *, rest: bool) -> None:
        """Write what waits, granule by granule; without `rest` keep an unfinished granule."""
        if not (self._waiting or len(self._ready) or (rest and self._superseded)):
            return
        self._begin()
        granule = self._known.schema.granule
        while self._waiting:
            self._ready.append(self._sifted(self._waiting[0]))
            self._waiting_bytes -= self._waiting.pop(0).nbytes
            # Files are written side by side, and what joins two calls in one is copied for them.
            if self._ready.nbytes >= _AT_ONCE_BYTES or not (self._waiting or rest):
                self._put(len(self._ready) // granule * granule)
        if rest:
            self._put(len(self._ready))

    def _begin(self) -> Writing:
        if self._writing is None:
            self._writing = self._begin_writing(self._known)
            self._known_by = Sifter(self._writing.snapshot, self._if_exists)
        return self._writing

    @property
    def _sifter(self) -> Sifter:
        assert self._known_by is not None
        return self._known_by

    def _put(self, n: int) -> None:
        """Write the first `n` records of those that are ready."""
        if not n:
            return
        granules = self._ready.pop(n, self._known.schema.granule)
        # Without their tensors: enough to ask again what the store holds, see `_change`.
        names = [name for name in granules[0].columns if name.startswith("has_")]
        names += [*KEY_COLUMNS, *digest_names(granules[0].columns)]
        for each in granules:
            self._written.append({name: each.columns[name] for name in names})
        try:
            self._begin().write(granules)
        except BaseException as error:
            self._failure = error  # they are lost, whether or not the block goes on
            raise

    def _publish(self) -> None:
        if self._writing is None:
            return
        before, after = self._writing.snapshot, committed(self._writing, self._change)
        if after is not before:
            self._done(after)

    def _change(self, latest: State) -> Change | None:
        """Return what the batch does to the latest state; asked anew if another writer came in."""
        if latest is not self._sifter.state:
            self._sift_again(latest)
        removed = self._rows_left_over()
        self.removed = len(removed)
        if not (self.added or self.replaced or self.removed):
            return None
        deleted = np.array(sorted(self._deleted + removed), np.int64)
        kind: CommitKind = "replace" if len(deleted) else "append"
        return Change(kind, deleted, self._dropped, self._source)

    def _sift_again(self, latest: State) -> None:
        """Look up once more what was written: others have added or deleted some of its keys."""
        self._known_by = Sifter(latest, self._if_exists)
        self._deleted.clear()
        self.added = self.replaced = 0
        self.skipped -= len(self._dropped)
        dropped, start = [], 0
        for columns in self._written:
            n = len(columns["index"])
            dropped.append(start + np.setdiff1d(np.arange(n), self._fresh(columns)))
            start += n
        self._dropped = np.concatenate([np.empty(0, np.int64), *dropped])

    def _rows_left_over(self) -> list[int]:
        """Return the rows of what is superseded and is not among what this batch brings."""
        return [
            row
            for node, number, split in sorted(self._superseded)
            for key, row in self._sifter.rows_of(number, node).items()
            if key.split == split and key not in self._seen and key not in self._kept
        ]

    def _sifted(self, records: RecordBatch) -> RecordBatch:
        """Return those of `records` that are to be written, seen what the store holds."""
        fresh = self._fresh(records.columns)
        return records if len(fresh) == len(records) else records.take(fresh)

    def _fresh(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the positions of the records that the store does not have as they are."""
        found = self._sifter.fates(columns)
        self.added += found.added
        self.skipped += found.skipped
        self.replaced += len(found.replaced)
        self._deleted += found.replaced
        return found.fresh
