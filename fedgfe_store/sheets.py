"""Contact sheets: small pictures in labelled rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_GAP = 6
_TEXT = 14
_INK = (40, 40, 40)
_MISSING = (225, 225, 225)


def contact_sheet(
    pictures: Mapping[tuple[str, str], Path],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    size: int = 96,
) -> Image.Image:
    """Draw pictures in a grid with a label for each row and column.

    Parameters
    ----------
    pictures : mapping of (row, column) to Path
        Image file of each cell; a cell without one is marked as missing.
    rows, columns : sequence of str
        Labels, in the order in which they are drawn.
    title : str
        A line above the sheet.
    size : int
        Width and height of a cell in pixels; pictures are fitted into it.

    Returns
    -------
    PIL.Image.Image
        The sheet, RGB.
    """
    font = ImageFont.load_default(_TEXT)
    left = max((round(font.getlength(row)) for row in rows), default=0) + 2 * _GAP
    step = max([size, *(round(font.getlength(column)) for column in columns)]) + _GAP
    head = _TEXT + 2 * _GAP
    top = head * 2 if title else head
    width = max(left + step * len(columns), round(font.getlength(title)) + 2 * _GAP)
    sheet = Image.new("RGB", (width, top + (size + _GAP) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, head / 2), title, _INK, font, anchor="lm")
    for x, column in enumerate(columns):
        draw.text((left + step * x + size / 2, top - head / 2), column, _INK, font, anchor="mm")
    for y, row in enumerate(rows):
        middle = top + (size + _GAP) * y + size / 2
        draw.text((left - _GAP, middle), row, _INK, font, anchor="rm")
        for x, column in enumerate(columns):
            box = (left + step * x, top + (size + _GAP) * y)
            _paste(sheet, pictures.get((row, column)), box, size)
    return sheet


def _paste(sheet: Image.Image, picture: Path | None, box: tuple[int, int], size: int) -> None:
    if picture is None:
        x, y = box
        draw = ImageDraw.Draw(sheet)
        draw.rectangle((x, y, x + size - 1, y + size - 1), outline=_MISSING)
        draw.line((x, y, x + size - 1, y + size - 1), _MISSING)
        return
    with Image.open(picture) as image:
        smaller = max(image.size) > size
        way = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
        scale = size / max(image.size)
        fitted = image.convert("RGB").resize(
            (round(image.width * scale), round(image.height * scale)), way
        )
    sheet.paste(fitted, (box[0] + (size - fitted.width) // 2, box[1] + (size - fitted.height) // 2))
