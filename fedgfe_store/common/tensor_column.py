"""One tensor column of a store: name, shape, axes, and what its values are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Self, get_args

from fedgfe_store.common.words import is_utf8, shown
from fedgfe_store.errors import SchemaMismatchError

ColumnDtype = Literal["float32", "bool", "int32", "int64"]
"""What the values of a tensor column can be: embeddings, masks, and numbers of tokens."""

LARGEST_CHUNK = 2**31 - 17
"""Bytes that blosc, which codes a record or several as one chunk, takes at most."""
_MOST_AXES = 31
_ITEMSIZES: dict[str, int] = {"float32": 4, "bool": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class TensorColumn:
    """One tensor per record.

    Parameters
    ----------
    name : str
        The column's name.
    shape : tuple of int
        Shape without the record axis; of a ragged column that of the longest record.
    dims : tuple of str
        Names of these axes; by default ``<name>_axis_0`` and so on.
    optional : bool
        Whether a record may be without it; a bool column ``has_<name>`` tells.
    dtype : {"float32", "bool", "int32", "int64"}
        What its values are. Masks and numbers are kept exactly, whatever the precision.
    ragged : bool
        Whether records have different lengths along the first axis: they are padded with zeros,
        and an int32 column ``length_<name>`` tells the length.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...] = ()
    optional: bool = False
    dtype: ColumnDtype = "float32"
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.dims == () and isinstance(self.shape, tuple):
            dims = tuple(f"{self.name}_axis_{i}" for i in range(len(self.shape)))
            object.__setattr__(self, "dims", dims)

    @property
    def nbytes(self) -> int:
        """Bytes of one record's values."""
        return _ITEMSIZES[self.dtype] * prod(self.shape)

    @property
    def fill(self) -> float | int:
        """What stands where a record has no value: NaN, or 0 where there is no such thing."""
        return float("nan") if self.dtype == "float32" else 0

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the key columns that tell of it: ``has_<name>`` and ``length_<name>``."""
        has = (f"has_{self.name}",) if self.optional else ()
        return (*has, f"length_{self.name}") if self.ragged else has

    def describe(self) -> str:
        """Return the column in words, for messages: ``mask [512] bool, ragged``."""
        is_plain = self.dtype == "float32"
        text = f"{self.name} {list(self.shape)}" + ("" if is_plain else f" {self.dtype}")
        return f"{text} ragged" if self.ragged else text

    def check(self) -> None:
        """Refuse a column that no file can hold.

        Raises
        ------
        SchemaMismatchError
            If a value is of another type, or the shape is too large.
        """
        name = shown(self.name) if not isinstance(self.name, str) else self.name
        shape, dims = self.shape, self.dims
        fits = isinstance(shape, tuple) and isinstance(dims, tuple)
        fits = fits and all(_is_int(n) and n > 0 for n in shape)
        fits = fits and all(isinstance(axis, str) and is_utf8(axis) for axis in dims)
        if not fits or not 0 < len(shape) == len(dims) <= _MOST_AXES:
            raise SchemaMismatchError(
                f"{name}: expected a shape of positive whole numbers with one name for each "
                f"axis, got shape {shown(shape)} and axes {shown(dims)}"
            )
        if self.dtype not in get_args(ColumnDtype):
            raise SchemaMismatchError(
                f"{name}: expected one of {', '.join(get_args(ColumnDtype))}, got "
                f"{shown(self.dtype)}"
            )
        if self.nbytes > LARGEST_CHUNK:
            raise SchemaMismatchError(
                f"{name}: expected a record of at most {LARGEST_CHUNK:,} bytes of {self.dtype}, "
                f"got the shape {shown(shape)}"
            )
        for what, value in (("optional", self.optional), ("ragged", self.ragged)):
            if not isinstance(value, bool):
                raise SchemaMismatchError(
                    f"{name}: expected {what} to be true or false, got {shown(value)}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the column as it stands in a store's attributes, without its name."""
        known = {"shape": list(self.shape), "dims": list(self.dims), "optional": self.optional}
        # Only where they are needed: stores of plain columns stay what they were, byte for byte.
        if self.dtype != "float32":
            known["dtype"] = self.dtype
        return {**known, "ragged": True} if self.ragged else known

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Self:
        """Return the column that `to_json` wrote.

        Raises
        ------
        TypeError or KeyError
            If it is not one that `to_json` wrote.
        """
        shape, dims = data["shape"], data["dims"]
        if not (isinstance(shape, list) and isinstance(dims, list)):
            raise TypeError(f"expected lists, got {shown(shape)} and {shown(dims)}")
        options = {key: data[key] for key in ("dtype", "ragged") if key in data}
        return cls(name, tuple(shape), tuple(dims), data["optional"], **options)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
