"""Giving space back: gather thinly filled granules, and unlink files that no live record needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedgfe_store.records import RecordBatch
from fedgfe_store.schema import Schema
from fedgfe_store.storage.commit import Transaction
from fedgfe_store.storage.engine import Compaction
from fedgfe_store.storage.files import chunk_sizes, sync_folder
from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.snapshot import Snapshot

# A copy then gains at least as many bytes as it writes.
_THIN = 0.5
"""Share of live records up to which a granule is worth copying."""


def compact(transaction: Transaction) -> tuple[Compaction, Snapshot]:
    """Gather the live records of thin granules at the tail, in one commit, and free their files.

    Nothing is committed when no file would be freed by it.
    """
    snapshot = transaction.snapshot
    before = tensor_bytes(snapshot.root, snapshot.schema)
    rows, useless = _rows_to_move(snapshot), _files_of_the_dead(snapshot)
    if not (len(rows) or useless):
        return Compaction(0, 0, before, before), snapshot
    if len(rows) or _died_since_the_last_compaction(snapshot, useless):
        _copy(transaction, rows)
        snapshot = transaction.publish("compact", deleted=rows)
    # Only now: a reader of an older commit that misses a file sees by the commit point why.
    freed = _files_of_the_dead(snapshot)
    for file in freed:
        file.unlink(missing_ok=True)  # as when another host compacts, too
    for name in snapshot.schema.columns:
        sync_folder(snapshot.root / name)
    after = tensor_bytes(snapshot.root, snapshot.schema)
    return Compaction(len(rows), len(freed), before, after), snapshot


def _copy(transaction: Transaction, rows: np.ndarray) -> None:
    snapshot = transaction.snapshot
    for start in range(0, len(rows), snapshot.schema.granule):
        part = rows[start : start + snapshot.schema.granule]
        snapshot.notes(part)
        columns = {name: snapshot.column_at(name, part) for name in snapshot.group.key_names}
        tensors = {name: snapshot.read(name, part) for name in snapshot.schema.columns}
        transaction.write([RecordBatch(columns, tensors)])


def live_per_granule(snapshot: Snapshot) -> np.ndarray:
    """Return the number of live records of each granule."""
    counts: np.ndarray = snapshot.visible.reshape(-1, snapshot.schema.granule).sum(axis=1)
    return counts


def _rows_to_move(snapshot: Snapshot) -> np.ndarray:
    granule, live = snapshot.schema.granule, live_per_granule(snapshot)
    thin = np.flatnonzero((live > 0) & (live <= granule * _THIN))
    if len(thin) <= -(-int(live[thin].sum()) // granule):
        return np.empty(0, np.int64)
    within = np.isin(np.arange(snapshot.point.records) // granule, thin)
    return np.flatnonzero(snapshot.visible & within)


def _files_of_the_dead(snapshot: Snapshot) -> list[Path]:
    dead = set(np.flatnonzero(live_per_granule(snapshot) == 0).tolist())
    return [
        file
        for name in snapshot.schema.columns
        for file in (snapshot.root / name).glob("c.*")
        if granule_of(file.name) in dead
    ]


def _died_since_the_last_compaction(snapshot: Snapshot, files: list[Path]) -> bool:
    granules = {granule_of(file.name) for file in files}
    within = np.isin(np.arange(snapshot.point.records) // snapshot.schema.granule, list(granules))
    deaths = snapshot.column("deleted_in")[within]
    return bool(deaths.max(initial=0) > snapshot.point.compacted)


def tensor_bytes(path: Path, schema: Schema) -> int:
    """Return the bytes that the tensor files of the store at `path` take."""
    return sum(size for name in schema.columns for _, size in chunk_sizes(path / name))
