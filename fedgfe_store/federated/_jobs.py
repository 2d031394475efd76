"""What is on its way to the writer: jobs, whose records come in pages, and the pool of pages."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from fedgfe_store.federated._pages import Page, page_records
from fedgfe_store.federated._target import Target
from fedgfe_store.records import RecordBatch, RecordKey
from fedgfe_store.schema import Schema

_LARGEST = {name: torch.finfo(getattr(torch, name)).max for name in ("float32", "bfloat16")}


@dataclass(frozen=True)
class LeftOut:
    """A record that was not written.

    Parameters
    ----------
    key : RecordKey
        Which record.
    reason : str
        Why, such as ``"t5 has values that are not finite"``.
    """

    key: RecordKey
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Pool:
    """The pages of a recorder: some are filled, some wait for the writer, the rest are free.

    Parameters
    ----------
    nbytes : int
        What all pages may take together; two pages are always allowed.
    """

    def __init__(self, nbytes: int) -> None:
        self.changed = threading.Condition()
        self._nbytes = nbytes
        self._free: list[Page] = []
        self._made = 0

    def take(self, schema: Schema, job: Job, *, wait: bool) -> Page | None:
        """Return an empty page for `job`; without `wait` None where there is none.

        A job for whose records the writer waits gets one in any case, or both would wait for
        ever.
        """
        with self.changed:
            while not self._free:
                page_bytes = schema.record_nbytes * page_records(schema)
                if self._made < max(2, self._nbytes // page_bytes) or job.starved:
                    self._made += 1
                    return Page(schema)
                if not wait:
                    return None
                self.changed.wait()
            return self._free.pop()

    def give_back(self, page: Page) -> None:
        """Let others have `page`."""
        page.clear()
        with self.changed:
            self._free.append(page)
            self.changed.notify_all()

    def free(self) -> None:
        """Let go of the memory of the pages that nobody uses."""
        with self.changed:
            self._free = []


class Job:
    """The records of one node and round, from the training thread to the writer's.

    Attributes
    ----------
    records : int
        How many there are so far.
    committed : bool
        Whether they are on the disk.
    added, replaced, skipped : int
        As of `AppendBatch`, once they are.
    left_out : list of LeftOut
        Records that were not written, once the others are.
    """

    def __init__(self, node: str, round: int, pool: Pool) -> None:
        self.node, self.round = node, round
        self.added = self.replaced = self.skipped = 0
        self.records = 0
        self.committed = False
        self.left_out: list[LeftOut] = []
        self._pool = pool
        self._waiting: deque[Page] = deque()
        self._ended = self._dropped = self._failed = self._hungry = False

    def __str__(self) -> str:
        return f"node {self.node}, round {self.round}"

    @property
    def starved(self) -> bool:
        """Whether the writer waits for records of this job."""
        return self._hungry and not self._waiting

    def put(self, page: Page) -> None:
        """Hand a filled page to the writer."""
        with self._pool.changed:
            if not self._failed:
                self._waiting.append(page)
                self._pool.changed.notify_all()
                return
        self._pool.give_back(page)

    def end(self, *, dropped: bool) -> None:
        """Say that nothing follows, or that nothing is to be committed."""
        with self._pool.changed:
            self._ended, self._dropped = True, self._dropped or dropped
            self._pool.changed.notify_all()

    def write(self, target: Target) -> None:
        """Commit the records as they come; nothing if the job is dropped."""
        try:
            with target.append(self.node, self.round) as batch:
                while (page := self._next()) is not None:
                    records = page.records()
                    self._pool.give_back(page)
                    records = self._finite(target.finished(records), target.precision)
                    if len(records):
                        batch.add_records(records)
            self.added, self.replaced = batch.added, batch.replaced
            self.skipped, self.committed = batch.skipped, True
        except _Dropped:
            return
        finally:
            self.drain()

    def drain(self) -> None:
        """Give back the pages that wait, and from now on those that come."""
        with self._pool.changed:
            self._failed = True
            waiting, self._waiting = self._waiting, deque()
        for page in waiting:
            self._pool.give_back(page)

    def _next(self) -> Page | None:
        with self._pool.changed:
            while not (self._waiting or self._ended):
                self._hungry = True
                self._pool.changed.notify_all()
                self._pool.changed.wait()
            self._hungry = False
            if self._dropped:
                raise _Dropped
            return self._waiting.popleft() if self._waiting else None

    def _finite(self, records: RecordBatch, precision: str) -> RecordBatch:
        """Return the records whose values are finite, and keep a note of the others."""
        reasons: dict[int, str] = {}
        for name, values in records.tensors.items():
            present = records.columns.get(f"has_{name}", np.full(len(records), True))
            for position in np.flatnonzero(present).tolist():
                largest = np.abs(values[position]).max()
                if not largest <= _LARGEST[precision]:
                    beyond = precision != "float32" and np.isfinite(largest)
                    what = f"beyond {precision}" if beyond else "that are not finite"
                    reasons.setdefault(position, f"{name} has values {what}")
        if not reasons:
            return records
        self.left_out += [LeftOut(records.key(i), reason) for i, reason in reasons.items()]
        return records.take(np.array([i for i in range(len(records)) if i not in reasons], int))


class _Dropped(Exception):
    """The training block raised: nothing of the job is to be committed."""
