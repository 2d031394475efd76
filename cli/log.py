"""What the library logs, on stderr: warnings as notes, or with ``--verbose`` everything."""

from __future__ import annotations

import logging

import click

from .say import say

_log = logging.getLogger("fedgfe_store")


class _Notes(logging.Handler):
    """Shows warnings, such as on whom a writer waits; when `verbose`, all there is, with times."""

    verbose = False
    _timed = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def emit(self, record: logging.LogRecord) -> None:
        if self.verbose:
            say(self._timed.format(record), err=True)
        elif record.levelno >= logging.WARNING:
            say(f"note: {record.getMessage()}", err=True)


def show_notes(ctx: click.Context) -> None:
    """Show what the library logs until `ctx` is closed."""
    notes = _Notes()
    _log.addHandler(notes)
    ctx.call_on_close(lambda: _log.removeHandler(notes))


def be_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Show all that the library logs, until `ctx` is closed, where `value` says so."""
    if not value:
        return
    for handler in _log.handlers:
        if isinstance(handler, _Notes):
            handler.verbose = True
    before = _log.level
    _log.setLevel(logging.DEBUG)
    ctx.call_on_close(lambda: _log.setLevel(before))
