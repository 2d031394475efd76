"""A selection as torch batches that are read ahead by a thread."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from fedgfe_store.common import threads
from fedgfe_store.common.recycled import Recycled
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.readers.columns import batch_columns
from fedgfe_store.rows import Rows

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.derived.record import Derived

T = TypeVar("T")

LABEL = "label"
"""What records' classes are called in batches, as numbers."""


@dataclass(frozen=True)
class Batch:
    """Tensors of some records, ``[b, *shape]`` each, and the records themselves.

    A ragged column is padded with zeros, and ``length_<name>``, int32 ``[b]``, is beside it.
    """

    selection: Rows | Derived
    tensors: Mapping[str, torch.Tensor]

    def __getitem__(self, column: str) -> torch.Tensor:
        return self.tensors[column]

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def records(self) -> pd.DataFrame:
        """Everything but the tensors, see `Selection.records`; read when asked for."""
        return self.selection.records


def _only_one(batches: Sequence[Batch], *, collate_fn_map: object = None) -> Batch:
    """Give a DataLoader whose batch size is 1, the default, the batch as it is."""
    if len(batches) > 1:
        raise SchemaMismatchError(
            f"batches are made already: expected DataLoader(batches, batch_size=None) and their "
            f"size in Selection.batches, got batch_size={len(batches)}"
        )
    return batches[0]


# Torch's documented way to say how a type of its users is collated.
default_collate_fn_map[Batch] = _only_one


@dataclass(frozen=True)
class BatchReader:
    """Reads records as batches: whole ones of a selection, or those that generation picks.

    Parameters
    ----------
    columns : sequence of str
        Tensor columns, and lengths and marks of them.
    dtype : torch.dtype, optional
        Data type of the embeddings, by default float32; masks and lengths keep theirs.
    pinned : bool
        Decode into page-locked memory.
    classes : sequence of str, optional
        Give each record's place among them as ``label``, int64; -1 of one of another class.
    memory : mapping of str to Recycled
        Where batches of a column may lie; by default each has new memory.
    """

    columns: Sequence[str]
    dtype: torch.dtype | None = None
    pinned: bool = False
    classes: Sequence[str] | None = None
    memory: Mapping[str, Recycled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        if self.dtype is not None and not known:
            raise SchemaMismatchError(f"dtype: expected such as torch.bfloat16, got {self.dtype!r}")
        if self.classes is not None and LABEL in self.columns:
            raise SchemaMismatchError(f"labels: the store has a tensor column {LABEL} already")

    def recycling(self, most: int) -> BatchReader:
        """Return this reader with memory for `most` batches, which is used again and again."""
        return replace(self, memory={name: Recycled(most) for name in self.columns})

    def read(self, rows: Rows | Derived) -> Batch:
        """Read some records, into memory that no other batch has; raises as `Rows.read`."""
        tensors = {name: self._tensor(rows, name) for name in self.columns}
        if self.classes is not None and isinstance(rows, Rows):  # means are of several classes
            places = {name: place for place, name in enumerate(self.classes)}
            found = [places.get(name, -1) for name in rows.column("class_name").tolist()]
            tensors[LABEL] = torch.tensor(found, dtype=torch.int64, pin_memory=self.pinned)
        return Batch(rows, tensors)

    def _tensor(self, rows: Rows | Derived, name: str) -> torch.Tensor:
        """Decode a column to where it stays; only another data type takes a copy."""
        if not self.pinned:
            tensor = torch.from_numpy(self._array(rows, name))
            return tensor.to(self.dtype) if self._converts(tensor.dtype) else tensor
        known = {t.name: (t.shape, t.dtype) for t in rows.schema.tensors}
        mark: tuple[tuple[int, ...], str] = ((), "bool" if name.startswith("has_") else "int32")
        shape, dtype = known.get(name, mark)
        stored: torch.dtype = getattr(torch, dtype)
        wanted = self.dtype if self._converts(stored) else stored
        # Anew for each batch, since one may outlive the next; torch keeps pinned memory that nobody
        # holds any more, and gives it out again.
        pinned = torch.empty((len(rows), *shape), dtype=wanted, pin_memory=True)
        if wanted == stored:
            rows.read(name, out=pinned.numpy())
        else:
            pinned.copy_(torch.from_numpy(rows.read(name)))
        return pinned

    def _array(self, rows: Rows | Derived, name: str) -> np.ndarray:
        if name not in self.memory or name not in rows.schema.columns:
            return rows.read(name)
        column = rows.schema.column(name)
        out = self.memory[name].empty((len(rows), *column.shape), column.dtype)
        return rows.read(name, out=out)

    def _converts(self, stored: torch.dtype) -> bool:
        """Whether values come as another data type: embeddings do, masks and lengths do not."""
        return self.dtype is not None and stored.is_floating_point


class Batches(IterableDataset[Batch]):
    """A sized iterable of `Batch`, made by `Selection.batches`; each iteration reads afresh.

    Also a dataset for ``torch.utils.data.DataLoader(batches, batch_size=None)``, whose workers
    share the batches among them.
    """

    def __init__(
        self,
        selection: Rows,
        batch_size: int,
        *,
        dtype: torch.dtype | None,
        columns: Sequence[str] | None,
        classes: Sequence[str] | None,
        shuffle: bool,
        seed: int | None,
        drop_last: bool,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        for name, number, least in (("batch_size", batch_size, 1), ("prefetch", prefetch, 0)):
            if not is_whole(number) or number < least:
                raise SchemaMismatchError(
                    f"{name}: expected a whole number from {least} up, got {number!r}"
                )
        if seed is not None and not (shuffle and is_whole(seed) and 0 <= seed < 2**63):
            raise SchemaMismatchError(
                f"seed: expected a whole number from 0 up, and shuffle=True, got {seed!r}"
            )
        names = batch_columns(selection.schema, columns)
        self._reader = BatchReader(names, dtype, pin_memory, classes)
        # Torch would say so only when the first batch is read.
        if pin_memory and not torch.accelerator.is_available():
            raise SchemaMismatchError(
                "pin_memory: expected a machine with an accelerator that torch can use, got none"
            )
        # A numpy integer of few bits would overflow where positions are counted.
        self._selection, self._size, self._prefetch = (
            selection,
            operator.index(batch_size),
            prefetch,
        )
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._epoch = self._passes = 0

    def __len__(self) -> int:
        whole = len(self._selection) // self._size
        return whole if self._drop_last else math.ceil(len(self._selection) / self._size)

    def set_epoch(self, epoch: int) -> None:
        """Ask for another order that `seed` fixes, as torch's ``DistributedSampler`` does.

        Workers of a DataLoader that are kept over passes do not learn of it.
        """
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        # No more than there are: `prefetch` makes a place for each, and people ask for 2**70.
        depth = min(self._prefetch, len(self))
        # Those that wait, the one being read, and the consumer's last and next.
        reader = self._reader.recycling(depth + 3)
        return prefetch(map(reader.read, self._parts()), depth)

    def _parts(self) -> Iterator[Rows]:
        """Give the records of each batch that is to be read here: nothing of them is read."""
        # A DataLoader's workers each have the whole dataset, and have to share it among them.
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        selection = self._selection
        if self._shuffle:
            selection = selection.take(self._order(worker))
        parts = islice(selection.parts(self._size), len(self))
        return (rows for _, rows in islice(parts, first, None, step))

    def _order(self, worker: Any) -> np.ndarray:
        """Return the positions of the records in the order of this pass: alike in all workers."""
        if self._seed is not None:
            seed = self._seed + self._epoch
        elif worker is not None:
            # Drawn for each pass; workers that are kept over passes count them.
            seed = worker.seed - worker.id + self._passes
            self._passes += 1
        else:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randperm(len(self._selection), generator=generator).numpy()


class RecordDataset(Dataset[dict[str, torch.Tensor]]):
    """Records by their positions, made by `Selection.to_torch`; loaders read several at once."""

    def __init__(
        self,
        selection: Rows,
        *,
        dtype: torch.dtype | None,
        columns: Sequence[str] | None,
        classes: Sequence[str] | None,
    ) -> None:
        names = batch_columns(selection.schema, columns)
        self._reader = BatchReader(names, dtype, classes=classes)
        # To other processes go the rows, and not what was read of them here.
        self._selection = selection.take(slice(None))

    def __len__(self) -> int:
        return len(self._selection)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Where there is none an IndexError ends a loop over the dataset.
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Read records at once: what a DataLoader asks for."""
        tensors = self._reader.read(self._selection.take(list(indices))).tensors
        rows = zip(*(values.unbind() for values in tensors.values()), strict=True)
        return [dict(zip(tensors, values, strict=True)) for values in rows]


@dataclass(frozen=True)
class _Failed:
    error: BaseException


_END = object()


def prefetch(items: Iterable[T], depth: int) -> Generator[T]:
    """Iterate over `items` in a thread that runs up to `depth` items ahead.

    The loop by which batches are read, for users and for generation. Besides the consumer's there
    are never more than `depth` + 1 items: those that wait, and the one that is being made.

    Parameters
    ----------
    items : iterable
        Iterated once, in the thread; an exception of it is raised to the consumer.
    depth : int
        Items that may wait for the consumer; with 0 they are made in the consumer's thread.

    Yields
    ------
    object
        The items, in order. Closing the iterator ends the thread.
    """
    if not depth:
        yield from items
        return
    # Two simple queues and not a bounded one, which takes locks: see `common.threads`.
    room: SimpleQueue[None] = SimpleQueue()
    ready: SimpleQueue[object] = SimpleQueue()
    stopped = False
    for _ in range(depth):
        room.put(None)

    def work() -> None:
        try:
            for item in items:
                room.get()
                if stopped:
                    return
                ready.put(item)
            ready.put(_END)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
            ready.put(_Failed(error))

    def stop() -> None:
        nonlocal stopped
        # In this order: the thread that gets the room looks whether it is to go on.
        stopped = True
        room.put(None)
        thread.join()

    thread = threads.Thread(work, "fedgfe-store-prefetch")
    try:
        try:
            thread.start()
            while (item := _next(thread, ready)) is not _END:
                room.put(None)
                yield item  # type: ignore[misc]
        finally:
            stop()
    finally:  # where the first was interrupted
        stop()


def _next(thread: threads.Thread, ready: SimpleQueue[object]) -> object:
    # A forked child, such as a worker of a DataLoader, has the iterator but not the thread: it
    # would wait for ever.
    if thread.process is not None:
        raise ConflictError(
            f"these batches are read ahead by a thread of process {thread.process}: iterate anew "
            f"in process {os.getpid()}"
        )
    item = ready.get()
    if isinstance(item, _Failed):
        try:
            raise item.error
        finally:
            del item  # it holds this frame
    return item
