"""What each commit of a store did."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.snapshot import Snapshot


def history(snapshot: Snapshot) -> pd.DataFrame:
    """Return the table that `EmbeddingStore.history` describes."""
    count = snapshot.commit
    numbers = np.arange(1, count + 1)
    kinds = snapshot.column("commit_kind")[:count].astype(object)
    moved = kinds == "compact"
    created, deleted = (
        np.bincount(snapshot.column(name).clip(max=count + 1), minlength=count + 2)[1 : count + 1]
        for name in ("created_in", "deleted_in")
    )
    times = snapshot.column("commit_time")[:count]
    return pd.DataFrame(
        {
            "commit": numbers,
            "time": pd.to_datetime(times, unit="ms", utc=True),
            "kind": kinds,
            "source": snapshot.column("commit_source")[:count].astype(object),
            "nodes": _touched(snapshot, "node"),
            "rounds": _touched(snapshot, "round"),
            "added": np.where(moved, 0, created),
            "deleted": np.where(moved, 0, deleted),
            "records": np.cumsum(created) - np.cumsum(deleted),
            "bytes": _bytes(snapshot),
        }
    )


def _touched(snapshot: Snapshot, name: str) -> list[tuple[str | int, ...]]:
    """Distinct values of a key column over the rows that each commit created or deleted."""
    values = snapshot.column(name)
    values = values.astype(object) if values.dtype.kind == "T" else values
    pairs = [
        pd.DataFrame({"commit": snapshot.column(mark), "value": values})
        for mark in ("created_in", "deleted_in")
    ]
    distinct = pd.concat(pairs).query("commit > 0").drop_duplicates().sort_values("value")
    found = distinct.groupby("commit")["value"].agg(tuple)
    return [found.get(number, ()) for number in range(1, snapshot.commit + 1)]


def _bytes(snapshot: Snapshot) -> np.ndarray:
    granule = snapshot.schema.granule
    writer = snapshot.column("created_in")[::granule]
    sizes = np.zeros(snapshot.point.commit + 1, np.int64)
    for name in snapshot.schema.columns:
        for file, nbytes in (snapshot.place.sizes(name) or {}).items():
            number = granule_of(file)
            if 0 <= number < len(writer):
                sizes[writer[number]] += nbytes
    return sizes[1 : snapshot.commit + 1]
