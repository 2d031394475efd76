"""Records picked by filters: lazily, and readable as pandas, xarray or torch."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fedgfe_store.common.filters import matches, wanted_values
from fedgfe_store.common.location import Given, location
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.readers.verbs import ReadableRows
from fedgfe_store.records import KEY_COLUMNS, NEGATIVE_SPLIT, TEXT_NODE, TEXT_ROUND
from fedgfe_store.storage.append import AppendBatch
from fedgfe_store.storage.engine import LOCK_TIMEOUT
from fedgfe_store.storage.engines import create, engine_of, latest
from fedgfe_store.storage.state import State

if TYPE_CHECKING:
    from fedgfe_store.derived.mean import Means


class Selection(ReadableRows):
    """Records of a store that filters chose, in a fixed order, as one commit shows them.

    Made by `EmbeddingStore.select`. Key columns are read when first needed; tensors only by
    `read`, by `batches` as it is iterated, and by the arrays of `to_xarray` as they are used.
    """

    def __init__(
        self,
        snapshot: State,
        filters: Mapping[str, Any],
        *,
        per_class: int | None,
        rows: np.ndarray | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._filters = filters
        self._per_class = per_class
        self._taken = rows

    @classmethod
    def of(
        cls, snapshot: State, filters: Mapping[str, Any], *, per_class: int | None = None
    ) -> Selection:
        """Return the records of `snapshot` that meet `filters`; see `EmbeddingStore.select`."""
        if per_class is not None and not (is_whole(per_class) and per_class >= 1):
            raise SchemaMismatchError(
                f"per_class: expected a whole number from 1 up, got {per_class!r}"
            )
        checked = {name: wanted_values(name, value) for name, value in filters.items()}
        return cls(snapshot, checked, per_class=per_class)

    @classmethod
    def whole(cls, snapshot: State) -> Selection:
        """Return all records of `snapshot`, negative embeddings among them."""
        return cls(snapshot, {}, per_class=None, rows=snapshot.rows_matching({}))

    def select(
        self,
        *,
        node: Any = None,
        round: Any = None,
        split: Any = None,
        class_name: Any = None,
        index: Any = None,
        sample_id: Any = None,
        file_id: Any = None,
        per_class: int | None = None,
    ) -> Self:
        """Return those of the records that meet further filters, in their order.

        The filters, and what is raised, are those of `EmbeddingStore.select`.
        """
        given = {"node": node, "round": round, "split": split, "class_name": class_name}
        given |= {"index": index, "sample_id": sample_id, "file_id": file_id}
        wanted = {name: value for name, value in given.items() if value is not None}
        narrower = Selection.of(self._snapshot, wanted, per_class=per_class)
        rows = self.rows
        for name, values in narrower._filters.items():
            rows = rows[matches(self._snapshot.column_at(name, rows), values)]
        return self._with(rows if per_class is None else self._lowest(rows, per_class))

    def others(self, *, per_class: int | None = None, **filters: Any) -> Selection:
        """Return other records of the same store and commit, by default all.

        The filters are those of `EmbeddingStore.select`.
        """
        return Selection.of(self._snapshot, filters, per_class=per_class)

    def __repr__(self) -> str:
        shown = ", ".join(self._description()) or "all records"
        return (
            f"<Selection of {self.location} at commit {self.commit}: {len(self)} records ({shown})>"
        )

    def _repr_html_(self) -> str:
        from fedgfe_store.readers.html import selection_html

        return selection_html(self, self._snapshot, self._description())

    def _description(self) -> list[str]:
        filters = dict(self._filters)
        if self._per_class is not None:
            filters["per_class"] = self._per_class
        parts = [f"{name}={reprlib.repr(_as_given(value))}" for name, value in filters.items()]
        return parts if self._taken is None else [*parts, "taken by position"]

    @cached_property
    def rows(self) -> np.ndarray:
        """Row numbers of the records in the store's arrays, int64 ``[n]``."""
        if self._taken is not None:
            return self._taken
        rows = self._snapshot.rows_matching(self._filters)
        if "split" not in self._filters and self._snapshot.group.may_have_negatives:
            rows = _without_negatives(self._snapshot, rows)
        return rows if self._per_class is None else self._lowest(rows, self._per_class)

    def _with(self, rows: np.ndarray) -> Self:
        return type(self)(self._snapshot, self._filters, per_class=self._per_class, rows=rows)

    def _lowest(self, rows: np.ndarray, n: int) -> np.ndarray:
        import pandas as pd

        keys = pd.DataFrame({name: self._column(name, rows) for name in KEY_COLUMNS})
        # Stable, so that of records of one index the same are kept each time.
        ordered = keys.sort_values("index", kind="stable")
        groups = ordered.groupby(["node", "round", "split", "class_name"], sort=False)
        kept: np.ndarray = rows[np.sort(groups.head(n).index.to_numpy())]
        return kept

    def where(self, condition: str) -> Self:
        """Return the records that meet a condition in SQL, of the columns of `records`.

        Parameters
        ----------
        condition : str
            What would stand behind ``WHERE`` in DuckDB: ``"round % 5 = 0 AND audio_path LIKE
            '%.wav'"``. Names of nodes are text. ``timestamp`` is in UTC, and `extra` NULL where it
            is empty: ``(extra->>'$.label') = 'x'``. The table ``records`` is these records, for a
            subquery; files, network and variables are out of reach.

        Returns
        -------
        Selection
            Those records, in their order. What is known of all of them is read, no tensor.

        Raises
        ------
        SchemaMismatchError
            If it is no condition of these columns; says what DuckDB does.
        NotFoundError
            If DuckDB is not installed (extra ``sql``).
        """
        from fedgfe_store.readers.sql import positions

        return self.take(positions(self, condition))

    def to_store(
        self,
        path: Given,
        *,
        shared: bool = False,
        timeout: float = LOCK_TIMEOUT,
        progress: Callable[[int], object] = lambda records: None,
    ) -> None:
        """Make a store at `path` of these records, in one commit.

        Tensors are the same to the last bit, and all that is known of the records comes along.

        Parameters
        ----------
        path, shared, timeout
            As for `EmbeddingStore.create`, and what is raised.
        progress : callable
            Called with the number of records just copied. One that is here twice comes once.

        Raises
        ------
        DamagedDataError
            If a record is damaged. The new store has no records then.
        """
        create(location(path), self.schema, shared=shared, timeout=timeout)
        empty = latest(location(path))
        batch = AppendBatch(
            empty,
            begin=lambda known: engine_of(empty).begin(known, timeout=timeout),
            node=None,
            round=None,
            if_exists="error",
            source=f"part of {self.schema.metadata.experiment or self.location.name}",
            done=lambda state: None,
        )
        with batch:
            for records in self.pieces():
                batch.add_records(records)
                progress(len(records))

    def mean(self, by: Sequence[str] = ("round", "class_name")) -> Means:
        """Return the mean of each group of records, which is computed as it is read.

        Parameters
        ----------
        by : sequence of str
            Key columns: records that agree in all of them form a group.

        Returns
        -------
        Means
            One derived record a group, for `generate` and `walk`, or to `read`. No tensor is read.

        Raises
        ------
        SchemaMismatchError
            If `by` is of no use.
        """
        from fedgfe_store.derived.mean import Means

        chosen = dict(self._filters)
        if self._per_class is not None:
            chosen["per_class"] = self._per_class
        return Means.of(self, by, None if self._taken is not None else chosen)


def _without_negatives(snapshot: State, rows: np.ndarray) -> np.ndarray:
    """Leave out what guidance leads away from, which is of no class."""
    negatives = snapshot.rows_matching(
        {"node": [TEXT_NODE], "round": [TEXT_ROUND], "split": [NEGATIVE_SPLIT]}
    )
    return rows[~np.isin(rows, negatives)] if len(negatives) else rows


def _as_given(value: Any) -> Any:
    """Return a filter's values as people give them: a single range without a list around it."""
    is_one_range = isinstance(value, list) and len(value) == 1 and isinstance(value[0], range)
    return value[0] if is_one_range else value
