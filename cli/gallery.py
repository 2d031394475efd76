"""A page of the images: ``gallery``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .codes import SOME_FAILED
from .options import (
    Filters,
    filter_options,
    image_folder,
    outdated_line,
    print_left_out,
    quiet_option,
    store_in_reach,
)
from .pictures import folders_option, selected
from .progress import progress
from .tables import counted, size

if TYPE_CHECKING:
    from .main import Context


@click.command("gallery")
@filter_options
@folders_option
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page [gallery.html in the folder; of several, in the one that they are in].",
)
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    input_dirs: tuple[Path, ...],
    output: Path | None,
    quiet: bool,
) -> None:
    """Make a page to look through the images: filters, provenance, two of anything side by side.

    The page is one file that works offline, with thumbnails in a folder beside it. Run again, it
    takes in what is new; only thumbnails that are missing or out of date are made. Pictures whose
    record is deleted or has another embedding now are marked, where the store is in reach.

    \b
    fedgfe-store gallery
    fedgfe-store gallery --round 5,20 --class dog --output dogs.html
    fedgfe-store gallery --input-dir output_images/demo --input-dir output_images/another
    """
    from fedgfe_store.images.gallery import make_gallery, scan_images

    obj: Context = ctx.obj
    folders = scan_images(input_dirs or [image_folder(obj.store)])
    images = selected(obj.store, folders, filters) if filters else None
    count = sum(len(each.names) for each in folders) if images is None else len(images)
    store = store_in_reach(obj.store)
    with progress(count, "pictures", quiet=quiet) as advance:
        gallery = make_gallery(folders, output, images=images, store=store, progress=advance)
    print_left_out(gallery.left_out)
    shown, nbytes = counted(gallery.pictures, "picture"), size(gallery.page.stat().st_size)
    made = counted(gallery.made, "thumbnail")
    click.echo(f"{shown} in {gallery.page}, {nbytes}; {made} made")
    if gallery.outdated:
        click.echo(outdated_line(gallery.outdated))
    if "damaged" in gallery.left_out.values():
        ctx.exit(SOME_FAILED)
