"""What a store has had before a file is taken in: records that were deleted, other samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedgfe_store.checkpoints.samples import Entry
from fedgfe_store.records import RecordKey
from fedgfe_store.storage.entry import conformed
from fedgfe_store.storage.incoming import checked
from fedgfe_store.storage.state import State
from fedgfe_store.storage.version_1 import identities

Place = tuple[str, str, int]
"""Split, class and index: what tells a record of a node and round."""


class DeletedRecords:
    """The records of one node and round that a store has had and has no more under their key.

    Parameters
    ----------
    snapshot : State
        The store.
    node : str
        Their node.
    round : int
        Their round.
    """

    def __init__(self, snapshot: State, node: str, round: int) -> None:
        self._schema, self._node, self._round = snapshot.schema, node, round
        self._names = [f"{t.name}_digest" for t in self._schema.tensors if not t.optional]
        filters: dict[str, list[Any]] = {"node": [node], "round": [round]}
        live = snapshot.rows_matching(filters)
        dead = np.setdiff1d(snapshot.rows_matching(filters, deleted=True), live)
        replaced = set(snapshot.keys(live))
        digests = [snapshot.column_at(name, dead).tolist() for name in self._names]
        self._digests: dict[RecordKey, set[tuple[int, ...]]] = {}
        for key, *found in zip(snapshot.keys(dead), *digests, strict=True):
            if key not in replaced:
                self._digests.setdefault(key, set()).add(tuple(found))

    def __contains__(self, sample: Entry) -> bool:
        """Whether `sample`, with these very tensors, was deleted."""
        key = RecordKey(self._node, self._round, sample.split, sample.class_name, sample.index)
        known = self._digests.get(key)
        if known is None:
            return False
        given = checked(self._schema, vars(key), {}, sample.tensors)
        columns = conformed(given, self._schema).columns
        return tuple(int(columns[name][0]) for name in self._names) in known


class Identities:
    """What the samples of a file say of who they are: by their file, else by their sample's name.

    Parameters
    ----------
    node : str
        Node of the file.
    round : int
        Its round.
    """

    def __init__(self, node: str, round: int) -> None:
        self._node, self._round = node, round
        self._seen: dict[Place, Mapping[str, str]] = {}

    def watch(self, samples: Iterable[Entry]) -> Iterator[Entry]:
        """Yield `samples`, looking at each."""
        for sample in samples:
            names = {"file": sample.file_id or "", "sample": sample.sample_id or ""}
            self._seen[sample.split, sample.class_name, sample.index] = names
            yield sample

    def notes(self, snapshot: State) -> list[str]:
        """Return a note if an index means another sample than in the round before.

        Whoever follows a sample through the rounds by its index would compare two samples.
        """
        if not any(any(names.values()) for names in self._seen.values()):
            return []
        before = self._round_before(snapshot)
        if before is None:
            return []
        last, known = before
        others = [
            (place, *found)
            for place, names in self._seen.items()
            if place in known and (found := _differing(names, known[place]))
        ]
        if not others:
            return []
        (split, class_name, index), what, now, then = others[0]
        return [
            f"{len(others)} of {len(self._seen)} indices mean another sample than in round {last}, "
            f"such as split {split}, class {class_name}, index {index}: {what} {now} here, {then} "
            f"there"
        ]

    def _round_before(self, snapshot: State) -> tuple[int, dict[Place, Mapping[str, str]]] | None:
        """Return the last round before that the node has records of, and who they are."""
        # Mostly it is the one before, and that takes no look at all the others.
        for rounds in (self._round - 1, range(self._round - 1)):
            rows = snapshot.rows_matching({"node": [self._node], "round": [rounds]})
            if len(rows):
                numbers = snapshot.column_at("round", rows)
                return int(numbers.max()), _known(snapshot, rows[numbers == numbers.max()])
        return None


def _known(snapshot: State, rows: np.ndarray) -> dict[Place, Mapping[str, str]]:
    """Return who the records at `rows` are; old stores have ``file_id`` in ``extra``."""
    columns = snapshot.notes(rows)
    names = ("split", "class_name", "index", "sample_id", "file_id")
    inside = identities(columns["extra"])
    parts = zip(*(columns[name].tolist() for name in names), inside.tolist(), strict=True)
    return {
        (split, class_name, index): {"file": file_id or other, "sample": sample_id}
        for split, class_name, index, sample_id, file_id, other in parts
    }


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return what tells two samples apart, the first name that both have, and both names."""
    for what, name in ours.items():
        if name and theirs[what]:
            return None if name == theirs[what] else (what, name, theirs[what])
    return None
