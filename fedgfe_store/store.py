"""The embedding store: create, open, append, select."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgfe_store import _commit
from fedgfe_store._append import AppendBatch, IfExists
from fedgfe_store._snapshot import Snapshot
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema
from fedgfe_store.selection import Selection

if TYPE_CHECKING:
    import pandas as pd

LOCK_TIMEOUT = 600.0
"""Seconds that a writer waits for another one by default."""


class EmbeddingStore:
    """Embeddings of one experiment: one ordinary Zarr v3 group on the local disk.

    Made by `EmbeddingStore.create` or `EmbeddingStore.open`. An open store shows the commit
    that was the latest when it was opened, or that it has itself written since, until `refresh`.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], schema: Schema, *, timeout: float = LOCK_TIMEOUT
    ) -> EmbeddingStore:
        """Make an empty store at `path`.

        Parameters
        ----------
        path : path-like
            A folder that does not exist yet, or an empty one.
        schema : Schema
            What its records look like.
        timeout : float
            Seconds to wait for another process that is making it.

        Raises
        ------
        ConflictError
            If something else is there.
        BusyError
            If another process holds the store for longer than `timeout`.
        """
        _commit.create(Path(path), schema, timeout=timeout)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, as_of: int | None = None) -> EmbeddingStore:
        """Open the store at `path`.

        Parameters
        ----------
        path : path-like
            The store's folder.
        as_of : int, optional
            See the store as this commit left it; such a store cannot be appended to.

        Raises
        ------
        NotFoundError
            If there is no store, or no such commit.
        SchemaMismatchError
            If the store is of a newer format.
        DamagedDataError
            If its ``zarr.json`` is damaged.
        """
        return cls(Snapshot.latest(Path(path), as_of))

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._snapshot.path

    @property
    def schema(self) -> Schema:
        """What the records look like."""
        return self._snapshot.schema

    @property
    def commit(self) -> int:
        """Number of the commit that is seen; 0 for a new store."""
        return self._snapshot.commit

    def __len__(self) -> int:
        """Return the number of records."""
        return int(self._snapshot.visible.sum())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"<EmbeddingStore {self.path}: {len(self)} records, commit {self.commit}, "
            f"{self.schema.describe()}, {self.schema.precision}>"
        )

    def refresh(self) -> None:
        """See the latest commit."""
        self._snapshot = Snapshot.latest(self.path)

    def append(
        self,
        *,
        node: str | int | None = None,
        round: int | None = None,
        if_exists: IfExists = "error",
        timeout: float = LOCK_TIMEOUT,
    ) -> AppendBatch:
        """Open a batch of records that becomes one commit when its block ends.

        Parameters
        ----------
        node, round : optional
            Node and round of the records, unless `AppendBatch.add` says otherwise.
        if_exists : {"error", "replace", "skip"}
            What to do with a key that the store has already. Under ``"error"`` a record with
            the same tensors is left out, and one with other tensors refuses the whole commit.
        timeout : float
            Seconds to wait for another writer.

        Returns
        -------
        AppendBatch
            A context; nothing is committed if its block raises.

        Raises
        ------
        ConflictError
            On exit, if a record conflicts with one in the store.
        BusyError
            If another writer holds the store for longer than `timeout`.

        Examples
        --------
        >>> with store.append(node=0, round=5) as batch:  # doctest: +SKIP
        ...     batch.add(split="train", class_name="dog", index=0, t5=t5, clip=clip)
        """
        if self._snapshot.as_of is not None:
            raise SchemaMismatchError(
                f"{self.path} was opened as of commit {self.commit}: "
                f"open it without as_of to append"
            )
        return AppendBatch(
            self.path,
            self._snapshot,
            node=node,
            round=round,
            if_exists=if_exists,
            timeout=timeout,
            done=self._see,
        )

    def _see(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def select(
        self,
        *,
        node: Any = None,
        round: Any = None,
        split: Any = None,
        class_name: Any = None,
        index: Any = None,
        sample_id: Any = None,
        per_class: int | None = None,
    ) -> Selection:
        """Return the records that meet every filter; no tensor is read.

        Parameters
        ----------
        node, round, split, class_name, index, sample_id : scalar, list or range, optional
            Wanted values; by default all. An empty list wants nothing.
        per_class : int, optional
            Keep only this many records, those of the lowest index, for each node, round, split
            and class.

        Returns
        -------
        Selection
            Records in the order in which they lie in the store.

        Raises
        ------
        SchemaMismatchError
            If a filter is of the wrong type.
        """
        filters = {
            "node": node,
            "round": round,
            "split": split,
            "class_name": class_name,
            "index": index,
            "sample_id": sample_id,
        }
        wanted = {name: value for name, value in filters.items() if value is not None}
        return Selection.of(self._snapshot, wanted, per_class=per_class)

    def history(self) -> pd.DataFrame:
        """Return one row per commit: its number, time (UTC), kind, and records added."""
        import pandas as pd

        snapshot = self._snapshot
        created = np.bincount(snapshot.column("created_in"), minlength=snapshot.commit + 1)
        deleted = np.bincount(snapshot.column("deleted_in"), minlength=snapshot.commit + 1)
        seen = slice(1, snapshot.commit + 1)
        return pd.DataFrame(
            {
                "commit": np.arange(1, snapshot.commit + 1),
                "time": pd.to_datetime(snapshot.column("commit_time"), unit="ms", utc=True)[
                    : snapshot.commit
                ],
                "kind": snapshot.column("commit_kind")[: snapshot.commit].astype(object),
                "added": created[seen],
                "deleted": deleted[seen],
            }
        )
