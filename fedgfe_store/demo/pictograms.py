"""Ten colourful pictograms, one for each class of the demo experiment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from fedgfe_store.errors import SchemaMismatchError

Colour = tuple[int, int, int]

_SUPERSAMPLING = 8
_INK: Colour = (34, 32, 44)
_WHITE: Colour = (250, 250, 250)


class _Canvas:
    """Shapes in a coordinate system of 100 x 100, placed with one scale and offset."""

    def __init__(self, pixels: int, background: Colour, *, scale: float, offset: Sequence[float]):
        self.image = Image.new("RGB", (pixels, pixels), background)
        self._draw = ImageDraw.Draw(self.image)
        self._unit = pixels / 100
        self._scale, self._offset = scale, offset

    def _place(self, xy: Sequence[float]) -> list[tuple[float, float]]:
        """Turn x, y, x, y, ... in units into pixels, scaled about the centre."""
        return [
            (
                (50 + (x - 50) * self._scale + self._offset[0]) * self._unit,
                (50 + (y - 50) * self._scale + self._offset[1]) * self._unit,
            )
            for x, y in zip(xy[::2], xy[1::2], strict=True)
        ]

    def _length(self, units: float) -> int:
        return max(1, round(units * self._scale * self._unit))

    def polygon(self, xy: Sequence[float], colour: Colour) -> None:
        self._draw.polygon(self._place(xy), fill=colour)

    def ellipse(self, box: Sequence[float], colour: Colour) -> None:
        self._draw.ellipse(self._place(box), fill=colour)

    def box(self, box: Sequence[float], colour: Colour, *, round: float = 0) -> None:
        self._draw.rounded_rectangle(self._place(box), self._length(round), fill=colour)

    def arc(
        self, box: Sequence[float], angles: tuple[float, float], colour: Colour, width: float
    ) -> None:
        self._draw.arc(self._place(box), *angles, fill=colour, width=self._length(width))

    def line(self, xy: Sequence[float], colour: Colour, width: float) -> None:
        """Draw a line with round ends and joints."""
        points, thick = self._place(xy), self._length(width)
        self._draw.line(points, fill=colour, width=thick)
        for x, y in points:
            r = thick / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _drop(c: _Canvas, x: float, y: float, r: float, colour: Colour) -> None:
    c.polygon((x, y - 2.2 * r, x - 0.92 * r, y - 0.4 * r, x + 0.92 * r, y - 0.4 * r), colour)
    c.ellipse((x - r, y - r, x + r, y + r), colour)


def _baby_cry(c: _Canvas) -> None:
    skin, blue = (255, 219, 178), (56, 140, 240)
    c.ellipse((7, 42, 25, 60), (240, 186, 144))
    c.ellipse((75, 42, 93, 60), (240, 186, 144))
    c.ellipse((14, 14, 86, 88), skin)
    c.arc((42, 5, 60, 24), (150, 400), (140, 84, 40), 4)
    c.ellipse((36, 56, 64, 82), (150, 24, 44))
    c.ellipse((42, 70, 58, 81), (244, 110, 120))
    for x in (24, 58):
        c.arc((x, 36, x + 18, 50), (190, 350), _INK, 4)
    _drop(c, 28, 62, 7, blue)
    _drop(c, 72, 62, 7, blue)


def _chainsaw(c: _Canvas) -> None:
    orange, steel = (255, 112, 24), (206, 212, 220)
    for x in range(48, 94, 8):
        c.polygon((x, 45, x + 4, 39, x + 8, 45), _WHITE)
        c.polygon((x, 65, x + 4, 71, x + 8, 65), _WHITE)
    c.box((36, 44, 97, 66), steel, round=10)
    c.line((50, 55, 88, 55), (120, 128, 140), 3)
    c.line((14, 40, 14, 26, 44, 26, 48, 40), _INK, 6)
    c.box((5, 38, 52, 76), orange, round=7)
    c.box((11, 60, 34, 68), _INK, round=3)
    c.ellipse((32, 44, 46, 58), (255, 214, 60))


def _dog(c: _Canvas) -> None:
    brown, dark, cream = (176, 112, 56), (98, 56, 24), (246, 222, 184)
    c.ellipse((20, 14, 80, 78), brown)
    c.polygon((30, 18, 10, 24, 5, 58, 16, 70, 27, 54), dark)
    c.polygon((70, 18, 90, 24, 95, 58, 84, 70, 73, 54), dark)
    c.box((42, 66, 58, 94), (244, 92, 112), round=8)
    c.ellipse((28, 48, 72, 84), cream)
    c.ellipse((40, 48, 60, 62), _INK)
    c.arc((36, 58, 51, 74), (20, 140), _INK, 3)
    c.arc((49, 58, 64, 74), (40, 160), _INK, 3)
    for x in (31, 58):
        c.ellipse((x, 32, x + 11, 44), _INK)
        c.ellipse((x + 2, 34, x + 6, 38), _WHITE)


def _drum(c: _Canvas) -> None:
    red, gold = (214, 34, 40), (250, 244, 220)
    c.ellipse((12, 66, 88, 96), gold)
    c.box((12, 46, 88, 81), red)
    c.ellipse((15, 64, 85, 91), red)
    c.line((14, 50, 26, 84, 38, 56, 50, 88, 62, 56, 74, 84, 86, 50), gold, 3.5)
    c.ellipse((12, 31, 88, 61), gold)
    c.ellipse((18, 35, 82, 57), (232, 218, 186))
    for x, tip in ((10, 42), (90, 58)):
        c.line((x, 8, tip, 42), (122, 66, 24), 5)
        c.ellipse((tip - 5, 37, tip + 5, 47), (150, 84, 34))


def _fireworks(c: _Canvas) -> None:
    bursts = (
        (34, 36, 28, (255, 70, 90)),
        (72, 28, 20, (255, 220, 70)),
        (68, 68, 26, (70, 230, 160)),
    )
    for x, y, reach, colour in bursts:
        for k in range(10):
            dx, dy = math.cos(math.tau * k / 10), math.sin(math.tau * k / 10)
            start, end = 0.3 * reach, 0.85 * reach
            c.line((x + start * dx, y + start * dy, x + end * dx, y + end * dy), colour, 3.4)
            tip = (x + reach * dx, y + reach * dy)
            c.ellipse((tip[0] - 2, tip[1] - 2, tip[0] + 2, tip[1] + 2), _WHITE)
        c.ellipse((x - 4, y - 4, x + 4, y + 4), _WHITE)
    c.line((30, 96, 33, 62), (255, 190, 120), 2.5)


def _helicopter(c: _Canvas) -> None:
    red, dark = (206, 32, 48), (60, 64, 80)
    c.polygon((44, 42, 92, 44, 92, 51, 52, 64), red)
    c.polygon((86, 28, 96, 28, 94, 54, 86, 50), (150, 16, 34))
    c.ellipse((10, 34, 66, 76), red)
    c.polygon((34, 40, 34, 57, 13, 57, 18, 46, 25, 41), (206, 240, 255))
    c.box((40, 46, 52, 60), (206, 240, 255), round=3)
    c.line((38, 22, 38, 36), dark, 5)
    c.line((4, 20, 72, 20), dark, 5)
    c.line((26, 74, 26, 86), dark, 4)
    c.line((50, 74, 50, 86), dark, 4)
    c.line((12, 86, 64, 86), dark, 5)


def _printer(c: _Canvas) -> None:
    shell, dark = (222, 226, 232), (70, 76, 92)
    c.box((28, 8, 72, 46), _WHITE, round=2)
    c.box((8, 36, 92, 78), shell, round=8)
    c.box((8, 36, 92, 52), (160, 168, 182), round=8)
    c.ellipse((76, 40, 84, 48), (64, 230, 90))
    c.ellipse((64, 40, 72, 48), (255, 90, 70))
    c.box((18, 58, 82, 68), dark, round=4)
    c.box((26, 62, 74, 96), _WHITE, round=2)
    for y, end in ((72, 66), (80, 66), (88, 54)):
        c.line((34, y, end, y), (40, 110, 220), 3.4)


def _rail_transport(c: _Canvas) -> None:
    body, glass, steel = (24, 150, 84), (190, 232, 250), (72, 62, 66)
    for y, half in ((80, 28), (88, 36), (96, 44)):
        c.line((50 - half, y, 50 + half, y), (112, 66, 34), 4)
    c.line((36, 74, 18, 99), steel, 4.5)
    c.line((64, 74, 82, 99), steel, 4.5)
    c.box((22, 6, 78, 78), body, round=14)
    c.box((22, 50, 78, 60), (250, 220, 70))
    c.box((38, 11, 62, 18), _INK, round=3)
    c.box((28, 23, 48, 45), glass, round=4)
    c.box((52, 23, 72, 45), glass, round=4)
    for x in (28, 62):
        c.ellipse((x, 63, x + 10, 73), (255, 250, 190))
    c.box((42, 64, 58, 74), _INK, round=3)


def _snoring(c: _Canvas) -> None:
    skin, blanket = (255, 214, 170), (64, 160, 232)
    c.box((4, 42, 11, 94), (140, 88, 48), round=3)
    c.box((6, 78, 96, 88), (140, 88, 48), round=3)
    c.box((89, 62, 96, 94), (140, 88, 48), round=3)
    c.box((11, 60, 40, 79), _WHITE, round=7)
    c.ellipse((17, 42, 47, 72), skin)
    c.arc((21, 50, 31, 58), (20, 160), _INK, 2.6)
    c.arc((34, 50, 44, 58), (20, 160), _INK, 2.6)
    c.ellipse((28, 60, 37, 69), (150, 40, 50))
    c.box((38, 56, 90, 80), blanket, round=10)
    for x, y, s, width in ((50, 38, 9, 3.6), (61, 22, 11, 4), (76, 4, 14, 4.6)):
        c.line((x, y, x + s, y, x, y + s, x + s, y + s), (255, 226, 90), width)


def _water_flowing(c: _Canvas) -> None:
    steel, shade, blue = (128, 138, 152), (92, 100, 114), (30, 136, 240)
    c.box((68, 54, 84, 88), blue)
    c.ellipse((52, 80, 99, 97), blue)
    c.ellipse((60, 83, 91, 92), (140, 206, 255))
    c.box((72, 58, 77, 86), (140, 206, 255), round=2)
    c.box((0, 22, 8, 56), shade, round=2)
    c.box((6, 29, 66, 49), steel)
    c.arc((45, 29, 87, 71), (270, 360), steel, 20)
    c.box((64, 48, 90, 58), shade, round=2)
    c.box((30, 16, 40, 32), shade)
    c.box((16, 9, 54, 19), (220, 50, 50), round=5)


_PICTOGRAMS: dict[str, tuple[Colour, Callable[[_Canvas], None]]] = {
    "baby_cry": ((255, 182, 204), _baby_cry),
    "chainsaw": ((34, 88, 58), _chainsaw),
    "dog": ((176, 220, 96), _dog),
    "drum": ((255, 200, 48), _drum),
    "fireworks": ((14, 16, 52), _fireworks),
    "helicopter": ((118, 192, 250), _helicopter),
    "printer": ((0, 136, 140), _printer),
    "rail_transport": ((240, 132, 62), _rail_transport),
    "snoring": ((88, 58, 146), _snoring),
    "water_flowing": ((236, 244, 248), _water_flowing),
}

CLASSES: tuple[str, ...] = tuple(_PICTOGRAMS)
"""The classes of the demo, in alphabetical order."""


def draw(class_name: str, *, size: int = 64, rng: np.random.Generator | None = None) -> Image.Image:
    """Draw the pictogram of a class.

    Parameters
    ----------
    class_name : str
        One of `CLASSES`.
    size : int
        Width and height in pixels.
    rng : numpy.random.Generator, optional
        Source of a small jitter: up to 3 % of the size in position, 6 % in scale and 4 % in the
        brightness of each colour channel. Without it the reference picture is drawn.

    Returns
    -------
    PIL.Image.Image
        RGB picture of ``size`` x ``size`` pixels.

    Raises
    ------
    SchemaMismatchError
        If there is no such class.
    """
    if class_name not in _PICTOGRAMS:
        raise SchemaMismatchError(f"class: expected one of {', '.join(CLASSES)}, got {class_name}")
    background, paint = _PICTOGRAMS[class_name]
    jitter = np.zeros(6) if rng is None else rng.uniform(-1, 1, 6)
    canvas = _Canvas(
        size * _SUPERSAMPLING,
        background,
        scale=1 + 0.06 * jitter[0],
        offset=(3 * jitter[1], 3 * jitter[2]),
    )
    paint(canvas)
    picture = canvas.image.resize((size, size), Image.Resampling.BOX)
    if rng is None:
        return picture
    tinted = np.asarray(picture) * (1 + 0.04 * jitter[3:6])
    return Image.fromarray(tinted.clip(0, 255).round().astype(np.uint8))
