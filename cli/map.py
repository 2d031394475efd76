"""Records on a map of two dimensions: ``map``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import Command
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
from .tables import print_data

if TYPE_CHECKING:
    from .finding import Context

_COLOURS = {"class": "class_name", "node": "node", "round": "round", "split": "split"}


@click.command("map", cls=Command)
@filter_options
@as_of_option
@click.option(
    "--method",
    type=click.Choice(["pca", "umap", "tsne"]),
    default="umap",
    show_default=True,
    help="umap needs the extra map, the others analysis.",
)
@column_option
@tokens_option
@click.option(
    "--by",
    type=click.Choice(list(_COLOURS)),
    default="class",
    show_default=True,
    help="What has a colour of its own.",
)
@format_option("csv and json give one record per line.")
@plot_option("Draw it: png, pdf or svg.")
@quiet_option
@click.pass_obj
def command(
    obj: Context,
    /,
    filters: Filters,
    as_of: int | None,
    method: str,
    column: str | None,
    tokens: Any,
    by: str,
    form: str,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Lay records out in two dimensions, so that those alike lie together.

    At most 5,000, drawn from all that are selected. pca keeps distances as far as two directions
    can; of umap and tsne only neighbourhoods mean something. `gallery --map` shows the pictures.

    \b
    fedgfe-store map --plot map.png
    fedgfe-store map --method pca --by round --class dog --plot dogs.png
    fedgfe-store map --format csv > points.csv
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis.maps import MOST, map_records
    from fedgfe_store.analysis.plots import check_plot, plot_map

    if plot is not None:
        check_plot(plot)
    elif form == "table":
        raise click.UsageError("expected --plot FILE, or --format csv or json")
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    with progress(2 * min(len(selection), MOST), "records", quiet=quiet) as advance:
        found = map_records(selection, method, column=column, tokens=tokens, progress=advance)
    if form == "table":
        click.echo(found.title)
    else:
        print_data(found.frame, form, double_precision=15)
    if plot is not None:
        plot_map(found.frame, _COLOURS[by], plot, title=found.title)
        click.echo(f"plot: {plot}", err=form != "table")
