"""How far sets of images are from others: ``fidelity``."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .codes import SOME_FAILED
from .command import Command
from .measures import by_option, per_call_option, print_measures
from .option_types import KeyValue
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
    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.images.fidelity import Fidelity
    from fedgfe_store.images.transfer import Transfer
    from fedgfe_store.selection import Selection

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
@click.option(
    "--measure",
    type=click.Choice(["distances", "classifier"]),
    default="distances",
    show_default=True,
    help="classifier: accuracy on the pictures of --real, in a subfolder for each class, of a "
    "classifier trained on each group's images, and the reverse.",
)
@folder_option("input")
@by_option("node,round")
@per_call_option
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
    measure: str,
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
    is FID with the standard Inception weights, and named after its features otherwise. With
    --measure classifier, what the images teach a classifier. Nothing is downloaded.

    \b
    fedgfe-store fidelity --features models/dinov2 --real photos/
    fedgfe-store fidelity --features models/dinov2 --real photos/ --measure classifier
    fedgfe-store fidelity --features models/dinov2 --to node=server --by node,round
    fedgfe-store fidelity --features weights-inception-2015-12-05-6726825d.pth --real photos/
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis.plots import check_plot
    from fedgfe_store.images.features import load_features
    from fedgfe_store.images.fidelity import Fidelity, fidelity
    from fedgfe_store.images.scoring import selected_images
    from fedgfe_store.images.transfer import MEASURES, train_and_test

    if (real is None) == (to is None):
        raise click.UsageError("expected one of --real and --to")
    is_classified = measure == "classifier"
    if is_classified and (real is None or "class_name" in by):
        raise click.UsageError("--measure classifier: expected --real, and no class in --by")
    if plot is not None:
        check_plot(plot, by)
    check_log(log, by)
    obj: Context = ctx.obj
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    pictures = _real(real, selection if is_classified else None)
    found = selected_images(selection, input_dir or default_folder(selection))
    features = load_features(model, own_device(device))
    with progress(len(found.images) + len(pictures), "pictures", quiet=quiet) as advance:
        options: dict[str, Any] = {"by": by, "batch_size": batch_size, "progress": advance}
        measured: Fidelity | Transfer
        if is_classified:
            measured = train_and_test(found, features, pictures, **options)
        else:
            others = None if real is None else list(pictures)
            keys = None if to is None else dict([to])
            measured = fidelity(found, features, real=others, to=keys, **options)
    print_left_out(measured.left_out)
    if form != "table":
        print_data(measured.frame, form, double_precision=15)
    elif isinstance(measured, Fidelity):
        _print(measured)
    else:
        print_measures(measured.frame, {})
        click.echo("\n" + "\n".join(MEASURES.values()))
    for note in measured.notes if isinstance(measured, Fidelity) else ():
        click.echo(f"note: {note}", err=True)
    if plot is not None:
        _draw(measured, by, plot, form)
    log_table(log, "fidelity", measured.frame, by, of=selection, form=form)
    if "damaged" in measured.left_out.values():
        ctx.exit(SOME_FAILED)


def _real(folder: Path | None, selection: Selection | None) -> Mapping[Path, str]:
    """Return the pictures of `folder`, with their classes where they are those of a selection."""
    from fedgfe_store.images.fidelity import pictures_below
    from fedgfe_store.images.transfer import real_classes

    if folder is None:
        return {}
    if selection is None:
        return dict.fromkeys(pictures_below(folder), "")
    return real_classes(folder, sorted(set(selection.others().column("class_name").tolist())))


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


def _draw(measured: Fidelity | Transfer, by: list[str], plot: Path, form: str) -> None:
    from fedgfe_store.analysis.plots import plot_rounds
    from fedgfe_store.images.fidelity import Fidelity
    from fedgfe_store.images.transfer import MEASURES

    titles: Mapping[str, str] = MEASURES
    if isinstance(measured, Fidelity):
        titles = {name: title.format(measured.name) for name, title in _TITLES.items()}
    plot_rounds(measured.frame, by, titles, plot)
    click.echo(f"plot: {plot}", err=form != "table")
