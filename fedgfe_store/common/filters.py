"""What names records: values of filters, and positions in a selection."""

from __future__ import annotations

import difflib
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fedgfe_store.common.words import is_number, is_utf8, is_whole
from fedgfe_store.errors import SchemaMismatchError

NUMBERS = ("round", "index")
"""Filters whose values are whole numbers."""

_INT64 = np.iinfo(np.int64)
_FEW = 20
"""Texts up to which one comparison after another is fastest."""

_PICKED = 5
"""Values that are compared in the time of picking one."""


def wanted_values(name: str, value: Any) -> list[Any]:
    """Return the value of the filter `name` as a list of the column's type, and of ranges.

    Raises
    ------
    SchemaMismatchError
        If it is of another type: nothing is rounded, cut or taken for what it is not.
    """
    if isinstance(value, range):
        return [_one(name, value)]
    value = _plain(value)
    single = isinstance(value, str | bytes | Mapping) or is_whole(value)
    if single or not isinstance(value, Iterable):
        return [_one(name, value)]
    return [_one(name, each if isinstance(each, range) else _plain(each)) for each in value]


def _plain(value: Any) -> Any:
    """Return an array, a tensor or a frame's column as Python's own values."""
    if hasattr(value, "to_numpy"):  # pandas and xarray
        value = value.to_numpy()
    # numpy makes numbers of times.
    moments = getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M")
    return value.tolist() if hasattr(value, "tolist") and not moments else value


def _one(name: str, value: Any) -> str | int | range:
    if name in NUMBERS:
        if isinstance(value, range):
            return value
        if is_whole(value):
            return operator.index(value)
        wanted = "whole numbers or a range"
    elif name == "node" and isinstance(value, range):
        return value
    elif name == "node" and is_whole(value):
        return str(operator.index(value))
    elif isinstance(value, str):
        if value.isascii() or is_utf8(value):
            return str.__str__(value)  # str() of an enumeration's member gives the member's name
        wanted = "text that is valid UTF-8"
    else:
        wanted = "text"
    raise SchemaMismatchError(f"{name}: expected {wanted}, got {reprlib.repr(value)}")


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the names of filters that there are not.

    Raises
    ------
    SchemaMismatchError
        If there is one: names the filter that is most like it.
    """
    known = list(known)
    words = {name.removesuffix("_name"): name for name in known} | {name: name for name in known}
    for name in given:
        if name in known:
            continue
        nearest = [words[each] for each in difflib.get_close_matches(name, words, n=1)]
        meant = f"the nearest: {nearest[0]}" if nearest else f"expected some of {', '.join(known)}"
        raise SchemaMismatchError(f"{name} is no filter; {meant}")


def matches(values: np.ndarray, wanted: Sequence[Any]) -> np.ndarray:
    """Return which of `values` are `wanted`, a result of `wanted_values`; bool ``[n]``."""
    mask = _among(values, [each for each in wanted if not isinstance(each, range)])
    for each in wanted:
        if isinstance(each, range):
            mask |= _within(values, each)
    return mask


def matches_at(values: np.ndarray, places: np.ndarray, wanted: Sequence[Any]) -> np.ndarray:
    """Return which of the `values` at `places` are `wanted`; bool ``[n]``."""
    if len(places) * _PICKED > len(values):
        mask: np.ndarray = matches(values, wanted)[places]
        return mask
    return matches(values[places], wanted)


def is_wanted(value: str | int, wanted: Sequence[Any]) -> bool:
    """Whether one value is among `wanted`, a result of `wanted_values`."""
    number = int(value) if isinstance(value, int) or is_number(value) else None
    return value in [w for w in wanted if not isinstance(w, range)] or any(
        number in each for each in wanted if isinstance(each, range)
    )


def _among(values: np.ndarray, wanted: list[Any]) -> np.ndarray:
    if values.dtype.kind == "T":
        return _is_among(values, wanted)
    wanted = [number for number in wanted if _INT64.min <= number <= _INT64.max]
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


def _within(values: np.ndarray, wanted: range) -> np.ndarray:
    """Return which of `values` are in `wanted`, which may be longer than any memory."""
    if values.dtype.kind == "T":
        names = {name for name in values.tolist() if is_number(name) and int(name) in wanted}
        return _among(values, sorted(names))
    if not wanted:
        return np.zeros(len(values), bool)
    low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
    mask: np.ndarray = (values >= low) & (values <= high)
    if abs(wanted.step) == 1:
        return mask
    mask &= _among(values, [n for n in np.unique(values[mask]).tolist() if n in wanted])
    return mask


def position_array(given: Any, n: int) -> np.ndarray:
    """Return the positions, int64, that `given` names among `n` records.

    Parameters
    ----------
    given : array-like
        Whole numbers from 0, negative ones count from the end; or a mask of `n` booleans. One
        that is a pandas Series goes by its index, as everywhere in pandas.
    n : int
        How many records there are.

    Raises
    ------
    SchemaMismatchError
        If it is neither: nothing is rounded, cut or repeated.
    """
    if hasattr(given, "reindex") and hasattr(given, "to_frame"):
        given = _in_order(given, n)
    found = _array(given)
    if found is None:
        _refuse(given, n)
    if found.dtype == bool:
        if len(found) != n:
            raise SchemaMismatchError(
                f"take: expected a mask of {n:,}, one for each record, got one of {len(found):,}"
            )
        return np.flatnonzero(found)
    wrong = found[(found < -n) | (found >= n)]
    if len(wrong):
        raise SchemaMismatchError(f"take: expected positions below {n:,}, got {wrong[0]}")
    return found.astype(np.int64)


def _array(given: Any) -> np.ndarray | None:
    """Return `given` as an array ``[n]`` of booleans or whole numbers, if it is one."""
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    if np.ma.is_masked(given):
        return None
    kind = getattr(getattr(given, "dtype", None), "kind", "O")
    if isinstance(given, np.ndarray) and given.ndim == 1 and kind in "biu":
        return given
    if hasattr(given, "tolist"):
        given = given.tolist()
    if not isinstance(given, list | tuple | range):
        return None
    kinds = {_kind(value) for value in given}
    if not kinds:
        return np.empty(0, np.int64)
    if len(kinds) > 1 or None in kinds:
        return None
    # Object, so that a number of any size stays what it is until it is compared.
    return np.array(given, bool if kinds == {bool} else object)


def _kind(value: Any) -> type | None:
    if isinstance(value, bool | np.bool):
        return bool
    return int if is_whole(value) else None


def _in_order(series: Any, n: int) -> Any:
    """Return a Series with a mask in the order of the records, whose index counts from 0."""
    import pandas as pd

    mask = pd.api.types.is_bool_dtype(series.dtype)
    if not mask or series.index.equals(pd.RangeIndex(n)):
        return series
    if sorted(series.index.tolist()) != list(range(n)):
        raise SchemaMismatchError(
            f"take: expected a mask whose index counts the {n:,} records as `records` does, "
            f"got {reprlib.repr(series.index.tolist())}"
        )
    return series.sort_index()


def _refuse(given: Any, n: int) -> NoReturn:
    got = f"{type(given).__name__} {reprlib.repr(given)}"
    raise SchemaMismatchError(
        f"take: expected positions below {n:,}, a mask of {n:,} or a slice, got {got}"
    )
