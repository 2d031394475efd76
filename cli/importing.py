"""Importing legacy checkpoints: ``import``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .answer import answers
from .codes import SOME_FAILED
from .command import Command
from .finding import tell_of_copies
from .options import quiet_option, wait_option
from .progress import progress
from .tables import counted, print_table, size

if TYPE_CHECKING:
    from fedgfe_store.checkpoints import FileReport, ImportReport

    from .finding import Context

_MOST_SHOWN = 6
_MOST_NAMED = 3


@click.command("import", cls=Command)
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH..."
)
@click.option(
    "--pattern", metavar="GLOB", default="*.pt", help="Which files of a folder to import [*.pt]."
)
@click.option("--audio", is_flag=True, help="Keep audio embeddings too.")
@click.option("--dry-run", is_flag=True, help="Read and report, write nothing.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How a new store keeps values; bfloat16 takes about 0.4 of the space.",
)
@click.option(
    "--if-exists",
    type=click.Choice(["error", "replace", "skip"]),
    default="error",
    show_default=True,
    help="What becomes of records that the store has with other tensors; replace: also delete what"
    " it has besides of a file's node, round and splits.",
)
@click.option(
    "--round-from",
    type=click.Choice(["name", "content"]),
    help="Which round counts where a file's name and its content differ; without it, refuse.",
)
@click.option(
    "--fail-fast",
    is_flag=True,
    help="Stop at the first file that fails or of which a record cannot be taken.",
)
@click.option(
    "--other-experiment",
    is_flag=True,
    help="Take files of another experiment than the store's, too.",
)
@wait_option
@quiet_option
@answers
@click.pass_context
def command(
    ctx: click.Context,
    /,
    paths: tuple[Path, ...],
    pattern: str,
    quiet: bool,
    answer: dict[str, Any],
    **options: Any,
) -> None:
    """Import FedGFE .pt checkpoints, files or folders, into the store.

    Each file becomes one commit. Files are read without running anything in them. A file that
    cannot be read is reported and the others are imported; importing again changes nothing.
    The store is made if it is not there.

    \b
    fedgfe-store import checkpoints/embeddings/
    fedgfe-store import checkpoints/embeddings/ --pattern "node_[0-4]*.pt" --dry-run
    fedgfe-store --store run1.zarr import node_0_embeddings_r5.pt --precision bfloat16

    Exit code: 0 all imported, 3 some files failed or records were left out, 1 all files failed.
    """
    from fedgfe_store.checkpoints import find_checkpoints, import_checkpoints
    from fedgfe_store.storage.engines import check_target

    obj: Context = ctx.obj
    check_target(obj.store)
    count = len(find_checkpoints(paths, pattern=pattern))
    with progress(count, "files", quiet=quiet) as advance:
        report = import_checkpoints(
            obj.store, paths, pattern=pattern, on_file=lambda file: advance(1), **options
        )
    answer.update(
        store=report.store_path,
        dry_run=options["dry_run"],
        files=report.files,
        notes=report.notes,
        not_read=count - len(report.files),
    )
    show_report(report, dry_run=options["dry_run"])
    tell_of_copies(obj.store, report)
    if len(report.files) < count:
        click.echo(f"stopped: {counted(count - len(report.files), 'file')} not read", err=True)
    if report.failed or report.incomplete:
        ctx.exit(1 if len(report.failed) == len(report.files) else SOME_FAILED)


def show_report(report: ImportReport, *, dry_run: bool = False, quiet: bool = False) -> None:
    """Print what became of each file that was read: a table, notes, failures and the sum."""
    good = [file for file in report.files if not (file.error or file.known or quiet)]
    if good:
        headers = ("file", "node", "round", "records", "unchanged", "classes", "splits", "skipped")
        right = ("round", "records", "unchanged")
        print_table(headers, [_row(file) for file in good], right=right)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    for file in [*good, *report.failed]:
        for note in file.notes:
            click.echo(f"note: {file.path.name}: {note}")
    for file in good:
        if file.removed:
            what = counted(file.removed, "record")
            click.echo(f"removed: {file.path.name}: {what} that it does not hold")
    for file in report.incomplete:
        for reason, samples in file.left_out.items():
            more = f" and {len(samples) - _MOST_NAMED:,} more" * (len(samples) > _MOST_NAMED)
            named = "; ".join(samples[:_MOST_NAMED])
            click.echo(f"left out: {file.path}: {reason}: {named}{more}", err=True)
    for file in report.failed:
        click.echo(f"failed: {file.path}: {file.error}", err=True)
    if not quiet:
        click.echo(_total(report, dry_run=dry_run))


def _row(file: FileReport) -> list[object]:
    return [
        file.path.name,
        file.node or "",
        "" if file.round is None else file.round,
        file.records + file.replaced,
        file.unchanged,
        _counts(file.classes),
        _counts(file.splits),
        _counts(file.skipped, between=": ", most=len(file.skipped)),
    ]


def _counts(counts: Mapping[str, int], *, between: str = " ", most: int = _MOST_SHOWN) -> str:
    if len(counts) > most and len(set(counts.values())) == 1:
        return f"{len(counts)} with {next(iter(counts.values()))} each"
    shown = [f"{name}{between}{count}" for name, count in list(counts.items())[:most]]
    more = [f"and {len(counts) - most} more"] if len(counts) > most else []
    return ", ".join(shown + more)


def _total(report: ImportReport, *, dry_run: bool) -> str:
    read = [file for file in report.files if not file.known]
    done = [file for file in read if file.error is None]
    replaced = sum(file.replaced for file in done)
    removed = sum(file.removed for file in done)
    skipped = sum(sum(file.skipped.values()) for file in done)
    parts = [
        f"{report.records:,} {'records found' if dry_run else 'new records'}",
        f"{replaced:,} replaced" if replaced else "",
        f"{removed:,} removed" if removed else "",
        f"{report.unchanged:,} unchanged" if report.unchanged else "",
        f"{skipped:,} skipped" if skipped else "",
        f"{len(report.failed):,} failed" if report.failed else "",
    ]
    folder = report.store_path
    there = folder.exists() if isinstance(folder, Path) else True
    where = f"store {report.store_path}" if there else f"no store at {report.store_path}"
    where = "dry run, nothing written" if dry_run else where
    bytes_read = size(sum(file.bytes for file in read))
    return f"{counted(len(read), 'file')}, {bytes_read}: {', '.join(filter(None, parts))}; {where}"
