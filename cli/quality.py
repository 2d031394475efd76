"""How embeddings compare with a reference: ``quality``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import Command
from .measures import CLASSIFIED, classified, draw, grouping, print_measures
from .option_types import KeyList, KeyValue
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
from .tables import counted, print_data
from .tracking import check_log, log_option, log_table

if TYPE_CHECKING:
    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.selection import Selection
    from fedgfe_store.store import EmbeddingStore

    from .finding import Context

_TEXT = ("node", "text")
_FORMS = {"cosine": "{:.4f}", "mse": "{:.4g}", "frechet": "{:.4g}", "diversity": "{:.4f}"}


@click.command("quality", cls=Command)
@filter_options
@as_of_option
@click.option(
    "--to",
    type=KeyValue(),
    default="node=text",
    show_default=True,
    metavar="KEY=VALUE",
    help="What embeddings are compared with: a node, round or split, such as node=server.",
)
@click.option(
    "--measure",
    type=click.Choice(["groups", *CLASSIFIED]),
    default="groups",
    show_default=True,
    help="averages, classes and confusion are of the class of the nearest reference record.",
)
@click.option(
    "--by",
    type=KeyList(),
    help="What forms a group: any of node, round, split, class, index "
    "[groups and averages: node,round; else all together].",
)
@column_option
@tokens_option
@format_option("csv and json give one group per line, with all digits.")
@plot_option("Draw it: over the rounds, or the confusion as a square; png, pdf or svg.")
@log_option
@quiet_option
@click.pass_obj
def command(
    obj: Context,
    /,
    filters: Filters,
    as_of: int | None,
    to: tuple[str, int | str],
    measure: str,
    by: list[str] | None,
    column: str | None,
    tokens: Any,
    form: str,
    plot: Path | None,
    log: Tracker | None,
    quiet: bool,
) -> None:
    """Show how close embeddings are to a reference, and which class is nearest.

    The reference is what `encode` made of the prompts, or the server's records with --to
    node=server. Needs scikit-learn (extra analysis).

    \b
    fedgfe-store quality
    fedgfe-store quality --by round,class --plot quality.png
    fedgfe-store quality --to node=server --measure averages
    """
    import numpy as np

    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis.reference import MEASURES, nearest_classes, quality

    keys = grouping(measure, by, plot, ["node", "round"])
    check_log(log, keys, measure)
    store = EmbeddingStore.open(obj.store, as_of=as_of)
    selection, reference = filters.select(store), _reference(store, to)
    # What is compared with itself says nothing.
    selection = selection.take(np.flatnonzero(selection.column(to[0]) != to[1]))
    with progress(len(selection), "records", quiet=quiet) as advance:
        if measure in CLASSIFIED:
            found = nearest_classes(
                selection, reference, column=column, tokens=tokens, progress=advance
            )
            table = classified(found, measure, keys).rename(columns={"pictures": "records"})
        else:
            table = quality(
                selection, reference, keys, column=column, tokens=tokens, progress=advance
            )
    where = f"{selection.location}, commit {selection.commit}"
    beside = f"{counted(len(reference), 'record')} of {to[0].removesuffix('_name')} {to[1]}"
    if form != "table":
        print_data(table, form, double_precision=15)
    else:
        print_measures(table, _FORMS)
        click.echo()
        for name in [name for name in MEASURES if name in table]:
            click.echo(MEASURES[name])
        click.echo(f"{counted(len(selection), 'record')} of {where}, beside {beside}")
    if plot is not None:
        drawn = table.rename(columns={"records": "pictures"}) if measure == "confusion" else table
        draw(drawn, measure, keys, plot, titles=MEASURES, title=f"{where}, beside {beside}")
        click.echo(f"plot: {plot}", err=form != "table")
    log_table(log, "quality", table, keys, of=selection, form=form)


def _reference(store: EmbeddingStore, to: tuple[str, int | str]) -> Selection:
    from fedgfe_store.errors import NotFoundError

    wanted: dict[str, Any] = dict([to])
    found = store.select(**wanted)
    if len(found):
        return found
    try:
        return Filters({name: [value] for name, value in wanted.items()}).select(store)
    except NotFoundError as error:
        if to == _TEXT:
            error.add_note("encode makes references of prompts; --to node=server takes the server")
        raise
