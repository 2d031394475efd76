"""The records of one node and round while the training loop computes them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, SupportsIndex

import numpy as np
import torch

from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.recording.pages import Block, LeftOut, Page
from fedgfe_store.recording.writer import Writer
from fedgfe_store.schema import Schema
from fedgfe_store.storage.incoming import checked_columns, checked_keys

_RECHECK = 0.005
"""Seconds after which a thread that waits for a page looks again; filling one takes longer."""

_log = logging.getLogger("fedgfe_store")


class RoundBatch:
    """The records of one node and round, on their way into one commit; see `Recorder.record`.

    Attributes
    ----------
    added, replaced, skipped : int
        Once committed: records that are new, that took another's place, and that the store has
        already.
    removed : int
        Once committed: records that an earlier run left of this node, round and split, and that
        did not come again.
    left_out : tuple of LeftOut
        Once committed: the records that were not written, as their values are not finite.
    """

    def __init__(self, writer: Writer, block: Block) -> None:
        self._writer, self._block = writer, block
        self._started = datetime.now(UTC)
        self._numbers: Counter[tuple[str, str, str]] = Counter()
        self._torn = False

    def __str__(self) -> str:
        return str(self._block)

    @property
    def added(self) -> int:
        """Records that are new in the store."""
        return self._block.added

    @property
    def replaced(self) -> int:
        """Records that took the place of others with the same key."""
        return self._block.replaced

    @property
    def skipped(self) -> int:
        """Records that the store had already."""
        return self._block.skipped

    @property
    def removed(self) -> int:
        """Records of an earlier run that are gone."""
        return self._block.removed

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Records that were not written."""
        return self._block.left_out

    def add(
        self,
        *,
        split: Any,
        class_name: Any,
        node: Any = None,
        index: Any = None,
        sample_id: Any = None,
        file_id: Any = None,
        image_filename: Any = None,
        audio_path: Any = None,
        timestamp: Any = None,
        extra: Any = None,
        **tensors: Any,
    ) -> None:
        """Copy records: one, or `n` whose tensors have a leading axis of length `n`.

        Parameters
        ----------
        split, class_name : str or sequence of str
            One for all records, or one each.
        node : str or int, optional
            Of these records; where the block is of a whole round, and only there.
        index : int or sequence of int, optional
            Number of each sample within node, split and class. By default they are counted in
            the order in which they come in this block, which then must be the same each round.
        sample_id, file_id, image_filename, audio_path : str or sequence of str, optional
            What else is known: which sample it is, in the data set and as a file, whatever its
            index; by default the guide's file name, ``node_0_train_dog_0_r5.png``.
        timestamp : datetime or sequence of datetime, optional
            By default when the block was opened; without a time zone it is UTC.
        extra : dict or sequence of dict, optional
            Any other metadata that JSON can hold.
        **tensors : Tensor or ndarray
            ``t5=[n, 17, 4096]``, ``clip=[n, 768]``, ...: of any device and floating-point type
            (float64 is rounded to float32), views or not, with or without gradients and axes of
            length 1. Width and rank tell T5 from CLIP, whichever name they come under. Other
            columns of a store that is there come under their names, as in `AppendBatch.add`: whole
            numbers as they are, a ragged one as a list, or with ``length_<name>``.

        Raises
        ------
        SchemaMismatchError
            If something does not fit; nothing of this call is added.
        """
        self._writer.check_own_process()
        if not self._block.is_open:
            raise ConflictError(f"the block of {self} is not open: use it as a context")
        schema, columns, lengths = self._writer.target.arrange(tensors)
        n = len(next(iter(columns.values())))
        node = self._node(node)
        numbers, counted = self._numbered(index, node, split, class_name, n)
        keys = {"node": node, "round": self._block.round, "split": split}
        keys |= {"class_name": class_name, "index": numbers}
        notes = {
            "sample_id": sample_id,
            "file_id": file_id,
            "image_filename": image_filename,
            "audio_path": audio_path,
            "timestamp": self._started if timestamp is None else timestamp,
            "extra": extra,
        }
        known = checked_columns(keys, notes, n) | lengths
        self._writer.target.say_rounded(columns)
        # A Ctrl-C that the block catches would leave half a call in it, part of that with the
        # writer already: `_finish` refuses such a block whole.
        self._torn = True
        self._numbers += counted
        self._copy(schema, known, columns)
        self._torn = False

    def __enter__(self) -> Self:
        self._writer.begin(self._block)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.is_open = False  # first: whatever follows may be interrupted
        if self._writer.is_forked:
            return  # the block goes on in the writer's own process
        if error is not None:
            self._writer.drop(self._block)
            return
        try:
            self._finish()
        except BaseException:
            self._writer.drop(self._block)
            raise
        if self._block.records:
            self._writer.settle()

    def _finish(self) -> None:
        """Let the writer have everything."""
        if self._torn:
            raise ConflictError(
                f"{self}: a call of add was broken off in this block; nothing of it is recorded"
            )
        self._block.end()
        if self._block.records:
            self._writer.submit(self._block)
        else:
            _log.warning("%s: nothing to record of %s", self._writer.path, self)
        self._writer.forget(self._block)

    def _copy(
        self, schema: Schema, known: Mapping[str, np.ndarray], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        block, start, n = self._block, 0, len(known["index"])
        while start < n:
            if block.page is None:
                block.page = self._new_page(schema)
            part = slice(start, start + block.page.room)
            block.page.put(
                {name: values[part] for name, values in known.items()},
                {name: tensor[part] for name, tensor in tensors.items()},
            )
            start = part.stop
            if not block.page.room:
                block.hand_over()
        block.records += n

    def _new_page(self, schema: Schema) -> Page:
        """Return an empty page; where there is none the writer begins before the block ends."""
        pool, block = self._writer.pool, self._block
        page = pool.take(schema, beyond=block.starved)
        if page is None:
            self._writer.submit(block)
        while page is None:
            # Not `get(timeout=...)`: in CPython 3.11 it can wait for ever where several threads do.
            time.sleep(_RECHECK)
            # Beyond what is allowed where the writer waits for this block: both would for ever.
            page = pool.take(schema, beyond=block.starved)
        return page

    def _node(self, given: Any) -> str:
        """Return the node of records that are added: the block's, or the one that is given."""
        if self._block.node is None:
            return str(checked_keys({"node": given}, 1)["node"][0])
        if given is not None:
            raise SchemaMismatchError(
                f"node: expected none, as this block is of node {self._block.node}, got {given!r}"
            )
        return self._block.node

    def _numbered(
        self, index: Any, node: str, split: Any, class_name: Any, n: int
    ) -> tuple[Any, Counter[tuple[Any, Any, Any]]]:
        """Return the records' indices, and how many of each node, split and class were counted."""
        counted: Counter[tuple[Any, Any, Any]] = Counter()
        if index is not None:
            if n > 1 and isinstance(index, SupportsIndex) and not getattr(index, "ndim", 0):
                raise SchemaMismatchError(
                    f"index: expected {n} values, one per record, got {index}"
                )
            return index, counted
        numbers = []
        for pair in zip(_each(split, n), _each(class_name, n), strict=False):
            group = (node, *pair)
            numbers.append(self._numbers[group] + counted[group])
            counted[group] += 1
        return numbers, counted


def _each(value: Any, n: int) -> Sequence[Any]:
    return [value] * n if isinstance(value, str) else list(value)
