"""Which sample a record is of, whatever its index: by its file, else by its sample's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from fedgfe_store.checkpoints.reading import Entry
from fedgfe_store.storage.version_1 import identities
from fedgfe_store.store import EmbeddingStore

Place = tuple[str, str, int]
"""Split, class and index: what tells a record of a node and round."""


class Identities:
    """What the samples of a file say of who they are.

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

    def watch(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield `entries`, looking at each."""
        for entry in entries:
            names = {"file": entry.file_id or "", "sample": entry.sample_id or ""}
            self._seen[entry.split, entry.class_name, entry.index] = names
            yield entry

    def notes(self, store: EmbeddingStore) -> list[str]:
        """Return a note if an index means another sample than in the round before."""
        if not (self._round and any(any(names.values()) for names in self._seen.values())):
            return []
        selection = store.select(node=self._node)
        groups = {r: rows for (_, r), rows in selection.by_node_and_round().items()}
        last = max((number for number in groups if number < self._round), default=None)
        if last is None:
            return []
        known = _known(selection.take(groups[last]).records)
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


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return what tells two samples apart, the first name that both have, and both names."""
    for what, name in ours.items():
        if name and theirs[what]:
            return None if name == theirs[what] else (what, name, theirs[what])
    return None


def _known(records: pd.DataFrame) -> dict[Place, Mapping[str, str]]:
    """Return who the records of a round are; old stores have ``file_id`` in ``extra``."""
    columns = ["split", "class_name", "index", "sample_id", "file_id"]
    inside = identities(np.array(records["extra"].tolist(), np.dtypes.StringDType())).tolist()
    rows = records[columns].itertuples(index=False, name=None)
    return {
        (split, class_name, index): {"file": file_id or other, "sample": sample_id}
        for (split, class_name, index, sample_id, file_id), other in zip(rows, inside, strict=True)
    }
