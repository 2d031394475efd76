"""Looking at every byte that a store needs: what is damaged, missing or left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np

from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.arrays import is_alike
from fedgfe_store.storage.claim import is_claim_name
from fedgfe_store.storage.compact import live_per_granule
from fedgfe_store.storage.engine import DamagedRecord, Verification
from fedgfe_store.storage.files import is_temporary_name
from fedgfe_store.storage.layout import KEY_CHUNK
from fedgfe_store.storage.metadata import GROUP_BYTES, GROUP_FILE, parsed_group
from fedgfe_store.storage.place import RemoteError
from fedgfe_store.storage.reading_all import damaged_records, repeated_keys
from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.snapshot import Snapshot
from fedgfe_store.storage.version_1 import PENDING
from fedgfe_store.storage.zones import COLUMNS as ZONE_COLUMNS


def verify(snapshot: Snapshot, *, progress: Callable[[int], object]) -> Verification:
    """Check what `snapshot` shows; `progress` hears how many records have been read."""
    broken = _broken_columns(snapshot)
    problems = [*broken.values(), *_metadata_problems(snapshot)]
    damaged: list[DamagedRecord] = []
    leftovers: list[str] = []
    if not broken:
        problems += [*_wrong_zones(snapshot), *repeated_keys(snapshot)]
        damaged = damaged_records(snapshot, leftovers, progress)
        leftovers += _leftovers(snapshot)
    return Verification(
        snapshot.commit, snapshot.point.live, tuple(damaged), tuple(problems), tuple(leftovers)
    )


def _broken_columns(snapshot: Snapshot) -> dict[str, str]:
    broken = {}
    for name in snapshot.group.key_columns:
        try:
            snapshot.column(name)
        except RemoteError:
            raise
        except (DamagedDataError, OSError) as error:
            broken[name] = str(error)
    if not broken:
        try:
            snapshot.notes(np.flatnonzero(snapshot.visible))
        except DamagedDataError as error:
            broken["row_digest"] = str(error)
    return broken


def wrong_shapes(snapshot: Snapshot) -> list[str]:
    """Return the arrays whose own metadata, which other Zarr readers use, is not what it must be.

    A power cut may leave it as it was before the last commits, or torn: see `Staging.hint`.
    """
    return [name for name in snapshot.group.arrays if not _has_shape(snapshot, name)]


def _has_shape(snapshot: Snapshot, name: str) -> bool:
    committed = snapshot.group.arrays[name]
    try:
        found = parsed_group(snapshot.place.read(f"{name}/{GROUP_FILE}", GROUP_BYTES))
    except RemoteError:
        raise
    except (OSError, ValueError):
        return False
    # It may be ahead of the commit while a writer is at work.
    return is_alike(found, committed) and found["shape"][0] >= snapshot.group.rows(name)


def _metadata_problems(snapshot: Snapshot) -> Iterator[str]:
    for name in wrong_shapes(snapshot):
        yield (
            f"{snapshot.place}/{name}/{GROUP_FILE} is missing or differs from what was committed: "
            f"other Zarr readers may need it (the next commit, or verify --repair, mends it)"
        )


def _wrong_zones(snapshot: Snapshot) -> Iterator[str]:
    for number in range(len(snapshot.group.zones.chunks)):
        values = (snapshot.chunks.chunk(name, number) for name in ZONE_COLUMNS)
        if snapshot.group.zones.would_miss(number, *values):
            yield (
                f"{snapshot.place}/{GROUP_FILE}: what is said of rows from {number * KEY_CHUNK} on "
                f"hides records from queries of a round or node"
            )


def _leftovers(snapshot: Snapshot) -> Iterator[str]:
    place, arrays = snapshot.place, [*snapshot.group.arrays]
    names = [PurePosixPath(name) for name in place.sizes() or {}]
    own = [name for name in names if str(name.parent) in (".", *arrays)]
    begun = [n for n in own if is_claim_name(str(n)) or str(n) == PENDING]
    yield from (f"{place}/{name}: a writer is at work, or died" for name in sorted(begun))
    for name, number in sorted(snapshot.chunks.stale):
        yield (
            f"{place}/{name}/c.{number}: marks of a commit that was never published "
            f"(the next commit clears them)"
        )
    for folder in (".", *arrays):
        yield from (
            f"{place}/{name}"
            for name in sorted(own)
            if str(name.parent) == folder and is_temporary_name(name.name)
        )
    unneeded = _unneeded(snapshot)
    for folder in arrays:
        tensor = folder in snapshot.schema.columns
        last = len(unneeded) if tensor else -(-snapshot.group.rows(folder) // KEY_CHUNK)
        for file in sorted(name for name in own if str(name.parent) == folder):
            number = granule_of(file.name)
            if number >= last or (tensor and number >= 0 and unneeded[number]):
                yield f"{place}/{file}: no record that a reader can reach"


def _unneeded(snapshot: Snapshot) -> np.ndarray:
    """Which granules hold nothing but records that were deleted up to the latest compaction."""
    granule, compacted = snapshot.schema.granule, snapshot.point.compacted
    deaths = snapshot.column("deleted_in").reshape(-1, granule).max(axis=1, initial=0)
    dead: np.ndarray = (live_per_granule(snapshot) == 0) & (deaths <= compacted)
    return dead
