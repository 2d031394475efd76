"""Stores with one writer at a time: all of Zarr, and published by one rename."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.location import Location, own_folder
from fedgfe_store.schema import FORMAT_VERSION, Schema
from fedgfe_store.storage.commit import Transaction
from fedgfe_store.storage.compact import compact
from fedgfe_store.storage.create import create
from fedgfe_store.storage.engine import Advance, Backup, Compaction, Verification
from fedgfe_store.storage.mending import find_mending
from fedgfe_store.storage.metadata import GROUP_FILE, Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.snapshot import Snapshot
from fedgfe_store.storage.verify import verify, wrong_shapes
from fedgfe_store.storage.writing import CommitKind

if TYPE_CHECKING:
    import pandas as pd


class LocalEngine:
    """The format of docs/format.md: a commit holds the writer's claim from its beginning on."""

    def create(self, location: Location, schema: Schema, *, timeout: float) -> None:
        """Make an empty store in a folder."""
        create(own_folder(location), schema, timeout=timeout)

    def latest(self, location: Location, place: Place, group: Group, as_of: int | None) -> Snapshot:
        """Return the state that `group` published, seen at `as_of`."""
        found = Snapshot(location, group, as_of, place=place)
        if as_of is not None:
            found.check_commit(as_of)
        return found

    def begin(self, known: Snapshot, *, timeout: float) -> Transaction:
        """Wait for the store's lock and claim its next commit."""
        known.check_writable()
        return Transaction(known, timeout=timeout)

    def history(self, state: Snapshot) -> pd.DataFrame:
        """Return what each commit did."""
        from fedgfe_store.storage.history import history

        return history(state)

    def verify(self, state: Snapshot, *, progress: Advance) -> Verification:
        """Read every live record and look at everything else."""
        return verify(state, progress=progress)

    def repair(
        self, known: Snapshot, *, timeout: float, progress: Advance
    ) -> tuple[Verification, Snapshot]:
        """Verify under the claim, mend what old releases did, mark what is damaged as deleted."""
        with self.begin(known, timeout=timeout) as transaction:
            snapshot = transaction.snapshot
            mending = find_mending(snapshot)
            snapshot.mend(mending.chunks)
            shapes = wrong_shapes(snapshot)
            if shapes:
                transaction.restore_shapes()
            found = verify(snapshot, progress=progress)
            rows = np.array([record.row for record in found.damaged], np.int64)
            if len(rows) or mending.chunks:
                kind: CommitKind = "repair" if mending.chunks else "delete"
                snapshot = transaction.publish(kind, deleted=rows, source="verify --repair")
        told = [f"{name}/{GROUP_FILE}: written anew for other Zarr readers" for name in shapes]
        return replace(found, mended=(*mending.told, *told)), snapshot

    def compact(self, known: Snapshot, *, timeout: float) -> tuple[Compaction, Snapshot]:
        """Gather thinly filled shards and unlink those without a live record."""
        with self.begin(known, timeout=timeout) as transaction:
            return compact(transaction)

    def back_up(
        self, known: Snapshot, target: Path, *, timeout: float, progress: Advance
    ) -> Backup:
        """Bring a copy that is a store at every moment."""
        from fedgfe_store.storage.backup import back_up

        known.check_writable()
        return back_up(known, target, timeout=timeout, progress=progress)

    def upgrade(self, known: Snapshot, *, timeout: float) -> tuple[bool, Snapshot]:
        """Bring a store of version 1 to version 2."""
        with self.begin(known, timeout=timeout) as transaction:
            if transaction.snapshot.group.version == FORMAT_VERSION:
                return False, transaction.snapshot
            transaction.upgrade()
            return True, transaction.publish("upgrade")
