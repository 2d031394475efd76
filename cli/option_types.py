"""What values of options are typed as: numbers and ranges, keys, a key and its value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    NumbersType = click.ParamType[list[int | range], object]
    NamesType = click.ParamType[list[str], object]
    WholeType = click.ParamType[int | None, object]
    RealsType = click.ParamType[list[float], object]
    PairType = click.ParamType[tuple[str, int | str], object]
else:
    # Not generic at run time in every click that is allowed.
    NumbersType = NamesType = WholeType = RealsType = PairType = click.ParamType

_NUMBER = re.compile(r"[0-9]{1,18}")
NUMERIC = ("round", "index")
"""Filters whose values are numbers."""


class NumberList(NumbersType):
    """Whole numbers and ranges: ``1,5,10-20``."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a list of int and range."""
        if not isinstance(value, str):
            return value
        return [self._number(part.strip(), value, param, ctx) for part in value.split(",")]

    def _number(self, part: str, value: str, param: Any, ctx: Any) -> int | range:
        from fedgfe_store.common.lookup import read_range

        if (found := read_range(part)) is not None:
            return found
        if _NUMBER.fullmatch(part):
            return int(part)
        return self.fail(f"expected numbers such as 1,5,10-20, got {value!r}", param, ctx)


class Numbers(RealsType):
    """Numbers: ``1,3.5,9``."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a list of float."""
        if not isinstance(value, str):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            self.fail(f"expected numbers such as 1,3.5,9, got {value!r}", param, ctx)
        return numbers


class WholeNumber(WholeType):
    """A whole number from 1, or the word that stands for None."""

    name = "whole number"

    def __init__(self, none: str) -> None:
        self._none = none

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as int or None."""
        if value is None or value == self._none:
            return None
        if isinstance(value, str) and value.isdecimal() and int(value) >= 1:
            return int(value)
        return self.fail(f"expected {self._none} or a number from 1, got {value!r}", param, ctx)


KEYS = {
    "node": "node",
    "round": "round",
    "split": "split",
    "class": "class_name",
    "index": "index",
}
"""Key columns by the names of their filters."""


class KeyList(NamesType):
    """Key columns by the names of their filters: ``round,class``; those of `known` only."""

    name = "keys"

    def __init__(self, known: Mapping[str, str] = KEYS) -> None:
        self._known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a list of the columns' names."""
        if not isinstance(value, str):
            return value
        names = [part.strip() for part in value.split(",")]
        if not set(names) <= self._known.keys() or len(set(names)) < len(names):
            wanted = f"some of {', '.join(self._known)}, each once"
            self.fail(f"expected {wanted}, got {value!r}", param, ctx)
        return [self._known[name] for name in names]


class KeyValue(PairType):
    """A key column and the value that its records have: ``node=server``."""

    name = "key and value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as the column's name and a text or number."""
        if not isinstance(value, str):
            return value
        name, _, wanted = value.partition("=")
        if name not in KEYS or not wanted or (name in NUMERIC and not _NUMBER.fullmatch(wanted)):
            known = f"one of {', '.join(KEYS)} and its value, such as node=server"
            self.fail(f"expected {known}, got {value!r}", param, ctx)
        return KEYS[name], int(wanted) if name in NUMERIC else wanted
