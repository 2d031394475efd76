"""What a command has to say, for programs: one JSON document on stdout with ``--format json``."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass
from typing import Any

import click


def answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--format table|json`` and the argument `answer`, a dict that it fills.

    With ``json``, stdout is that dict and nothing else, the command's name first; what the command
    prints for people goes to stderr. It is printed whatever the exit code, unless an error ended
    the command before it had anything to say.
    """

    @click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="json: one document on stdout, all else on stderr.",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, form: str, **kwargs: Any) -> Any:
        if form == "table":
            return function(*args, answer={}, **kwargs)
        with _answering() as answer:
            return function(*args, answer=answer, **kwargs)

    return wrapped


@contextmanager
def _answering() -> Iterator[dict[str, Any]]:
    answer: dict[str, Any] = {}
    try:
        with redirect_stdout(sys.stderr):
            yield answer
    except click.exceptions.Exit:  # with a code, after the work was done
        _print(answer)
        raise
    _print(answer)


def _print(answer: dict[str, Any]) -> None:
    if answer:
        whole = {"command": click.get_current_context().info_name, **answer}
        text = json.dumps(whole, default=_plain, ensure_ascii=False, indent=2)
        # In UTF-8 whatever the terminal's encoding, as all that programs read.
        click.echo(f"{text}\n".encode(), nl=False)


def _plain(value: Any) -> Any:
    """Say a value that JSON has no form for: a dataclass as its fields, a path as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(value, "item"):  # a number of numpy's
        return value.item()
    return str(value)
