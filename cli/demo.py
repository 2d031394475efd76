"""A whole experiment in small, from checkpoints to a contact sheet: ``demo``."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._options import quiet_option

if TYPE_CHECKING:
    pass

_CHECKPOINTS = Path("checkpoints/embeddings")
_STORE = Path("embeddings.zarr")
_EXPERIMENT = "demo"
_SHEET = Path("contact_sheet.png")


@click.command("demo")
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
    """Make a small experiment and render it, on any machine.

    Three nodes and a server record ten classes at rounds 1, 3, 5 and 10, as legacy checkpoints.
    They are imported and rendered with the tiny FLUX that comes along, without a GPU.

    \b
    fedgfe-store demo
    cd demo && fedgfe-store generate --round 5
    """
    from . import generate, importing, stores
    from .main import Context

    output_dir.mkdir(parents=True, exist_ok=True)
    with chdir(output_dir):
        ctx.obj = Context(_STORE)
        _step("training: three nodes and a server save their embeddings", quiet)
        _train()
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
        _step("fedgfe-store info", quiet)
        ctx.invoke(stores.info)
        _step("fedgfe-store generate", quiet)
        ctx.invoke(generate.command, quiet=quiet)
        _draw_sheet()
    _step(f"look at {output_dir / _SHEET}, and try:  cd {output_dir}", quiet)
    if not quiet:
        click.echo("fedgfe-store query --class dog --round 10")
        click.echo("fedgfe-store generate --round 5 --seed 1 --output-dir another")


def _step(line: str, quiet: bool) -> None:
    if not quiet:
        click.secho(f"\n$ {line}" if line.startswith("fedgfe-store") else f"\n{line}", bold=True)


def _train() -> None:
    """Write the checkpoints, and an empty store that knows which model draws them."""
    from fedgfe_store import EmbeddingStore, Metadata, Schema
    from fedgfe_store.demo.experiment import write_checkpoints

    write_checkpoints(_CHECKPOINTS, experiment=_EXPERIMENT)
    if not _STORE.exists():
        metadata = Metadata(experiment=_EXPERIMENT, diffusion_type="flux", model="tiny")
        EmbeddingStore.create(_STORE, Schema.flux(17, metadata=metadata))


def _draw_sheet() -> None:
    from fedgfe_store.pictures import find_pictures
    from fedgfe_store.sheets import arrange, save_sheet

    folder = Path("output_images") / _EXPERIMENT
    pictures = find_pictures(folder, node="server", split="test", index=0)
    save_sheet(arrange(pictures), _SHEET, thumbnail=96)
