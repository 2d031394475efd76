"""What is on its way to the writer: jobs, whose records come in pages, and the pool of pages.

As in `fedgfe_store.common.threads` no lock is taken here, and an interruption at any step costs a
page at most, which another one takes the place of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import torch

from fedgfe_store.recording.pages import Page, page_records
from fedgfe_store.recording.runs import Run
from fedgfe_store.recording.target import Target
from fedgfe_store.records import RecordBatch, RecordKey
from fedgfe_store.schema import Schema

_LARGEST = {name: torch.finfo(getattr(torch, name)).max for name in ("float32", "bfloat16")}

_RECHECK = 0.005
"""Seconds after which a thread that waits for a page looks again; filling one takes longer."""


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
        self._nbytes = nbytes
        self._free: SimpleQueue[Page] = SimpleQueue()
        self._made = 0

    def take(self, schema: Schema, job: Job, *, wait: bool) -> Page | None:
        """Return an empty page for `job`; without `wait` None where there is none.

        A job for whose records the writer waits gets one in any case, or both would wait for
        ever.
        """
        most = max(2, self._nbytes // (schema.record_nbytes * page_records(schema)))
        while True:
            try:
                return self._free.get_nowait()
            except Empty:
                pass
            if self._made < most or job.starved:
                self._made += 1
                return Page(schema)
            if not wait:
                return None
            # Not `get(timeout=...)`: in CPython 3.11 it can wait for ever where several threads do.
            time.sleep(_RECHECK)

    def give_back(self, page: Page) -> None:
        """Let others have `page`."""
        page.clear()
        self._free.put(page)

    def free(self) -> None:
        """Let go of the memory of the pages that nobody uses."""
        while True:
            try:
                self._free.get_nowait()
            except Empty:
                return


class Job:
    """The records of one node and round, from the training thread to the writer's.

    Attributes
    ----------
    records : int
        How many there are so far.
    committed : bool
        Whether they are on the disk.
    added, replaced, skipped, removed : int
        As of `AppendBatch`, once they are.
    left_out : list of LeftOut
        Records that were not written, once the others are.
    """

    def __init__(self, node: str, round: int, pool: Pool, run: Run) -> None:
        self.node, self.round = node, round
        self.added = self.replaced = self.skipped = self.removed = 0
        self.records = 0
        self.committed = False
        self.left_out: list[LeftOut] = []
        self._pool, self._run = pool, run
        self._pages: SimpleQueue[Page | None] = SimpleQueue()
        self._dropped = self._over = False
        self._given = self._wanted = 0

    def __str__(self) -> str:
        return f"node {self.node}, round {self.round}"

    @property
    def starved(self) -> bool:
        """Whether the writer waits for records of this job."""
        return self._wanted > self._given

    def put(self, page: Page) -> None:
        """Hand a filled page to the writer."""
        self._given += 1
        self._pages.put(page)
        if self._over:
            self.drain()

    def end(self, *, dropped: bool) -> None:
        """Say that nothing follows, or that nothing is to be committed."""
        self._dropped = self._dropped or dropped
        self._pages.put(None)

    def write(self, target: Target) -> None:
        """Commit the records as they come; nothing if the job is dropped.

        The first of this run take the place of what earlier runs left of their node, round and
        split: after a restart the same samples may come under other indices.
        """
        splits: set[str] = set()
        try:
            with target.append(self.node, self.round, self._run.source) as batch:
                while (page := self._next()) is not None:
                    records = page.records()
                    self._pool.give_back(page)
                    splits.update(records.columns["split"].tolist())
                    records = self._finite(target.finished(records), target.precision)
                    if len(records):
                        batch.add_records(records)
                for split in sorted(splits) if target.supersedes else ():
                    if self._run.is_new(self.node, self.round, split):
                        batch.supersede(node=self.node, round=self.round, split=split)
            self.added, self.replaced, self.removed = batch.added, batch.replaced, batch.removed
            self.skipped, self.committed = batch.skipped, True
            self._run.keep(self.node, self.round, splits)
        except _Dropped:
            return
        finally:
            self.drain()

    def drain(self) -> None:
        """Give back the pages that wait, and from now on those that come."""
        self._over = True
        while True:
            try:
                page = self._pages.get_nowait()
            except Empty:
                self._pages.put(None)  # a writer that comes to this job yet finds its end
                return
            if page is not None:
                self._pool.give_back(page)

    def _next(self) -> Page | None:
        self._wanted += 1
        page = self._pages.get()
        if self._dropped:
            if page is not None:
                self._pool.give_back(page)
            raise _Dropped
        return page

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
