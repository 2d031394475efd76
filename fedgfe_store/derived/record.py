"""What all derived records can: tell their keys, digests and sources, and be read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from fedgfe_store.common.location import Location
from fedgfe_store.derived_keys import Key
from fedgfe_store.records import KEY_COLUMNS
from fedgfe_store.rows import Rows
from fedgfe_store.schema import Schema

if TYPE_CHECKING:
    import pandas as pd


class Derived(ABC):
    """Records that are computed from those of a store as they are read, in a fixed order.

    Made by `Selection.mean` and `walk`; `generate` takes them as it takes a selection. What they
    are made of is that of one commit.
    """

    @property
    @abstractmethod
    def source(self) -> Rows:
        """The records of the store that they are made of, or some of them."""

    @abstractmethod
    def keys(self) -> Sequence[Key]:
        """Return what identifies each record."""

    @property
    @abstractmethod
    def file_ids(self) -> list[str]:
        """The sample that each record's noise is that of; empty where there is none."""

    @property
    @abstractmethod
    def counts(self) -> list[int]:
        """How many records of the store each one is made of."""

    @abstractmethod
    def take(self, positions: Sequence[int] | np.ndarray) -> Self:
        """Return the records at `positions`, whole numbers from 0, in that order."""

    @abstractmethod
    def digests(self, column: str) -> np.ndarray:
        """Return a digest of all that the values in a tensor column depend on, uint64 ``[n]``.

        It is made of the sources' digests; no tensor is read.
        """

    @abstractmethod
    def check(self, column: str) -> None:
        """Refuse what cannot be combined in a tensor column; no tensor is read.

        Raises
        ------
        SchemaMismatchError
            If records have other lengths in a ragged column, other values in a mask, or none in
            an optional column.
        """

    @abstractmethod
    def _values(self, column: str) -> np.ndarray:
        """Return the values of a column that `check` has passed, a length or a mark included."""

    @abstractmethod
    def describe(self) -> str:
        """Return in words what they are."""

    def read(self, column: str, *, out: np.ndarray | None = None) -> np.ndarray:
        r"""Read the sources, a few at a time, and compute the values in a tensor column.

        Parameters
        ----------
        column : str
            Name of the tensor column, or of lengths or marks of one.
        out : ndarray, shape [n, \*shape], optional
            Memory for the result.

        Returns
        -------
        ndarray of float32, shape [n, \*shape]
            Computed in float64 and rounded once; masks and lengths are those of the sources.

        Raises
        ------
        SchemaMismatchError
            If the sources cannot be combined in it, see `check`.
        DamagedDataError
            If a source's values are not those that were committed; names the record.
        """
        is_mark = column in self.schema.marks and column not in self.schema.columns
        self.check(column.partition("_")[2] if is_mark else column)
        values = self._values(column)
        if out is None:
            return values
        out[...] = values
        return out

    @property
    def schema(self) -> Schema:
        """What the records look like: as their sources."""
        return self.source.schema

    @property
    def location(self) -> Location:
        """Where the store is."""
        return self.source.location

    @property
    def commit(self) -> int:
        """Number of the commit that is seen."""
        return self.source.commit

    @property
    def store_id(self) -> str | None:
        """Identity of the store."""
        return self.source.store_id

    @property
    def as_of(self) -> int | None:
        """The commit that was asked for; None where the store was seen as it is."""
        return self.source.as_of

    def others(self, *, per_class: int | None = None, **filters: Any) -> Rows:
        """Return records of the same store and commit, as `Selection.others` does."""
        return self.source.others(per_class=per_class, **filters)

    def __len__(self) -> int:
        """Return the number of derived records."""
        return len(self.keys())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<{self.describe()} of {self.location} at commit {self.commit}>"

    @cached_property
    def records(self) -> pd.DataFrame:
        """Everything but the tensors, one row per derived record.

        Returns
        -------
        DataFrame
            The key columns, None where sources differ in one; ``file_id``; ``sources``, the number
            of records that it is made of; ``derived``, what it is in words; and a
            ``<tensor>_digest`` for each tensor column, 16 hex digits.
        """
        import pandas as pd

        keys = self.keys()
        columns: dict[str, Any] = {
            name: pd.Series([key.value(name) for key in keys], dtype=object) for name in KEY_COLUMNS
        }
        columns |= {"file_id": self.file_ids, "sources": self.counts}
        columns["derived"] = [str(key) for key in keys]
        for name in self.schema.columns:
            columns[f"{name}_digest"] = [f"{d:016x}" for d in self.digests(name).tolist()]
        return pd.DataFrame(columns)


def combined_digest(recipe: str, digests: Iterable[int]) -> int:
    """Return the digest of what `recipe` makes of records with these digests, in this order."""
    content = recipe.encode() + b"\0" + np.fromiter(digests, "<u8").tobytes()
    return xxhash.xxh3_64_intdigest(content)
