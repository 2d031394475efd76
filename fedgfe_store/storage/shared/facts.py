"""What the table's log says of a commit, and of each file of keys that it added."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import xxhash

from fedgfe_store.common.filters import is_wanted

Part = Literal["records", "marks", "commits"]
"""What a file of the table holds: records; marks of deletion; facts of compacted commits."""

BOUNDED = ("row", "round", "index", "node", "split", "class_name")
"""Columns of which each file's smallest and largest value stand in the log."""

_LONGEST_BOUND = 64
"""Characters of a text's bound: the log is read whole, and a name may have 65,536 bytes."""


@dataclass(frozen=True)
class Facts:
    """What a commit did; stands in the log with each file that it added.

    Parameters
    ----------
    time : int
        When it was made, in milliseconds since 1970 UTC.
    kind, source : str
        As `history` shows them.
    nodes, rounds : tuple
        Values among the records that it added or deleted, sorted.
    added, deleted : int
        How many it added and deleted; a compaction counts none.
    live : int
        Visible records after it.
    classes : tuple of str
        Classes of what it added, in order; of a compaction all up to then.
    negatives : bool
        Whether records without a class were added by it, or before a compaction.
    granules : tuple of tuple of int
        Runs of shards that it wrote: the first one's number, and how many.
    """

    time: int
    kind: str
    source: str
    nodes: tuple[str, ...]
    rounds: tuple[int, ...]
    added: int
    deleted: int
    live: int
    classes: tuple[str, ...]
    negatives: bool
    granules: tuple[tuple[int, int], ...]

    def encode(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `encode` made.

        Raises
        ------
        ValueError, TypeError or KeyError
            If it is not that.
        """
        found = json.loads(text)
        for name in ("nodes", "rounds", "classes"):
            found[name] = tuple(found[name])
        found["granules"] = tuple((int(first), int(n)) for first, n in found["granules"])
        return cls(**found)


@dataclass(frozen=True)
class KeyFile:
    """A file of the table, as the log tells of it.

    Parameters
    ----------
    path : str
        Its name within the table's folder, which ends in a digest of its bytes.
    size, n : int
        Its bytes and rows.
    unmarked : int
        Rows without a ``deleted_in``.
    part : str
        What it holds.
    commit : int
        The commit that added it.
    about : str
        `Facts` of that commit.
    bounds : mapping
        Smallest and largest value of `BOUNDED` columns; texts may be cut so that they hold.
    """

    path: str
    size: int
    n: int
    unmarked: int
    part: Part
    commit: int
    about: str
    bounds: Mapping[str, tuple[Any, Any]]

    @property
    def checksum(self) -> str:
        """What the log's entry must hold, so that no changed bit of it goes unseen."""
        bounds = [[name, *self.bounds.get(name, (None, None))] for name in BOUNDED]
        told = [self.path, self.size, self.n, self.unmarked, self.part, self.commit, self.about]
        text = json.dumps([*told, bounds], ensure_ascii=False)
        return xxhash.xxh3_64_hexdigest(text.encode())

    def may_hold(self, filters: Mapping[str, Sequence[Any]]) -> bool:
        """Whether a row that meets every filter may be in it, as far as its bounds tell."""
        return all(_overlaps(*self.bounds[name], wanted) for name, wanted in filters.items()
                   if name in self.bounds)  # fmt: skip


def _overlaps(low: Any, high: Any, wanted: Sequence[Any]) -> bool:
    if low == high:
        return is_wanted(low, wanted)
    for value in wanted:
        if isinstance(value, range):
            if isinstance(low, str):  # names of nodes that are numbers are not in their order
                return True
            if value and min(value[0], value[-1]) <= high and max(value[0], value[-1]) >= low:
                return True
        elif low <= value <= high:
            return True
    return False


def bounds_of(columns: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, Any]]:
    """Return the bounds of those columns that have any, of at least one row."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in BOUNDED:
        values = columns[name]
        if values.dtype.kind == "T":
            texts = set(values.tolist())
            found[name] = _lower(min(texts)), _upper(max(texts))
        else:
            found[name] = int(values.min()), int(values.max())
    return found


def _lower(text: str) -> str:
    return text[:_LONGEST_BOUND]


def _upper(text: str) -> str:
    return text if len(text) <= _LONGEST_BOUND else text[:_LONGEST_BOUND] + "\U0010ffff"


def classes_in_order(all_facts: Iterable[Facts]) -> list[str]:
    """Return the classes of several commits, in the order of their arrival."""
    return list(dict.fromkeys(name for facts in all_facts for name in facts.classes))


def nodes_sorted(values: Iterable[str]) -> tuple[str, ...]:
    """Return distinct names of nodes as `history` shows them."""
    return tuple(sorted(set(values)))
