"""Reading a selection's vectors and keys a few records at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.selection import Selection

Tokens = Literal["mean", "flat"]
Progress = Callable[[int], object]
Vectors = NDArray[np.float64]

_BATCH_BYTES = 32 * 2**20
_KEYS_AT_ONCE = 16384


@dataclass(frozen=True)
class Features:
    """How the records of a tensor column become vectors.

    Parameters
    ----------
    column : str
        Tensor column.
    shape : tuple of int
        Shape of one vector: that of the column, or without its token axis.
    dims : tuple of str
        Names of these axes.
    pooled : bool
        Whether a vector is the mean over the tokens.
    """

    column: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    pooled: bool

    @classmethod
    def of(cls, selection: Selection, column: str, tokens: Tokens) -> Features:
        """Return how `column` of `selection` becomes vectors.

        Raises
        ------
        SchemaMismatchError
            If there is no such column or no such way.
        """
        if tokens not in ("mean", "flat"):
            raise SchemaMismatchError(f"tokens: expected 'mean' or 'flat', got {tokens!r}")
        known = selection.schema.column(column)
        pooled = tokens == "mean" and len(known.shape) > 1
        cut = 1 if pooled else 0
        return cls(column, known.shape[cut:], known.dims[cut:], pooled)

    @property
    def width(self) -> int:
        """Numbers in one vector."""
        return prod(self.shape)

    def read(self, selection: Selection) -> Vectors:
        """Return the vectors of a few records, ``[n, width]``."""
        values = selection.read(self.column)
        if self.pooled:
            values = values.mean(axis=1, dtype=np.float64)
        return values.reshape(len(values), self.width).astype(np.float64, copy=False)

    def describe(self) -> dict[str, str]:
        """Return the attributes that tell how a result was made."""
        return {"column": self.column, "tokens": "mean" if self.pooled else "flat"}


def check_selection(what: str, selection: Selection) -> None:
    """Refuse what is no selection.

    Raises
    ------
    SchemaMismatchError
        If it is none.
    """
    if not isinstance(selection, Selection):
        raise SchemaMismatchError(
            f"{what}: expected a selection, such as store.select(), got {type(selection).__name__}"
        )


def squares(values: Vectors) -> float:
    """Return the sum of squares, without the threads of BLAS: on a busy machine they wait."""
    return float(np.einsum("i,i->", values.ravel(), values.ravel()))


def with_values(selection: Selection, column: str) -> Selection:
    """Return the records of `selection` that have a value in the tensor column `column`."""
    if not selection.schema.column(column).optional:
        return selection
    present = key_frame(selection, [f"has_{column}"])[f"has_{column}"].to_numpy(bool)
    return selection.take(np.flatnonzero(present))


def key_frame(selection: Selection, columns: Sequence[str]) -> pd.DataFrame:
    """Return some columns of `Selection.records`, without all of it in memory at once."""
    names = list(columns)
    parts = [part.records[names] for _, part in selection.parts(_KEYS_AT_ONCE)]
    return pd.concat(parts or [selection.records[names]], ignore_index=True)


def read_vectors(selection: Selection, features: Features) -> Iterator[tuple[slice, Vectors]]:
    """Yield positions and vectors of `selection`, in parts whose tensors take some 32 MB."""
    size = max(1, _BATCH_BYTES // selection.schema.column(features.column).nbytes)
    for positions, part in selection.parts(size):
        yield positions, features.read(part)
