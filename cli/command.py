"""What all commands share: help in groups, and options that may stand before or behind them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

from fedgfe_store.common.location import Location

from .log import be_verbose
from .store_path import StorePath

_GROUPS = {
    "Which records": "node round split class_name classes index sample_id file_id per_class where "
    "mean walk frames mode as_of allow_empty",
    "Pictures": "from_image overwrite steps guidance seed height width negative images_per_record "
    "column lora pool",
    "Model and memory": "model clip_model diffusion_type family dtype batch_size device offload "
    "quantize compiled vae_tiling clear_cache_every",
    "Old script": "checkpoint checkpoint_dir pattern",
}
"""Headings, and names of the options under them, those first that are asked for most."""

_FIRST, _REST = "Which records", "Run"
_GROUPED = 20
"""From so many options on they are in groups: fewer are seen at a glance."""


# One word alone, such as model, is the same in both; a part of a path is none, and what somebody
# typed stands in quotes.
_ARGUMENT = re.compile(
    r"\"[^\"\n]*\"|(?<![\w=])'[^'\n]*'|"
    r"(?<![\w/.-])(?P<name>[a-z]+(?:_[a-z]+)+)(?![\w/.-])(?:=(?:'(?P<value>\w+)'|True))?"
)

_FIRST_WORD = re.compile("(?:error: )?(?P<name>[a-z]+): ")

STORE = "fedgfe_store.store"
"""Where a context keeps the store that was named behind the command."""


def _name_store(ctx: click.Context, param: click.Parameter, value: Location | None) -> None:
    if value is None:
        return
    ctx.meta[STORE] = value
    if ctx.obj is None:  # the shell asks how a word goes on
        return
    typed = ctx.find_root().get_parameter_source("store") is ParameterSource.COMMANDLINE
    if typed and ctx.obj.given != value:
        raise click.UsageError(f"--store: expected one, got {ctx.obj.given} and {value}")
    ctx.obj.given = value


_STORE = click.Option(
    ["--store"],
    type=StorePath(),
    expose_value=False,
    callback=_name_store,
    help="The embedding store, here or before the command.",
)
_VERBOSE = click.Option(
    ["--verbose", "-v"],
    is_flag=True,
    expose_value=False,
    callback=be_verbose,
    help="Log on stderr what is done, with times.",
)


class Command(click.Command):
    """A command that takes ``--store`` and ``--verbose`` too, with its help in groups."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters and those of all commands."""
        *own, help_option = super().get_params(ctx)
        return [*own, _STORE, _VERBOSE, help_option]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in groups where there are many."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        for each in options:
            if isinstance(each.type, click.IntRange) and each.metavar is None:
                each.metavar = "N"
        if len(options) < _GROUPED:
            super().format_options(ctx, formatter)
            return
        for heading, group in _in_groups(options):
            lines = [record for each in group if (record := each.get_help_record(ctx))]
            with formatter.section(heading):
                formatter.write_dl(lines)


def in_options(text: str, command: click.Command | None) -> str:
    """Say in a command's options what an error says in Python's arguments.

    ``if_exists='replace'`` becomes ``--if-exists replace``, and ``height:`` at its beginning the
    option that gives the height, if that has another name.
    """
    params = command.params if command else []
    # The first long name: behind it are older ones.
    flags = {
        p.name: next((o for o in p.opts if o[:2] == "--"), p.opts[0]) for p in params if p.name
    }

    def flag(found: re.Match[str]) -> str:
        if found["name"] not in flags:
            return found[0]
        value = found["value"] or ""
        return f"{flags[found['name']]} {value}".rstrip()

    first = _FIRST_WORD.match(text)
    if first and flags.get(first["name"]) not in (None, f"--{first['name']}"):
        text = text[: first.start("name")] + flags[first["name"]] + text[first.end("name") :]
    return _ARGUMENT.sub(flag, text)


def _in_groups(options: list[click.Option]) -> Iterator[tuple[str, list[click.Option]]]:
    by_name = {each.name: each for each in options}
    groups: dict[str, list[click.Option]] = {}
    for heading, names in _GROUPS.items():
        here = [by_name[name] for name in names.split() if name in by_name]
        if len(here) == 1 and heading != _FIRST:  # a heading says nothing of one option
            continue
        groups[heading] = here
        for each in here:
            del by_name[each.name]
    ordered: dict[str, Any] = {_FIRST: groups.pop(_FIRST), _REST: list(by_name.values())}
    return ((heading, group) for heading, group in (ordered | groups).items() if group)
