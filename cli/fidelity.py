"""How far sets of images are from others: ``fidelity``."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .codes import SOME_FAILED
from .command import Command
from .option_types import KeyList, KeyValue
from .options import (
    Filters,
    as_of_option,
    default_folder,
    device_option,
    filter_options,
    folder_option,
    format_option,
    own_device,
    plot_option,
    print_left_out,
    quiet_option,
)
from .progress import progress
from .tables import print_data, print_table
from .tracking import check_log, log_option, log_table

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.images.fidelity import Fidelity

    from .finding import Context

_TITLES = {
    "kid": "KID: kernel distance, unbiased",
    "frechet": "{}: all nodes together",
}


@click.command("fidelity", cls=Command)
@filter_options
@as_of_option
@click.option(
    "--features",
    "model",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER|FILE",
    help="A vision model of transformers, or the standard Inception weights for FID.",
)
@click.option(
    "--real",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Compare with the pictures in this folder and those inside it.",
)
@click.option(
    "--to",
    type=KeyValue(),
    metavar="KEY=VALUE",
    help="Compare with the images of one node, round or split: node=server, round=1.",
)
@folder_option("input")
@click.option(
    "--by",
    type=KeyList(),
    default="node,round",
    show_default=True,
    help="What forms a group: any of node, round, split, class, index.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Pictures per call of the model.",
)
@device_option
@format_option("csv and json give one group per line, with all digits.")
@plot_option("Draw it over the rounds: png, pdf or svg.")
@log_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    as_of: int | None,
    model: Path,
    real: Path | None,
    to: tuple[str, int | str] | None,
    input_dir: Path | None,
    by: list[str],
    batch_size: int,
    device: str | None,
    form: str,
    plot: Path | None,
    log: Tracker | None,
    quiet: bool,
) -> None:
    """Measure how far images are from real ones, or from those of a node or round.

    KID with its standard error for each group, and the Frechet distance of all nodes together: it
    is FID with the standard Inception weights, and named after its features otherwise. Nothing is
    downloaded.

    \b
    fedgfe-store fidelity --features models/dinov2 --real photos/
    fedgfe-store fidelity --features models/dinov2 --to node=server --by node,round
    fedgfe-store fidelity --features weights-inception-2015-12-05-6726825d.pth --real photos/
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis.plots import check_plot
    from fedgfe_store.images.features import load_features
    from fedgfe_store.images.fidelity import fidelity, pictures_below
    from fedgfe_store.images.scoring import selected_images

    if (real is None) == (to is None):
        raise click.UsageError("expected one of --real and --to")
    if plot is not None:
        check_plot(plot, by)
    check_log(log, by)
    pictures = None if real is None else pictures_below(real)
    obj: Context = ctx.obj
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    found = selected_images(selection, input_dir or default_folder(selection))
    features = load_features(model, own_device(device))
    total = len(found.images) + len(pictures or ())
    with progress(total, "pictures", quiet=quiet) as advance:
        measured = fidelity(
            found,
            features,
            real=pictures,
            to=None if to is None else dict([to]),
            by=by,
            batch_size=batch_size,
            progress=advance,
        )
    print_left_out(measured.left_out)
    if form == "table":
        _print(measured)
    else:
        print_data(measured.frame, form, double_precision=15)
    for note in measured.notes:
        click.echo(f"note: {note}", err=True)
    if plot is not None:
        _draw(measured, by, plot, form)
    log_table(log, "fidelity", measured.frame, by, of=selection, form=form)
    if "damaged" in measured.left_out.values():
        ctx.exit(SOME_FAILED)


def _print(measured: Fidelity) -> None:
    frame = measured.frame
    shown = frame.drop(columns="kid_error").assign(
        kid=[_with_error(*row) for row in zip(frame["kid"], frame["kid_error"], strict=True)],
        frechet=["-" if isnan(value) else f"{value:.4g}" for value in frame["frechet"]],
    )
    if frame["frechet"].isna().all():
        shown = shown.drop(columns="frechet")
    names = {"kid": "KID", "frechet": measured.name, "class_name": "class"}
    headers = [names.get(str(name), str(name)) for name in shown]
    left = {"node", "split", "class"}
    print_table(headers, shown.to_numpy().tolist(), right=[n for n in headers if n not in left])


def _with_error(value: float, error: float) -> str:
    return "-" if isnan(value) else f"{value:.4f} ± {error:.4f}"


def _draw(measured: Fidelity, by: list[str], plot: Path, form: str) -> None:
    from fedgfe_store.analysis.plots import plot_rounds

    frame: pd.DataFrame = measured.frame
    titles = {name: title.format(measured.name) for name, title in _TITLES.items()}
    plot_rounds(frame, by, titles, plot)
    click.echo(f"plot: {plot}", err=form != "table")
