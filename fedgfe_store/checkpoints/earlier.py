"""What a store has had of a node before a checkpoint of it is taken in: deleted records, others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np

from fedgfe_store.checkpoints.reading import Entry
from fedgfe_store.records import RecordKey
from fedgfe_store.storage.entry import conformed
from fedgfe_store.storage.incoming import checked
from fedgfe_store.storage.snapshot import Snapshot
from fedgfe_store.storage.version_1 import identities

Place = tuple[str, str, int]
"""Split, class and index: what tells a record of a node and round."""

Digests = tuple[int, ...]
"""Those of the tensors that each record has."""


class EarlierRecords:
    """The records of one node that a store has, or has had, when a file is taken in.

    Parameters
    ----------
    snapshot : Snapshot
        The store, before the file.
    node : str
        Node of the file.
    round : int
        Its round.
    """

    def __init__(self, snapshot: Snapshot, node: str, round: int) -> None:
        self._snapshot, self._node, self._round = snapshot, node, round
        self._schema = snapshot.schema
        self._names = [f"{t.name}_digest" for t in self._schema.tensors if not t.optional]
        self._seen: dict[Place, Mapping[str, str]] = {}

    def deleted(self, sample: Entry) -> bool:
        """Whether `sample` was deleted: its key, with these very tensors, and has not come back."""
        key = RecordKey(self._node, self._round, sample.split, sample.class_name, sample.index)
        known = self._deleted.get(key)
        if known is None:
            return False
        tensors = {name: getattr(sample, name) for name in self._schema.columns}
        given = checked(self._schema, vars(key), {}, tensors)
        columns = conformed(given, self._schema).columns
        return tuple(int(columns[name][0]) for name in self._names) in known

    @cached_property
    def _deleted(self) -> Mapping[RecordKey, set[Digests]]:
        snapshot = self._snapshot
        written = snapshot.column("created_in") > 0
        rows = self._rows(written & (snapshot.column("round") == self._round))
        live = snapshot.visible[rows]
        replaced = set(snapshot.keys(rows[live]))
        digests = [snapshot.column_at(name, rows[~live]).tolist() for name in self._names]
        found: dict[RecordKey, set[Digests]] = {}
        for key, *of_it in zip(snapshot.keys(rows[~live]), *digests, strict=True):
            if key not in replaced:
                found.setdefault(key, set()).add(tuple(of_it))
        return found

    def watch(self, samples: Iterable[Entry]) -> Iterator[Entry]:
        """Yield `samples`, noting who each is: by its file, else by its sample's name."""
        for sample in samples:
            names = {"file": sample.file_id or "", "sample": sample.sample_id or ""}
            self._seen[sample.split, sample.class_name, sample.index] = names
            yield sample

    def notes(self) -> list[str]:
        """Return a note if an index of what was watched means another sample in the round before.

        Whoever follows a sample through the rounds by its index would compare two samples.
        """
        if not any(any(names.values()) for names in self._seen.values()):
            return []
        before = self._round_before()
        if before is None:
            return []
        last, rows = before
        known = self._named(rows)
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

    def _round_before(self) -> tuple[int, np.ndarray] | None:
        """Return the last round before this one that the node has records of, and their rows."""
        rounds, live = self._snapshot.column("round"), self._snapshot.visible
        # From the latest on, mostly the one before: names of nodes are text, and slow to compare.
        for number in np.unique(rounds[live & (rounds < self._round)])[::-1]:
            rows = self._rows(live & (rounds == number))
            if len(rows):
                return int(number), rows
        return None

    def _rows(self, mask: np.ndarray) -> np.ndarray:
        """Return the node's rows among those of `mask`."""
        rows = np.flatnonzero(mask)
        own: np.ndarray = rows[self._snapshot.column_at("node", rows) == self._node]
        return own

    def _named(self, rows: np.ndarray) -> dict[Place, Mapping[str, str]]:
        """Return who the records at `rows` are; old stores have ``file_id`` in ``extra``."""
        columns = self._snapshot.notes(rows)
        names = ("split", "class_name", "index", "sample_id", "file_id")
        parts = [columns[name].tolist() for name in names]
        inside = identities(columns["extra"]).tolist()
        return {
            (split, class_name, index): {"file": file_id or other, "sample": sample_id}
            for split, class_name, index, sample_id, file_id, other in zip(
                *parts, inside, strict=True
            )
        }


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return what tells two samples apart, the first name that both have, and both names."""
    for what, name in ours.items():
        if name and theirs[what]:
            return None if name == theirs[what] else (what, name, theirs[what])
    return None
