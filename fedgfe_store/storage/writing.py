"""One commit in the making, whatever keeps a store's key columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np

from fedgfe_store.records import RecordBatch
from fedgfe_store.schema import Schema
from fedgfe_store.storage.state import State

CommitKind = Literal["append", "replace", "delete", "compact", "upgrade", "repair"]


class OvertakenError(Exception):
    """Another writer has committed since `Writing.snapshot`, which now shows that commit.

    Only stores that many may write to raise it; nothing of what was written is lost.
    """


@dataclass(frozen=True)
class Change:
    """What a commit does, seen what the store holds.

    Parameters
    ----------
    kind : str
        What `history` calls it.
    deleted : ndarray of int64
        Rows that it marks as deleted.
    dropped : ndarray of int64
        Records that were written and are not to be committed, by their position among all that
        `Writing.write` was given.
    source : str, optional
        Where it came from.
    """

    kind: CommitKind
    deleted: np.ndarray
    dropped: np.ndarray
    source: str | None = None


class Writing(Protocol):
    """A commit in the making; as a context, it rolls back unless `publish` was reached.

    Attributes
    ----------
    snapshot : State
        The latest state, which the commit will follow.
    """

    @property
    def snapshot(self) -> State:
        """The latest state, which the commit will follow."""

    @property
    def schema(self) -> Schema:
        """Schema of the store as the latest commit left it."""

    def write(self, granules: Sequence[RecordBatch]) -> None:
        """Write `granules` as the next shards; all but the last one of a call are whole."""

    def commit_change(self, change: Change) -> State:
        """Commit what was written, and `change`, in one step; return the state after it.

        Raises
        ------
        OvertakenError
            If another writer has committed meanwhile and `change` must be thought over.
        BusyError
            If others came first for longer than the timeout.
        """

    def __enter__(self) -> Self:
        """Begin the block."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it: what was not committed is rolled back."""


def committed(writing: Writing, change: Callable[[State], Change | None]) -> State:
    """Commit what `change` makes of the latest state, anew whenever another writer was faster.

    Parameters
    ----------
    writing : Writing
        The commit in the making.
    change : callable
        Called with the latest state; returns what the commit does to it, None for nothing.

    Returns
    -------
    State
        The state after the commit; the latest one if there was nothing to do.
    """
    while True:
        wanted = change(writing.snapshot)
        if wanted is None:
            return writing.snapshot
        try:
            return writing.commit_change(wanted)
        except OvertakenError:
            continue
