"""Stores that many write to at once, as `storage.engines` asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.location import Location
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema
from fedgfe_store.storage.engine import Advance, Backup, Compaction, Verification
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.state import State
from fedgfe_store.storage.writing import Change, committed

try:
    import deltalake  # noqa: F401
    import pyarrow  # noqa: F401
except ImportError:
    raise SchemaMismatchError(
        "a shared store needs the extra cloud: pip install 'fedgfe-store[cloud]'"
    ) from None

from fedgfe_store.storage.shared.compact import compact
from fedgfe_store.storage.shared.create import create
from fedgfe_store.storage.shared.history import history
from fedgfe_store.storage.shared.snapshot import SharedSnapshot
from fedgfe_store.storage.shared.transaction import SharedTransaction
from fedgfe_store.storage.shared.verify import verify

if TYPE_CHECKING:
    import pandas as pd


class SharedEngine:
    """No lock: a commit is the entry of the log that only one writer can make."""

    def create(self, location: Location, schema: Schema, *, timeout: float) -> None:
        """Make an empty store in a folder or behind a URL."""
        create(location, schema)

    def latest(
        self, location: Location, place: Place, group: Group, as_of: int | None
    ) -> SharedSnapshot:
        """Return the latest state, seen at `as_of`."""
        return SharedSnapshot.latest(location, place, group, as_of)

    def begin(self, known: SharedSnapshot, *, timeout: float) -> SharedTransaction:
        """Begin a commit; nobody waits for it."""
        known.check_writable()
        return SharedTransaction(known, timeout=timeout)

    def history(self, state: SharedSnapshot) -> pd.DataFrame:
        """Return what each commit did."""
        return history(state)

    def verify(self, state: SharedSnapshot, *, progress: Advance) -> Verification:
        """Read every live record and every file of keys."""
        return verify(state, progress=progress)

    def repair(
        self, known: SharedSnapshot, *, timeout: float, progress: Advance
    ) -> tuple[Verification, State]:
        """Verify the latest state and mark what is damaged as deleted."""
        with self.begin(known, timeout=timeout) as transaction:
            found = verify(transaction.snapshot, progress=progress)
            damaged = np.array([record.row for record in found.damaged], np.int64)

            def change(latest: State) -> Change | None:
                rows = damaged[np.isin(damaged, latest.rows_matching({}))]
                nothing = np.empty(0, np.int64)
                return Change("delete", rows, nothing, "verify --repair") if len(rows) else None

            return found, committed(transaction, change)

    def compact(
        self, known: SharedSnapshot, *, timeout: float
    ) -> tuple[Compaction, SharedSnapshot]:
        """Gather thin shards and small files of keys, and remove what is dead."""
        with self.begin(known, timeout=timeout) as transaction:
            return compact(transaction)

    def back_up(
        self, known: SharedSnapshot, target: Path, *, timeout: float, progress: Advance
    ) -> Backup:
        """Refuse: others write while it would be copied."""
        raise SchemaMismatchError(
            f"{known.path}: a shared store has no backup of its own; merge it into a store in a "
            f"folder (fedgfe-store --store COPY merge {known.path}), which is one of its records"
        )

    def upgrade(self, known: SharedSnapshot, *, timeout: float) -> tuple[bool, SharedSnapshot]:
        """Do nothing: there is one version of such stores."""
        known.check_writable()
        return False, known
