"""Reading every live record of a store, whatever keeps its key columns."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.engine import Advance, DamagedRecord
from fedgfe_store.storage.state import State
from fedgfe_store.storage.whole_files import Found, looked_at

_AT_ONCE = 16
"""Files of each column between two words of progress; few chunks of them are in memory."""


def repeated_keys(snapshot: State) -> list[str]:
    """Return what is wrong with keys that stand more than once."""
    counts = Counter(snapshot.keys(snapshot.rows_matching({})))
    return [f"{key} stands {count} times" for key, count in counts.items() if count > 1]


def damaged_records(
    snapshot: State, leftovers: list[str], progress: Advance
) -> list[DamagedRecord]:
    """Read every live record, file by file on all processors, and return the unreadable ones.

    Damage where no live record lies joins `leftovers`.
    """
    reasons: dict[int, list[str]] = {}
    live = np.sort(snapshot.rows_matching({}))
    numbers, starts = np.unique(live // snapshot.schema.granule, return_index=True)
    granules = list(zip(numbers.tolist(), np.split(live, starts[1:]), strict=len(live) > 0))
    pool = threads.fetchers() if snapshot.place.distant else threads.readers()
    for begin in range(0, len(granules), _AT_ONCE):
        some = granules[begin : begin + _AT_ONCE]
        work = [(name, *each) for each in some for name in snapshot.schema.columns]
        files = [(snapshot.expected(*each),) for each in work]
        for (name, _, _), found in zip(work, threads.run(pool, looked_at, files), strict=True):
            for row, reason in _damaged_rows(snapshot, name, found, leftovers):
                reasons.setdefault(row, []).append(reason)
        progress(sum(len(rows) for _, rows in some))
    rows = np.array(sorted(reasons), np.int64)
    return [
        DamagedRecord(key, row, "; ".join(reasons[row]))
        for key, row in zip(snapshot.keys(rows), rows.tolist(), strict=True)
    ]


def _damaged_rows(
    snapshot: State, name: str, found: Found, leftovers: list[str]
) -> list[tuple[int, str]]:
    """Return which rows of a file cannot be read, and why, as one who reads them is told."""
    damaged = []
    for row in found.lost:
        try:
            snapshot.read(name, np.array([row]), sealed=True)
        except DamagedDataError as error:
            damaged.append((row, str(error).split("committed: ")[-1]))
    if found.damage and not damaged:
        leftovers.append(f"{found.damage}, but no live record lies there")
    return damaged
