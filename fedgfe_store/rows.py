"""Records of a snapshot by their row numbers: what readers of any framework build upon."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fedgfe_store.common.filters import position_array
from fedgfe_store.common.location import Location, own_folder
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import (
    KEY_COLUMNS,
    NOTE_COLUMNS,
    RecordBatch,
    RecordKey,
    are_negatives,
    check_keys,
)
from fedgfe_store.schema import Schema
from fedgfe_store.storage.checksums import hex_digests
from fedgfe_store.storage.state import State

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import xarray as xr


class Rows(ABC):
    """Records of a store, in a fixed order, as one commit shows them; `Selection` says which."""

    _snapshot: State

    @property
    @abstractmethod
    def rows(self) -> np.ndarray:
        """Row numbers of the records in the store's arrays, int64 ``[n]``."""

    @abstractmethod
    def _with(self, rows: np.ndarray) -> Self:
        """Return the records in these rows."""

    @abstractmethod
    def others(self, *, per_class: int | None = None, **filters: Any) -> Rows:
        """Return other records of the same store and commit, by default all."""

    @property
    def path(self) -> Path:
        """Folder of the store; SchemaMismatchError where it is read from a URL."""
        return own_folder(self._snapshot.path)

    @property
    def location(self) -> Location:
        """Where the store is: its folder, or the address that `str` makes a URL."""
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

    @cached_property
    def classes(self) -> list[str]:
        """Classes of all records of the store at this commit, selected or not, sorted.

        A class's place in it is its number: the same for every selection of the commit.
        """
        rows = self._snapshot.rows_matching({})
        names = ("node", "split", "class_name")
        self._snapshot.fetch(names, rows)
        known = {name: self._snapshot.column_at(name, rows) for name in names}
        return sorted(set(known["class_name"][~are_negatives(known)].tolist()))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.rows)

    def __bool__(self) -> bool:
        return True

    def _column(self, name: str, rows: np.ndarray) -> np.ndarray:
        values = self._snapshot.column_at(name, rows)
        return values.astype(object) if values.dtype.kind == "T" else values

    def column(self, name: str) -> np.ndarray:
        """Return a key column or note of the records, such as ``"class_name"``, ``[n]``.

        Raises
        ------
        SchemaMismatchError
            If there is none of that name.
        """
        if name not in (*KEY_COLUMNS, *NOTE_COLUMNS):
            raise SchemaMismatchError(
                f"column: expected one of {', '.join((*KEY_COLUMNS, *NOTE_COLUMNS))}, got {name!r}"
            )
        return self._snapshot.column_at(name, self.rows)

    @cached_property
    def records(self) -> pd.DataFrame:
        """Everything but the tensors, one row per record.

        Returns
        -------
        DataFrame
            Columns ``node``, ``round``, ``split``, ``class_name``, ``index``, ``sample_id``,
            ``image_filename``, ``audio_path``, ``timestamp`` (UTC), ``extra`` (JSON), a
            ``<tensor>_digest`` for each tensor column (16 hex digits, as in images and in the
            gallery) and ``recorded_in``, the commit that first wrote the record;
            ``has_<tensor>`` for each optional column, and ``length_<tensor>`` for each ragged
            one. The frame's own index counts from 0.
        """
        import pandas as pd

        names = [*KEY_COLUMNS, *NOTE_COLUMNS]
        names += self.schema.marks
        names += [f"{name}_digest" for name in self.schema.columns] + ["recorded_in"]
        self._snapshot.fetch([*names, "row_digest"], self.rows)
        # For its check that keys and notes belong together; what it read is kept for below.
        self._snapshot.notes(self.rows)
        frame = pd.DataFrame({name: self._column(name, self.rows) for name in names})
        for name in self.schema.columns:
            # 64 bits as a number are rounded by JavaScript, and refused by what knows signed ones.
            digests = hex_digests(frame[f"{name}_digest"].to_numpy())
            frame[f"{name}_digest"] = np.array(digests, object)
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

    def by_node_and_round(self) -> dict[tuple[str, int], np.ndarray]:
        """Return the positions of the records, int64 ``[n]``, of each node and round."""
        import pandas as pd

        keys = pd.DataFrame({name: self._column(name, self.rows) for name in ("node", "round")})
        groups: Any = keys.groupby(["node", "round"], sort=False).indices
        return {(str(node), int(number)): at for (node, number), at in groups.items()}

    def keys(self) -> list[RecordKey]:
        """Return the records' keys."""
        return self._snapshot.keys(self.rows)

    def check_keys(self) -> None:
        """Check that keys and notes of each record belong together, as `keys` and `records` do.

        Raises
        ------
        DamagedDataError
            If they are not those that were committed together.
        """
        self._snapshot.notes(self.rows)

    def key_columns(self) -> dict[str, np.ndarray]:
        """Return the key columns of the records as they stand, without an object for each.

        That they belong together is checked where a record is used: by `keys`, `records`, `read`.
        """
        self._snapshot.fetch(KEY_COLUMNS, self.rows)
        return {name: self._snapshot.column_at(name, self.rows) for name in KEY_COLUMNS}

    def digests(self, column: str) -> np.ndarray:
        """Return the digest of each record's values in a tensor column, uint64 ``[n]``."""
        return self._snapshot.column_at(f"{column}_digest", self.rows)

    def compacted_away(self) -> np.ndarray:
        """Return which records have lost their tensors to a later compaction, bool ``[n]``.

        Only those of an older commit can; `read` refuses them, all else of them can be read.
        """
        gone = np.zeros(len(self), bool)
        if self._snapshot.point.compacted <= self.commit:
            return gone
        granules, places = np.unique(self.rows // self.schema.granule, return_inverse=True)
        for tensor in self.schema.tensors:
            files, place = self._snapshot.tensor_files[tensor.name], self._snapshot.place
            names = map(files.file_name, granules.tolist())
            lost = np.array([not place.exists(name) for name in names], bool)
            here = lost[places]
            if tensor.optional:
                here &= self._snapshot.column_at(f"has_{tensor.name}", self.rows)
            gone |= here
        return gone

    def __getitem__(self, positions: Any) -> Self:
        """Return some of the records, as `take` does; a single position is one record."""
        if isinstance(positions, str):
            raise SchemaMismatchError(
                f"expected positions of records, got {positions!r}: read({positions!r}) reads a "
                f"tensor column, and column({positions!r}) another one"
            )
        return self.take([positions] if is_whole(positions) else positions)

    # Otherwise Python would go over positions, and make a selection for each.
    __iter__ = None

    def __getitems__(self, positions: Any) -> None:
        """Say what a DataLoader takes: it would ask for the records here, and not know them."""
        raise SchemaMismatchError(
            "expected DataLoader(selection.to_torch(), batch_size=32) or "
            "DataLoader(selection.batches(32), batch_size=None), got DataLoader(selection)"
        )

    def take(self, positions: Sequence[int] | Sequence[bool] | np.ndarray | slice) -> Self:
        """Return some of the records.

        Parameters
        ----------
        positions : sequence of int, sequence of bool or slice
            Positions among these records, in the order wanted, repeats allowed, negative ones from
            the end; or a mask, one bool for each record, such as ``records.split == "test"`` or
            a DataArray of `to_xarray`; or a slice.

        Raises
        ------
        SchemaMismatchError
            If it is none of these, such as a mask of another length, or fractions.
        """
        return self._with(self._rows_at(positions))

    def _rows_at(self, positions: Any) -> np.ndarray:
        rows = self.rows
        if isinstance(positions, slice):
            try:
                return rows[positions]
            except TypeError:
                raise SchemaMismatchError(
                    f"take: expected a slice of whole numbers, got {positions}"
                ) from None
        if hasattr(positions, "coords"):
            self._check_order(positions)
        found: np.ndarray = rows[position_array(positions, len(rows))]
        return found

    def _check_order(self, array: xr.DataArray) -> None:
        """Refuse an array of xarray whose keys are not those of the records, one by one."""
        for name in KEY_COLUMNS:
            given = array.coords.get(name)
            if given is not None and not np.array_equal(given, self._column(name, self.rows)):
                raise SchemaMismatchError(
                    f"take: expected the {name} of the records in their order, got an array "
                    f"of others"
                )

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
        if column in self.schema.marks and column not in self.schema.columns:
            return self._marks(column, out)
        if out is not None:
            known = self.schema.column(column)
            _check_memory(out, (len(self), *known.shape), known.dtype)
        return self._snapshot.read(column, self.rows, out=out)

    def _marks(self, name: str, out: np.ndarray | None) -> np.ndarray:
        values = self._snapshot.column_at(name, self.rows)
        if out is None:
            return values
        _check_memory(out, values.shape, values.dtype.name)
        out[...] = values
        return out

    def known_columns(self) -> dict[str, np.ndarray]:
        """Return all that is known of the records besides their tensors, an array ``[n]`` each."""
        names = self._snapshot.group.key_names
        self._snapshot.fetch(names, self.rows)
        return {name: self._snapshot.column_at(name, self.rows) for name in names}

    def parts(self, size: int) -> Iterator[tuple[slice, Self]]:
        """Yield the records, `size` at a time, with their positions among all; nothing is read.

        Whoever goes over more records than fit memory does it by this.
        """
        for start in range(0, len(self), size):
            positions = slice(start, min(start + size, len(self)))
            yield positions, self._with(self.rows[positions])

    def pieces(self) -> Iterator[RecordBatch]:
        """Yield the records with all that is known of them, a few tensor files at a time."""
        # A multiple of what a file holds, so that few files are opened twice.
        for _, part in self.parts(self.schema.granule * 4):
            self._snapshot.notes(part.rows)  # for its check, as in `records`
            tensors = {name: part.read(name) for name in self.schema.columns}
            yield RecordBatch(part.known_columns(), tensors)


def _check_memory(out: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    right = (out.shape, out.dtype) == (shape, np.dtype(dtype))
    if not (right and out.flags.c_contiguous and out.flags.writeable):
        states = [("contiguous", out.flags.c_contiguous), ("writable", out.flags.writeable)]
        got = " ".join(f"{'' if holds else 'not '}{state}," for state, holds in states)
        raise SchemaMismatchError(
            f"out: expected contiguous, writable, {dtype} {list(shape)}, "
            f"got {got} {out.dtype} {list(out.shape)}"
        )
