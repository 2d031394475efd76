"""Whether images go with the sounds of their records: ``audio``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .codes import SOME_FAILED
from .command import Command
from .measures import by_option, draw, grouping, per_call_option, print_measures
from .options import (
    Filters,
    as_of_option,
    default_folder,
    device_option,
    filter_options,
    folder_option,
    format_option,
    own_device,
    pattern_option,
    plot_option,
    print_left_out,
    quiet_option,
)
from .progress import progress
from .tables import counted, print_data
from .tracking import check_log, log_option, log_table

if TYPE_CHECKING:
    from fedgfe_store.analysis.trackers import Tracker

    from .finding import Context

_FORMS = {"similarity": "{:.3f}"}
_TITLES = {
    "similarity": "similarity: mean cosine between an image and its record's sound",
    "R@1": "R@1: share of images whose own sound is the most similar",
    "R@5": "R@5: share of images whose own sound is among five",
    "R@10": "R@10: share of images whose own sound is among ten",
}


@click.command("audio", cls=Command)
@filter_options
@as_of_option
@click.option(
    "--audio-model",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="A CLAP of transformers.",
)
@click.option(
    "--clip-model",
    required=True,
    metavar="FOLDER|NAME",
    help="A CLIP model of transformers: its folder, or its name on the hub.",
)
@folder_option("input")
@click.option(
    "--audio-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path(),
    help="Where the records' audio_path begin [the current folder].",
)
@click.option(
    "--prompt",
    default="a photo of a {class}",
    show_default=True,
    help="What is said to CLIP of a class; underscores in its name become spaces.",
)
@click.option(
    "--sound-prompt",
    default="the sound of a {class}",
    show_default=True,
    help="What is said to CLAP of a class.",
)
@by_option("node,round")
@per_call_option
@pattern_option
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
    audio_model: Path,
    clip_model: str,
    input_dir: Path | None,
    audio_dir: Path,
    prompt: str,
    sound_prompt: str,
    by: list[str],
    batch_size: int,
    patterns: tuple[str, ...],
    device: str | None,
    form: str,
    plot: Path | None,
    log: Tracker | None,
    quiet: bool,
) -> None:
    """Measure whether images go with the sounds of their records.

    A CLAP says how much a sound is of each class, a CLIP how much an image is. similarity is the
    cosine of the two, R@k the share of the images whose own sound is among the k most similar. Of a
    sound the first ten seconds count. Needs the extra audio.

    \b
    fedgfe-store audio --audio-model models/clap --clip-model models/clip
    fedgfe-store audio --audio-model models/clap --clip-model models/clip --plot audio.png
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.clap import Clap
    from fedgfe_store.images.clip import Clip
    from fedgfe_store.images.hearing import MISSING, class_space, compare_with_sounds
    from fedgfe_store.images.scoring import selected_images
    from fedgfe_store.images.sound import sound_files

    keys = grouping("audio", by, plot, by)
    check_log(log, keys)
    obj: Context = ctx.obj
    selection = filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
    found = selected_images(selection, input_dir or default_folder(selection), patterns=patterns)
    files = sound_files(selection, audio_dir)
    device = own_device(device)
    space = class_space(
        Clap.load(audio_model, device),
        Clip.load(clip_model, device),
        found.classes,
        prompt,
        sound_prompt,
    )
    sounds = len({files[image.key] for image in found.images if image.key in files})
    with progress(sounds + len(found.images), "files", quiet=quiet) as advance:
        heard = compare_with_sounds(found, files, space, batch_size=batch_size, progress=advance)
    print_left_out(heard.left_out)
    table = heard.table(keys)
    what = f"{counted(len(heard.frame), 'picture')} among {counted(heard.sounds, 'sound')}"
    if form != "table":
        print_data(table, form, double_precision=15)
    else:
        print_measures(table, _FORMS)
        chances = ", ".join(f"{min(1, k / heard.sounds):.1%}" for k in (1, 5, 10))
        click.echo(f"\n{what}; R@1, R@5 and R@10 by chance: {chances}")
    if plot is not None:
        draw(table, "audio", keys, plot, titles=_TITLES, title=what)
        click.echo(f"plot: {plot}", err=form != "table")
    log_table(log, "audio", table, keys, of=selection, form=form)
    if {"damaged", MISSING} & set(heard.left_out.values()):
        ctx.exit(SOME_FAILED)
