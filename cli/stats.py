"""Numbers about embeddings: ``stats``."""

from __future__ import annotations

from math import floor, isfinite, isnan, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import Command
from .measures import by_option
from .options import (
    Filters,
    as_of_option,
    column_option,
    filter_options,
    format_option,
    plot_option,
    quiet_option,
    tokens_option,
)
from .progress import progress
from .tables import counted, print_data, print_table
from .tracking import check_log, log_option, log_table

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.selection import Selection

    from .finding import Context

_MEANINGS = {
    "norm": "mean length of the records' vectors",
    "spread": "root mean square of the records' distances to their centroid",
    "separation": "distance between the classes' centroids / within the classes",
    "drift": "cosine distance of the centroid to that of the previous round",
    "drift_l2": "L2 distance of these two",
    "to_server": "cosine distance of a node's class centroid to the server's, "
    "mean over nodes and classes",
    "to_server_l2": "L2 distance of these two, mean over nodes and classes",
}
_DIGITS = {"drift": 5, "to_server": 5}
_SMALLEST, _LARGEST = -5, 8


@click.command("stats", cls=Command)
@filter_options
@as_of_option
@by_option("round,class")
@column_option
@tokens_option
@format_option("json gives one group per line; csv and json have all digits.")
@plot_option("Draw it over the rounds: png, pdf or svg.")
@log_option
@quiet_option
@click.pass_obj
def command(
    obj: Context,
    /,
    filters: Filters,
    as_of: int | None,
    by: list[str],
    column: str | None,
    tokens: Any,
    form: str,
    plot: Path | None,
    log: Tracker | None,
    quiet: bool,
) -> None:
    """Show how embeddings spread, drift over rounds, and differ from the server's.

    Records are read once, a few at a time.

    \b
    fedgfe-store stats
    fedgfe-store stats --by round,node --class dog --plot drift.png
    fedgfe-store stats --by round --column clip --format csv > stats.csv
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis import summarize
    from fedgfe_store.analysis.plots import check_plot, plot_summary
    from fedgfe_store.analysis.scan import main_column

    if plot is not None:
        check_plot(plot, by)
    check_log(log, by)
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    if column is None:
        column = main_column(selection)
    with progress(len(selection), "records", quiet=quiet) as advance:
        table = summarize(selection, by, column=column, tokens=tokens, progress=advance)
    where = (
        f"{selection.location}, commit {selection.commit}: {_vectors(selection, column, tokens)}"
    )
    if form != "table":
        print_data(table, form, double_precision=15)
    else:
        if len(table):
            _print(table, by)
            click.echo()
        click.echo(f"{counted(int(table['records'].sum()), 'record')} of {where}")
    if plot is not None:
        plot_summary(table, by, plot, title=where)
        click.echo(f"plot: {plot}", err=form != "table")
    log_table(log, "stats", table, by, of=selection, form=form)


def _vectors(selection: Selection, column: str, tokens: str) -> str:
    shape = selection.schema.columns[column]
    if len(shape) < 2:
        return column
    how = f"mean over {shape[0]} tokens" if tokens == "mean" else f"{shape[0]} tokens as one vector"
    return f"{column}, {how}"


def _print(table: pd.DataFrame, by: list[str]) -> None:
    numbers = [name for name in table.columns if name not in by]
    shown = {name: _column(table[name].tolist(), _DIGITS.get(name, 4)) for name in numbers}
    shown["records"] = [f"{n:,}" for n in table["records"]]
    columns = [shown.get(name, table[name].tolist()) for name in table.columns]
    right = [name for name in table.columns if name in ("round", "index", *numbers)]
    print_table(list(table.columns), zip(*columns, strict=True), right=right)
    click.echo()
    for name in [name for name in _MEANINGS if name in table]:
        click.echo(f"{name}: {_MEANINGS[name]}")


def _column(values: list[float], digits: int) -> list[str]:
    """Return numbers with as many decimals as the largest needs for so many digits.

    Where they are so small or large that this is more than people read, as powers of ten.
    """
    largest = max((abs(v) for v in values if v and isfinite(v)), default=1.0)
    place = floor(log10(largest))
    if _SMALLEST <= place <= _LARGEST:
        form = f",.{max(0, digits - 1 - place)}f"
    else:
        form = f".{digits - 1}e"
    return ["-" if isnan(v) else format(v, form) for v in values]
