"""Contact sheets: small images in labelled rows and columns, and one sample over the rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.arrange import Sheet, arrange
from fedgfe_store.images.drawing import LARGEST, SMALLEST, Style, draw_frame, draw_page
from fedgfe_store.images.labels import clean, label_of
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.records import KEY_COLUMNS
from fedgfe_store.storage.files import write_file

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf")
"""Endings of the files that a sheet can go into."""

MOVING_KINDS = (".gif", ".webp")
"""Endings of the files that an animation can go into."""

# A walk is to look like a motion, rounds are to be told apart.
_FRAME_MS = {"round": 700, "frame": 150}
_LAST_FRAME_MS = {"round": 2000, "frame": 1000}


def save_sheet(
    sheet: Sheet,
    file: Path,
    *,
    title: str | None = None,
    thumbnail: int = 128,
    report: Callable[[str], object] = lambda line: None,
    progress: Callable[[int], object] = lambda images: None,
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
        A line above the sheet; by default what its images have in common.
    thumbnail : int
        Width and height of a cell in pixels, 32 to 1024; images are fitted into it.
    report : callable
        Called with a line for each image that cannot be read; its cell says so.
    progress : callable
        Called with the number of images just drawn.

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
    """Write an image under its name at once, so that a stopped run leaves no half of one."""
    data = BytesIO()
    image.save(data, Image.registered_extensions()[file.suffix.lower()], **options)
    write_file(file, data.getbuffer())


def animate(
    images: Iterable[ImageRecord],
    file: Path,
    *,
    over: Literal["round", "frame"] = "round",
    thumbnail: int = 256,
) -> list[ImageRecord]:
    """Write one sample's images over the rounds, or those of a walk, as an animation.

    Parameters
    ----------
    images : iterable of ImageRecord
        As `ImageFolder.select` gives them. Of several samples or walks that one is taken which has
        most images.
    file : Path
        A GIF or WebP file.
    over : {"round", "frame"}
        What its frames are: rounds of a sample, or frames of a walk.
    thumbnail : int
        Width and height of the image in pixels, 32 to 1024.

    Returns
    -------
    list of ImageRecord
        Those that are shown, in their order.

    Raises
    ------
    SchemaMismatchError
        If there are fewer than two images of it, or an option is of no use.
    DamagedDataError
        If an image cannot be read.
    """
    check_output(file, MOVING_KINDS)
    _check_size(thumbnail)
    sample = [name for name in KEY_COLUMNS if name != "round"]
    rows = ["derived"] if over == "frame" else sample
    sheet = arrange(images, rows=rows, columns=[over])
    frames_of = Counter(row for row, _ in sheet.cells)
    row = max(sheet.rows, key=frames_of.__getitem__)
    shown = [sheet.cells[row, column] for column in sheet.columns if (row, column) in sheet.cells]
    places = [column[0] for column in sheet.columns if (row, column) in sheet.cells]
    if len(shown) < 2:
        raise SchemaMismatchError(
            f"an animation needs pictures of two {over}s, got {len(shown)} "
            f"({label_of(row, sheet.by_row)}, {over} {places[0]})"
        )
    title = label_of(row, sheet.by_row)
    frames = [
        draw_frame(image, title, f"{over} {place}", done=(n + 1) / len(shown), size=thumbnail)
        for n, (image, place) in enumerate(zip(shown, places, strict=True))
    ]
    lasting = [_FRAME_MS[over]] * (len(frames) - 1) + [_LAST_FRAME_MS[over]]
    _save(frames[0], file, save_all=True, append_images=frames[1:], duration=lasting, loop=0)
    return shown
