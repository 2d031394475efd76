"""Pictures that a command looks at: of several folders, and those that meet its filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Filters, Renamed

if TYPE_CHECKING:
    from click.decorators import FC

    from fedgfe_store.common.location import Location
    from fedgfe_store.images.folder import ImageFolder
    from fedgfe_store.images.record import ImageRecord
    from fedgfe_store.store import EmbeddingStore


def folders_option(function: FC) -> FC:
    """Give a command the option ``--images``, which may be repeated, as `input_dirs`."""
    return click.option(
        "--images",
        "--input-dir",
        "--input_dir",
        "input_dirs",
        cls=Renamed,
        type=click.Path(file_okay=False, path_type=Path),
        multiple=True,
        help="Folder of the images, or of a sweep [output_images/<experiment>]; repeat it for "
        "several.",
    )(function)


def selected(
    place: Location,
    scanned: Sequence[ImageFolder],
    filters: Filters,
    store: EmbeddingStore | None = None,
) -> list[ImageRecord]:
    """Return the pictures of some folders that meet the filters.

    Parameters
    ----------
    place : Path or Address
        Where the store is, for filters that only its records can answer.
    scanned : sequence of ImageFolder
        The folders.
    filters : Filters
        What was asked for.
    store : EmbeddingStore, optional
        Mark the pictures of its records that are out of date.

    Raises
    ------
    NotFoundError
        If a name or number is not there, or nothing meets all of them.
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.common.lookup import said
    from fedgfe_store.errors import NotFoundError
    from fedgfe_store.images.folder import key_values, pick
    from fedgfe_store.images.outdated import marked
    from fedgfe_store.records import KEY_COLUMNS

    known = [image for folder in scanned for image in folder.select()]
    if not filters:
        return marked(known, store)
    samples = {name: v for name, v in filters.typed.items() if name not in KEY_COLUMNS}
    keys = replace(filters, typed={n: v for n, v in filters.typed.items() if n not in samples})
    where = ", ".join(str(folder.path) for folder in scanned)
    wanted = keys.looked_up(lambda name: key_values(known, name), where)
    images = pick(known, where, **wanted)
    if not samples:
        return marked(images, store)
    selection = replace(filters, typed=samples, per_class=None).select(EmbeddingStore.open(place))
    named = set(selection.keys())
    kept = [image for image in images if image.key in named]
    if not kept:
        asked = "; ".join(said(values) for values in samples.values())
        raise NotFoundError(f"no picture in {where} is of {asked}")
    return marked(kept, store)
