"""Records that a user has deleted from a store, so that an import need not bring them back."""

from __future__ import annotations

import numpy as np

from fedgfe_store.checkpoints.reading import Entry
from fedgfe_store.records import RecordKey
from fedgfe_store.storage.entry import conformed
from fedgfe_store.storage.incoming import checked
from fedgfe_store.storage.snapshot import Snapshot


class DeletedRecords:
    """The records of one node and round that a store has had and has no more under their key.

    Parameters
    ----------
    snapshot : Snapshot
        The store.
    node : str
        Their node.
    round : int
        Their round.
    """

    def __init__(self, snapshot: Snapshot, node: str, round: int) -> None:
        self._schema, self._node, self._round = snapshot.schema, node, round
        self._names = [f"{t.name}_digest" for t in self._schema.tensors if not t.optional]
        written = (snapshot.column("created_in") > 0) & (snapshot.column("round") == round)
        rows = np.flatnonzero(written)
        rows = rows[snapshot.column_at("node", rows) == node]
        live = snapshot.visible[rows]
        replaced = set(snapshot.keys(rows[live]))
        digests = [snapshot.column_at(name, rows[~live]).tolist() for name in self._names]
        self._digests: dict[RecordKey, set[tuple[int, ...]]] = {}
        for key, *found in zip(snapshot.keys(rows[~live]), *digests, strict=True):
            if key not in replaced:
                self._digests.setdefault(key, set()).add(tuple(found))

    def __contains__(self, sample: Entry) -> bool:
        """Whether `sample`, with these very tensors, was deleted."""
        key = RecordKey(self._node, self._round, sample.split, sample.class_name, sample.index)
        known = self._digests.get(key)
        if known is None:
            return False
        tensors = {name: getattr(sample, name) for name in self._schema.columns}
        given = checked(self._schema, vars(key), {}, tensors)
        columns = conformed(given, self._schema).columns
        return tuple(int(columns[name][0]) for name in self._names) in known
