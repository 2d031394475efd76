"""Records on their way to the writer: in blocks, whose memory is used again and again.

As in `fedgfe_store.common.threads` no lock is taken here: a Ctrl-C in the training thread would
leave it locked. An interruption at any step costs a page at most, which another one takes the place
of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import torch

from fedgfe_store.recording.target import Run
from fedgfe_store.records import RecordBatch, RecordKey
from fedgfe_store.schema import Schema

PAGE_BYTES = 16 * 2**20
"""Of a page. With 1 MiB the training thread takes a fifth longer, and with 64 MiB hardly less; but
a block of few records takes a whole page, too."""

_NUMPY_DTYPES = (torch.float32, torch.float16, torch.float64)
"""Those that numpy has, too."""


class Page:
    """Room for some 16 MiB of records of one schema, filled from the start.

    Tensors are copied into it as they come, in one piece each: rows one by one would take twice
    the time, and memory that was never written to takes twice the time again.
    """

    def __init__(self, schema: Schema) -> None:
        self.size = page_records(schema)
        self.count = 0
        self._columns: list[Mapping[str, np.ndarray]] = []
        self._optional = [t.name for t in schema.tensors if t.optional]
        self._ragged = [t.name for t in schema.tensors if t.ragged]
        self._tensors = {t.name: np.empty((self.size, *t.shape), t.dtype) for t in schema.tensors}

    @property
    def room(self) -> int:
        """Records that fit in yet."""
        return self.size - self.count

    def put(self, columns: Mapping[str, np.ndarray], tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy records in, at most `room`: key columns and notes, and tensors of any device."""
        n = len(columns["index"])
        for name, tensor in tensors.items():
            _copy(self._tensors[name][self.count : self.count + n], tensor)
        has = {f"has_{name}": np.full(n, name in tensors) for name in self._optional}
        none = {f"length_{name}": np.zeros(n, np.int32) for name in self._ragged}
        self._columns.append({**none, **columns, **has})
        self.count += n

    def records(self) -> RecordBatch:
        """Return what the page holds; the tensors are the page's memory, until it is cleared."""
        columns = {
            name: np.concatenate([part[name] for part in self._columns])
            for name in self._columns[0]
        }
        tensors = {
            name: values[: self.count]
            for name, values in self._tensors.items()
            if columns.get(f"has_{name}", np.True_).any()
        }
        return RecordBatch(columns, tensors)

    def clear(self) -> None:
        """Make the page empty; its memory stays."""
        self.count, self._columns = 0, []


def _copy(room: np.ndarray, tensor: torch.Tensor) -> None:
    """Copy values; on the CPU by numpy, as torch's threads wait for each other where it is busy."""
    if tensor.is_cpu and tensor.dtype in _NUMPY_DTYPES and not tensor.is_neg():
        with np.errstate(over="ignore"):
            np.copyto(room, tensor.numpy(), casting="same_kind")
    else:
        torch.from_numpy(room).copy_(tensor)


def page_records(schema: Schema) -> int:
    """Return how many records fit in a page, at least one."""
    return max(1, PAGE_BYTES // schema.record_nbytes)


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
        self._made, self._most = 0, 2

    def take(self, schema: Schema, *, beyond: bool) -> Page | None:
        """Return an empty page, None where there is none; `beyond` what is allowed if need be."""
        try:
            return self._free.get_nowait()
        except Empty:
            pass
        # One to fill while the writer has the other.
        self._most = max(2, self._nbytes // (schema.record_nbytes * page_records(schema)))
        if self._made >= self._most and not beyond:
            return None
        # Not counted under a lock: of two training threads both may make one, a page too many.
        self._made += 1
        return Page(schema)

    @property
    def is_ample(self) -> bool:
        """Whether the writer may keep a page for longer: training is left more than half."""
        return self._most - self._made + self._free.qsize() > self._most // 2

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


class Block:
    """The records of one node and round, in pages, from the training thread to the writer's.

    Attributes
    ----------
    node : str or None
        None where each record says its own: a block of a whole round.
    records : int
        How many there are so far.
    page : Page or None
        The one that is being filled.
    is_open : bool
        Whether there may be more.
    submitted : bool
        Whether the writer was told of it.
    added, replaced, skipped, removed, left_out
        As of `RoundBatch`.
    """

    def __init__(self, node: str | None, round: int, run: Run, pool: Pool) -> None:
        self.node, self.round, self.run = node, round, run
        self.added = self.replaced = self.skipped = self.removed = 0
        self.left_out: tuple[LeftOut, ...] = ()
        self.records = 0
        self.is_open = self.submitted = False
        self._pool = pool
        self.page: Page | None = None
        self._pages: SimpleQueue[Page | None] = SimpleQueue()
        self._dropped = self._over = False
        self._given = self._wanted = 0

    def __str__(self) -> str:
        return named(self.node, self.round)

    @property
    def starved(self) -> bool:
        """Whether the writer waits for records of this block."""
        return self._wanted > self._given

    def hand_over(self) -> None:
        """Let the writer have the page that is being filled."""
        # Never two owners of a page, wherever this is interrupted.
        page, self.page = self.page, None
        if page is not None:
            # Counted first: a writer that has the page already must not be taken for starved.
            self._given += 1
            self._pages.put(page)
            if self._over:
                self.drain()

    def end(self) -> None:
        """Say that nothing follows."""
        self.hand_over()
        self._pages.put(None)

    def drop(self) -> None:
        """End the block so that nothing of it is committed."""
        self.is_open, self._dropped = False, True
        self.end()
        if not self.submitted:
            self.drain()

    def next(self) -> Page | None:
        """Wait for a page, in the writer's thread; None is the end, `Dropped` is raised."""
        self._wanted += 1
        page = self._pages.get()
        if self._dropped:
            if page is not None:
                self._pool.give_back(page)
            raise Dropped
        return page

    def drain(self) -> None:
        """Give back the pages that wait, and from now on those that come."""
        self._over = True
        while True:
            try:
                page = self._pages.get_nowait()
            except Empty:
                self._pages.put(None)  # a writer that comes to this block yet finds its end
                return
            if page is not None:
                self._pool.give_back(page)


def named(node: str | None, round: int) -> str:
    """Return what a log calls a block."""
    return f"round {round}" if node is None else f"node {node}, round {round}"


class Dropped(Exception):
    """The training block raised: nothing of it is to be committed."""
