"""Means of groups of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from fedgfe_store.derived.record import Derived, combined_digest
from fedgfe_store.derived_keys import MeanKey, filters_text
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, check_keys, key_order
from fedgfe_store.rows import Rows

if TYPE_CHECKING:
    from fedgfe_store.schema import TensorColumn

# Of tensors that are read at a time: what a mean takes besides itself, however large its group.
_PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False, repr=False)
class Means(Derived):
    """Means of groups of records, made by `Selection.mean`.

    Parameters
    ----------
    chosen : Rows
        The records.
    groups : tuple of (MeanKey, ndarray)
        What each group is, and the positions of its records.
    """

    chosen: Rows
    groups: tuple[tuple[MeanKey, np.ndarray], ...]

    @classmethod
    def of(cls, rows: Rows, by: Sequence[str], filters: Mapping[str, Any] | None) -> Self:
        """Form groups.

        Parameters
        ----------
        rows : Rows
            The records.
        by : sequence of str
            Key columns that the records of a group agree in.
        filters : mapping or None
            What chose the records, by lists of values; None where they were taken by position.

        Raises
        ------
        SchemaMismatchError
            If `by` is of no use.
        """
        import pandas as pd

        check_keys("mean", by)
        named = filters or {}
        single = {n: v[0] for n, v in named.items() if n in KEY_COLUMNS and _is_single(v)}
        rest = {n: v for n, v in named.items() if n not in by and n not in single}
        columns = rows.key_columns()
        frame = pd.DataFrame({name: columns[name].tolist() for name in by})
        found: dict[tuple[Any, ...], np.ndarray] = {
            key if isinstance(key, tuple) else (key,): np.asarray(positions)
            for key, positions in frame.groupby(list(by), sort=False).indices.items()
        }
        groups = []
        for key in sorted(found, key=key_order(by)):
            fixed = single | dict(zip(by, map(_plain, key), strict=True))
            ordered = tuple((name, fixed[name]) for name in KEY_COLUMNS if name in fixed)
            members = rows.take(found[key])
            others = {"records": _name_of(members)} if filters is None else rest
            groups.append((MeanKey(ordered, filters_text(others)), found[key]))
        return cls(rows, tuple(groups))

    @classmethod
    def of_one(cls, rows: Rows, key: MeanKey) -> Self:
        """Return the mean of all of some records, which is known by `key`."""
        return cls(rows, ((key, np.arange(len(rows))),))

    @property
    def source(self) -> Rows:
        """The records that the groups are among."""
        return self.chosen

    def keys(self) -> list[MeanKey]:
        """Return what identifies each mean."""
        return [key for key, _ in self.groups]

    @property
    def file_ids(self) -> list[str]:
        """Empty for each: a mean is of no sample."""
        return [""] * len(self.groups)

    @property
    def counts(self) -> list[int]:
        """How many records each group has."""
        return [len(positions) for _, positions in self.groups]

    def take(self, positions: Sequence[int] | np.ndarray) -> Self:
        """Return the means at `positions`, whole numbers from 0, in that order."""
        return type(self)(self.chosen, tuple(self.groups[place] for place in positions))

    def members(self, place: int) -> Rows:
        """Return the records of one group."""
        return self.chosen.take(self.groups[place][1])

    def digests(self, column: str) -> np.ndarray:
        """Return a digest of each group's digests in a tensor column, uint64 ``[n]``.

        Their order does not count: compaction may change it, and a mean is the same.
        """
        groups = (self.members(place).digests(column) for place in range(len(self.groups)))
        found = [combined_digest("mean", np.sort(each).tolist()) for each in groups]
        return np.array(found, np.uint64)

    def check(self, column: str) -> None:
        """Refuse a group whose records have no mean in a tensor column, see `Derived.check`."""
        known = self.schema.column(column)
        if known.dtype == "float32" and not known.marks:
            return
        for place, (key, _) in enumerate(self.groups):
            lacking = _unlike(self.members(place), known)
            if lacking:
                raise SchemaMismatchError(f"{key}: {lacking}")

    def _values(self, column: str) -> np.ndarray:
        groups = [self.members(place) for place in range(len(self.groups))]
        if column not in self.schema.columns or self.schema.column(column).dtype != "float32":
            rows = [members.take([0]).read(column) for members in groups]
        else:
            rows = [mean_of(members, column)[None] for members in groups]
        return np.concatenate(rows)

    def describe(self) -> str:
        """Return in words what they are."""
        one = str(self.groups[0][0]) if len(self.groups) == 1 else f"{len(self.groups)} means"
        return f"{one}, of {sum(self.counts)} records"


def mean_of(rows: Rows, column: str) -> np.ndarray:
    """Return the mean of a column of embeddings, float32, reading a few records at a time."""
    known = rows.schema.column(column)
    total = np.zeros(known.shape)
    for _, part in rows.parts(max(1, _PIECE_BYTES // known.nbytes)):
        total += part.read(column).sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)


def _unlike(rows: Rows, column: TensorColumn) -> str:
    """Say why records have no mean in a tensor column; empty where they have one."""
    if column.optional:
        without = int((~rows.read(f"has_{column.name}").astype(bool)).sum())
        if without:
            return f"expected {column.name} in each record, got {without} of {len(rows)} without"
    if column.ragged:
        lengths = np.unique(rows.read(f"length_{column.name}")).tolist()
        if len(lengths) > 1:
            return (
                f"expected records of one length in {column.name}, whose tokens stand for the "
                f"same, got lengths from {lengths[0]} to {lengths[-1]}"
            )
    if column.dtype != "float32":
        different = len(np.unique(rows.digests(column.name)))
        if different > 1:
            return f"expected the same {column.name} in each record, got {different} different"
    return ""


def _is_single(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 1 and not isinstance(values[0], range)


def _plain(value: Any) -> str | int:
    return value if isinstance(value, str) else int(value)


def _name_of(rows: Rows) -> str:
    """Return a name for records that no filters tell: a hash of their keys."""
    text = "\n".join(sorted(map(repr, rows.keys())))
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
