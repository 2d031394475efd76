"""What each commit of a store did."""

from __future__ import annotations

from dataclasses import dataclass
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
    changes = _changes(snapshot)
    created, deleted = changes.created, changes.deleted
    times = snapshot.column("commit_time")[:count]
    return pd.DataFrame(
        {
            "commit": numbers,
            "time": pd.to_datetime(times, unit="ms", utc=True),
            "kind": kinds,
            "source": snapshot.column("commit_source")[:count].astype(object),
            "nodes": _sorted(changes.nodes),
            "rounds": _sorted(changes.rounds),
            "added": np.where(moved, 0, created),
            "deleted": np.where(moved, 0, deleted),
            "records": np.cumsum(created) - np.cumsum(deleted),
            "bytes": _bytes(snapshot, changes.writers),
        }
    )


@dataclass(frozen=True)
class _Changes:
    """Records that each commit created and deleted, their nodes and rounds; who wrote each file."""

    created: np.ndarray
    deleted: np.ndarray
    nodes: list[set[Any]]
    rounds: list[set[Any]]
    writers: np.ndarray


def _changes(snapshot: Snapshot) -> _Changes:
    count, granule = snapshot.commit, snapshot.schema.granule
    totals = np.zeros((2, count + 2), np.int64)
    found: dict[str, list[set[Any]]] = {
        name: [set() for _ in range(count + 1)] for name in ("node", "round")
    }
    chunks, first, writers = snapshot.chunks, 0, [np.empty(0, np.int32)]
    snapshot.fetch(("created_in", "deleted_in", *found))
    for number in chunks.numbers("created_in"):
        # Not kept: of millions of records the names of nodes alone take gigabytes.
        names = ("created_in", "deleted_in", *found)
        created, deleted, *values = (chunks.chunk(n, number, keep=False) for n in names)
        for which, marks in enumerate((created, deleted)):
            totals[which] += np.bincount(marks.clip(max=count + 1), minlength=count + 2)
            for known, column in zip(found.values(), values, strict=True):
                _gather(known, marks, column)
        writers.append(created[-first % granule :: granule])
        first += len(created)
    added, removed = totals[:, 1 : count + 1]
    return _Changes(added, removed, found["node"][1:], found["round"][1:], np.concatenate(writers))


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


def _bytes(snapshot: Snapshot, writer: np.ndarray) -> np.ndarray:
    sizes = np.zeros(snapshot.point.commit + 1, np.int64)
    for name in snapshot.schema.columns:
        for file, nbytes in (snapshot.place.sizes(name) or {}).items():
            number = granule_of(file)
            if 0 <= number < len(writer):
                sizes[writer[number]] += nbytes
    return sizes[1 : snapshot.commit + 1]
