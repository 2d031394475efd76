"""Parts of a run: which records each of several processes renders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import xxhash

from fedgfe_store.errors import SchemaMismatchError

if TYPE_CHECKING:
    import numpy as np

    from fedgfe_store.derived_keys import Key

_PARTS = re.compile(r"([0-9]+)/([0-9]+)")


@dataclass(frozen=True)
class Part:
    """One of `count` disjoint parts of any selection.

    Parameters
    ----------
    index : int
        Which part, from 0.
    count : int
        Number of parts.

    Raises
    ------
    SchemaMismatchError
        Unless ``0 <= index < count``.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise _no_part(str(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``i/n``, such as ``0/4``.

        Raises
        ------
        SchemaMismatchError
            If it is anything else, or not ``i < n``.
        """
        found = _PARTS.fullmatch(text)
        if not found:
            raise _no_part(text)
        return cls(int(found[1]), int(found[2]))

    def holds(self, key: Key) -> bool:
        """Tell whether a record, with all its images, belongs to this part.

        It depends on the key alone: not on the other records, nor on what is done.
        """
        return self.count == 1 or part_of(key, self.count) == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Part(0, 1)
"""The one part of a run that is not split."""


def part_of(key: Key, count: int) -> int:
    """Give the index of the part of `count` that a record belongs to, the same for ever."""
    # The command line's help takes `Part` from here, and must not wait for numpy.
    from fedgfe_store.names import key_json
    from fedgfe_store.records import RecordKey

    # By a hash of the key, not by place: a part keeps its records when others come or are deleted.
    if not isinstance(key, RecordKey):
        return _digest(json.dumps(key_json(key), sort_keys=True)) % count
    node, split, name = (json.dumps(text) for text in (key.node, key.split, key.class_name))
    return _hash(node, key.round, split, name, key.index) % count


def parts_of(keys: Iterable[Key], count: int) -> list[int]:
    """Give the indices of the parts of `count` that any of the records belongs to."""
    return sorted({part_of(key, count) for key in keys})


def places_of(columns: Mapping[str, np.ndarray], part: Part) -> np.ndarray:
    """Tell which of many records belong to a part, without an object for each of the others.

    Parameters
    ----------
    columns : mapping of str to ndarray
        Key columns of the records.
    part : Part
        Which part.

    Returns
    -------
    ndarray of int64
        Places of the records, as `Part.holds` of their keys says.
    """
    # The command line's help takes `Part` from here, and must not wait for numpy.
    import numpy as np

    n, count, index = len(columns["index"]), part.count, part.index
    if count == 1:
        return np.arange(n)
    texts = (columns[name].tolist() for name in ("node", "split", "class_name"))
    nodes, splits, names = (_quoted(values) for values in texts)
    rounds, indices = (columns[name].tolist() for name in ("round", "index"))
    keys = zip(nodes, rounds, splits, names, indices, strict=True)
    return np.array([i for i, key in enumerate(keys) if _hash(*key) % count == index], np.int64)


def _quoted(texts: list[str]) -> Iterator[str]:
    """Give each text as JSON has it; most are the same as many others."""
    known = {text: json.dumps(text) for text in set(texts)}
    return map(known.__getitem__, texts)


def _hash(node: str, round_: int, split: str, name: str, index: int) -> int:
    """Hash a key whose texts are JSON already: as JSON, its fields in alphabetical order."""
    canonical = (
        f'{{"class_name":{name},"index":{index},"node":{node},"round":{round_},"split":{split}}}'
    )
    return _digest(canonical)


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("ascii"))


def _no_part(text: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"part: expected i/n with 0 <= i < n, such as 0/4, or auto, got {text!r}"
    )
