"""Records picked by filters: lazily, and readable as pandas, xarray or torch."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgfe_store._snapshot import Snapshot
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import (
    KEY_COLUMNS,
    NOTE_COLUMNS,
    RecordBatch,
    RecordKey,
    check_keys,
    is_whole,
)
from fedgfe_store.schema import Schema

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch
    import xarray as xr

    from fedgfe_store.torch_data import Batches

_NUMBERS = ("round", "index")
_FEW = 20
"""Texts up to which one comparison after another is fastest."""


class Selection:
    """Records of a store, in a fixed order, as one commit shows them.

    Made by `EmbeddingStore.select`. Key columns are read when first needed; tensors only by
    `read`, by `batches` as it is iterated, and by the arrays of `to_xarray` as they are used.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        filters: Mapping[str, Any],
        *,
        per_class: int | None,
        rows: np.ndarray | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._filters = filters
        self._per_class = per_class
        self._given = rows

    @classmethod
    def of(
        cls, snapshot: Snapshot, filters: Mapping[str, Any], *, per_class: int | None = None
    ) -> Selection:
        """Return the records of `snapshot` that meet `filters`; see `EmbeddingStore.select`."""
        if per_class is not None and not (is_whole(per_class) and per_class >= 1):
            raise SchemaMismatchError(
                f"per_class: expected a whole number from 1 up, got {per_class!r}"
            )
        checked = {name: wanted_values(name, value) for name, value in filters.items()}
        return cls(snapshot, checked, per_class=per_class)

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self._snapshot.path

    @property
    def schema(self) -> Schema:
        """What the records look like."""
        return self._snapshot.schema

    @property
    def commit(self) -> int:
        """Number of the commit that is seen."""
        return self._snapshot.commit

    @property
    def store_id(self) -> str | None:
        """Identity of the store; None for one of format version 1."""
        return self._snapshot.group.id

    @property
    def as_of(self) -> int | None:
        """The commit that was asked for; None where the store was seen as it is."""
        return self._snapshot.as_of

    def others(self, **filters: Any) -> Selection:
        """Return other records of the same store and commit; see `EmbeddingStore.select`."""
        return Selection.of(self._snapshot, filters)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.rows)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        shown = ", ".join(self._description()) or "all records"
        return f"<Selection of {self.path} at commit {self.commit}: {len(self)} records ({shown})>"

    def _repr_html_(self) -> str:
        from fedgfe_store._html import selection_html

        return selection_html(self, self._snapshot, self._description())

    def _description(self) -> list[str]:
        filters = dict(self._filters)
        if self._per_class is not None:
            filters["per_class"] = self._per_class
        parts = [f"{name}={reprlib.repr(value)}" for name, value in filters.items()]
        return parts if self._given is None else [*parts, "taken by position"]

    @cached_property
    def rows(self) -> np.ndarray:
        """Row numbers of the records in the store's arrays, int64 ``[n]``."""
        if self._given is not None:
            return self._given
        rows = np.flatnonzero(self._snapshot.visible)
        for name in sorted(self._filters, key=_NUMBERS.__contains__, reverse=True):
            values = self._snapshot.column_at(name, rows)
            rows = rows[_matches(values, self._filters[name])]
        return rows if self._per_class is None else self._lowest(rows, self._per_class)

    def _lowest(self, rows: np.ndarray, n: int) -> np.ndarray:
        import pandas as pd

        keys = pd.DataFrame({name: self._column(name, rows) for name in KEY_COLUMNS})
        ordered = keys.sort_values("index", kind="stable")
        groups = ordered.groupby(["node", "round", "split", "class_name"], sort=False)
        kept: np.ndarray = rows[np.sort(groups.head(n).index.to_numpy())]
        return kept

    def _column(self, name: str, rows: np.ndarray) -> np.ndarray:
        values = self._snapshot.column_at(name, rows)
        return values.astype(object) if values.dtype.kind == "T" else values

    @cached_property
    def records(self) -> pd.DataFrame:
        """Everything but the tensors, one row per record.

        Returns
        -------
        DataFrame
            Columns ``node``, ``round``, ``split``, ``class_name``, ``index``, ``sample_id``,
            ``image_filename``, ``audio_path``, ``timestamp`` (UTC), ``extra`` (JSON), a
            ``<tensor>_digest`` for each tensor column and ``recorded_in``, the commit that
            first wrote the record. The frame's own index counts the selection from 0.
        """
        import pandas as pd

        self._snapshot.notes(self.rows)
        names = [*KEY_COLUMNS, *NOTE_COLUMNS]
        names += [name for name in self._snapshot.group.key_names if name.startswith("has_")]
        names += [f"{name}_digest" for name in self.schema.columns] + ["recorded_in"]
        frame = pd.DataFrame({name: self._column(name, self.rows) for name in names})
        frame["timestamp"] = pd.to_datetime(frame["timestamp"], unit="ms", utc=True)
        return frame

    def counts(self, *columns: str) -> pd.Series[int]:
        """Return how many records there are of each combination of key columns' values.

        Parameters
        ----------
        *columns : str
            Key columns, such as ``"round", "node"``.

        Returns
        -------
        Series of int
            Counts, indexed by the values that occur, sorted.

        Raises
        ------
        SchemaMismatchError
            If a name is not that of a key column, or none is given.
        """
        import pandas as pd

        check_keys("counts", columns)
        keys = pd.DataFrame({name: self._column(name, self.rows) for name in columns})
        return keys.groupby(list(columns), sort=True).size()

    def keys(self) -> list[RecordKey]:
        """Return the records' keys."""
        return self._snapshot.keys(self.rows)

    def by_node_and_round(self) -> dict[tuple[str, int], np.ndarray]:
        """Return the positions of the records, int64 ``[n]``, of each node and round."""
        import pandas as pd

        keys = pd.DataFrame({name: self._column(name, self.rows) for name in ("node", "round")})
        groups: Any = keys.groupby(["node", "round"], sort=False).indices
        return {(str(node), int(number)): at for (node, number), at in groups.items()}

    def take(self, positions: Sequence[int] | np.ndarray | slice) -> Selection:
        """Return the records at `positions` of this selection, in that order."""
        rows = self.rows[positions if isinstance(positions, slice) else np.asarray(positions, int)]
        return Selection(self._snapshot, self._filters, per_class=self._per_class, rows=rows)

    def read(self, column: str, *, out: np.ndarray | None = None) -> np.ndarray:
        r"""Read a tensor column of the selected records into memory.

        Parameters
        ----------
        column : str
            Name of the tensor column.
        out : ndarray of float32, shape [n, \*shape], optional
            Memory to decode into, such as pinned memory; contiguous and writable. What it holds
            after an error is undefined.

        Returns
        -------
        ndarray of float32, shape [n, \*shape]
            NaN where a record has no value in an optional column; `out` if it is given.

        Raises
        ------
        DamagedDataError
            If a record's values are not those that were committed; names the record.
        SchemaMismatchError
            If `out` is not as it must be.
        """
        if out is not None:
            self._check_memory(column, out)
        return self._snapshot.read(column, self.rows, out=out)

    def _check_memory(self, column: str, out: np.ndarray) -> None:
        shape = (len(self), *self.schema.column(column).shape)
        right = (out.shape, out.dtype) == (shape, np.dtype(np.float32))
        if not (right and out.flags.c_contiguous and out.flags.writeable):
            states = [("contiguous", out.flags.c_contiguous), ("writable", out.flags.writeable)]
            got = " ".join(f"{'' if holds else 'not '}{state}," for state, holds in states)
            raise SchemaMismatchError(
                f"out: expected contiguous, writable, float32 {list(shape)}, "
                f"got {got} {out.dtype} {list(out.shape)}"
            )

    def to_xarray(self) -> xr.Dataset:
        """Return the selection as a lazy Dataset.

        Returns
        -------
        Dataset
            Tensor columns along ``record``; the keys are a MultiIndex on it, so that
            ``.sel(round=5, class_name="dog")`` works. Tensors are read, and checked, when their
            values are used.
        """
        from fedgfe_store._xarray import to_dataset

        return to_dataset(self)

    def key_columns(self) -> dict[str, np.ndarray]:
        """Return all that is known of the records besides their tensors, an array ``[n]`` each."""
        return self._key_columns(self.rows)

    def _key_columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        names = self._snapshot.group.key_names
        return {name: self._snapshot.column_at(name, rows) for name in names}

    def pieces(self) -> Iterator[RecordBatch]:
        """Yield the records with all that is known of them, a few tensor files at a time."""
        step = self.schema.granule * 4
        for start in range(0, len(self), step):
            rows = self.rows[start : start + step]
            self._snapshot.notes(rows)
            columns = self._key_columns(rows)
            tensors = {name: self._snapshot.read(name, rows) for name in self.schema.columns}
            yield RecordBatch(columns, tensors)

    def batches(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        columns: Sequence[str] | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> Batches:
        """Return the selection as torch batches, read ahead by a thread while iterated.

        Parameters
        ----------
        batch_size : int
            Records per batch; the last one holds what remains.
        dtype : torch.dtype, optional
            Data type of the tensors, by default float32.
        columns : sequence of str, optional
            Tensor columns, by default all that every record has.
        prefetch : int
            Batches read ahead; 0 reads in the caller's thread.
        pin_memory : bool
            Decode straight into page-locked memory, which ``batch["t5"].to("cuda",
            non_blocking=True)`` copies from while the GPU goes on.

        Returns
        -------
        Batches
            A sized iterable of `Batch`.
        """
        from fedgfe_store.torch_data import Batches

        return Batches(
            self,
            batch_size,
            dtype=dtype,
            columns=columns,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )


def wanted_values(name: str, value: Any) -> range | list[Any]:
    """Return the value of the filter `name` as a range, or as a list of the column's type.

    Raises
    ------
    SchemaMismatchError
        If it is of another type.
    """
    if isinstance(value, range):
        return value if name in _NUMBERS else [_one(name, number) for number in value]
    if isinstance(value, str | bytes) or is_whole(value) or not isinstance(value, Iterable):
        return [_one(name, value)]
    return [_one(name, each) for each in value]


def _one(name: str, value: Any) -> str | int:
    if name in _NUMBERS:
        if is_whole(value):
            return operator.index(value)
        raise SchemaMismatchError(f"{name}: expected whole numbers or a range, got {value!r}")
    if name == "node" and is_whole(value):
        return str(operator.index(value))
    if isinstance(value, str):
        return str(value)
    raise SchemaMismatchError(f"{name}: expected text, got {value!r}")


def _matches(values: np.ndarray, wanted: range | list[Any]) -> np.ndarray:
    if isinstance(wanted, range):
        if not wanted:
            return np.zeros(len(values), bool)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
        wide = values.astype(np.int64)
        mask: np.ndarray = (wide >= low) & (wide <= high) & ((wide - low) % abs(wanted.step) == 0)
        return mask
    if values.dtype.kind == "T":
        return _is_among(values, wanted)
    if len(wanted) == 1:
        return np.asarray(values == wanted[0])
    return np.isin(values, np.array(wanted, np.int64))


def _is_among(values: np.ndarray, texts: list[Any]) -> np.ndarray:
    """Return which of `values` are one of `texts`, to the last character.

    Compared with plain text, also by `np.isin`, numpy overlooks U+0000 at its end.
    """
    if len(texts) > _FEW:
        return np.fromiter(map(set(texts).__contains__, values.tolist()), bool, len(values))
    mask = np.zeros(len(values), bool)
    for text in texts:
        mask |= values == np.array(text, values.dtype)
    return mask
