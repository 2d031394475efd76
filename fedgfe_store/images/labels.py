"""Text on images: keys in words, broken into lines that fit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import takewhile
from typing import Any

from PIL import ImageDraw, ImageFont

_SAID = {
    name: f"{name} {{}}"
    for name in ("round", "node", "index", "image", "frame", "guidance", "seed", "steps")
}
_KEYS = re.compile(r".+?(?:, |$)")
_WORDS = re.compile(r"[^ _/\\.-]+[ _/\\.-]*|[ _/\\.-]+")
_LONGEST = 300
_UNKNOWN = "\U0010ffff"


def label_of(values: Iterable[Any], names: Iterable[str]) -> str:
    """Return key columns in words: ``server, test, dog, index 0``."""
    words = []
    for name, value in zip(names, values, strict=True):
        if (name, value) == ("image", 0):
            continue  # nearly every record has one image, which needs no number
        plain = (name, value) == ("node", "server")
        shown = f"{value:g}" if isinstance(value, float) else value
        words.append(str(value) if plain else _SAID.get(name, "{}").format(shown))
    return ", ".join(clean(word) or "(empty)" for word in words)


def clean(text: str) -> str:
    """Return `text` in one line of signs that the font has."""
    return " ".join("".join(map(_drawable, text[:_LONGEST])).split())


@cache
def _drawable(sign: str) -> str:
    """Return `sign`, or its letter without accents, or its escape: never a box like any other."""
    if not sign.isprintable():
        return " "
    if _is_in_font(sign):
        return sign
    plain = "".join(s for s in unicodedata.normalize("NFKD", sign) if not unicodedata.combining(s))
    if plain and all(map(_is_in_font, plain)):
        return plain
    return sign.encode("ascii", "backslashreplace").decode()


def _is_in_font(sign: str) -> bool:
    font = ImageFont.load_default(16)
    return bytes(font.getmask(sign)) != bytes(font.getmask(_UNKNOWN))


class Label:
    """Text of one size that is broken into lines to fit a width.

    Parameters
    ----------
    points : int
        Size of the letters.
    most : int
        Width in pixels.
    lines : int
        So many lines at most; what does not fit ends in an ellipsis.
    """

    def __init__(self, points: int, most: int, *, lines: int) -> None:
        self.points = points
        self.line = round(points * 1.3)
        self._font = ImageFont.load_default(points)
        self._most, self._lines = most, lines

    def wrapped(self, text: str) -> list[str]:
        """Return the lines of `text`."""
        lines = [""]
        for piece in self._pieces(text):
            if not self._fits(lines[-1] + piece):
                lines.append("")
            lines[-1] += piece
        lines = [line.strip() for line in lines if line.strip()]
        if len(lines) <= self._lines:
            return lines
        last = lines[self._lines - 1]
        while last and not self._fits(f"{last}…"):
            last = last[:-1]
        return [*lines[: self._lines - 1], f"{last}…"]

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield `text` in pieces that fit: whole keys, or else words, or else parts of words."""
        for key in _KEYS.findall(text):
            for word in [key] if self._fits(key) else _WORDS.findall(key):
                rest = word
                while not self._fits(rest) and len(rest) > 1:
                    starts = (rest[:n] for n in range(1, len(rest)))
                    cut = max(1, len(list(takewhile(self._fits, starts))))
                    yield rest[:cut]
                    rest = rest[cut:]
                yield rest

    def _fits(self, text: str) -> bool:
        return self._font.getlength(text.rstrip()) <= self._most

    def width(self, texts: Iterable[str]) -> int:
        """Return the pixels that the widest line of `texts` takes."""
        lines = [line for text in texts for line in self.wrapped(text)]
        return round(max((self._font.getlength(line) for line in lines), default=0)) + 1

    def height(self, texts: Iterable[str]) -> int:
        """Return the pixels that the highest of `texts` takes."""
        return self.line * max((len(self.wrapped(text)) for text in texts), default=0)

    def write(
        self,
        draw: ImageDraw.ImageDraw,
        place: tuple[int, int],
        text: str,
        colour: tuple[int, int, int],
        *,
        anchor: str = "lt",
    ) -> None:
        """Write `text` at `place`.

        Parameters
        ----------
        anchor : str
            Which part of the text is at `place`: l, m or r for left, middle or right; then t, m
            or s for top, middle or bottom.
        """
        lines = self.wrapped(text)
        x, y = place
        top = y - {"t": 0.0, "m": 0.5, "s": 1.0}[anchor[1]] * self.line * len(lines)
        for number, line in enumerate(lines):
            middle = top + self.line * (number + 0.5)
            draw.text((x, middle), line, colour, self._font, anchor=f"{anchor[0]}m")
