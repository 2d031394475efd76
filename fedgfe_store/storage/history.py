"""What each commit of a store did."""

from __future__ import annotations

from typing import Any

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
    created, deleted, nodes, rounds = _changes(snapshot)
    times = snapshot.column("commit_time")[:count]
    return pd.DataFrame(
        {
            "commit": numbers,
            "time": pd.to_datetime(times, unit="ms", utc=True),
            "kind": kinds,
            "source": snapshot.column("commit_source")[:count].astype(object),
            "nodes": _sorted(nodes),
            "rounds": _sorted(rounds),
            "added": np.where(moved, 0, created),
            "deleted": np.where(moved, 0, deleted),
            "records": np.cumsum(created) - np.cumsum(deleted),
            "bytes": _bytes(snapshot),
        }
    )


def _changes(
    snapshot: Snapshot,
) -> tuple[np.ndarray, np.ndarray, list[set[Any]], list[set[Any]]]:
    """Return what each commit created and deleted: counts of records, and nodes and rounds."""
    count = snapshot.commit
    totals = np.zeros((2, count + 2), np.int64)
    nodes: list[set[Any]] = [set() for _ in range(count + 1)]
    rounds: list[set[Any]] = [set() for _ in range(count + 1)]
    chunks = snapshot.chunks
    snapshot.fetch(("created_in", "deleted_in", "node", "round"))
    for number in chunks.numbers("node"):
        # Not kept: of millions of records the names of nodes alone take gigabytes.
        values = [chunks.chunk(name, number, keep=False) for name in ("node", "round")]
        for which, name in enumerate(("created_in", "deleted_in")):
            marks = chunks.chunk(name, number)
            totals[which] += np.bincount(marks.clip(max=count + 1), minlength=count + 2)
            for found, column in zip((nodes, rounds), values, strict=True):
                _gather(found, marks, column)
    created, deleted = totals[:, 1 : count + 1]
    return created, deleted, nodes[1:], rounds[1:]


def _gather(found: list[set[Any]], commits: np.ndarray, values: np.ndarray) -> None:
    """Put each of `values` among those that were found for its commit, if that is seen."""
    if not commits.any():
        return
    # Neighbours are mostly of one commit, node and round, and of text each look costs.
    new = (commits[1:] != commits[:-1]) | (values[1:] != values[:-1])
    first = np.concatenate([[0], np.flatnonzero(new) + 1])
    first = first[(commits[first] > 0) & (commits[first] < len(found))]
    for commit, value in zip(commits[first].tolist(), values[first].tolist(), strict=True):
        found[commit].add(value)


def _sorted(found: list[set[Any]]) -> list[tuple[Any, ...]]:
    return [tuple(sorted(values)) for values in found]


def _bytes(snapshot: Snapshot) -> np.ndarray:
    granule = snapshot.schema.granule
    writer = snapshot.column_at("created_in", np.arange(0, snapshot.point.records, granule))
    sizes = np.zeros(snapshot.point.commit + 1, np.int64)
    for name in snapshot.schema.columns:
        for file, nbytes in (snapshot.place.sizes(name) or {}).items():
            number = granule_of(file)
            if 0 <= number < len(writer):
                sizes[writer[number]] += nbytes
    return sizes[1 : snapshot.commit + 1]
