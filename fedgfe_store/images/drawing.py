"""Drawing the pages of a contact sheet and the frames of an animation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from fedgfe_store.errors import DamagedDataError
from fedgfe_store.images.arrange import Place, Sheet
from fedgfe_store.images.folder import side_by_side
from fedgfe_store.images.labels import Label, label_of
from fedgfe_store.images.png import UNREADABLE
from fedgfe_store.images.record import ImageRecord

SMALLEST, LARGEST = 32, 1024
"""Pixels that a thumbnail can have."""

_GAP = 6
_FRAME = 2
_INK, _FAINT, _LINE, _RED = (30, 30, 30), (110, 110, 110), (225, 225, 225), (190, 40, 40)
# Pixels of a page's side: a bound that viewers and textures of graphics cards commonly share.
_PAGE = 4096
# Narrower, the title of a single small column would fall into many lines.
_NARROWEST = 240


@dataclass(frozen=True)
class Style:
    """Sizes of a sheet's parts, the same on all its pages: pixels, and the labels' letters."""

    size: int
    high: int
    left: int
    head: int
    foot: int
    row: Label
    column: Label
    small: Label

    @classmethod
    def of(cls, sheet: Sheet, thumbnail: int) -> Style:
        """Return the sizes that the labels of `sheet` need beside thumbnails of that size."""
        points = max(11, min(16, thumbnail // 8))
        shapes = {record.size or (1, 1) for record in sheet.cells.values()}
        high = max(_fit(shape, thumbnail)[1] for shape in shapes)
        row = Label(points, max(160, thumbnail), lines=max(1, int(high / (1.3 * points))))
        column = Label(points, thumbnail, lines=3)
        small = Label(max(10, points - 3), thumbnail, lines=3)
        captions = {sheet.caption(record) for record in sheet.cells.values()}
        return cls(
            size=thumbnail,
            high=high,
            left=row.width(label_of(r, sheet.by_row) for r in sheet.rows) + 2 * _GAP,
            head=column.height(label_of(c, sheet.by_column) for c in sheet.columns) + 2 * _GAP,
            foot=small.height(captions),
            row=row,
            column=column,
            small=small,
        )

    @property
    def across(self) -> int:
        """Pixels from one cell to the next one on the right."""
        return self.size + _GAP

    @property
    def down(self) -> int:
        """Pixels from one cell to the next one below."""
        return self.high + self.foot + _GAP

    def pages(self, sheet: Sheet) -> Iterator[tuple[tuple[Place, ...], tuple[Place, ...]]]:
        """Yield the rows and columns of each page."""
        across = max(1, (_PAGE - self.left) // self.across)
        down = max(1, (_PAGE - self.head - 4 * self.row.line) // self.down)
        for y in range(0, len(sheet.rows), down):
            for x in range(0, len(sheet.columns), across):
                yield sheet.rows[y : y + down], sheet.columns[x : x + across]


def draw_page(
    sheet: Sheet,
    style: Style,
    title: str,
    *,
    report: Callable[[str], object],
    progress: Callable[[int], object],
) -> Image.Image:
    """Draw all rows and columns of `sheet` below `title`; see `sheets.save_sheet`."""
    width = max(style.left + style.across * len(sheet.columns), _NARROWEST)
    heading = Label(style.row.points, width - 2 * _GAP, lines=3)
    top = heading.height([title]) + _GAP + style.head
    image = Image.new("RGB", (width, top + style.down * len(sheet.rows) + _GAP), "white")
    draw = ImageDraw.Draw(image)
    heading.write(draw, (_GAP, _GAP), title, _INK)
    for x, column in enumerate(sheet.columns):
        place = style.left + style.across * x + style.size // 2, top - _GAP
        style.column.write(draw, place, label_of(column, sheet.by_column), _INK, anchor="ms")
    for y, row in enumerate(sheet.rows):
        place = style.left - _GAP, top + style.down * y + style.high // 2
        style.row.write(draw, place, label_of(row, sheet.by_row), _INK, anchor="rm")
    _draw_cells(image, sheet, style, top, report=report, progress=progress)
    return image


def _draw_cells(
    image: Image.Image,
    sheet: Sheet,
    style: Style,
    top: int,
    *,
    report: Callable[[str], object],
    progress: Callable[[int], object],
) -> None:
    draw = ImageDraw.Draw(image)
    records = [sheet.cells.get((row, column)) for row in sheet.rows for column in sheet.columns]
    loaded = side_by_side(lambda record: _load(record, style.size), records)
    for number, (record, thumbnail) in enumerate(zip(records, loaded, strict=True)):
        y, x = divmod(number, len(sheet.columns))
        corner = style.left + style.across * x, top + style.down * y
        if thumbnail is not None:
            _paste(image, thumbnail, corner, (style.size, style.high))
        else:
            _mark(draw, corner, style, damaged=record is not None)
        if record is None:
            continue
        if record.mark and thumbnail is not None:
            outline = *corner, corner[0] + style.size - 1, corner[1] + style.high - 1
            draw.rectangle(outline, outline=_RED, width=_FRAME)
        place = corner[0] + style.size // 2, corner[1] + style.high
        ink = _RED if record.mark else _FAINT
        style.small.write(draw, place, sheet.caption(record), ink, anchor="mt")
        progress(1)
        if thumbnail is None:
            report(f"{record.file} is damaged")


def _load(record: ImageRecord | None, size: int) -> Image.Image | None:
    """Return an image fitted into a square; None where there is none or it cannot be read."""
    if record is None:
        return None
    try:
        with Image.open(record.file) as image:
            return _fitted(image, size)
    except (*UNREADABLE, ValueError):
        return None


def _fit(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Return width and height of an image whose longer side is to be `size` pixels."""
    scale = size / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _fitted(image: Image.Image, size: int) -> Image.Image:
    # Few pixels stay square when they grow: a small model's image should look like one.
    smaller = max(image.size) > size
    way = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return image.convert("RGB").resize(_fit(image.size, size), way)


def _paste(
    image: Image.Image, thumbnail: Image.Image, corner: tuple[int, int], cell: tuple[int, int]
) -> None:
    x, y = (
        c + (c_size - t) // 2 for c, c_size, t in zip(corner, cell, thumbnail.size, strict=True)
    )
    image.paste(thumbnail, (x, y))


def _mark(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], style: Style, *, damaged: bool
) -> None:
    x, y = corner
    outline = x, y, x + style.size - 1, y + style.high - 1
    draw.rectangle(outline, outline=_RED if damaged else _LINE)
    place = x + style.size // 2, y + style.high // 2
    word, colour = ("damaged", _RED) if damaged else ("missing", _FAINT)
    style.small.write(draw, place, word, colour, anchor="mm")


def draw_frame(
    record: ImageRecord, title: str, said: str, *, done: float, size: int
) -> Image.Image:
    """Draw one frame of an animation: what it is of, its image, and where it lies.

    Parameters
    ----------
    record : ImageRecord
        What is shown.
    title : str
        What all frames share, in words.
    said : str
        Which one it is, such as ``round 5``.
    done : float
        How much of the animation has been seen with it, up to 1.
    size : int
        Width and height of the image in pixels.

    Raises
    ------
    DamagedDataError
        If the image cannot be read.
    """
    thumbnail = _load(record, size)
    if thumbnail is None:
        raise DamagedDataError(f"{record.file} is damaged")
    label = Label(max(11, min(16, size // 12)), size, lines=3)
    top = label.height([title]) + 2 * _GAP
    foot = label.line + 4 * _GAP
    image = Image.new("RGB", (size + 2 * _GAP, top + size + foot), "white")
    draw = ImageDraw.Draw(image)
    label.write(draw, (_GAP, _GAP), title, _INK)
    _paste(image, thumbnail, (_GAP, top), (size, size))
    line_below = ", ".join(filter(None, [said, record.remark]))
    label.write(draw, (_GAP, top + size + _GAP), line_below, _RED if record.mark else _INK)
    line = image.height - _GAP - 1
    draw.line((_GAP, line, _GAP + size - 1, line), _LINE, 3)
    draw.line((_GAP, line, _GAP + round(done * (size - 1)), line), _INK, 3)
    return image
