"""What the images show, by a CLIP model: ``score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .codes import SOME_FAILED
from .command import Command
from .measures import CLASSIFIED, classified, draw, grouping, per_call_option, print_measures
from .option_types import KeyList
from .options import (
    Filters,
    as_of_option,
    class_names,
    default_folder,
    device_option,
    filter_options,
    folder_option,
    foreign_line,
    format_option,
    own_device,
    pattern_option,
    plot_option,
    print_left_out,
    quiet_option,
)
from .progress import progress
from .tables import as_text, counted, print_data
from .tracking import check_log, log_option, log_table

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.images.scoring import Scores

    from .finding import Context

_GROUPS = {
    "node": "node",
    "round": "round",
    "split": "split",
    "class": "class_name",
    "index": "index",
    "image": "image",
}
_FORMS = {"similarity": "{:.3f}"}
_TITLES = {
    "agreement": "agreement: share of images whose closest class is their own",
    "similarity": "similarity: mean cosine between an image and its class' prompt",
}


@click.command("score", cls=Command)
@filter_options
@as_of_option
@click.option(
    "--clip-model",
    required=True,
    metavar="FOLDER|NAME",
    help="A CLIP model of transformers: its folder, or its name on the hub.",
)
@folder_option("input")
@click.option(
    "--among",
    multiple=True,
    metavar="NAMES",
    help="Classes to compare with: dog,drum [all of the store].",
)
@click.option(
    "--prompt",
    default="a photo of a {class}",
    show_default=True,
    help="What is said of a class; underscores in its name become spaces.",
)
@click.option(
    "--measure",
    type=click.Choice(["similarity", *CLASSIFIED]),
    default="similarity",
    show_default=True,
    help="averages: accuracy, balanced accuracy, macro and weighted F1 of each group; classes: "
    "precision, recall and F1 of each class; confusion: which class was taken for which.",
)
@click.option(
    "--by",
    type=KeyList(_GROUPS),
    help="Some of node,round,split,class,index,image; all six give each picture a row "
    "[similarity: node,round,class; averages: node,round; classes and confusion: all together].",
)
@per_call_option
@pattern_option
@device_option
@format_option("csv and json give one group per line.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write csv or json to this file instead; csv unless --format says json.",
)
@plot_option("Draw it: over the rounds, or the confusion as a square; png, pdf or svg.")
@log_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    as_of: int | None,
    clip_model: str,
    input_dir: Path | None,
    among: tuple[str, ...],
    prompt: str,
    measure: str,
    by: list[str] | None,
    batch_size: int,
    patterns: tuple[str, ...],
    device: str | None,
    form: str,
    output: Path | None,
    plot: Path | None,
    log: Tracker | None,
    quiet: bool,
) -> None:
    """Measure with CLIP whether images show their class.

    similarity is the cosine between an image and its class' prompt, agreement the share of the
    images whose closest prompt, among the classes of the store or those of --among, is that of
    their own class, and closest the class that was so most often.

    \b
    fedgfe-store score --clip-model openai/clip-vit-base-patch32 --round 5
    fedgfe-store score --clip-model models/clip --by round --node server
    fedgfe-store score --clip-model models/clip --output scores.csv
    fedgfe-store score --clip-model models/clip --measure averages --plot accuracy.png
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.scoring import score_pictures, selected_images

    if output is not None and not output.parent.is_dir():
        raise click.BadParameter(f"no folder {output.parent}", param_hint="--output")
    keys = grouping(measure, by, plot, ["node", "round", "class_name"])
    check_log(log, keys, measure)
    obj: Context = ctx.obj
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    found = selected_images(selection, input_dir or default_folder(selection), patterns=patterns)
    with progress(len(found.images), "pictures", quiet=quiet) as advance:
        scores = score_pictures(
            found,
            clip_model,
            among=class_names(among, selection) if among else None,
            prompt=prompt,
            batch_size=batch_size,
            device=own_device(device),
            progress=advance,
        )
    print_left_out(scores.left_out)
    foreign = sum(image.is_foreign for image in found.images)
    if foreign:
        click.echo(foreign_line(foreign), err=True)
    if len(scores.prompts) < 2:
        (only,) = scores.prompts
        click.echo(
            f"note: {only} is the only class to choose from, so that agreement says nothing; "
            f"--among names others",
            err=True,
        )
    is_classified = measure in CLASSIFIED
    table = classified(scores.frame, measure, keys) if is_classified else scores.table(keys)
    if output is not None:
        output.write_text(as_text(table, "csv" if form == "table" else form), encoding="utf-8")
        click.echo(f"{counted(len(scores.frame), 'picture')} scored, {len(table)} rows in {output}")
    elif form == "table":
        _print(scores, table)
    else:
        print_data(table, form)
    if plot is not None:
        title = f"{counted(len(scores.frame), 'picture')} of {selection.location.name}"
        draw(table, measure, keys, plot, titles=_TITLES, title=title)
        click.echo(f"plot: {plot}", err=form != "table")
    log_table(log, "score", table, keys, of=selection, form=form)
    if "damaged" in scores.left_out.values():
        ctx.exit(SOME_FAILED)


def _print(scores: Scores, table: pd.DataFrame) -> None:
    print_measures(table, _FORMS)
    frame = scores.frame
    line = f"{counted(len(frame), 'picture')}: similarity {frame['similarity'].mean():.3f}"
    if len(scores.prompts) > 1:
        line += f", agreement {frame['agrees'].mean():.1%} among {len(scores.prompts)} classes"
    click.echo(f"\n{line}")
