"""Which of the records on their way into a store it has already, and what becomes of those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedgfe_store.errors import ConflictError
from fedgfe_store.records import RecordKey, keys_of
from fedgfe_store.storage.state import State

IfExists = Literal["error", "replace", "skip"]


@dataclass(frozen=True)
class Fates:
    """What becomes of records: positions of those to be written, and what they replace.

    Parameters
    ----------
    fresh : ndarray of int64
        Positions of the records that are written.
    added, skipped : int
        Records that are new, and that stay out.
    replaced : tuple of int
        Rows of the store's whose place is taken.
    """

    fresh: np.ndarray
    added: int
    skipped: int
    replaced: tuple[int, ...]


class Sifter:
    """Looks records up in one state of a store.

    Parameters
    ----------
    state : State
        The store.
    if_exists : {"error", "replace", "skip"}
        See `EmbeddingStore.append`.
    """

    def __init__(self, state: State, if_exists: IfExists) -> None:
        self.state, self._if_exists = state, if_exists
        self._stored: dict[tuple[int, str], dict[RecordKey, int]] = {}

    def fates(self, columns: Mapping[str, np.ndarray]) -> Fates:
        """Tell what becomes of records of which keys and digests are known.

        Raises
        ------
        ConflictError
            If the store has one with other tensors, under ``"error"``.
        """
        fresh: list[int] = []
        replaced: list[int] = []
        added = skipped = 0
        for position, key in enumerate(keys_of(columns)):
            row = self._row_of(key)
            if row is None:
                added += 1
            elif self._stays(columns, position, row):
                skipped += 1
                continue
            elif self._if_exists == "replace":
                replaced.append(row)
            else:
                raise ConflictError(
                    f"{key} is in {self.state.path} already, with other tensors "
                    f"(if_exists='replace' puts these in its place, 'skip' keeps the old ones); "
                    f"nothing was committed"
                )
            fresh.append(position)
        return Fates(np.array(fresh, np.int64), added, skipped, tuple(replaced))

    def is_there(self, columns: Mapping[str, np.ndarray], position: int, key: RecordKey) -> bool:
        """Whether the store has a record as it would come."""
        row = self._row_of(key)
        return row is not None and self._stays(columns, position, row)

    def _row_of(self, key: RecordKey) -> int | None:
        """Return the row that holds the live record `key`, looked for by round and node first."""
        return self.rows_of(key.round, key.node).get(key)

    def rows_of(self, number: int, node: str) -> dict[RecordKey, int]:
        """Return the rows of the live records of a round and node."""
        if (number, node) not in self._stored:
            rows = self.state.rows_matching({"round": [number], "node": [node]})
            keys = self.state.keys(rows)
            self._stored[number, node] = dict(zip(keys, rows.tolist(), strict=True))
        return self._stored[number, node]

    def _stays(self, columns: Mapping[str, np.ndarray], position: int, row: int) -> bool:
        """Whether the store's record in `row` stays, as when it has all that the new one brings."""
        if self._if_exists == "skip":
            return True
        at = np.array([row])
        return all(
            columns[f"{t.name}_digest"][position] == self.state.column_at(f"{t.name}_digest", at)[0]
            for t in self.state.schema.tensors
            if not t.optional or (f"has_{t.name}" in columns and columns[f"has_{t.name}"][position])
        )
