"""Writing legacy checkpoints: ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .codes import SOME_FAILED
from .options import Filters, as_of_option, filter_options, quiet_option
from .progress import progress
from .tables import counted, print_table, size

if TYPE_CHECKING:
    from fedgfe_store.checkpoints import ExportedFile

    from .finding import Context


@click.command("export")
@filter_options
@as_of_option
@click.option(
    "--output-dir",
    "--output_dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the checkpoints.",
)
@click.option(
    "--layout",
    type=click.Choice(["guide", "upstream"]),
    default="guide",
    show_default=True,
    help="upstream: no batch axes, and the server's samples stacked by split and class.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    as_of: int | None,
    output_dir: Path,
    quiet: bool,
    **options: Any,
) -> None:
    """Write records as FedGFE .pt checkpoints, one file per node and round.

    Old scripts and notebooks read them, and so does import. A file with a damaged record is
    reported and the others are written. Memory for the largest file is needed.

    \b
    fedgfe-store export --round 5 --output-dir checkpoints/round_5
    fedgfe-store export --node server --layout upstream --output-dir checkpoints/server

    Exit code: 0 all files written, 3 some failed, 1 all failed.
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.checkpoints import export_checkpoints

    obj: Context = ctx.obj
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    count = len(selection.by_node_and_round())
    with progress(count, "files", quiet=quiet) as advance:
        files = export_checkpoints(
            selection, output_dir, on_file=lambda file: advance(1), **options
        )
    _show(files, output_dir)
    failed = sum(file.error is not None for file in files)
    if failed:
        ctx.exit(1 if failed == len(files) else SOME_FAILED)


def _show(files: tuple[ExportedFile, ...], folder: Path) -> None:
    good = [file for file in files if file.error is None]
    failed = [file for file in files if file.error is not None]
    if good:
        headers = ("file", "node", "round", "records", "size")
        rows = [(f.path.name, f.node, f.round, f.records, size(f.bytes)) for f in good]
        print_table(headers, rows, right=("round", "records", "size"))
    for file in good:
        for note in file.notes:
            click.echo(f"note: {file.path.name}: {note}")
    for file in failed:
        click.echo(f"failed: {file.path}: {file.error}", err=True)
    records = counted(sum(file.records for file in good), "record")
    lost = f", {len(failed):,} failed" if failed else ""
    total = size(sum(file.bytes for file in good))
    click.echo(f"{counted(len(good), 'file')}, {total}: {records}{lost}; {folder}")
