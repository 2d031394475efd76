"""Progress with rate and remaining time: a bar on a terminal, one line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .say import say

LOG_INTERVAL = 60.0


@contextmanager
def progress(total: int, unit: str, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show how far a job of `total` `unit` is, on stderr.

    Yields
    ------
    callable
        To be called with the number of units just done.
    """
    if quiet or not total:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar(total, unit) as advance:
            yield advance
    else:
        yield _Log(total, unit).advance


@contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        MofNCompleteColumn(),
        TextColumn(unit),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    done = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(n: int) -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=n, rate=f"{rate:,.1f} {unit}/s")

        yield advance


class _Log:
    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit = total, unit
        self._start = self._shown = time.monotonic()
        self._done = 0

    def advance(self, n: int) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._shown >= LOG_INTERVAL:
            self._shown = now
            rate = self._done / (now - self._start)
            left = duration((self._total - self._done) / rate) if rate else "?"
            unit = self._unit
            say(
                f"{self._done} of {self._total} {unit}, {rate:,.2f} {unit}/s, {left} left", err=True
            )


def duration(seconds: float) -> str:
    """Return `seconds` as people read it: ``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
