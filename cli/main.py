"""The command ``fedgfe-store``: its global options, its commands, and how errors are shown."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from fedgfe_store import __version__
from fedgfe_store.common.location import Location
from fedgfe_store.errors import FedgfeStoreError

from .command import in_options
from .finding import Context
from .log import be_verbose, show_notes
from .say import print_on_any_terminal
from .store_path import StorePath
from .threads import share_processors

_COMMANDS = {
    "init": ("stores", "init", "Make an empty store."),
    "import": ("importing", "command", "Import FedGFE .pt checkpoints."),
    "encode": ("encode", "command", "Encode prompts about classes, to compare with."),
    "adopt": ("adopt", "command", "Let the old script's job scripts call this command."),
    "export": ("export", "command", "Write records as .pt checkpoints, Parquet or safetensors."),
    "info": ("stores", "info", "Show what a store holds."),
    "query": ("query", "command", "List records by node, round, split and class."),
    "generate": ("generate", "command", "Render images from embeddings."),
    "sweep": ("sweep", "command", "Render with every combination of some settings."),
    "status": ("status", "command", "Show which images are done, missing, stale or failed."),
    "slurm": ("slurm", "command", "Print a SLURM script that renders on many GPUs."),
    "gallery": ("gallery", "command", "Make a page to look through the images."),
    "score": ("score", "command", "Measure with CLIP whether images show their class."),
    "audio": ("audio", "command", "Measure whether images go with their records' sounds."),
    "fidelity": ("fidelity", "command", "Measure how far images are from others: KID, FID."),
    "history": ("changes", "history", "Show what each commit did."),
    "delete": ("changes", "delete", "Delete records."),
    "verify": ("verify", "command", "Check every record and file; repair."),
    "compact": ("changes", "compact", "Give space back."),
    "backup": ("changes", "backup", "Bring a copy of the store to another folder."),
    "upgrade": ("changes", "upgrade", "Bring a store of an old format to the newest."),
    "merge": ("changes", "merge", "Bring other stores' records into one."),
    "stats": ("stats", "command", "Show spread, drift and distances of embeddings."),
    "quality": ("quality", "command", "Show how close embeddings are to a reference."),
    "map": ("map", "command", "Lay records out so that those alike lie together."),
    "sheet": ("sheet", "command", "Draw contact sheets, or one sample over the rounds."),
    "preview": ("preview", "command", "Draw a small sheet of a round, quickly."),
    "demo": ("demo", "command", "Train a small federation and render what it learns."),
}

_SECTIONS = {
    "Stores": "init import encode info query history",
    "Images": "generate sweep status slurm preview sheet gallery",
    "Findings": "score audio fidelity stats quality map",
    "Care": "export merge delete verify compact backup upgrade",
    "First steps and old scripts": "demo adopt",
}


class _LazyGroup(click.Group):
    """A group that imports a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"fedgfe_store.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], _COMMANDS)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them"
            ctx.fail(f"no command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, names in _SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, _COMMANDS[name][2]) for name in names.split()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FedgfeStoreError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            lines = [f"error: {error}", *getattr(error, "__notes__", [])]
            name = ctx.invoked_subcommand
            command = self.get_command(ctx, name) if name else None
            click.echo(in_options("\n".join(lines), command), err=True)
            ctx.exit(1)


@click.group(
    "fedgfe-store",
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="fedgfe-store")
@click.option(
    "--store",
    type=StorePath(),
    envvar="FEDGFE_STORE",
    help="The embedding store: a folder, or one that holds it, or a URL to read from; also "
    "$FEDGFE_STORE [embeddings.zarr, else the one among checkpoints/].",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress, only results.")
@click.option("--verbose", "-v", is_flag=True, help="Log on stderr what is done, with times.")
@click.pass_context
def group(ctx: click.Context, store: Location | None, quiet: bool, verbose: bool) -> None:
    """Keep embeddings of federated training in one store, and render images from it.

    \b
    fedgfe-store import checkpoints/embeddings/
    fedgfe-store info
    fedgfe-store query --round 5 --class dog
    fedgfe-store generate --round 5
    """
    print_on_any_terminal()
    ctx.obj = Context(store)
    show_notes(ctx)
    be_verbose(ctx, ctx.command.params[0], verbose)
    if quiet:  # as if it stood behind the command
        ctx.default_map = {name: {"quiet": True} for name in _COMMANDS}


def main() -> None:
    """Run the command line and exit."""
    share_processors(os.environ)
    sys.exit(group(standalone_mode=True))


if __name__ == "__main__":
    main()
