"""Looking at every byte that a shared store needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.engine import Advance, DamagedRecord, Verification
from fedgfe_store.storage.files import is_temporary_name
from fedgfe_store.storage.place import RemoteError
from fedgfe_store.storage.reading_all import damaged_records, repeated_keys
from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.shared.key_table import TABLE, read_bytes
from fedgfe_store.storage.shared.snapshot import SharedSnapshot


def verify(snapshot: SharedSnapshot, *, progress: Advance) -> Verification:
    """Check what `snapshot` shows; `progress` hears how many records have been read."""
    problems = [*_broken_files(snapshot)]
    damaged: list[DamagedRecord] = []
    leftovers: list[str] = []
    if not problems:
        try:
            problems += repeated_keys(snapshot)
        except DamagedDataError as error:
            problems.append(str(error))
    if not problems:
        damaged = damaged_records(snapshot, leftovers, progress)
        needed, replaced = _past(snapshot), snapshot.session.log.replaced()
        leftovers += [
            f"{snapshot.place}/{name}: no record that a reader can reach"
            for name in unreferred(snapshot)
            if granule_of(name.rpartition("/")[2]) not in needed
            and name.rpartition("/")[2] not in replaced
        ]
    live = snapshot.live
    return Verification(snapshot.commit, live, tuple(damaged), tuple(problems), tuple(leftovers))


def _broken_files(snapshot: SharedSnapshot) -> Iterator[str]:
    for file in snapshot.files:
        try:
            read_bytes(snapshot.place, file)
        except RemoteError:
            raise
        except DamagedDataError as error:
            yield str(error)


def _past(snapshot: SharedSnapshot) -> set[int]:
    """Return the shards of records that were deleted since the last compaction."""
    rows = np.setdiff1d(snapshot.rows_matching({}, deleted=True), snapshot.rows_matching({}))
    rows = rows[snapshot.column_at("deleted_in", rows) > snapshot.point.compacted]
    return set((rows // snapshot.schema.granule).tolist())


def unreferred(snapshot: SharedSnapshot) -> list[str]:
    """Return the names of files of keys and shards that no live record of the latest commit needs.

    Some of them may be of a writer that is at work.
    """
    names = snapshot.place.sizes() or {}
    known = {f"{TABLE}/{file.path}" for file in snapshot.files}
    live = set(np.unique(snapshot.rows_matching({}) // snapshot.schema.granule).tolist())
    found = []
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        shard = folder in snapshot.schema.columns and granule_of(file) >= 0
        keys = folder == TABLE and file.endswith(".parquet")
        unneeded = (keys and name not in known) or (shard and granule_of(file) not in live)
        if unneeded or (folder in snapshot.schema.columns and is_temporary_name(file)):
            found.append(name)
    return found
