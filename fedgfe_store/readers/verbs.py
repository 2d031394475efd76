"""What rows can be read as; each reader is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedgfe_store.rows import Rows

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    import xarray as xr
    from ray.data import Dataset

    from fedgfe_store.readers.exporting import ExportedFile
    from fedgfe_store.readers.torch import Batches, RecordDataset


class ReadableRows(Rows):
    """Rows that can be read as xarray, torch, Ray Data, Parquet and safetensors."""

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
        labels: bool = False,
        shuffle: bool = False,
        seed: int | None = None,
        drop_last: bool = False,
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
        labels : bool
            Give ``batch["label"]`` too, int64 ``[b]``: the place of a record's class in `classes`.
        shuffle : bool
            Give the records in a random order, a permutation of them all. A record is read alone at
            its own cost, so that nothing is held for that but the order.
        seed : int, optional
            Fixes the order: every pass has the same, unless `Batches.set_epoch` asks for another.
            Without, each pass has one of its own, from torch's generator, so that
            ``torch.manual_seed`` repeats a run.
        drop_last : bool
            Leave out a last batch that is smaller.
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
            classes=self.classes if labels else None,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            prefetch=prefetch,
            pin_memory=pin_memory,
        )

    def to_torch(
        self,
        *,
        dtype: torch.dtype | None = None,
        columns: Sequence[str] | None = None,
        labels: bool = False,
    ) -> RecordDataset:
        """Return the selection as a map-style torch Dataset, for a DataLoader with any sampler.

        Parameters
        ----------
        dtype, columns, labels
            As for `batches`.

        Returns
        -------
        RecordDataset
            Record `i` is a dict of tensors by column, ``[*shape]`` each. A DataLoader has a batch
            read at once, also in workers, forked or spawned; ``DistributedSampler`` shares the
            records among ranks.
        """
        from fedgfe_store.readers.torch import RecordDataset

        return RecordDataset(
            self, dtype=dtype, columns=columns, classes=self.classes if labels else None
        )
