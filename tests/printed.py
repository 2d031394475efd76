"""What printed output says, apart from how it is laid out and from what no two runs share.

Numbers that training made differ in the last digits between machines, and with them how many digits
are shown, how wide a column is, where a line breaks, and how much of an array fits one line. So the
words of two outputs are compared exactly, whole numbers among them, and other numbers by tolerance.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import groupby
from typing import Any, NamedTuple

import pytest

# The first that fits is taken, so the order matters.
_TOKEN = re.compile(
    r"""
      (?P<DATE>    \d{4}-\d\d-\d\d ([ T]\d\d:\d\d(:\d\d(\.\d+)?)?)? (\+\d\d:\d\d)? )
    | (?P<DIGEST>  \b [0-9a-f]{12,} \b (\.\.\.)? )
    | (?P<VERSION> (?<![\w.]) \d+\.\d+\.\d+ [\w.+]* )
    | (?P<RATE>    (?<![\w.]) \d[\d.,]* [ ] (images|files)/s \b )
    | (?P<TIME>    (?<![\w.]) \d[\d.,]* [ ] (s|min|h) \b )
    | (?P<SIZE>    (?<![\w.]) (?P<bytes>\d[\d.,]*) [ ]? (?P<unit>[kMGT]?B) \b )
    | (?P<PIXELS>  (?<=size=) (?P<width>\d+) x (?P<height>\d+) )
    | (?P<REST>    [-\d.]* \.\.\. (?!,) )
    | (?P<NUMBER>  (?<![\w.]) [-+]? ( (\d{1,3}(,\d{3})+|\d+) (\.\d*(e[-+]?\d+)? | e[-+]?\d+ | (?=%))
                                    | (nan|NaN|inf)\b ) %? (?!\w|\.[\w.]) )
    | (?P<LAYOUT>  [─━]+ | \\$ )
    | (?P<word>    \w ([\w./'-]* \w)? | [^\w\s] )
    """,
    re.VERBOSE | re.MULTILINE,
)
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_VALUES = {"NUMBER", "DIGEST", "DATE", "REST", "integer"}


class _Token(NamedTuple):
    kind: str
    word: str
    numbers: tuple[float, ...] = ()


def words(text: str) -> list[str]:
    """Return the words, names, signs and whole numbers of `text`; of what differs only its kind."""
    return [token.word for token in _read(text)]


def numbers(text: str) -> list[float]:
    """Return the numbers of `text` that are not whole, its shares, sizes in bytes and in pixels."""
    return [number for token in _read(text) for number in token.numbers]


def near(expected: str) -> Any:
    """Return what `numbers` of an output compare equal to whose training was rounded otherwise.

    Such differences grow from round to round: processors of two kinds, or one core and a library
    of another version, end at adapters whose losses are the same and whose embeddings are not.
    """
    return pytest.approx(numbers(expected), rel=0.5, abs=0.1, nan_ok=True)


def text_of(page: str) -> str:
    """Return the text of HTML."""
    reader = _Text()
    reader.feed(page)
    return "\n".join(reader.parts)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.lasttag not in ("style", "script"):
            self.parts.append(data)


def _read(text: str) -> list[_Token]:
    tokens = [_token(match) for match in _TOKEN.finditer(text)]
    tokens = [token for token in tokens if token.kind != "LAYOUT"]
    read: list[_Token] = []
    for are_values, run in groupby(tokens, lambda token: token.kind in _VALUES):
        several = list(run)
        # One line of an array shows as many as fit it; times are in one unit or in two.
        if are_values and _is_cut(several):
            several = [_Token("REST", "VALUES")]
        read += [t for k, t in enumerate(several) if t.kind != "TIME" or not _follows(several, k)]
    return read


def _is_cut(values: list[_Token]) -> bool:
    kinds = [token.kind for token in values]
    return "REST" in kinds or kinds.count("DIGEST") > 1


def _follows(several: list[_Token], position: int) -> bool:
    return position > 0 and several[position - 1].kind == "TIME"


def _token(match: re.Match[str]) -> _Token:
    kind, text = match.lastgroup or "", match.group()
    if match["word"]:
        return _Token("integer" if text.isdecimal() else "word", text)
    if match["SIZE"]:
        nbytes = float(match["bytes"].replace(",", "")) * _UNITS[match["unit"]]
        return _Token("SIZE", "SIZE", (nbytes,))
    if match["PIXELS"]:
        return _Token("PIXELS", "PIXELS", (float(match["width"]), float(match["height"])))
    if match["NUMBER"]:
        number = float(text.rstrip("%").replace(",", ""))
        return _Token("NUMBER", "NUMBER", (number / 100 if text.endswith("%") else number,))
    for kind in ("DATE", "DIGEST", "VERSION", "RATE", "TIME", "REST", "LAYOUT"):
        if match[kind]:
            return _Token(kind, kind)
    raise AssertionError(text)
