"""What each commit of a shared store did: it says so itself."""

from __future__ import annotations

from bisect import bisect_right

import pandas as pd

from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.shared.snapshot import SharedSnapshot


def history(snapshot: SharedSnapshot) -> pd.DataFrame:
    """Return the table that `EmbeddingStore.history` describes."""
    told = {n: facts for n, facts in snapshot.facts.items() if n <= snapshot.commit}
    nbytes = _bytes(snapshot)
    return pd.DataFrame(
        {
            "commit": pd.Series([*told], dtype="int64"),
            "time": pd.to_datetime([facts.time for facts in told.values()], unit="ms", utc=True),
            "kind": pd.Series([facts.kind for facts in told.values()], dtype=object),
            "source": pd.Series([facts.source for facts in told.values()], dtype=object),
            "nodes": pd.Series([facts.nodes for facts in told.values()], dtype=object),
            "rounds": pd.Series([facts.rounds for facts in told.values()], dtype=object),
            "added": pd.Series([facts.added for facts in told.values()], dtype="int64"),
            "deleted": pd.Series([facts.deleted for facts in told.values()], dtype="int64"),
            "records": pd.Series([facts.live for facts in told.values()], dtype="int64"),
            "bytes": pd.Series([nbytes.get(number, 0) for number in told], dtype="int64"),
        }
    )


def _bytes(snapshot: SharedSnapshot) -> dict[int, int]:
    """Return the bytes of the shards of each commit that are still there."""
    runs = sorted(
        (first, first + n, commit)
        for commit, facts in snapshot.facts.items()
        for first, n in facts.granules
    )
    starts = [first for first, _, _ in runs]
    found: dict[int, int] = {}
    for name in snapshot.schema.columns:
        for file, size in (snapshot.place.sizes(name) or {}).items():
            number = granule_of(file)
            place = bisect_right(starts, number) - 1
            if number >= 0 and place >= 0 and number < runs[place][1]:
                commit = runs[place][2]
                found[commit] = found.get(commit, 0) + size
    return found
