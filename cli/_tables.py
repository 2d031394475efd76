"""Tables that line up; counts and sizes that people read are those of the library."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fedgfe_store._text import counted, names, numbers, numbers_first, size

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["counted", "names", "numbers", "print_counts", "print_table", "size"]


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
    order = sorted(counts.columns, key=numbers_first)
    rows = [[number, *row, sum(row)] for number, row in zip(
        counts.index, counts[order].to_numpy().tolist(), strict=True)]  # fmt: skip
    headers = ["round", *order, "all"]
    print_table(headers, rows, right=headers)
