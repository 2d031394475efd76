"""Values of a tensor column as a caller gives them: refused, or as an array that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema, TensorColumn

_FLOATS = ("float32", "float16", "bfloat16")


def taken(
    schema: Schema, column: TensorColumn, value: Any
) -> tuple[np.ndarray, np.ndarray | None] | None:
    r"""Return `value` as an array of the column's, in the caller's memory if it is so there.

    Parameters
    ----------
    schema : Schema
        The store's, for messages.
    column : TensorColumn
        The column.
    value : Tensor, ndarray, or for a ragged column a sequence of them; or None
        ``[n, *shape]``, or ``[*shape]`` for a single record; of a ragged column the first of
        these axes may be shorter, and a sequence has a ``[length, ...]`` for each record.

    Returns
    -------
    values : ndarray, shape [n, \*shape]
        Of the column's data type; a ragged column's padded with zeros.
    lengths : ndarray of int32, shape [n], or None
        How long each record is, in a ragged column.

    Raises
    ------
    SchemaMismatchError
        If a shape, data type or value does not fit the column.
    """
    if value is None:
        if column.optional:
            return None
        raise SchemaMismatchError(
            f"{column.name}: expected a tensor {list(column.shape)}, got None"
        )
    if column.ragged and isinstance(value, list | tuple):
        return _padded(schema, column, value)
    array = _array(column, value)
    if array.ndim == len(column.shape):
        array = array[np.newaxis]
    if not _fits(column, array.shape[1:]):
        raise _wrong_shape(schema, column, value)
    if not column.ragged:
        return array, None
    n, length = array.shape[:2]
    lengths = np.full(n, length, np.int32)
    if length < column.shape[0]:
        array, given = np.zeros((n, *column.shape), column.dtype), array
        array[:, :length] = given
    return array, lengths


def _padded(
    schema: Schema, column: TensorColumn, given: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return arrays of different lengths as one that is padded with zeros, and the lengths."""
    values = np.zeros((len(given), *column.shape), column.dtype)
    lengths = np.zeros(len(given), np.int32)
    for position, each in enumerate(given):
        record = f" (record {position} of {len(given)})"
        array = _array(column, each, record)
        if not _fits(column, array.shape):
            raise _wrong_shape(schema, column, each, record)
        values[position, : len(array)] = array
        lengths[position] = len(array)
    return values, lengths


def _fits(column: TensorColumn, shape: tuple[int, ...]) -> bool:
    if not column.ragged:
        return shape == column.shape
    first, *rest = column.shape
    return len(shape) == len(column.shape) and shape[0] <= first and [*shape[1:]] == rest


def _wrong_shape(
    schema: Schema, column: TensorColumn, value: Any, record: str = ""
) -> SchemaMismatchError:
    first, *rest = column.shape
    axes = [f"up to {first}" if column.ragged else str(first), *map(str, rest)]
    wanted = axes if record else ["n", *axes]
    return SchemaMismatchError(
        f"{column.name}: expected [{', '.join(wanted)}] as in the store "
        f"({schema.describe()}), got {list(value.shape)}{record}"
    )


def _array(column: TensorColumn, value: Any, record: str = "") -> np.ndarray:
    """Return a tensor or array as one of numpy, of the column's data type."""
    _check_values(column, value, record)
    try:
        plain = value.detach().cpu().resolve_neg() if is_tensor(value) else value
        if column.dtype == "float32":
            return np.asarray(plain.float().numpy() if is_tensor(value) else plain, np.float32)
        if is_tensor(value):
            plain = (plain.float() if plain.is_floating_point() else plain).numpy()
        return exact(column, np.asarray(plain), record)
    except (TypeError, ValueError) as error:  # of a kind that has its values elsewhere
        raise SchemaMismatchError(
            f"{column.name}: expected values in memory, got {kind(value)}: {error}{record}"
        ) from None


def exact(column: TensorColumn, values: np.ndarray, record: str = "") -> np.ndarray:
    """Return whole numbers or truth values in the column's data type, none of them changed.

    Raises
    ------
    SchemaMismatchError
        If one does not fit it; names it, and the `record`.
    """
    dtype = np.dtype(column.dtype)
    if values.dtype == dtype:
        return values
    if dtype.kind == "b":
        fits = (values == 0) | (values == 1)
    else:
        # As floats the bounds are powers of two, so that neither is rounded.
        low, beyond = -(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1)
        if values.dtype.kind == "f":
            fits = (values >= low) & (values < float(beyond)) & (np.trunc(values) == values)
        else:
            fits = (values >= low) & (values <= beyond - 1)
    if not fits.all():
        first = np.argwhere(~fits)[0].tolist()
        where = record or (f" (at {first})" if first else "")
        raise SchemaMismatchError(
            f"{column.name}: expected {'0 or 1, or bool' if dtype.kind == 'b' else dtype.name}, "
            f"got {values[tuple(first)]!s}{where}"
        )
    return values.astype(dtype)


def _check_values(column: TensorColumn, value: Any, record: str) -> None:
    """Refuse what is no tensor of values of the column's kind, or of which some are not there."""
    dtype = getattr(value, "dtype", None)
    name = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
    if not _is_taken(column, name):
        got = type(value).__name__ if dtype is None else name
        wanted = "float32, float16 or bfloat16" if column.dtype == "float32" else "numbers"
        advice = "; convert it first, so that what is lost is your choice"
        raise SchemaMismatchError(f"{column.name}: expected {wanted}, got {got}{advice}{record}")
    if isinstance(value, np.ma.MaskedArray):
        raise SchemaMismatchError(
            f"{column.name}: expected an array without a mask, which a store cannot keep, got a "
            f"masked array; fill it first{record}"
        )
    if is_tensor(value) and not is_dense(value):
        raise SchemaMismatchError(
            f"{column.name}: expected a dense tensor with its values in memory, got "
            f"{kind(value)}{record}"
        )


def _is_taken(column: TensorColumn, dtype: str) -> bool:
    if column.dtype == "float32":
        return dtype in _FLOATS
    return dtype in ("bool", "float64", *_FLOATS) or dtype.rstrip("0123456789") in ("int", "uint")


def is_tensor(value: Any) -> bool:
    """Whether `value` is a tensor of torch, without importing it."""
    return hasattr(value, "detach") and hasattr(value, "numpy")


def is_dense(tensor: Any) -> bool:
    """Whether torch has the values of `tensor`, one after another."""
    names = {each.__name__ for each in type(tensor).__mro__}
    return (
        str(tensor.layout) == "torch.strided"
        and not (tensor.is_nested or tensor.is_meta)
        and not names & {"FakeTensor", "FunctionalTensor"}
    )


def kind(value: Any) -> str:
    """Return what sort of tensor `value` is."""
    if not is_tensor(value):
        return type(value).__name__
    return f"a {type(value).__name__} of layout {value.layout} on device {value.device}"
