"""Contact sheets and animations of rendered images: ``sheet``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from fedgfe_store.images.axes import OF_DERIVED, SETTINGS

from .command import Command
from .option_types import KEYS, KeyList
from .options import (
    Filters,
    filter_options,
    foreign_line,
    image_folder,
    outdated_line,
    pattern_option,
    picture_names,
    quiet_option,
    store_in_reach,
)
from .pictures import folders_option, selected
from .progress import progress
from .tables import counted
from .tracking import log_option, log_sheet

if TYPE_CHECKING:
    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.images.arrange import Sheet
    from fedgfe_store.images.record import ImageRecord

    from .finding import Context

AXES = KEYS | {name: name for name in (*OF_DERIVED, *SETTINGS)}


@click.command("sheet", cls=Command)
@filter_options
@folders_option
@click.option(
    "--rows",
    type=KeyList(AXES),
    help=f"What a row is: {', '.join(AXES)}, or several: class,index [class; of walks derived].",
)
@click.option(
    "--columns",
    type=KeyList(AXES),
    help="What a column is: one of these, or frame [round; of walks frame].",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file [sheet.png; with --animate sheet.gif].",
)
@click.option(
    "--thumbnail",
    type=click.IntRange(32, 1024),
    help="Width of a picture in pixels [128; with --animate 256].",
)
@click.option("--title", help="A line above the sheet [what its pictures have in common].")
@click.option(
    "--animate", is_flag=True, help="One sample over the rounds, or a walk, as GIF or WebP."
)
@log_option
@pattern_option
@quiet_option
@click.pass_obj
def command(
    obj: Context,
    /,
    filters: Filters,
    input_dirs: tuple[Path, ...],
    rows: list[str] | None,
    columns: list[str] | None,
    output: Path | None,
    thumbnail: int | None,
    title: str | None,
    animate: bool,
    log: Tracker | None,
    patterns: tuple[str, ...],
    quiet: bool,
) -> None:
    """Draw contact sheets of rendered images, or one sample over the rounds, or a walk.

    Of several pictures for a cell that one is shown whose other keys fill most cells. A sheet
    larger than 4096 pixels goes into several files. Pictures whose record is deleted or has another
    embedding now are marked, where the store is in reach, and so are those of other programs,
    such as of FedGFE's training.

    \b
    fedgfe-store sheet --node server --split test
    fedgfe-store sheet --rows node --class dog --index 0 --output dogs.png
    fedgfe-store sheet --images sweep --rows steps --columns guidance --class dog
    fedgfe-store sheet --animate --class dog --node server --output dog.gif
    """
    from fedgfe_store.derived_keys import WalkKey
    from fedgfe_store.images import sheet as sheets
    from fedgfe_store.images.arrange import arrange
    from fedgfe_store.images.folders import scan_folders

    output = output or Path("sheet.gif" if animate else "sheet.png")
    if log is not None:
        _check_log(log, output, animate=animate)
    sheets.check_output(output, sheets.MOVING_KINDS if animate else sheets.KINDS)
    store = store_in_reach(obj)
    folders = input_dirs or [image_folder(obj.store)]
    scanned = scan_folders(folders, picture_names(patterns, store))
    images = selected(obj.store, scanned, filters, store)
    walks = columns == ["frame"] or all(isinstance(image.key, WalkKey) for image in images)
    rows = rows or (["derived"] if walks else ["class_name"])
    columns = columns or (["frame"] if walks else ["round"])
    if "frame" not in columns and "derived" not in rows:  # whose frames would be one another's rows
        images = [image for image in images if not isinstance(image.key, WalkKey)]
    if animate:
        over: Literal["round", "frame"] = "frame" if columns == ["frame"] else "round"
        shown = sheets.animate(images, output, over=over, thumbnail=thumbnail or 256)
        told = [
            str(image.frame if over == "frame" else image.key.shown("round")) for image in shown
        ]
        click.echo(f"{output}: {shown[0].key.shown('class_name')}, {over}s {', '.join(told)}")
        _tell_outdated(shown)
        return
    sheet = arrange(images, rows=rows, columns=columns)
    with progress(len(sheet.cells), "pictures", quiet=quiet) as advance:
        files = sheets.save_sheet(
            sheet,
            output,
            title=title,
            thumbnail=thumbnail or 128,
            report=lambda line: click.echo(f"note: {line}", err=True),
            progress=advance,
        )
    for line in _told(sheet, len(images), files):
        click.echo(line)
    if log is not None:
        rounds = (image.key.value("round") for image in sheet.cells.values())
        log_sheet(log, files, max((n for n in rounds if isinstance(n, int)), default=0))
    _tell_outdated(sheet.cells.values())


def _check_log(log: Tracker, output: Path, *, animate: bool) -> None:
    """Refuse what a tracker could not show."""
    if animate:
        raise click.UsageError("--log takes sheets, not animations")
    if output.suffix.lower() == ".pdf":
        raise click.UsageError(
            f"--log takes pictures: expected an --output such as sheet.png, got {output}"
        )
    log.check()


def _tell_outdated(images: Iterable[ImageRecord]) -> None:
    shown = list(images)
    foreign = sum(image.is_foreign for image in shown)
    if foreign:
        click.echo(foreign_line(foreign))
    marks = Counter(image.mark for image in shown if image.mark)
    if marks:
        click.echo(outdated_line(marks))


def _told(sheet: Sheet, found: int, files: list[Path]) -> list[str]:
    shape = f"{counted(len(sheet.rows), 'row')}, {counted(len(sheet.columns), 'column')}"
    shown = counted(len(sheet.cells), "picture")
    where = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
    lines = [f"{where}: {shape}, {shown}, {sheet.missing:,} missing"]
    if found > len(sheet.cells):
        said = sheet.title or "see below the pictures"
        lines.append(f"one picture for each cell, of {found:,}: {said}")
    return lines
