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
    ragged : bool
        Whether records have different numbers of tokens.
    """

    column: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    pooled: bool
    ragged: bool

    @classmethod
    def of(cls, selection: Selection, column: str | None, tokens: Tokens) -> Features:
        """Return how `column` of `selection`, by default `main_column`, becomes vectors.

        Raises
        ------
        SchemaMismatchError
            If there is no such column of embeddings, or no such way.
        """
        if tokens not in ("mean", "flat"):
            raise SchemaMismatchError(f"tokens: expected 'mean' or 'flat', got {tokens!r}")
        known = selection.schema.column(column or main_column(selection))
        if known.dtype != "float32":
            others = ", ".join(t.name for t in selection.schema.tensors if t.dtype == "float32")
            raise SchemaMismatchError(
                f"column: expected one of embeddings ({others or 'there is none'}), got "
                f"{known.describe()}"
            )
        pooled = tokens == "mean" and len(known.shape) > 1
        cut = 1 if pooled else 0
        return cls(known.name, known.shape[cut:], known.dims[cut:], pooled, known.ragged)

    @property
    def width(self) -> int:
        """Numbers in one vector."""
        return prod(self.shape)

    def read(self, selection: Selection) -> Vectors:
        """Return the vectors of a few records, ``[n, width]``."""
        values = selection.read(self.column)
        if self.pooled and self.ragged:
            lengths = selection.read(f"length_{self.column}").reshape(-1, *(1,) * len(self.shape))
            values = values.sum(axis=1, dtype=np.float64) / lengths
        elif self.pooled:
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


def main_column(selection: Selection) -> str:
    """Return the column that is looked at when none is named: the first of embeddings.

    Raises
    ------
    SchemaMismatchError
        If there is none.
    """
    names = [t.name for t in selection.schema.tensors if t.dtype == "float32"]
    if not names:
        raise SchemaMismatchError(
            f"{selection.location}: expected a column of embeddings (float32), got "
            f"{selection.schema.describe()}"
        )
    return names[0]


def with_values(selection: Selection, column: str) -> Selection:
    """Return the records of `selection` that have a value in the tensor column `column`.

    One of length 0 in a ragged column has none.
    """
    marks = selection.schema.column(column).marks
    if not marks:
        return selection
    present = key_frame(selection, marks)[list(marks)].to_numpy(np.int64).all(axis=1)
    return selection.take(np.flatnonzero(present))


def key_frame(selection: Selection, columns: Sequence[str]) -> pd.DataFrame:
    """Return some columns of `Selection.records`, without all of it in memory at once."""
    names = list(columns)
    parts = [part.records[names] for _, part in selection.parts(_KEYS_AT_ONCE)]
    return pd.concat(parts or [selection.records[names]], ignore_index=True)


def batch_records(selection: Selection, features: Features) -> int:
    """Return of how many records the tensors take some 32 MB."""
    return max(1, _BATCH_BYTES // selection.schema.column(features.column).nbytes)


def read_vectors(selection: Selection, features: Features) -> Iterator[tuple[slice, Vectors]]:
    """Yield positions and vectors of `selection`, in parts whose tensors take some 32 MB."""
    for positions, part in selection.parts(batch_records(selection, features)):
        yield positions, features.read(part)
