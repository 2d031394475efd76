"""Damage that releases before format version 2 could do to a store, and how it is undone.

They published times that no reader took, and let marks of a commit that was never made come to
life with the next one. Both leave enough to tell what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedgfe_store.common.words import counted
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.records import EARLIEST, KEY_COLUMNS, LATEST, NOTE_COLUMNS, key_at
from fedgfe_store.storage import key_files
from fedgfe_store.storage.checksums import row_digests
from fedgfe_store.storage.entry import FIRST_ENTRY, LAST_ENTRY
from fedgfe_store.storage.layout import KEY_CHUNK
from fedgfe_store.storage.snapshot import Snapshot


@dataclass(frozen=True)
class Mending:
    """Key chunks as they should be, and a line on each thing that is undone."""

    chunks: Mapping[tuple[str, int], np.ndarray]
    told: tuple[str, ...]


def find_mending(snapshot: Snapshot) -> Mending:
    """Return what can be undone of such damage; what is damaged in another way stays as it is."""
    chunks: dict[tuple[str, int], np.ndarray] = {}
    told: list[str] = []
    if snapshot.group.version == 1:
        for number in range(-(-snapshot.point.records // KEY_CHUNK)):
            told += _mend_times(snapshot, number, chunks)
        if not chunks:
            told += _mend_marks(snapshot, chunks)
    return Mending(chunks, tuple(told))


def _mend_times(
    snapshot: Snapshot, number: int, chunks: dict[tuple[str, int], np.ndarray]
) -> list[str]:
    """Bring times that no reader takes to the nearest one that they all take."""
    start = number * KEY_CHUNK
    rows = np.arange(start, min(start + KEY_CHUNK, snapshot.point.records))
    column = snapshot.group.key_columns["timestamp"]
    try:
        data = key_files.contents(snapshot.place, column, number)
        times = key_files.decoded(column, data, len(rows)).values
        names = [name for name in (*KEY_COLUMNS, *NOTE_COLUMNS) if name != "timestamp"]
        columns = {name: snapshot.column_at(name, rows) for name in names}
        digests = snapshot.column_at("row_digest", rows).copy()
    except (OSError, ValueError, RuntimeError):
        return []  # damaged in another way, which verify reports
    outside = (times != column.fill) & ((times < EARLIEST) | (times > LATEST))
    mended = np.where(outside, times.clip(FIRST_ENTRY, LAST_ENTRY), times)
    committed = row_digests({**columns, "timestamp": times}) == digests
    due = row_digests({**columns, "timestamp": mended})
    # Of a repair that was broken off one of the two files may have been put in place.
    half = ~committed & np.isin(times, (FIRST_ENTRY, LAST_ENTRY))
    if not (committed | (due == digests))[outside].all():
        return []
    rows = np.flatnonzero(outside | half)
    if not len(rows):
        return []
    digests[rows] = due[rows]
    chunks |= {("timestamp", number): mended, ("row_digest", number): digests}
    columns["timestamp"] = mended
    keys = (key_at(columns, row) for row in rows.tolist())
    return [f"{key}: its time was one that no reader takes" for key in keys]


def _mend_marks(snapshot: Snapshot, chunks: dict[tuple[str, int], np.ndarray]) -> list[str]:
    """Clear marks that a commit took over from one that was never made."""
    try:
        _ = snapshot.visible
        return []
    except DamagedDataError:
        pass
    created, deleted = snapshot.column("created_in"), snapshot.column("deleted_in")
    kinds = snapshot.column("commit_kind")
    marked = np.flatnonzero(deleted > 0)
    strays = marked[_are_stray(snapshot, marked, deleted[marked], kinds[deleted[marked] - 1])]
    alive = (created > 0) & (deleted == 0)
    if int(alive.sum()) + len(strays) != snapshot.point.live or not len(strays):
        return []
    for number in np.unique(strays // KEY_CHUNK).tolist():
        values = deleted[number * KEY_CHUNK : (number + 1) * KEY_CHUNK].copy()
        values[strays[strays // KEY_CHUNK == number] - number * KEY_CHUNK] = 0
        chunks["deleted_in", number] = values
    return [f"{counted(len(strays), 'record')} had marks of a commit that was never made"]


def _are_stray(
    snapshot: Snapshot, rows: np.ndarray, commits: np.ndarray, kinds: np.ndarray
) -> np.ndarray:
    """Whether `rows` are marked by commits that deleted nothing, or put nothing in their place."""
    created = snapshot.column("created_in")
    stray = np.asarray(kinds == "append")
    moved = (kinds == "replace") | (kinds == "compact")
    for commit in np.unique(commits[moved]).tolist():
        successors = set(snapshot.keys(np.flatnonzero(created == commit)))
        places = np.flatnonzero(moved & (commits == commit))
        stray[places] = [key not in successors for key in snapshot.keys(rows[places])]
    return stray
