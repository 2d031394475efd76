"""What became of the images: ``status``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import Command
from .derived_options import Asked, derived_options, described
from .option_types import KeyList
from .options import (
    Filters,
    as_of_option,
    default_folder,
    filter_options,
    folder_option,
    format_option,
)
from .progress import progress
from .tables import counted, numbers, print_data, print_table

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.derived.record import Derived
    from fedgfe_store.images.status import ImageStatus
    from fedgfe_store.selection import Selection

    from .finding import Context

_COUNTS = ("done", "missing", "stale", "failed", "all")
_GROUPS = {"node": "node", "round": "round", "split": "split", "class": "class_name"}
_SHOWN_REASONS = 5


@click.command("status", cls=Command)
@filter_options
@derived_options
@as_of_option
@folder_option("output")
@click.option(
    "--by",
    type=KeyList(_GROUPS),
    help="Count by some of node,round,split,class [by node and round, then by class].",
)
@click.option(
    "--images-per-record",
    type=click.IntRange(1, 10_000),
    help="Images that each record should have [as many as any has had].",
)
@click.option(
    "--parts",
    "--shards",
    "parts",
    type=click.IntRange(min=1),
    help="Parts that the work is shared out in [those of the latest run].",
)
@click.option("--failed", is_flag=True, help="List the failed images with their reasons.")
@click.option(
    "--deleted",
    is_flag=True,
    help="List the images in the folder whose record is deleted.",
)
@format_option(
    "csv and json give one group per line, by node, round and class, or the images listed."
)
@click.pass_obj
def command(
    obj: Context,
    filters: Filters,
    derived: Asked,
    as_of: int | None,
    output_dir: Path | None,
    by: list[str] | None,
    images_per_record: int | None,
    parts: int | None,
    failed: bool,
    deleted: bool,
    form: str,
) -> None:
    """Show which images are done, missing, stale or failed.

    Stale images were made from another embedding or with other settings than the folder's latest
    ones. Images of records that the store does not have any more are counted apart. No model is
    loaded, so this runs on a login node.

    \b
    fedgfe-store status --round 5
    fedgfe-store status --by class --failed
    fedgfe-store status --by node,round,class --format csv > status.csv
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.status import image_status

    if failed and deleted:
        raise click.UsageError("expected --failed or --deleted, got both")
    selection = derived.of(filters.select(EmbeddingStore.open(obj.store, as_of=as_of)))
    folder = output_dir or default_folder(selection)
    with progress(len(selection), "records") as advance:
        status = image_status(
            selection, folder, images_per_record=images_per_record, progress=advance
        )
    if form != "table":
        if failed:
            table = _failures(status)
        elif deleted:
            table = _deleted(status)
        else:
            table = status.counts(by or _groups(status)[-1])
        print_data(table, form)
        return
    _print_head(selection, status)
    for groups in [by] if by else _groups(status)[:-1]:
        _print_counts(status, groups)
    _print_stale(status)
    if failed and status.totals["failed"]:
        _print_failures(status)
    _print_deleted(status, listed=deleted)
    _print_rest(status, parts)


def _groups(status: ImageStatus) -> list[list[str]]:
    """Give what images are counted by where nothing is said; last, for data."""
    if "derived" in status.frame:
        known = [name for name in _GROUPS.values() if status.frame[name].nunique() > 1]
        return [["derived", *known]] * 2
    return [["node", "round"], ["class_name"], ["node", "round", "class_name"]]


def _failures(status: ImageStatus) -> pd.DataFrame:
    frame = status.frame
    return frame[frame["status"] == "failed"].drop(columns="status")


def _deleted(status: ImageStatus) -> pd.DataFrame:
    import pandas as pd

    from fedgfe_store.records import KEY_COLUMNS

    rows = [
        [*map(image.key.shown, KEY_COLUMNS), image.number, image.name] for image in status.deleted
    ]
    return pd.DataFrame(rows, columns=[*KEY_COLUMNS, "image", "file"])


def _print_deleted(status: ImageStatus, *, listed: bool) -> None:
    if not status.deleted:
        return
    if listed:
        headers = [str(name).removesuffix("_name") for name in _deleted(status)]
        rows = _deleted(status).to_numpy().tolist()
        print_table(headers, rows, right=("round", "index", "image"))
        click.echo()
    more = "" if listed else " (--deleted lists them)"
    count = counted(len(status.deleted), "image")
    click.echo(f"deleted: {count} in the folder of records that are deleted{more}")


def _print_head(selection: Selection | Derived, status: ImageStatus) -> None:
    click.echo(described(selection))
    click.echo(f"folder: {status.folder}")
    if status.images_per_record > 1:
        click.echo(f"images per record: {status.images_per_record}")
    if status.settings:
        _print_settings(status.settings)


def _print_settings(made_with: Mapping[str, Any]) -> None:
    first = ("model", "revision", "dtype", "steps", "height", "width")
    model, revision, dtype, steps, height, width = (made_with.get(name, "?") for name in first)
    hidden = (*first, "noise")
    known = {k: v for k, v in made_with.items() if k not in hidden and v is not None}
    rest = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in known.items()}
    click.echo(f"model: {model} ({str(revision)[:12]}), {dtype}")
    shown = [f"{steps} steps", f"{width}x{height}", *(f"{k} {v}" for k, v in rest.items())]
    click.echo(f"settings: {', '.join(shown)}")


def _print_counts(status: ImageStatus, by: Sequence[str]) -> None:
    rows = status.counts(by).to_numpy().tolist()
    total = ["all", *[""] * (len(by) - 1), *status.totals.values()]
    headers = [*(name.removesuffix("_name") for name in by), *_COUNTS]
    click.echo()
    print_table(headers, [*rows, total], right=("round", *_COUNTS))


def _print_stale(status: ImageStatus) -> None:
    reasons = status.frame["reason"][status.frame["status"] == "stale"].value_counts()
    click.echo()
    for reason, count in reasons.head(_SHOWN_REASONS).items():
        click.echo(f"stale: {counted(count, 'image')}: {reason}")
    if len(reasons) > _SHOWN_REASONS:
        click.echo(f"stale: and {len(reasons) - _SHOWN_REASONS} other reasons")


def _print_failures(status: ImageStatus) -> None:
    failures = _failures(status).drop(columns="file")
    headers = [str(name).removesuffix("_name") for name in failures]
    print_table(headers, failures.to_numpy().tolist(), right=("round", "index", "image"))
    click.echo()


def _print_rest(status: ImageStatus, parts: int | None) -> None:
    from fedgfe_store.generation.parts import parts_of
    from fedgfe_store.images.manifest import part_count

    unfinished = status.totals["all"] - status.totals["done"]
    count = parts or part_count(status.folder)
    if not unfinished:
        click.echo("nothing is missing")
    elif count is None:
        click.echo(f"to finish: {counted(unfinished, 'image')}")
    else:
        array = numbers(parts_of(status.unfinished, count)).replace(" ", "")
        click.echo(f"to finish: --array={array}")
