"""Words on the terminal or in a log, whose reader may be gone."""

from __future__ import annotations

import codecs
import io
import os
import sys

import click


def say(line: str, *, err: bool = False) -> None:
    """Print a line; where nobody reads any more, as after Ctrl-C on ``| tee``, go on in silence."""
    try:
        click.echo(line, err=err)
    except BrokenPipeError:
        # Python would fail once more as it flushes at exit, and lose the exit code.
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_on_any_terminal() -> None:
    """Show signs that the terminal's encoding lacks as escapes, such as ``\\xe9``, not as errors.

    So are the bytes of file names that are no valid text. ASCII is taken for a locale that nobody
    has set, and UTF-8 printed, as click does.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        ascii_only = codecs.lookup(stream.encoding).name == "ascii"
        encoding = "utf-8" if ascii_only else stream.encoding
        stream.reconfigure(encoding=encoding, errors="backslashreplace")
