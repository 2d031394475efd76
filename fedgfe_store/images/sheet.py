"""Contact sheets: small pictures in labelled rows and columns, and one sample over the rounds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.drawing import LARGEST, SMALLEST, Style, draw_frame, draw_page
from fedgfe_store.images.folder import Picture
from fedgfe_store.images.labels import clean, label_of
from fedgfe_store.images.pairing import sample_numbers
from fedgfe_store.records import KEY_COLUMNS, check_keys, key_order
from fedgfe_store.storage.files import write_file

Place = tuple[Any, ...]
"""The values of a row's or a column's key columns."""

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf")
"""Endings of the files that a sheet can go into."""

MOVING_KINDS = (".gif", ".webp")
"""Endings of the files that an animation can go into."""

_FRAME_MS, _LAST_FRAME_MS = 700, 2000


@dataclass(frozen=True)
class Sheet:
    """Pictures by row and column.

    Parameters
    ----------
    by_row, by_column : tuple of str
        Key columns of the rows and of the columns.
    rows, columns : tuple
        Their values, in the order in which they are drawn.
    cells : mapping
        A picture for each (row, column) that has one.
    common : mapping
        The other key columns in which all of these pictures agree, and their values.
    """

    by_row: tuple[str, ...]
    by_column: tuple[str, ...]
    rows: tuple[Place, ...]
    columns: tuple[Place, ...]
    cells: Mapping[tuple[Place, Place], Picture]
    common: Mapping[str, Any]

    @property
    def missing(self) -> int:
        """Number of cells without a picture."""
        return len(self.rows) * len(self.columns) - len(self.cells)

    @property
    def title(self) -> str:
        """What all pictures have in common, in words."""
        return label_of(self.common.values(), self.common)

    def caption(self, picture: Picture) -> str:
        """Return in words what row, column and title do not say of a picture, its mark included."""
        told = {*self.by_row, *self.by_column, *self.common}
        rest = {name: value for name, value in _facts(picture).items() if name not in told}
        return ", ".join(filter(None, [label_of(rest.values(), rest), picture.mark]))


def arrange(
    pictures: Iterable[Picture],
    *,
    rows: Sequence[str] = ("class_name",),
    columns: Sequence[str] = ("round",),
) -> Sheet:
    """Put pictures into rows and columns by their keys.

    Where several belong in one cell, the same sample is taken for all cells as far as possible:
    that one of the other keys' combinations which fills most of them. Over rounds a sample is
    known by its ``file_id``, where its pictures name one, and by its index else: `index` then
    means the one of the first round that has the sample.

    Parameters
    ----------
    pictures : iterable of Picture
        As `find_pictures` gives them.
    rows, columns : sequence of str
        Key columns of the rows and of the columns; none in both.

    Raises
    ------
    SchemaMismatchError
        If `rows` or `columns` is of no use, or there is no picture.
    """
    check_keys("rows", rows)
    check_keys("columns", columns)
    if set(rows) & set(columns):
        both = ", ".join(sorted(set(rows) & set(columns)))
        raise SchemaMismatchError(f"expected other keys for columns than for rows, got {both}")
    pictures = list(pictures)
    if not pictures:
        raise SchemaMismatchError("a sheet: expected at least one picture, got none")
    others = [name for name in (*KEY_COLUMNS, "image") if name not in {*rows, *columns}]
    found: dict[tuple[Place, Place], dict[Place, Picture]] = defaultdict(dict)
    for picture, number in zip(pictures, _numbers(pictures, {*rows, *columns}), strict=True):
        facts = _facts(picture) | {"index": number}
        cell = tuple(facts[n] for n in rows), tuple(facts[n] for n in columns)
        found[cell][tuple(facts[n] for n in others)] = picture
    counts = Counter(sample for samples in found.values() for sample in samples)
    order = key_order(others)
    ranked = sorted(counts, key=lambda sample: (-counts[sample], order(sample)))
    rank = {sample: place for place, sample in enumerate(ranked)}
    cells = {cell: samples[min(samples, key=rank.__getitem__)] for cell, samples in found.items()}
    return Sheet(
        tuple(rows),
        tuple(columns),
        tuple(sorted({row for row, _ in cells}, key=key_order(rows))),
        tuple(sorted({column for _, column in cells}, key=key_order(columns))),
        cells,
        _common(others, cells.values()),
    )


def _numbers(pictures: Sequence[Picture], axes: Collection[str]) -> list[int]:
    """Give the index of each picture, or what is the same for a sample in all rounds."""
    keys = [picture.key for picture in pictures]
    if "round" not in axes:
        return [key.index for key in keys]
    return sample_numbers(keys, [picture.file_id for picture in pictures])


def _facts(picture: Picture) -> dict[str, Any]:
    facts = {name: getattr(picture.key, name) for name in KEY_COLUMNS}
    return facts | {"image": picture.number}


def _common(names: list[str], pictures: Iterable[Picture]) -> dict[str, Any]:
    facts = [_facts(picture) for picture in pictures]
    return {name: facts[0][name] for name in names if len({f[name] for f in facts}) == 1}


def save_sheet(
    sheet: Sheet,
    file: Path,
    *,
    title: str | None = None,
    thumbnail: int = 128,
    report: Callable[[str], object] = lambda line: None,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[Path]:
    """Draw a sheet into a file, or into several where one would be larger than 4096 pixels.

    Parameters
    ----------
    sheet : Sheet
        A result of `arrange`.
    file : Path
        Where it goes; its ending tells the kind. Pages are called ``sheet-1.png``,
        ``sheet-2.png``, ...
    title : str, optional
        A line above the sheet; by default what its pictures have in common.
    thumbnail : int
        Width and height of a cell in pixels, 32 to 1024; pictures are fitted into it.
    report : callable
        Called with a line for each picture that cannot be read; its cell says so.
    progress : callable
        Called with the number of pictures just drawn.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    SchemaMismatchError
        If the kind of file is unknown or `thumbnail` is of no use.
    NotFoundError
        If there is no folder for `file`.
    """
    check_output(file)
    _check_size(thumbnail)
    style = Style.of(sheet, thumbnail)
    pages = list(style.pages(sheet))
    names = _page_names(file, len(pages))
    head = sheet.title if title is None else clean(title)
    for number, (name, (rows, columns)) in enumerate(zip(names, pages, strict=True), 1):
        said = head if len(pages) == 1 else f"{head} (page {number} of {len(pages)})".strip()
        page = replace(sheet, rows=rows, columns=columns)
        _save(draw_page(page, style, said, report=report, progress=progress), name)
    return names


def check_output(file: Path, kinds: Sequence[str] = KINDS) -> None:
    """Refuse a file that could not be written, before anything is read.

    Parameters
    ----------
    file : Path
        The file.
    kinds : sequence of str
        Endings that are allowed.

    Raises
    ------
    SchemaMismatchError
        If its ending is another.
    NotFoundError
        If there is no folder for it.
    """
    if file.suffix.lower() not in kinds:
        raise SchemaMismatchError(f"{file}: expected a name ending in {', '.join(kinds)}")
    if not file.parent.is_dir():
        raise NotFoundError(f"{file}: there is no folder {file.parent}")


def _check_size(thumbnail: int) -> None:
    if not SMALLEST <= thumbnail <= LARGEST:
        raise SchemaMismatchError(
            f"thumbnail: expected {SMALLEST} to {LARGEST} pixels, got {thumbnail}"
        )


def _page_names(file: Path, count: int) -> list[Path]:
    if count == 1:
        return [file]
    digits = len(str(count))
    return [file.with_stem(f"{file.stem}-{n:0{digits}}") for n in range(1, count + 1)]


def _save(image: Image.Image, file: Path, **options: Any) -> None:
    """Write a picture under its name at once, so that a stopped run leaves no half of one."""
    data = BytesIO()
    image.save(data, Image.registered_extensions()[file.suffix.lower()], **options)
    write_file(file, data.getbuffer())


def animate(pictures: Iterable[Picture], file: Path, *, thumbnail: int = 256) -> list[Picture]:
    """Write one sample's pictures over the rounds as an animation.

    Parameters
    ----------
    pictures : iterable of Picture
        As `find_pictures` gives them. Of several samples the one with most rounds is taken.
    file : Path
        A GIF or WebP file.
    thumbnail : int
        Width and height of the picture in pixels, 32 to 1024.

    Returns
    -------
    list of Picture
        Those that are shown, by round.

    Raises
    ------
    SchemaMismatchError
        If the sample has fewer than two rounds, or an option is of no use.
    DamagedDataError
        If a picture cannot be read.
    """
    check_output(file, MOVING_KINDS)
    _check_size(thumbnail)
    sheet = arrange(pictures, rows=[name for name in KEY_COLUMNS if name != "round"])
    rounds_of = Counter(row for row, _ in sheet.cells)
    row = max(sheet.rows, key=rounds_of.__getitem__)
    shown = [sheet.cells[row, column] for column in sheet.columns if (row, column) in sheet.cells]
    if len(shown) < 2:
        raise SchemaMismatchError(
            f"an animation needs pictures of two rounds, got {len(shown)} "
            f"({label_of(row, sheet.by_row)}, round {shown[0].key.round})"
        )
    rounds, title = [picture.key.round for picture in shown], label_of(row, sheet.by_row)
    frames = [draw_frame(picture, title, rounds, thumbnail) for picture in shown]
    lasting = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    _save(frames[0], file, save_all=True, append_images=frames[1:], duration=lasting, loop=0)
    return shown
