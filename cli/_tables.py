"""Tables that line up, and sizes that people read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()
) -> None:
    """Print `rows` under `headers`; the columns named in `right` are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    numeric = set(right)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A log or a pipe has no width: rows stay whole there.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    console = Console(width=width, markup=False, highlight=False, soft_wrap=False)
    console.print(table)


def print_counts(records: pd.DataFrame) -> None:
    """Print how many of `records` there are of each round and node."""
    counts = records.groupby(["round", "node"]).size().unstack(fill_value=0)
    order = sorted(counts.columns, key=lambda n: (not n.isdecimal(), len(n), n))
    rows = [[number, *row, sum(row)] for number, row in zip(
        counts.index, counts[order].to_numpy().tolist(), strict=True)]  # fmt: skip
    headers = ["round", *order, "all"]
    print_table(headers, rows, right=headers)


def counted(number: int, noun: str) -> str:
    """Return a number of things as people read it: ``1 record``, ``1,200 records``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(nbytes: float) -> str:
    """Return a number of bytes as people read it: ``3.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def numbers(values: Iterable[int]) -> str:
    """Return whole numbers with runs of three or more as ranges: ``1, 3, 5-10``."""
    parts: list[str] = []
    run: list[int] = []
    for value in [*sorted(set(values)), None]:
        if run and (value is None or value != run[-1] + 1):
            long = len(run) > 2
            parts += [f"{run[0]}-{run[-1]}"] if long else map(str, run)
            run = []
        if value is not None:
            run.append(value)
    return ", ".join(parts)


def names(values: Iterable[str], *, most: int = 12) -> str:
    """Return `values` in one line, numbers as ranges and first; a long list is cut with a count."""
    unique = sorted(set(values))
    plain = [v for v in unique if not v.isdecimal()]
    whole = numbers(int(v) for v in unique if v.isdecimal())
    shown = ([whole] if whole else []) + plain[:most]
    more = [f"and {len(plain) - most} more"] if len(plain) > most else []
    return ", ".join(shown + more)
