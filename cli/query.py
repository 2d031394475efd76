"""Listing records: ``query``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .command import Command
from .options import Filters, as_of_option, filter_options, format_option
from .tables import counted, print_data, print_table

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

    from .finding import Context

_SHOWN = ("node", "round", "split", "class_name", "index", "sample_id", "image_filename")


@click.command("query", cls=Command)
@filter_options
@as_of_option
@format_option("json gives one record per line; json and csv have every column.")
@click.option(
    "--where",
    metavar="SQL",
    help="A condition of DuckDB on the columns of --format csv: round % 5 = 0 (extra sql).",
)
@click.option(
    "--limit", type=click.IntRange(min=0), help="Most records shown [table: 20, else all]."
)
@click.pass_obj
def command(
    obj: Context,
    filters: Filters,
    as_of: int | None,
    form: str,
    where: str | None,
    limit: int | None,
) -> None:
    """List records by node, round, split and class.

    \b
    fedgfe-store query --round 5 --class dog,drum --node 0-4,server
    fedgfe-store query --round 1-20 --per-class 1 --format csv > records.csv
    fedgfe-store query --where "round % 5 = 0 AND class_name LIKE 'dog%'"
    """
    from fedgfe_store import EmbeddingStore

    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    if where is not None:
        selection = _narrowed(selection, where, allow_empty=filters.allow_empty)
    _warn(selection)
    if limit is None and form == "table":
        limit = 20
    records = selection.take(slice(limit)).records
    if form != "table":
        print_data(records, form, date_format="iso")
    else:
        print_table(_SHOWN, records[list(_SHOWN)].to_numpy().tolist(), right=("round", "index"))
        shown = "" if len(records) == len(selection) else f", {len(records)} shown"
        click.echo(f"\n{counted(len(selection), 'record')}{shown}")


def _narrowed(selection: Selection, where: str, *, allow_empty: bool) -> Selection:
    from fedgfe_store.errors import NotFoundError

    met = selection.where(where)
    if len(selection) and not len(met) and not allow_empty:
        raise NotFoundError(f"none of {counted(len(selection), 'record')} meets --where {where!r}")
    return met


def _warn(selection: Selection) -> None:
    """Say which part of the past is only listed."""
    gone = int(selection.compacted_away().sum())
    if gone:
        kept = len(selection) - gone
        left = f"those of the other {kept:,} can be read" if kept else "none can be read"
        whose = counted(gone, "record")
        click.echo(f"note: the tensors of {whose} were compacted away since; {left}", err=True)
