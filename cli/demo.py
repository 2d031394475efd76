"""A whole experiment in small, from checkpoints to a contact sheet: ``demo``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .command import Command
from .options import quiet_option
from .progress import progress
from .tables import print_table

if TYPE_CHECKING:
    from fedgfe_store.demo.experiment import Report

_AUDIO = Path("audio")
_CHECKPOINTS = Path("checkpoints/embeddings")
_STORE = Path("embeddings.zarr")
_EXPERIMENT = "demo"
_SHEET = Path("contact_sheet.png")


@click.command("demo", cls=Command)
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default="demo",
    show_default=True,
    help="Folder of the demo; run again, it goes on with what is there.",
)
@quiet_option
@click.pass_context
def command(ctx: click.Context, /, output_dir: Path, quiet: bool) -> None:
    """Train a small federation and render what it learns.

    Three nodes and a server learn to turn the sounds of ten classes into embeddings, in 20 rounds.
    Those of rounds 1, 5, 10 and 20 go into a store and are rendered with the tiny FLUX that comes
    along, without a GPU.

    \b
    fedgfe-store demo
    cd demo && fedgfe-store generate --round 5
    """
    from . import generate, importing, stores
    from .finding import Context

    output_dir.mkdir(parents=True, exist_ok=True)
    with chdir(output_dir):
        ctx.obj = Context(_STORE)
        _train(quiet)
        _step("fedgfe-store info", quiet)
        ctx.invoke(stores.info)
        _write_checkpoints(quiet)
        _step(f"fedgfe-store import {_CHECKPOINTS}", quiet)
        ctx.invoke(
            importing.command,
            paths=(_CHECKPOINTS,),
            pattern="*.pt",
            audio=False,
            dry_run=False,
            precision="float32",
            if_exists="error",
            quiet=quiet,
        )
        _step("fedgfe-store generate", quiet)
        ctx.invoke(generate.command, quiet=quiet)
        _draw_sheet()
    _step(f"look at {output_dir / _SHEET}, and try:  cd {output_dir}", quiet)
    if not quiet:
        click.echo("fedgfe-store query --class dog --round 10")
        click.echo("fedgfe-store generate --round 5 --seed 1 --images another")


def _step(line: str, quiet: bool) -> None:
    if not quiet:
        click.secho(f"\n$ {line}" if line.startswith("fedgfe-store") else f"\n{line}", bold=True)


def _train(quiet: bool) -> None:
    """Train the federation into a store that knows which model draws its embeddings."""
    from fedgfe_store import EmbeddingStore, Metadata, Schema
    from fedgfe_store.demo.experiment import ROUNDS, run

    if not _STORE.exists():
        metadata = Metadata(experiment=_EXPERIMENT, diffusion_type="flux", model="tiny")
        EmbeddingStore.create(_STORE, Schema.flux(17, metadata=metadata))
    _step(f"training: three nodes and a server, {ROUNDS} rounds", quiet)
    reports: list[Report] = []
    with progress(ROUNDS, "rounds", quiet=quiet) as advance:

        def note(report: Report) -> None:
            reports.append(report)
            advance(1)

        run(EmbeddingStore.open(_STORE), audio=_AUDIO, experiment=_EXPERIMENT, report=note)
    if not quiet:
        _show(reports)


def _show(reports: Sequence[Report]) -> None:
    """Print how the federation learnt, at the rounds that are recorded."""
    from fedgfe_store.demo.experiment import RECORDED

    if not reports:
        click.echo("all its rounds are recorded already")
        return
    headers = ["round", "loss", "loss on held-out sounds", "of these told apart"]
    rows = [
        [r.round, f"{r.train_loss:.2f}", f"{r.test_loss:.2f}", f"{r.told:.0%}"]
        for r in reports
        if r.round in RECORDED
    ]
    print_table(headers, rows, right=headers)


def _write_checkpoints(quiet: bool) -> None:
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.checkpoints import export_checkpoints

    _step(
        "the same embeddings as the .pt checkpoints of old, which are no news to the store", quiet
    )
    store = EmbeddingStore.open(_STORE)
    export_checkpoints(store.select(), _CHECKPOINTS, overwrite=True)


def _draw_sheet() -> None:
    from fedgfe_store.images.arrange import arrange
    from fedgfe_store.images.folder import ImageFolder
    from fedgfe_store.images.sheet import save_sheet

    folder = Path("output_images") / _EXPERIMENT
    pictures = ImageFolder.scan(folder).select(node="server", split="test", index=0)
    save_sheet(arrange(pictures), _SHEET, thumbnail=96)
