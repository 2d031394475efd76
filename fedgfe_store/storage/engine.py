"""What keeps stores of one sort: how they are made, opened, written and looked after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedgfe_store.common.location import Location
from fedgfe_store.records import RecordKey
from fedgfe_store.schema import Schema
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.state import State
from fedgfe_store.storage.writing import Writing

if TYPE_CHECKING:
    import pandas as pd

LOCK_TIMEOUT = 600.0
"""Seconds that a writer waits for another one by default."""


@dataclass(frozen=True)
class DamagedRecord:
    """A live record whose tensors are not what was committed, and what is wrong with them."""

    key: RecordKey
    row: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """What `EmbeddingStore.verify` found.

    Parameters
    ----------
    commit, records : int
        The commit that was looked at, and its live records.
    damaged : tuple of DamagedRecord
        Records that cannot be read; a repair marks them deleted.
    problems : tuple of str
        Damage that is not one record's: key columns, array metadata, keys that stand twice.
    leftovers : tuple of str
        What no reader needs: files of dead writers, and of records that were compacted away, and
        damaged bytes where no live record lies. The next writer or `EmbeddingStore.compact`
        clears the files.
    mended : tuple of str
        Damage by an earlier release that a repair has undone.
    """

    commit: int
    records: int
    damaged: tuple[DamagedRecord, ...]
    problems: tuple[str, ...]
    leftovers: tuple[str, ...]
    mended: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether every live record can be read and nothing else is damaged."""
        return not (self.damaged or self.problems)


@dataclass(frozen=True)
class Compaction:
    """What a compaction did: records copied, files unlinked, bytes of tensor files."""

    records_moved: int
    files_freed: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Backup:
    """What a backup did: the commit that it holds, its records, and what had to be brought.

    Parameters
    ----------
    commit, records : int
        The commit of the store, and its live records.
    copied, linked, removed : int
        Files copied, files linked since the copy lies on the same file system, and files removed
        since the store has none of that name any more.
    nbytes : int
        Bytes copied.
    """

    commit: int
    records: int
    copied: int
    linked: int
    removed: int
    nbytes: int


Advance = Callable[[int], object]
"""Hears how many records, or bytes, were just read."""


class Engine(Protocol):
    """How stores of one sort are kept; `storage.engines` chooses one."""

    def create(self, location: Location, schema: Schema, *, timeout: float) -> None:
        """Make an empty store; ConflictError if something is there."""

    def latest(self, location: Location, place: Place, group: Group, as_of: int | None) -> State:
        """Return the latest state of the store whose ``zarr.json`` is `group`, seen at `as_of`."""

    def begin(self, known: State, *, timeout: float) -> Writing:
        """Begin a commit of the store that `known` shows."""

    def history(self, state: State) -> pd.DataFrame:
        """Return the table that `EmbeddingStore.history` describes."""

    def verify(self, state: State, *, progress: Advance) -> Verification:
        """Look at every byte that the store needs."""

    def repair(
        self, known: State, *, timeout: float, progress: Advance
    ) -> tuple[Verification, State]:
        """Verify the store and mark damaged records as deleted; return the state after it."""

    def compact(self, known: State, *, timeout: float) -> tuple[Compaction, State]:
        """Give space back; return the state after it."""

    def back_up(self, known: State, target: Path, *, timeout: float, progress: Advance) -> Backup:
        """Bring a copy of the store to `target`."""

    def upgrade(self, known: State, *, timeout: float) -> tuple[bool, State]:
        """Bring the store to the newest format version; return whether there was one to bring."""
