"""What keeps a store in order: verify, backup, upgrade, compact; and its history."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedgfe_store.common.location import Location, own_folder
from fedgfe_store.storage.engine import LOCK_TIMEOUT, Backup, Compaction, Engine, Verification
from fedgfe_store.storage.state import State

if TYPE_CHECKING:
    import pandas as pd


class Upkeep:
    """A store as its files are kept, whatever its records mean."""

    _snapshot: State
    _engine: Engine

    @property
    def path(self) -> Path:
        """The store's folder; SchemaMismatchError where it is read from a URL."""
        return own_folder(self._snapshot.path)

    @property
    def location(self) -> Location:
        """Where the store is: its folder, or the address that `str` makes a URL."""
        return self._snapshot.path

    @property
    def commit(self) -> int:
        """Number of the commit that is seen; 0 for a new store."""
        return self._snapshot.commit

    def verify(
        self,
        *,
        repair: bool = False,
        timeout: float = LOCK_TIMEOUT,
        progress: Callable[[int], object] = lambda records: None,
    ) -> Verification:
        """Read every live record and look at everything else that the store needs.

        Parameters
        ----------
        repair : bool
            Mark damaged records as deleted, in one commit, so that importing or appending them
            again puts them back; write arrays' metadata anew that a power cut left torn; and undo
            what releases before format version 2 could do: times that no reader takes, and marks
            of a commit that was never made. Nothing else can be mended from within.
        timeout : float
            Seconds to wait for another writer, under `repair`.
        progress : callable
            Called with the number of records just read.

        Returns
        -------
        Verification
            What was found; damage is reported, not raised.
        """
        if not repair:
            return self._engine.verify(self._snapshot, progress=progress)
        found, self._snapshot = self._engine.repair(
            self._snapshot, timeout=timeout, progress=progress
        )
        return found

    def backup(
        self,
        target: str | os.PathLike[str],
        *,
        timeout: float = LOCK_TIMEOUT,
        progress: Callable[[int], object] = lambda nbytes: None,
    ) -> Backup:
        """Bring a copy of the store, at its latest commit, to `target`.

        The copy is a store: it opens, and is sound, at any moment once the first backup is done.
        Run again, a backup brings what is new. Tensor files are linked where `target` is on the
        same file system, and copied elsewhere; writers wait only while the rest is copied.

        Parameters
        ----------
        target : path-like
            A new folder, or one that an earlier backup of this store was brought to.
        timeout : float
            Seconds to wait for another writer, or another backup.
        progress : callable
            Called with the number of bytes just copied.

        Returns
        -------
        Backup
            The commit that is in it, and what was brought.

        Raises
        ------
        ConflictError
            If something else lies at `target`, or a copy that has commits of its own.
        BusyError
            If another writer holds the store for longer than `timeout`.
        """
        return self._engine.back_up(
            self._snapshot, Path(target), timeout=timeout, progress=progress
        )

    def upgrade(self, *, timeout: float = LOCK_TIMEOUT) -> bool:
        """Bring the store to the format version that new stores have, in one commit.

        Releases that do not know it refuse the store from then on, in one line. Records keep
        their bits; a ``file_id`` among a record's `extra` becomes the column's.

        Parameters
        ----------
        timeout : float
            Seconds to wait for another writer.

        Returns
        -------
        bool
            Whether there was anything to do.

        Raises
        ------
        DamagedDataError
            If a key column is damaged; nothing is changed.
        BusyError
            If another writer holds the store for longer than `timeout`.
        """
        done, self._snapshot = self._engine.upgrade(self._snapshot, timeout=timeout)
        return done

    def compact(self, *, timeout: float = LOCK_TIMEOUT) -> Compaction:
        """Gather the records of thinly filled files and unlink files without a live record.

        Records keep their bits. Deleted records, and the state that they belonged to, are then
        gone for readers of an older commit, who are told so.

        Parameters
        ----------
        timeout : float
            Seconds to wait for another writer.

        Returns
        -------
        Compaction
            What it did; nothing when no file would be freed.

        Raises
        ------
        DamagedDataError
            If a record that would be copied is damaged; nothing is changed.
        BusyError
            If another writer holds the store for longer than `timeout`.
        """
        done, self._snapshot = self._engine.compact(self._snapshot, timeout=timeout)
        return done

    def history(self) -> pd.DataFrame:
        """Return one row per commit.

        Returns
        -------
        DataFrame
            ``commit``, ``time`` (UTC), ``kind``, ``source`` (where it came from), ``nodes`` and
            ``rounds`` that it touched, records ``added`` and ``deleted`` (a replaced record counts
            in both, one that a compaction moved in neither), ``records`` live after it, and
            ``bytes`` on disk of the tensor files that it wrote and that are still there; 0 from a
            web server, which does not list files.
        """
        return self._engine.history(self._snapshot)
