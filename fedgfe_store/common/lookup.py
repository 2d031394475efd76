"""Filters as people type them: names and ranges, looked up among what there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedgfe_store.common.filters import NUMBERS, matches
from fedgfe_store.common.words import is_utf8, names, numbers, quoted, said_range
from fedgfe_store.errors import NotFoundError

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_NOUNS = {"class_name": "class", "sample_id": "sample id", "file_id": "file id"}
_MOST_COMPARED = 20_000
_MOST_SHOWN = 12
_LONGEST_LIST = 400

Wanted = list[Any]
"""Values of one filter: names or numbers, and ranges."""


def noun(column: str) -> str:
    """Return what a value of a key column is called: ``class`` for ``class_name``."""
    return _NOUNS.get(column, column)


def read_range(text: str) -> range | None:
    """Return the range that `text` is, such as ``10-20``; None if it is none."""
    found = _RANGE.fullmatch(text)
    if found is None or int(found[1]) > int(found[2]):
        return None
    return range(int(found[1]), int(found[2]) + 1)


def said(values: Iterable[Any]) -> str:
    """Return the values of a filter in one line, such that each can be told from the others."""
    parts = [said_range(v) if isinstance(v, range) else quoted(str(v)) for v in values]
    more = len(parts) - _MOST_SHOWN
    return ", ".join(parts[:_MOST_SHOWN] + ([f"and {more:,} more"] if more > 0 else []))


class Known:
    """The values that a key column has.

    Parameters
    ----------
    column : str
        Its name.
    values : ndarray, shape [n]
        Its value of each record.
    """

    def __init__(self, column: str, values: np.ndarray) -> None:
        self.column, self._values = column, values

    def has(self, wanted: str | int | range) -> bool:
        """Whether any record has this value, or one in this range."""
        if isinstance(wanted, str) and not is_utf8(wanted):
            return False
        return bool(matches(self._values, [wanted]).any())

    @cached_property
    def distinct(self) -> list[Any]:
        """The values that occur, sorted."""
        return sorted(set(self._values.tolist()))

    def shown(self) -> str:
        """Return the values that there are in one line, of which a long one is cut."""
        text = numbers(self.distinct) if self.column in NUMBERS else names(self.distinct)
        if len(text) <= _LONGEST_LIST:
            return text
        return f"{text[:_LONGEST_LIST].rpartition(', ')[0]}, ..."

    def nearest(self, wanted: str | int | range) -> list[Any]:
        """Return the values that are most like one that no record has; none where none is."""
        if isinstance(wanted, str):
            return self._alike(wanted)
        first, last = (wanted[0], wanted[-1]) if isinstance(wanted, range) else (wanted, wanted)
        if self.column not in NUMBERS:
            return []
        below = [number for number in self.distinct if number < first][-1:]
        return below + [number for number in self.distinct if number > last][:1]

    def _alike(self, wanted: str) -> list[str]:
        lowered: dict[str, str] = {}
        for name in self.distinct[:_MOST_COMPARED]:
            lowered.setdefault(name.lower(), name)
        return [lowered[n] for n in difflib.get_close_matches(wanted.lower(), lowered, n=2)]


def look_up(
    typed: Mapping[str, Wanted], known: Callable[[str], Known], where: str, *, strict: bool = True
) -> dict[str, Wanted]:
    """Return filters for `EmbeddingStore.select` from what was typed.

    A text is split at commas, or read as a range of nodes, only where there is no value of that
    whole name. Numbers are those of a range already.

    Parameters
    ----------
    typed : mapping
        Texts, or numbers and ranges, by column.
    known : callable
        Gives the values that a column has.
    where : str
        Where they are, for the error.
    strict : bool
        Whether a value that there is not is an error; else it is taken as it would be read.

    Raises
    ------
    NotFoundError
        If there is no such value: names the nearest ones, and what there is.
    """
    found: dict[str, Wanted] = {}
    missing: list[str] = []
    for column, values in typed.items():
        there = known(column)
        found[column] = []
        for value in values:
            parts = [value] if column in NUMBERS else _parts(value, there)
            found[column] += parts
            unknown = [part for part in parts if not there.has(part)]
            if unknown and len(parts) > 1 and any("," in name for name in there.nearest(value)):
                unknown = [value]  # rather a misspelt name with a comma than several names
            missing += [_missing(part, there, where) for part in unknown]
    if missing and strict:
        raise NotFoundError("\n".join(missing))
    return found


def _parts(text: str, known: Known) -> list[str | range]:
    """Return the names and ranges that `text` says."""
    if known.has(text):
        return [text]
    return [_part(part, known) for part in (each.strip() for each in text.split(","))]


def _part(text: str, known: Known) -> str | range:
    span = read_range(text) if known.column == "node" and not known.has(text) else None
    return text if span is None else span


def _missing(value: str | int | range, known: Known, where: str) -> str:
    shown = value if isinstance(value, int) else said([value])
    if not known.distinct:
        return f"no {noun(known.column)} {shown} in {where}, which has no records"
    nearest = known.nearest(value)
    close = f"; the nearest: {said(nearest)}" if nearest else ""
    return f"no {noun(known.column)} {shown} in {where}{close}; there are {known.shown()}"


def no_records(filters: Mapping[str, Wanted], without: Mapping[str, int], where: str) -> str:
    """Say that no record meets all of some filters, each of which some records meet.

    Parameters
    ----------
    filters : mapping
        Values by column.
    without : mapping
        How many records meet all filters but that of this column.
    where : str
        Where the records are.
    """
    asked = "; ".join(f"{noun(column)} {said(values)}" for column, values in filters.items())
    left = [f"{count:,} do without {noun(column)}" for column, count in without.items() if count]
    hint = f" ({', '.join(left)})" if len(filters) > 1 and left else ""
    return f"no record in {where}, meets all filters: {asked}{hint}"


def matched(column: str, values: Sequence[Any]) -> str:
    """Return how many records have each of the values that occur: ``dog (60), drum (60)``."""
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    if column in NUMBERS and len(counts) > _MOST_SHOWN:
        return f"{numbers(counts)} ({len(values):,})"
    parts = [f"{quoted(str(value))} ({count:,})" for value, count in sorted(counts.items())]
    more = len(parts) - _MOST_SHOWN
    return ", ".join(parts[:_MOST_SHOWN] + ([f"and {more:,} more"] if more > 0 else []))
