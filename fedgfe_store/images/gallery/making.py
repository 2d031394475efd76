"""Making a gallery of folders: its thumbnails, then its page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from fedgfe_store.errors import NotFoundError
from fedgfe_store.images.folder import ImageFolder, side_by_side
from fedgfe_store.images.folders import folder_labels, scan_folders
from fedgfe_store.images.foreign import PictureNames
from fedgfe_store.images.gallery.page import ShownFolder, render_page
from fedgfe_store.images.gallery.points import Points
from fedgfe_store.images.gallery.thumbnails import thumbnail_name, update_thumbnail
from fedgfe_store.images.outdated import marked
from fedgfe_store.images.png import UNREADABLE
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.storage.files import write_file

if TYPE_CHECKING:
    from fedgfe_store.store import EmbeddingStore

_Wanted = ImageRecord | tuple[ImageFolder, str]
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
        Why a file is not shown, by its name, with its folder's where there are several.
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


def scan_images(
    folders: Path | Iterable[Path], others: PictureNames | None = None
) -> list[ImageFolder]:
    """List the folders that a gallery is to be made of.

    Parameters
    ----------
    folders : Path or iterable of Path
        Folders of images, or of a sweep.
    others : PictureNames, optional
        How other programs name their images, by default as FedGFE does.

    Raises
    ------
    NotFoundError
        If there is no such folder, or no image in it.
    """
    found = scan_folders([folders] if isinstance(folders, Path) else folders, others)
    for images in found:
        if not images.path.is_dir():
            raise NotFoundError(f"no folder of pictures at {images.path}")
        if not images.names:
            raise NotFoundError(
                f"no pictures in {images.path}: expected PNG files that generate made"
            )
    return found


def make_gallery(
    folders: Path | Sequence[ImageFolder],
    output: Path | None = None,
    *,
    images: Sequence[ImageRecord] | None = None,
    store: EmbeddingStore | None = None,
    points: Points | None = None,
    progress: Callable[[int], object] | None = None,
) -> Gallery:
    """Make one static page of images; it works from the disk, without a network.

    Facts come from the folders' manifests and, where those say nothing of an image, from the
    image itself; of images of other programs, their names.

    Parameters
    ----------
    folders : Path or sequence of ImageFolder
        Folder of the images, or several, listed by `scan_images`.
    output : Path, optional
        The page, by default ``gallery.html`` in the folder; in the one that several are in, else
        in the current one. Thumbnails lie beside it: in ``thumbnails`` where that is so, else in
        a folder named after the page.
    images : sequence of ImageRecord, optional
        Show these ones of the folders only.
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
    listed = scan_images(folders) if isinstance(folders, Path) else list(folders)
    home = _home([each.path for each in listed])
    page = output or home / PAGE_NAME
    inside = page.parent.resolve() == home.resolve()
    thumbnails = page.with_name(THUMBNAILS if inside else f"{page.stem}_{THUMBNAILS}")
    labels = folder_labels([each.path for each in listed])
    places = {
        path: thumbnails / (label if len(labels) > 1 else "") for path, label in labels.items()
    }
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    for each in listed:
        _ = each.lines  # read before there are threads: each of them would
    wanted: Sequence[_Wanted] = (
        [(each, name) for each in listed for name in each.names] if images is None else images
    )
    shown, left_out = [], {}
    for one, found in zip(wanted, side_by_side(_Preparing(places), wanted), strict=True):
        if isinstance(found, str):
            left_out[_said(one, labels)] = found
        else:
            shown.append(found)
        if progress is not None:
            progress(1)
    if not shown:
        name, reason = next(iter(left_out.items()))
        where = ", ".join(str(each.path) for each in listed)
        raise NotFoundError(f"nothing to show of {len(wanted)} files in {where}: {name}: {reason}")
    records = marked([record for record, _ in shown], store)
    text = render_page(
        records,
        title=os.fsencode(home.resolve().name).decode("utf-8", "replace"),
        folders=[
            ShownFolder(
                path,
                os.fsencode(label).decode("utf-8", "replace"),
                _folder_url(path, page.parent),
                _folder_url(places[path], page.parent),
            )
            for path, label in labels.items()
        ],
        points=points,
    )
    write_file(page, text.encode("utf-8"))
    marks = Counter(record.mark for record in records if record.mark)
    made = sum(was_made for _, was_made in shown)
    foreign = sum(record.is_foreign for record in records)
    return Gallery(page, thumbnails, len(shown), made, left_out, marks, foreign)


class _Preparing:
    """Finds out about one image and makes its thumbnail; threads may call it at once."""

    def __init__(self, thumbnails: Mapping[Path, Path]) -> None:
        self._thumbnails = thumbnails

    def __call__(self, wanted: _Wanted) -> tuple[ImageRecord, bool] | str:
        record = wanted if isinstance(wanted, ImageRecord) else wanted[0].record(wanted[1])
        if isinstance(record, str):
            return record
        thumbnail = self._thumbnails[record.folder] / thumbnail_name(record.name)
        try:
            return record, update_thumbnail(record.file, thumbnail)
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return "damaged"


def _home(folders: Sequence[Path]) -> Path:
    """Return where a page goes unless told otherwise: the folder, or that which holds them all."""
    if len(folders) == 1:
        return folders[0]
    parents = {folder.resolve().parent: folder.parent for folder in folders}
    return next(iter(parents.values())) if len(parents) == 1 else Path()


def _said(wanted: _Wanted, labels: Mapping[Path, str]) -> str:
    """Name a file, with its folder where there are several."""
    if isinstance(wanted, ImageRecord):
        folder, name = wanted.folder, wanted.name
    else:
        folder, name = wanted[0].path, wanted[1]
    return f"{labels[folder]}/{name}" if len(labels) > 1 else name


def _folder_url(folder: Path, start: Path) -> str:
    relative = os.path.relpath(folder.resolve(), start.resolve())
    return "" if relative == os.curdir else quote(os.fsencode(relative)) + "/"
