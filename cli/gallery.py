"""A page of the images: ``gallery``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .codes import SOME_FAILED
from .command import Command
from .options import (
    Filters,
    filter_options,
    foreign_line,
    image_folder,
    outdated_line,
    pattern_option,
    picture_names,
    print_left_out,
    quiet_option,
    store_in_reach,
)
from .pictures import folders_option, selected
from .progress import progress
from .tables import counted, size

if TYPE_CHECKING:
    from fedgfe_store.derived_keys import Key
    from fedgfe_store.images.gallery import Points
    from fedgfe_store.store import EmbeddingStore

    from .finding import Context


@click.command("gallery", cls=Command)
@filter_options
@folders_option
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page [gallery.html in the folder; of several, in the one that they are in].",
)
@pattern_option
@click.option(
    "--map",
    "method",
    type=click.Choice(["pca", "umap", "tsne"]),
    help="Show the pictures on a map of their embeddings, too; needs the store.",
)
@click.option(
    "--column", help="With --map: tensor column [the first of embeddings: t5; clip for sd]."
)
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    input_dirs: tuple[Path, ...],
    output: Path | None,
    patterns: tuple[str, ...],
    method: str | None,
    column: str | None,
    quiet: bool,
) -> None:
    """Make a page to look through the images: filters, provenance, two of anything side by side.

    The page is one file that works offline, with thumbnails in a folder beside it. Run again, it
    takes in what is new; only thumbnails that are missing or out of date are made. Pictures whose
    record is deleted or has another embedding now are marked, where the store is in reach, and so
    are those of other programs, such as of FedGFE's training. With --map there is a point for each,
    whose picture is shown when it is pointed at (pca and tsne need the extra analysis, umap the
    extra map).

    \b
    fedgfe-store gallery
    fedgfe-store gallery --round 5,20 --class dog --output dogs.html
    fedgfe-store gallery --images output_images/demo --images output_images/another
    fedgfe-store gallery --map umap --column clip
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.gallery import make_gallery, scan_images

    if column is not None and method is None:
        raise click.UsageError("--column goes with --map")
    obj: Context = ctx.obj
    store = store_in_reach(obj)
    folders = scan_images(input_dirs or [image_folder(obj.store)], picture_names(patterns, store))
    images = selected(obj.store, folders, filters) if filters else None
    count = sum(len(each.names) for each in folders) if images is None else len(images)
    points = None
    if method is not None:
        known = [each for one in folders for each in one.records.values()]
        pictured = {each.key for each in images or known if not isinstance(each, str)}
        # Not `store`, which is none where it cannot be read.
        points = _points(pictured, EmbeddingStore.open(obj.store), method, column, quiet=quiet)
    with progress(count, "pictures", quiet=quiet) as advance:
        gallery = make_gallery(
            folders, output, images=images, store=store, points=points, progress=advance
        )
    print_left_out(gallery.left_out)
    shown, nbytes = counted(gallery.pictures, "picture"), size(gallery.page.stat().st_size)
    made = counted(gallery.made, "thumbnail")
    click.echo(f"{shown} in {gallery.page}, {nbytes}; {made} made")
    if points is not None:
        click.echo(f"map: {points.title}")
    if gallery.foreign:
        click.echo(foreign_line(gallery.foreign))
    if gallery.outdated:
        click.echo(outdated_line(gallery.outdated))
    if "damaged" in gallery.left_out.values():
        ctx.exit(SOME_FAILED)


def _points(
    pictured: Collection[Key],
    store: EmbeddingStore,
    method: str,
    column: str | None,
    *,
    quiet: bool,
) -> Points:
    """Lay out the records that have a picture."""
    from fedgfe_store.analysis.maps import MOST, map_records
    from fedgfe_store.images.gallery import Points
    from fedgfe_store.records import RecordKey

    selection = store.select()
    selection = selection.take([n for n, key in enumerate(selection.keys()) if key in pictured])
    with progress(2 * min(len(selection), MOST), "records", quiet=quiet) as advance:
        found = map_records(selection, method, column=column, progress=advance)
    rows = found.frame.itertuples(index=False, name=None)
    return Points(found.title, {RecordKey(*row[:-2]): row[-2:] for row in rows})
