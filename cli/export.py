"""Writing records in formats of others: ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .answer import answers
from .codes import SOME_FAILED
from .command import Command
from .options import Filters, as_of_option, filter_options, quiet_option
from .progress import progress
from .tables import counted, print_table, size

if TYPE_CHECKING:
    from fedgfe_store.checkpoints import ExportedFile
    from fedgfe_store.checkpoints.exporting import Layout

    from .finding import Context

_NAMED: dict[str, list[str] | None] = {"all": None, "none": []}


@click.command("export", cls=Command)
@filter_options
@as_of_option
@click.option(
    "--output-dir",
    "--output_dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the files.",
)
@click.option(
    "--to",
    "kind",
    type=click.Choice(["pt", "parquet", "safetensors"]),
    default="pt",
    show_default=True,
    help="pt: FedGFE's checkpoints. parquet: what is known of records, for DuckDB, polars, pandas "
    "and Hugging Face datasets (extra parquet). safetensors: stacks of tensors.",
)
@click.option(
    "--tensors",
    metavar="NAMES",
    help="Tensor columns of parquet and safetensors: t5,clip, all or none [parquet: none, "
    "safetensors: all].",
)
@click.option(
    "--layout",
    type=click.Choice(["guide", "upstream"]),
    help="Of pt. upstream: no batch axes, and the server's samples stacked by split and class "
    "[guide].",
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@quiet_option
@answers
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    as_of: int | None,
    output_dir: Path,
    kind: str,
    tensors: str | None,
    layout: Layout | None,
    overwrite: bool,
    quiet: bool,
    answer: dict[str, Any],
) -> None:
    """Write records as .pt checkpoints, Parquet or safetensors, a file for each node and round.

    Old scripts and notebooks read checkpoints, and so does import; memory for the largest file is
    needed, and little for the other formats. A file with a damaged record is reported and the
    others are written.

    \b
    fedgfe-store export --round 5 --output-dir checkpoints/round_5
    fedgfe-store export --node server --layout upstream --output-dir checkpoints/server
    fedgfe-store export --to parquet --tensors clip --output-dir parquet

    Exit code: 0 all files written, 3 some failed, 1 all failed.
    """
    from fedgfe_store import EmbeddingStore

    if kind == "pt" and tensors is not None:
        raise click.UsageError("--tensors is of --to parquet and safetensors")
    if kind != "pt" and layout is not None:
        raise click.UsageError("--layout is of --to pt")
    obj: Context = ctx.obj
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    count = len(selection.by_node_and_round())
    with progress(count, "files", quiet=quiet) as advance:
        options: Any = {"overwrite": overwrite, "on_file": lambda file: advance(1)}
        if kind == "pt":
            from fedgfe_store.checkpoints import export_checkpoints

            files = export_checkpoints(selection, output_dir, layout=layout or "guide", **options)
        else:
            names = tensors or ("all" if kind == "safetensors" else "none")
            options["tensors"] = _NAMED.get(names, [name.strip() for name in names.split(",")])
            write = selection.to_parquet if kind == "parquet" else selection.to_safetensors
            files = write(output_dir, **options)
    answer.update(store=selection.location, commit=selection.commit, folder=output_dir, files=files)
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
