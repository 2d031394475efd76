"""Options of ``generate`` that are fields of what is asked for: written there, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from itertools import chain
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from fedgfe_store.generation.request import Option, Request

from .option_types import WholeNumber

HINTS = get_type_hints(Request)
FIELDS = {each.name: each for each in fields(Request) if "option" in each.metadata}
DECIDED_BY_IMAGE = {name for name, each in FIELDS.items() if each.metadata["option"].of_image}
"""Fields that an image which is made again decides on."""


def request_options(start: str, stop: str | None = None) -> Callable[..., Any]:
    """Give a command the options of the fields from `start` up to `stop`, else up to the last."""
    names = list(FIELDS)
    chosen = names[names.index(start) : None if stop is None else names.index(stop)]
    options = [_option(FIELDS[name]) for name in chosen]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _option(field: Field[Any]) -> Callable[..., Any]:
    option: Option = field.metadata["option"]
    flags = option.flags or (f"--{field.name.replace('_', '-')}",)
    if field.default is False:
        return click.option(*flags, field.name, is_flag=True, help=option.help)
    if field.default == ():
        return click.option(
            *flags, field.name, multiple=True, metavar=option.metavar, help=option.help
        )
    default = option.none or (field.default if isinstance(field.default, str | int) else None)
    return click.option(
        *flags,
        field.name,
        type=_type(HINTS[field.name], option),
        default=default,
        show_default=default is not None,
        metavar=option.metavar,
        help=option.help,
    )


def _type(hint: Any, option: Option) -> click.ParamType[Any]:
    """Say what is typed: one of some words, a number within its bounds, else a text."""
    kinds = [hint] if get_origin(hint) is Literal else get_args(hint) or [hint]
    if get_origin(kinds[0]) is Literal:
        return click.Choice(list(chain.from_iterable(map(get_args, kinds))))
    if kinds[0] is float:
        return click.FLOAT
    if kinds[0] is not int:
        return click.STRING
    if option.none is not None:
        return WholeNumber(option.none)
    bounded = (option.least, option.most) != (None, None)
    return click.IntRange(option.least, option.most) if bounded else click.INT
