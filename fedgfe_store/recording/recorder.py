"""Recording embeddings from a training loop, without making it wait for the disk."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch

from fedgfe_store.common import threads
from fedgfe_store.errors import ConflictError, FedgfeStoreError, SchemaMismatchError
from fedgfe_store.recording.block import RoundBatch
from fedgfe_store.recording.runs import Run
from fedgfe_store.recording.target import Target
from fedgfe_store.recording.writer import Job, LeftOut, Pool
from fedgfe_store.schema import Metadata, Precision
from fedgfe_store.storage.append import IfExists
from fedgfe_store.storage.entry import whole_number
from fedgfe_store.storage.incoming import checked_keys
from fedgfe_store.storage.upkeep import LOCK_TIMEOUT
from fedgfe_store.store import EmbeddingStore

__all__ = ["LeftOut", "Missing", "OnError", "Recorder", "RoundBatch"]

OnError = Literal["raise", "warn"]
BUFFER_BYTES = 512 * 2**20
"""Bytes of records that wait for the writer by default before training waits, too."""

_SHOWN = 10
_STORE_PROBLEMS = (FedgfeStoreError, OSError, MemoryError)
_log = logging.getLogger("fedgfe_store")
_open: weakref.WeakSet[Recorder] = weakref.WeakSet()


@dataclass(frozen=True)
class Missing:
    """Records of one node and round that could not be committed.

    Parameters
    ----------
    node : str
        Federated node.
    round : int
        Federated round.
    reason : str
        Why.
    """

    node: str
    round: int
    reason: str

    def __str__(self) -> str:
        return f"node {self.node}, round {self.round} ({self.reason})"


class Recorder:
    """Appends what a training loop computes to a store: one commit per node and round.

    Records are copied to the CPU as they are added, and nothing of the tensors given is kept. A
    thread of its own writes them, in order, so that training goes on meanwhile. Use it as a
    context, or `close` it; what waits is also written when the interpreter exits. After
    `flush` everything recorded so far is on the disk: call it before a training checkpoint is
    saved, so that a run that is killed and goes on from there misses no round.

    Parameters
    ----------
    store : EmbeddingStore or path-like
        Where to record; a store that is given stays as it is until its `refresh`. A store that
        is not there is made when the first records are committed, from their shapes.
    every : int
        Which rounds are `due`: those that it divides; 0 for none.
    if_exists : {"replace", "error", "skip"}
        What to do with a record that the store has already, as after a restart. With
        ``"replace"`` the first block of this recorder for a node, round and split takes the place
        of all that earlier runs left of it, in the same commit, and the log says how many records
        went: training data comes shuffled, so the same samples may come under other indices.
        Further blocks of this recorder add to it. With ``"skip"`` and ``"error"`` records are
        compared by key alone, and what does not come again stays.
    keep_earlier : bool
        Under ``"replace"``, keep what does not come again, too: where several processes, each
        with its recorder, record parts of one node, round and split.
    on_error : {"raise", "warn"}
        What a problem of the store, such as a full disk, does: ``"raise"`` raises it from the
        next call of `record`, `flush` or `close`; ``"warn"`` logs it, lists the round in
        `missing`, and lets training go on.
    background : bool
        Write in a thread; otherwise a block of `record` ends when its commit is on the disk,
        and raises its error itself.
    buffer_bytes : int
        Bytes of records, as float32, that may wait for the writer; then adding more waits, too.
        The memory is taken as it is needed, kept for the next records, and freed by `close`.
    precision : {"float32", "bfloat16"}, optional
        How a store that is made here keeps values, by default ``"float32"``; one that is there
        must keep them so.
    metadata : Metadata, optional
        What a store that is made here knows of the experiment. Classes join as they are
        recorded. An encoder or an experiment's name that differs from that of a store that is
        there is refused at once; where either has no name there is nothing to compare.
    other_experiment : bool
        Record to a store of an experiment of another name; what has the same keys is replaced.
    images_dir : str, optional
        Folder that ``image_path`` in the records' ``extra`` names, as FedGFE's checkpoints do.
    timeout : float
        Seconds that a commit waits for another writer.

    Raises
    ------
    SchemaMismatchError
        If an option is not one of those above, or does not fit the store that is there.
    DamagedDataError
        If the store that is there is damaged.

    Examples
    --------
    >>> with Recorder("embeddings.zarr", every=5) as recorder:  # doctest: +SKIP
    ...     for round in range(1, 41):
    ...         train(round)
    ...         if recorder.due(round):
    ...             with recorder.record(node=0, round=round) as batch:
    ...                 batch.add(split="train", class_name=names, index=numbers, t5=t5, clip=clip)
    """

    def __init__(
        self,
        store: EmbeddingStore | str | os.PathLike[str],
        *,
        every: int = 1,
        if_exists: IfExists = "replace",
        keep_earlier: bool = False,
        on_error: OnError = "raise",
        background: bool = True,
        buffer_bytes: int = BUFFER_BYTES,
        precision: Precision | None = None,
        metadata: Metadata | None = None,
        other_experiment: bool = False,
        images_dir: str | None = None,
        timeout: float = LOCK_TIMEOUT,
    ) -> None:
        _check_choice("if_exists", if_exists, IfExists)
        _check_choice("on_error", on_error, OnError)
        self.every = whole_number("every", every)
        self.path = store.path if isinstance(store, EmbeddingStore) else Path(store)
        self._on_error, self._background = on_error, background
        self._target = Target(
            self.path,
            precision=precision,
            metadata=metadata or Metadata(),
            other_experiment=other_experiment,
            if_exists=if_exists,
            keep_earlier=keep_earlier,
            timeout=timeout,
            images_dir=images_dir,
        )
        self._run = Run()
        self._pool = Pool(whole_number("buffer_bytes", buffer_bytes))
        self._line = threads.Line("fedgfe-store-recorder", self)
        self._process = os.getpid()
        self._waiting: dict[Job, None] = {}
        self._blocks: dict[int, RoundBatch] = {}
        self._missing: dict[tuple[str, int], Missing] = {}
        self._errors: deque[BaseException] = deque()
        self._left_out: list[LeftOut] = []
        self._closed = self._said_rounded = False
        _open.add(self)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """The nodes and rounds that could not be committed, and have not been since."""
        return tuple(self._missing.values())

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The records of committed rounds that were left out, as their values are not finite."""
        return tuple(self._left_out)

    def due(self, round: int) -> bool:
        """Whether `round` is to be recorded: `every` divides it."""
        return self.every > 0 and round % self.every == 0

    def record(self, *, node: str | int, round: int) -> RoundBatch:
        """Open a block whose records become one commit when it ends.

        Parameters
        ----------
        node : str or int
            Federated node: 0, 1, ... or ``"server"``.
        round : int
            Federated round, from 0.

        Returns
        -------
        RoundBatch
            A context. If the block raises, nothing of it is committed and the exception passes.

        Raises
        ------
        ConflictError
            If the recorder is closed, belongs to the process that this one was forked from, or
            another block of this thread is open.
        FedgfeStoreError or OSError
            What became of an earlier block, under ``on_error="raise"``.
        """
        return self._block(node, round, self._run)

    def _block(self, node: str | int, round: int, run: Run) -> RoundBatch:
        """As `record`, as a part of `run`."""
        self._check_usable()
        self._raise_errors()
        key = {"node": node, "round": round, "split": "-", "class_name": "-", "index": 0}
        columns = checked_keys(key, 1)
        job = Job(str(columns["node"][0]), int(columns["round"][0]), self._pool, run)
        return RoundBatch(self, job, self._target, self._pool)

    def flush(self) -> None:
        """Wait until everything recorded so far is committed and on the disk.

        Raises
        ------
        FedgfeStoreError or OSError
            What became of a block, under ``on_error="raise"``.
        """
        self._check_usable()
        self._line.wait()
        self._raise_errors()

    def close(self) -> None:
        """Write what waits, end the thread, and log what is missing; a second call does nothing.

        In a process forked from the recorder's own it does nothing: what waits is not its own.

        Raises
        ------
        FedgfeStoreError or OSError
            As for `flush`.
        """
        if self._is_forked or self._closed:
            return
        self._check_no_block()
        self._line.wait()
        self._closed = True
        self._line.close()
        self._pool.free()
        _open.discard(self)
        if self._missing:
            missing = [str(each) for each in self.missing]
            _log.warning("%s: not recorded: %s", self.path, _listed(missing))
        self._raise_errors()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif not self._is_forked:
            self._drop_block()
            self._close_quietly()

    def _close_quietly(self) -> None:
        """Close where an error would hide another one, or nobody would see it: it is logged."""
        try:
            self.close()
        except Exception:  # noqa: BLE001 - logged whole
            _log.exception("%s: recording failed", self.path)

    def _finish(self) -> None:
        """Close as the interpreter exits; a block that is open then is not committed."""
        if self._is_forked or self._closed:
            return
        for block in list(self._blocks.values()):
            _log.warning("%s: the block of %s never ended: not recorded", self.path, block)
            block._drop()
        if self._waiting:
            _log.warning("%s: the recorder was not closed: writing what waits", self.path)
        self._close_quietly()

    def _submit(self, job: Job) -> None:
        if self._closed:
            raise ConflictError(f"{job}: the recorder was closed before this block ended")
        self._waiting[job] = None
        self._line.submit(lambda: self._write(job))
        if self._closed:  # by another thread, just now: its own thread may have ended before
            self._line.close()

    def _begin(self, block: RoundBatch) -> None:
        self._check_usable()
        self._blocks[threading.get_ident()] = block

    def _forget(self, block: RoundBatch) -> None:
        for thread, each in list(self._blocks.items()):  # other threads begin blocks meanwhile
            if each is block:
                self._blocks.pop(thread, None)

    def _drop_block(self) -> None:
        """Drop the block that this thread has left, though an interruption kept it from ending."""
        block = self._blocks.get(threading.get_ident())
        if block is not None:
            block._drop()

    def _ended(self) -> None:
        if not self._background:
            self._line.wait()
            self._raise_errors()

    def _write(self, job: Job) -> None:
        """Commit a job, in the writer's thread, and keep what became of it."""
        try:
            job.write(self._target)
        except BaseException as error:  # noqa: BLE001 - raised from the next call, or logged
            self._keep_error(job, error)
        else:
            if job.committed:
                self._keep_success(job)
        finally:
            self._waiting.pop(job, None)

    def _keep_error(self, job: Job, error: BaseException) -> None:
        known = isinstance(error, _STORE_PROBLEMS)
        reason = str(error) or type(error).__name__
        if not known:
            reason = f"{type(error).__name__}: {error}"
        self._missing[job.node, job.round] = Missing(job.node, job.round, reason)
        if self._on_error == "raise" or not known:
            error.add_note(f"while {job} was recorded to {self.path}")
            self._errors.append(error)
        _log.warning("%s: %s is not recorded: %s", self.path, job, reason)

    def _keep_success(self, job: Job) -> None:
        self._missing.pop((job.node, job.round), None)
        self._left_out += job.left_out
        if job.removed:
            _log.warning(
                "%s: %s: recorded anew; %d records that an earlier run left of it are gone",
                self.path,
                job,
                job.removed,
            )
        if job.left_out:
            left = [str(each) for each in job.left_out]
            _log.warning("%s: left out of %s: %s", self.path, job, _listed(left))

    def _raise_errors(self) -> None:
        errors = []
        while self._errors:
            errors.append(self._errors.popleft())
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"then: {other}")
            raise errors[0]

    @property
    def _is_forked(self) -> bool:
        """Whether this process was forked from the recorder's: its thread and store stay there."""
        return self._process != os.getpid()

    def _check_own_process(self) -> None:
        if self._is_forked:
            raise ConflictError(
                f"this recorder of {self.path} belongs to process {self._process}: make another "
                f"one in process {os.getpid()}"
            )

    def _check_usable(self) -> None:
        self._check_own_process()
        if self._closed:
            raise ConflictError(f"this recorder of {self.path} is closed: make another one")
        self._check_no_block()

    def _check_no_block(self) -> None:
        block = self._blocks.get(threading.get_ident())
        if block is not None:
            raise ConflictError(f"the block of {block} is still open in this thread: end it first")

    def _say_rounded(self, tensors: Mapping[str, torch.Tensor]) -> None:
        names = [name for name, tensor in tensors.items() if tensor.dtype is torch.float64]
        if names and not self._said_rounded:
            self._said_rounded = True
            _log.warning("%s: float64 is rounded to float32 (%s)", self.path, ", ".join(names))


def _listed(items: Sequence[str]) -> str:
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *more])


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        expected = ", ".join(get_args(choices))
        raise SchemaMismatchError(f"{name}: expected one of {expected}, got {value!r}")


def _finish() -> None:
    """Write what waits in recorders that nobody closed."""
    for recorder in list(_open):
        recorder._finish()


# Commits use thread pools, which take no more work once `atexit` runs: this comes before they end.
getattr(threading, "_register_atexit", atexit.register)(_finish)
