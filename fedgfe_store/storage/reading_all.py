"""Reading every live record of a store, whatever keeps its key columns."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.engine import Advance, DamagedRecord
from fedgfe_store.storage.state import State


def repeated_keys(snapshot: State) -> list[str]:
    """Return what is wrong with keys that stand more than once."""
    counts = Counter(snapshot.keys(snapshot.rows_matching({})))
    return [f"{key} stands {count} times" for key, count in counts.items() if count > 1]


def damaged_records(
    snapshot: State, leftovers: list[str], progress: Advance
) -> list[DamagedRecord]:
    """Read every live record, shard by shard, and return those that cannot be read.

    Damage where no live record lies joins `leftovers`.
    """
    reasons: dict[int, list[str]] = {}
    live = np.sort(snapshot.rows_matching({}))
    numbers, starts = np.unique(live // snapshot.schema.granule, return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(live, starts[1:]), strict=len(live) > 0):
        for name in snapshot.schema.columns:
            for row, reason in _damaged_rows(snapshot, name, number, rows, leftovers):
                reasons.setdefault(row, []).append(reason)
        progress(len(rows))
    rows = np.array(sorted(reasons), np.int64)
    return [
        DamagedRecord(key, row, "; ".join(reasons[row]))
        for key, row in zip(snapshot.keys(rows), rows.tolist(), strict=True)
    ]


def _damaged_rows(
    snapshot: State, name: str, granule: int, rows: np.ndarray, leftovers: list[str]
) -> list[tuple[int, str]]:
    """Read a tensor file whole, which checks all its checksums, and find who cannot be read."""
    try:
        snapshot.check_file(name, granule)
        intact = True
    except DamagedDataError as error:
        intact, damage = False, str(error)
    try:
        snapshot.read(name, rows, sealed=True)
    except DamagedDataError:
        pass
    else:
        if not intact:
            leftovers.append(f"{damage}, but no live record lies there")
        return []
    found = []
    for row in rows.tolist():
        try:
            snapshot.read(name, np.array([row]), sealed=True)
        except DamagedDataError as error:
            found.append((row, str(error).split("committed: ")[-1]))
    return found
