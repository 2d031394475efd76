"""The writer of a recorder: a thread that commits blocks, and what became of them."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedgfe_store.common import threads
from fedgfe_store.errors import ConflictError, FedgfeStoreError
from fedgfe_store.recording.pages import Block, Dropped, LeftOut, Page, Pool, named
from fedgfe_store.recording.preview import Previews
from fedgfe_store.recording.target import Target
from fedgfe_store.storage.append import AppendBatch

OnError = Literal["raise", "warn"]

_SHOWN = 10
"""Records that a line of the log names: a round that diverged would fill it with all of them."""
_STORE_PROBLEMS = (FedgfeStoreError, OSError, MemoryError)
_log = logging.getLogger("fedgfe_store")
# Weak: a recorder that nobody holds any more must not keep its pages until the process ends.
_open: weakref.WeakSet[Writer] = weakref.WeakSet()


@dataclass(frozen=True)
class Missing:
    """Records of one node and round that could not be committed.

    Parameters
    ----------
    node : str or None
        Federated node; None where a block of a whole round could not be.
    round : int
        Federated round.
    reason : str
        Why.
    """

    node: str | None
    round: int
    reason: str

    def __str__(self) -> str:
        return f"{named(self.node, self.round)} ({self.reason})"


class Writer:
    """Commits blocks in a thread of its own, in order, and keeps what became of them.

    Parameters
    ----------
    target : Target
        The store.
    pool : Pool
        Where blocks have their pages from.
    on_error : {"raise", "warn"}
        Whether problems of the store are raised, see `Recorder`.
    background : bool
        Whether a block may end before it is committed.
    previews : Previews, optional
        Told of what is committed.
    """

    def __init__(
        self,
        target: Target,
        pool: Pool,
        *,
        on_error: OnError,
        background: bool,
        previews: Previews | None = None,
    ) -> None:
        self._previews = previews
        self.target, self.pool, self.path = target, pool, target.path
        self._on_error, self._background = on_error, background
        self._line = threads.Line("fedgfe-store-recorder", self)
        self._process = os.getpid()
        # Plain dicts and a deque: each of their operations takes place whole or not at all.
        self._waiting: dict[Block, None] = {}
        self._blocks: dict[int, Block] = {}
        self._missing: dict[tuple[str | None, int], Missing] = {}
        self._errors: deque[BaseException] = deque()
        self._left_out: list[LeftOut] = []
        self._closed = False
        _open.add(self)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What could not be committed, and has not been since."""
        return tuple(self._missing.values())

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was left out of blocks that were committed."""
        return tuple(self._left_out)

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the writer's: its thread and store stay there."""
        return self._process != os.getpid()

    def check_own_process(self) -> None:
        """Refuse a process that was forked from the writer's: nothing would ever be committed."""
        if self.is_forked:
            raise ConflictError(
                f"this recorder of {self.path} belongs to process {self._process}: make another "
                f"one in process {os.getpid()}"
            )

    def check_usable(self) -> None:
        """Refuse to begin anything here, now or in this thread."""
        self.check_own_process()
        if self._closed:
            raise ConflictError(f"this recorder of {self.path} is closed: make another one")
        self._check_no_block()

    def _check_no_block(self) -> None:
        block = self._blocks.get(threading.get_ident())
        if block is not None:
            raise ConflictError(f"the block of {block} is still open in this thread: end it first")

    def begin(self, block: Block) -> None:
        """Open `block`, the only one of this thread."""
        self.check_usable()
        # In this order: interrupted between the two it is a block that `leave` finds and drops.
        self._blocks[threading.get_ident()] = block
        block.is_open = True

    def submit(self, block: Block) -> None:
        """Commit `block` as its pages come, after those before it; a second call does nothing."""
        if block.submitted:
            return
        if self._closed:
            raise ConflictError(f"{block}: the recorder was closed before this block ended")
        self._waiting[block] = None
        self._line.submit(lambda: self._write(block))
        if self._closed:  # by another thread, just now: its own thread may have ended before
            self._line.close()
        block.submitted = True

    def drop(self, block: Block) -> None:
        """End `block` so that nothing of it is committed."""
        block.drop()
        self.forget(block)

    def forget(self, block: Block) -> None:
        """Note that `block` has ended."""
        for thread, each in list(self._blocks.items()):  # other threads begin blocks meanwhile
            if each is block:
                self._blocks.pop(thread, None)

    def settle(self) -> None:
        """Where nothing is written in the background: wait, and raise what went wrong."""
        if not self._background:
            self._line.wait()
            self.raise_errors()

    def flush(self) -> None:
        """Wait until all blocks that have ended are committed, and raise what went wrong."""
        self.check_usable()
        self._line.wait()
        self.raise_errors()

    def close(self) -> None:
        """Write what waits, end the thread, say what is missing and raise what went wrong."""
        if self.is_forked or self._closed:
            return
        self._check_no_block()
        self._line.wait()  # first: a Ctrl-C while it waits leaves the recorder open
        self._closed = True
        self._line.close()
        self.pool.free()
        _open.discard(self)
        if self._missing:
            missing = [str(each) for each in self.missing]
            _log.warning("%s: not recorded: %s", self.path, _listed(missing))
        self.raise_errors()

    def leave(self) -> None:
        """Close because an exception passes, without this thread's block."""
        if self.is_forked:
            return
        # Still open where an interruption kept it from ending.
        block = self._blocks.get(threading.get_ident())
        if block is not None:
            self.drop(block)
        self._close_quietly()

    def finish(self) -> None:
        """Close as the interpreter exits; a block that is open then is not committed."""
        if self.is_forked or self._closed:
            return
        for block in list(self._blocks.values()):
            _log.warning("%s: the block of %s never ended: not recorded", self.path, block)
            self.drop(block)
        self._previews = None  # it would end with the interpreter
        if self._waiting:
            _log.warning("%s: the recorder was not closed: writing what waits", self.path)
        self._close_quietly()

    def _close_quietly(self) -> None:
        """Close where an error would hide another one, or nobody would see it: it is logged."""
        try:
            self.close()
        except Exception:  # noqa: BLE001 - logged whole
            _log.exception("%s: recording failed", self.path)

    def raise_errors(self) -> None:
        """Raise what went wrong since the last call, under ``on_error="raise"``."""
        errors = []
        while self._errors:  # one by one: the writer's thread may add another meanwhile
            errors.append(self._errors.popleft())
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"then: {other}")
            raise errors[0]

    def _write(self, block: Block) -> None:
        """Commit a block, in the writer's thread, and keep what became of it."""
        try:
            self._commit(block)
        except Dropped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised from the next call, or logged
            self._keep_error(block, error)
        else:
            self._keep_success(block)
        finally:
            # Training may fill pages yet for what failed: without this it would wait for them.
            block.drain()
            self._waiting.pop(block, None)

    def _commit(self, block: Block) -> None:
        """Commit records as they come.

        The first of a run take the place of what earlier runs left of their node, round and split:
        after a restart the same samples may come under other indices.
        """
        groups: set[tuple[str, str]] = set()
        run, kept = block.run, list[Page]()
        try:
            with self.target.append(block.node, block.round, run.source) as batch:
                while (page := block.next()) is not None:
                    # Without a copy where there are enough pages: fresh memory costs as much as
                    # all that is done with it. Otherwise the page goes back at once.
                    keeps = self.pool.is_ample
                    if keeps:
                        kept.append(page)
                    try:
                        groups |= self._add(block, batch, page, given=keeps)
                    finally:
                        if not keeps:
                            self.pool.give_back(page)
                for node, split in sorted(groups) if self.target.supersedes else ():
                    if run.is_new(node, block.round, split):
                        batch.supersede(node=node, round=block.round, split=split)
        finally:
            for page in kept:
                self.pool.give_back(page)
        block.added, block.replaced, block.removed = batch.added, batch.replaced, batch.removed
        block.skipped = batch.skipped
        # Only now that it is committed: a block that failed is followed by one that is still new.
        run.keep(block.round, groups)

    def _add(
        self, block: Block, batch: AppendBatch, page: Page, *, given: bool
    ) -> set[tuple[str, str]]:
        """Add what is in a page, which is `given` away or not; return its nodes and splits."""
        records = self.target.finished(page.records())
        nodes, splits = (records.columns[name].tolist() for name in ("node", "split"))
        unfit = batch.add_finite(records, given=given)
        block.left_out += tuple(
            LeftOut(records.key(position), why) for position, why in unfit.items()
        )
        return set(zip(nodes, splits, strict=True))

    def _keep_error(self, block: Block, error: BaseException) -> None:
        known = isinstance(error, _STORE_PROBLEMS)
        reason = str(error) or type(error).__name__
        if not known:
            reason = f"{type(error).__name__}: {error}"
        self._missing[block.node, block.round] = Missing(block.node, block.round, reason)
        if self._on_error == "raise" or not known:
            error.add_note(f"while {block} was recorded to {self.path}")
            self._errors.append(error)
        _log.warning("%s: %s is not recorded: %s", self.path, block, reason)

    def _keep_success(self, block: Block) -> None:
        self._missing.pop((block.node, block.round), None)
        self._left_out += block.left_out
        if block.removed:
            _log.warning(
                "%s: %s: recorded anew; %d records that an earlier run left of it are gone",
                self.path,
                block,
                block.removed,
            )
        if block.left_out:
            left = [str(each) for each in block.left_out]
            _log.warning("%s: left out of %s: %s", self.path, block, _listed(left))
        if self._previews is not None and block.added + block.replaced:
            self._previews.begin(block.node, block.round)


def _listed(items: Sequence[str]) -> str:
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *more])


def _finish() -> None:
    """Write what waits in recorders that nobody closed."""
    for writer in list(_open):
        writer.finish()


# Commits use thread pools, which take no more work once `atexit` runs: this comes before they end.
getattr(threading, "_register_atexit", atexit.register)(_finish)
