"""The records of one node and round while the training loop computes them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np
import torch

from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.recording.pages import Page
from fedgfe_store.recording.target import Target
from fedgfe_store.recording.writer import Job, LeftOut, Pool
from fedgfe_store.schema import Schema
from fedgfe_store.storage.incoming import checked_columns

if TYPE_CHECKING:
    from fedgfe_store.recording.recorder import Recorder

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

    def __init__(self, recorder: Recorder, job: Job, target: Target, pool: Pool) -> None:
        self._recorder, self._job, self._target, self._pool = recorder, job, target, pool
        self._started = datetime.now(UTC)
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._page: Page | None = None
        self._is_open = self._submitted = self._torn = False

    def __str__(self) -> str:
        return str(self._job)

    @property
    def added(self) -> int:
        """Records that are new in the store."""
        return self._job.added

    @property
    def replaced(self) -> int:
        """Records that took the place of others with the same key."""
        return self._job.replaced

    @property
    def skipped(self) -> int:
        """Records that the store had already."""
        return self._job.skipped

    @property
    def removed(self) -> int:
        """Records of an earlier run that are gone."""
        return self._job.removed

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Records that were not written."""
        return tuple(self._job.left_out)

    def add(
        self,
        *,
        split: Any,
        class_name: Any,
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
            length 1. Width and rank tell T5 from CLIP, whichever name they come under.

        Raises
        ------
        SchemaMismatchError
            If something does not fit; nothing of this call is added.
        """
        self._recorder._check_own_process()
        if not self._is_open:
            raise ConflictError(f"the block of {self} is not open: use it as a context")
        schema, columns = self._target.arrange(tensors)
        n = len(next(iter(columns.values())))
        numbers, counted = self._numbered(index, split, class_name, n)
        keys = {"node": self._job.node, "round": self._job.round, "split": split}
        keys |= {"class_name": class_name, "index": numbers}
        notes = {
            "sample_id": sample_id,
            "file_id": file_id,
            "image_filename": image_filename,
            "audio_path": audio_path,
            "timestamp": self._started if timestamp is None else timestamp,
            "extra": extra,
        }
        known = checked_columns(keys, notes, n)
        self._recorder._say_rounded(columns)
        self._torn = True
        self._numbers += counted
        self._copy(schema, known, columns)
        self._torn = False

    def __enter__(self) -> Self:
        self._recorder._begin(self)
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        if self._recorder._is_forked:
            return  # the block goes on in the recorder's own process
        if error is not None:
            self._drop()
            return
        try:
            self._finish()
        except BaseException:
            self._drop()
            raise
        if self._job.records:
            self._recorder._ended()

    def _finish(self) -> None:
        """Let the writer have everything."""
        if self._torn:
            raise ConflictError(
                f"{self}: a call of add was broken off in this block; nothing of it is recorded"
            )
        self._hand_over()
        self._job.end(dropped=False)
        if self._job.records:
            self._submit()
        else:
            _log.warning("%s: nothing to record of %s", self._recorder.path, self)
        self._recorder._forget(self)

    def _drop(self) -> None:
        """End the block so that nothing of it is committed."""
        self._is_open = False
        self._job.end(dropped=True)
        self._hand_over()
        if not self._submitted:
            self._job.drain()
        self._recorder._forget(self)

    def _hand_over(self) -> None:
        # Never two owners of a page, wherever this is interrupted.
        page, self._page = self._page, None
        if page is not None:
            self._job.put(page)

    def _submit(self) -> None:
        """Let the writer begin, if it has not begun already."""
        if not self._submitted:
            self._recorder._submit(self._job)
            self._submitted = True

    def _copy(
        self, schema: Schema, known: Mapping[str, np.ndarray], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        start, n = 0, len(known["index"])
        while start < n:
            if self._page is None:
                self._page = self._new_page(schema)
            part = slice(start, start + self._page.room)
            self._page.put(
                {name: values[part] for name, values in known.items()},
                {name: tensor[part] for name, tensor in tensors.items()},
            )
            start = part.stop
            if not self._page.room:
                self._hand_over()
        self._job.records += n

    def _new_page(self, schema: Schema) -> Page:
        """Return an empty page; where there is none the writer begins before the block ends."""
        page = self._pool.take(schema, self._job, wait=False)
        if page is None:
            self._submit()
            page = self._pool.take(schema, self._job, wait=True)
        assert page is not None
        return page

    def _numbered(
        self, index: Any, split: Any, class_name: Any, n: int
    ) -> tuple[Any, Counter[tuple[Any, Any]]]:
        """Return the records' indices, and how many of each split and class were counted."""
        counted: Counter[tuple[Any, Any]] = Counter()
        if index is not None:
            if n > 1 and isinstance(index, SupportsIndex) and not getattr(index, "ndim", 0):
                raise SchemaMismatchError(
                    f"index: expected {n} values, one per record, got {index}"
                )
            return index, counted
        numbers = []
        for pair in zip(_each(split, n), _each(class_name, n), strict=False):
            numbers.append(self._numbers[pair] + counted[pair])
            counted[pair] += 1
        return numbers, counted


def _each(value: Any, n: int) -> Sequence[Any]:
    return [value] * n if isinstance(value, str) else list(value)
