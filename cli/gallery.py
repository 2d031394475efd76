"""A page of the images: ``gallery``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .codes import SOME_FAILED
from .options import (
    folder_option,
    foreign_line,
    image_folder,
    outdated_line,
    pattern_option,
    picture_names,
    print_left_out,
    quiet_option,
    store_in_reach,
)
from .progress import progress
from .tables import counted, size

if TYPE_CHECKING:
    from .finding import Context


@click.command("gallery")
@folder_option("input")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page [gallery.html in the folder].",
)
@pattern_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    input_dir: Path | None,
    output: Path | None,
    patterns: tuple[str, ...],
    quiet: bool,
) -> None:
    """Make a page to look through the images: filters, provenance, rounds side by side.

    The page is one file that works offline, with thumbnails in a folder beside it. Run again, it
    takes in what is new; only thumbnails that are missing or out of date are made. Pictures whose
    record is deleted or has another embedding now are marked, where the store is in reach, and so
    are those of other programs, such as of FedGFE's training.

    \b
    fedgfe-store gallery
    fedgfe-store gallery --input-dir output_images/another --output another.html
    """
    from fedgfe_store.images.gallery import make_gallery, scan_images

    obj: Context = ctx.obj
    folder = input_dir or image_folder(obj.store)
    store = store_in_reach(obj)
    images = scan_images(folder, picture_names(patterns, store))
    with progress(len(images.names), "pictures", quiet=quiet) as advance:
        gallery = make_gallery(images, output, store=store, progress=advance)
    print_left_out(gallery.left_out)
    shown, nbytes = counted(gallery.pictures, "picture"), size(gallery.page.stat().st_size)
    made = counted(gallery.made, "thumbnail")
    click.echo(f"{shown} in {gallery.page}, {nbytes}; {made} made")
    if gallery.foreign:
        click.echo(foreign_line(gallery.foreign))
    if gallery.outdated:
        click.echo(outdated_line(gallery.outdated))
    if "damaged" in gallery.left_out.values():
        ctx.exit(SOME_FAILED)
