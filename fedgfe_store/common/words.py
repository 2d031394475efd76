"""Counts, sizes and lists as people read them."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable
from typing import Any, SupportsIndex

from fedgfe_store.errors import SchemaMismatchError

_LIKE_A_RANGE = re.compile(r"[0-9]+-[0-9]+")


def counted(number: int, noun: str) -> str:
    """Return a number of things as people read it: ``1 record``, ``1,200 records``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(nbytes: float) -> str:
    """Return a number of bytes as people read it: ``3.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def numbers(values: Iterable[int]) -> str:
    """Return whole numbers with runs of three or more as ranges: ``1, 3, 5-10``."""
    parts: list[str] = []
    run: list[int] = []
    for value in [*sorted(set(values)), None]:
        if run and (value is None or value != run[-1] + 1):
            long = len(run) > 2
            parts += [f"{run[0]}-{run[-1]}"] if long else map(str, run)
            run = []
        if value is not None:
            run.append(value)
    return ", ".join(parts)


def quoted(name: str) -> str:
    """Return `name` as it can be told from others in a list: in quotes where it looks like one."""
    plain = name.isprintable() and name.strip() == name != "" and not set('",') & set(name)
    if plain and not _LIKE_A_RANGE.fullmatch(name):
        return name
    return json.dumps(name, ensure_ascii=False)


def said_range(values: range) -> str:
    """Return a range of whole numbers as people type it: ``10-20``."""
    return f"{values.start}-{values.stop - 1}" if len(values) != 1 else f"{values.start}"


def names(values: Iterable[str], *, most: int = 12) -> str:
    """Return `values` in one line, numbers as ranges and first; a long list is cut with a count.

    Names that have a comma or look like a range are in quotes.
    """
    unique = sorted(set(values))
    plain = [quoted(v) for v in unique if not is_number(v)]
    whole = numbers(int(v) for v in unique if is_number(v))
    shown = ([whole] if whole else []) + plain[:most]
    more = [f"and {len(plain) - most} more"] if len(plain) > most else []
    return ", ".join(shown + more)


def shown(value: object, *, most: int = 120) -> str:
    """Return `value` as code in one short line, for messages; also what cannot show itself."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a caller's object may raise anything, and so do long numbers
        return f"a value of type {type(value).__name__} that cannot be shown"
    return shortened(text, most)


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8, which bytes that a shell passed on may not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, of Python's or of numpy's."""
    # What isinstance(value, SupportsIndex) asks, which takes 10 us a value. Arrays and tensors
    # have an __index__ too, whatever they hold.
    whole = hasattr(type(value), "__index__") and not hasattr(value, "__len__")
    return whole and not isinstance(value, bool)


def whole_number(name: str, value: Any) -> int:
    """Return `value` if it is a whole number from 0, else raise `SchemaMismatchError`."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        number = operator.index(value)
        if number >= 0:
            return number
    raise SchemaMismatchError(f"{name}: expected a whole number from 0, got {value!r}")


def is_number(name: str) -> bool:
    """Whether `name` is a whole number as Python writes it: not ``007``, and of 18 digits at most.

    Only such names can be listed, and asked for, by ranges of numbers.
    """
    return name.isascii() and name.isdecimal() and len(name) <= 18 and str(int(name)) == name


def numbers_first(name: str) -> tuple[bool, int, str]:
    """Return the place of a name in a list: ``0, 2, 10, server``; a key for `sorted`."""
    return (not name.isdecimal(), len(name) if name.isdecimal() else 0, name)


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Return the place of a name in a list, numbers in it by size: ``steps-4, steps-16``."""
    return [numbers_first(part) for part in re.split(r"([0-9]+)", name)]


def shortened(text: str, most: int) -> str:
    """Return `text` cut to at most `most` characters, with a mark where something is missing."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """Return `text`, such as a file's name, in one line that any terminal shows as it stands."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )
