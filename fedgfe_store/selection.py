"""Records picked by filters: lazily, and readable as pandas, xarray or torch."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fedgfe_store.common.filters import wanted_values
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, NEGATIVE_SPLIT, TEXT_NODE, TEXT_ROUND
from fedgfe_store.rows import Rows
from fedgfe_store.storage.state import State

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    import xarray as xr
    from ray.data import Dataset

    from fedgfe_store.derived.mean import Means
    from fedgfe_store.readers.exporting import ExportedFile
    from fedgfe_store.readers.torch import Batches


class Selection(Rows):
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

    def to_xarray(self, *, chunks: int | Mapping[str, int] | None = None) -> xr.Dataset:
        """Return the selection as a lazy Dataset.

        Parameters
        ----------
        chunks : int or mapping, optional
            Tensors as dask arrays of so many records a chunk, ``256`` or ``{"record": 256}``;
            ``{}`` for whole tensor files near 64 MiB. Whoever computes holds several chunks.

        Returns
        -------
        Dataset
            Tensor columns along ``record``; the keys index it, so that ``.sel(round=5,
            class_name="dog")`` works, see `RecordIndex`, and are coordinates to group by.
            Tensors are read, and checked, when their values are used. ``length_<name>`` and
            ``has_<name>`` are coordinates of the records. ``to_netcdf`` and ``to_zarr`` take
            it; with `chunks` so much at a time.
        """
        from fedgfe_store.readers.xarray import to_dataset

        return to_dataset(self, chunks)

    def to_ray(self, *, columns: Sequence[str] | None = None) -> Dataset:
        """Return the selection as a Ray Data dataset, a row for each record.

        Parameters
        ----------
        columns : sequence of str, optional
            Tensor columns, as for `batches`.

        Returns
        -------
        ray.data.Dataset
            The five key columns and the tensors. Nothing is read before it is used; then Ray's
            workers, which see the store under the same path, read blocks of some 64 MB.

        Raises
        ------
        NotFoundError
            If Ray is not installed.
        SchemaMismatchError
            If there is no such column.
        """
        from fedgfe_store.readers.ray import to_ray

        return to_ray(self, columns)

    def to_parquet(
        self,
        folder: str | Path,
        *,
        tensors: Sequence[str] | None = (),
        overwrite: bool = False,
        on_file: Callable[[ExportedFile], object] | None = None,
    ) -> tuple[ExportedFile, ...]:
        """Write the records as Parquet, a file for each node and round.

        What DuckDB, polars, pandas and Hugging Face's ``load_dataset("parquet",
        data_dir=folder)`` read. Memory for one row group is needed, some 64 MB.

        Parameters
        ----------
        folder : path-like
            Where the files go; made if it is not there.
        tensors : sequence of str, optional
            Tensor columns that are written too, None for all, as float32 lists of fixed sizes, one
            in another; of a ragged column the records' own lengths. NULL where there is none.
        overwrite : bool
            Replace files that are there already.
        on_file : callable, optional
            Called with each file's report when it is done.

        Returns
        -------
        tuple of ExportedFile
            By round and node. Each file takes its place in one step; one with a damaged record
            is reported and not written.

        Raises
        ------
        ConflictError
            If files are there already, without `overwrite`.
        SchemaMismatchError
            If there is no such column.
        NotFoundError
            If pyarrow is not installed (extra ``parquet``).
        """
        from fedgfe_store.readers.parquet import to_parquet

        return to_parquet(self, folder, tensors, overwrite=overwrite, on_file=on_file)

    def to_safetensors(
        self,
        folder: str | Path,
        *,
        tensors: Sequence[str] | None = None,
        overwrite: bool = False,
        on_file: Callable[[ExportedFile], object] | None = None,
    ) -> tuple[ExportedFile, ...]:
        """Write tensors as safetensors, a file for each node and round.

        Parameters
        ----------
        tensors : sequence of str, optional
            Tensor columns, by default all: stacks ``[n, *shape]`` as `read` gives them, in
            bfloat16 where the store rounds to it. ``has_<name>`` and ``length_<name>`` are
            beside them. The file's metadata has the columns of `records` as JSON in ``records``.
        folder, overwrite, on_file
            As for `to_parquet`, and so are result and errors.
        """
        from fedgfe_store.readers.safetensors import to_safetensors

        return to_safetensors(self, folder, tensors, overwrite=overwrite, on_file=on_file)

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
            Data type of the embeddings, by default float32; masks and lengths keep theirs.
        columns : sequence of str, optional
            Tensor columns, by default all that every record has. A ragged column brings its
            lengths as ``length_<name>``; ``has_<name>`` of an optional one can be named, too.
        prefetch : int
            Batches read ahead; 0 reads in the caller's thread.
        pin_memory : bool
            Decode straight into page-locked memory, which ``batch["t5"].to("cuda",
            non_blocking=True)`` copies from while the GPU goes on.

        Returns
        -------
        Batches
            A sized iterable of `Batch`, and a torch ``IterableDataset``.
        """
        from fedgfe_store.readers.torch import Batches

        return Batches(
            self,
            batch_size,
            dtype=dtype,
            columns=columns,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )


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
