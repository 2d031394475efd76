"""Making a folder's gallery: its thumbnails, then its page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from fedgfe_store.errors import NotFoundError
from fedgfe_store.images.folder import ImageFolder, side_by_side
from fedgfe_store.images.foreign import PictureNames
from fedgfe_store.images.gallery.page import render_page
from fedgfe_store.images.gallery.points import Points
from fedgfe_store.images.gallery.thumbnails import thumbnail_name, update_thumbnail
from fedgfe_store.images.outdated import marked
from fedgfe_store.images.png import UNREADABLE
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.storage.files import write_file

if TYPE_CHECKING:
    from fedgfe_store.store import EmbeddingStore

PAGE_NAME = "gallery.html"
THUMBNAILS = "thumbnails"


@dataclass(frozen=True)
class Gallery:
    """A gallery that was made.

    Parameters
    ----------
    page : Path
        Its HTML file.
    thumbnails : Path
        Folder of its thumbnails.
    pictures : int
        Images that it shows.
    made : int
        Thumbnails that were missing or out of date.
    left_out : mapping
        Why a file is not shown, by its name.
    outdated : mapping
        Number of images that are marked, by what the mark says.
    foreign : int
        Images of other programs.
    """

    page: Path
    thumbnails: Path
    pictures: int
    made: int
    left_out: Mapping[str, str]
    outdated: Mapping[str, int]
    foreign: int = 0


def scan_images(folder: Path, others: PictureNames | None = None) -> ImageFolder:
    """List a folder that a gallery is to be made of.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    others : PictureNames, optional
        How other programs name their images, by default as FedGFE does.

    Raises
    ------
    NotFoundError
        If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no folder of pictures at {folder}")
    images = ImageFolder.scan(folder, others=others)
    if not images.names:
        raise NotFoundError(f"no pictures in {folder}: expected PNG files that generate made")
    return images


def make_gallery(
    folder: ImageFolder | Path,
    output: Path | None = None,
    *,
    store: EmbeddingStore | None = None,
    points: Points | None = None,
    progress: Callable[[int], object] | None = None,
) -> Gallery:
    """Make one static page of a folder's images; it works from the disk, without a network.

    Facts come from the folder's manifests and, where those say nothing of an image, from the
    image itself; of images of other programs, their names.

    Parameters
    ----------
    folder : ImageFolder or Path
        Folder of the images, listed or not.
    output : Path, optional
        The page, by default ``gallery.html`` in the folder. Thumbnails lie beside it: in
        ``thumbnails`` where it is in the folder, else in a folder named after the page.
    store : EmbeddingStore, optional
        Mark the images of its records that are out of date.
    points : Points, optional
        Show the images on this map, too.
    progress : callable, optional
        Called with 1 for each file that is looked at.

    Returns
    -------
    Gallery
        What was made, and which files are not shown.

    Raises
    ------
    NotFoundError
        If there is no such folder, or no image in it of which a record is known.
    """
    images = folder if isinstance(folder, ImageFolder) else scan_images(folder)
    folder, names = images.path, images.names
    page = output or folder / PAGE_NAME
    inside = page.parent.resolve() == folder.resolve()
    thumbnails = page.with_name(THUMBNAILS if inside else f"{page.stem}_{THUMBNAILS}")
    thumbnails.mkdir(parents=True, exist_ok=True)
    shown, left_out = [], {}
    _ = images.lines  # read before there are threads: each of them would
    for name, found in zip(names, side_by_side(_Preparing(images, thumbnails), names), strict=True):
        if isinstance(found, str):
            left_out[name] = found
        else:
            shown.append(found)
        if progress is not None:
            progress(1)
    if not shown:
        name, reason = next(iter(left_out.items()))
        raise NotFoundError(f"nothing to show of {len(names)} files in {folder}: {name}: {reason}")
    records = marked([record for record, _ in shown], store)
    text = render_page(
        records,
        title=os.fsencode(folder.resolve().name).decode("utf-8", "replace"),
        image_url=_folder_url(folder, page.parent),
        thumbnail_url=_folder_url(thumbnails, page.parent),
        points=points,
    )
    write_file(page, text.encode("utf-8"))
    marks = Counter(record.mark for record in records if record.mark)
    made = sum(was_made for _, was_made in shown)
    foreign = sum(record.is_foreign for record in records)
    return Gallery(page, thumbnails, len(shown), made, left_out, marks, foreign)


class _Preparing:
    """Finds out about one image and makes its thumbnail; threads may call it at once."""

    def __init__(self, images: ImageFolder, thumbnails: Path) -> None:
        self._images, self._thumbnails = images, thumbnails

    def __call__(self, name: str) -> tuple[ImageRecord, bool] | str:
        record = self._images.record(name)
        if isinstance(record, str):
            return record
        try:
            return record, update_thumbnail(record.file, self._thumbnails / thumbnail_name(name))
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return "damaged"


def _folder_url(folder: Path, start: Path) -> str:
    relative = os.path.relpath(folder.resolve(), start.resolve())
    return "" if relative == os.curdir else quote(os.fsencode(relative)) + "/"
