"""Tables that line up; counts and sizes that people read are those of the library."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store.common.words import counted, names, numbers, numbers_first, size

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "as_text",
    "counted",
    "names",
    "numbers",
    "print_counts",
    "print_data",
    "print_table",
    "size",
]


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
    # Escaped before widths are measured; boxes are ASCII there by themselves.
    encoding = sys.stdout.encoding or "utf-8"
    for row in rows:
        cells = (str(cell).encode(encoding, "backslashreplace") for cell in row)
        table.add_row(*(cell.decode(encoding) for cell in cells))
    # A log or a pipe has no width: rows stay whole there.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    console = Console(width=width, markup=False, highlight=False, soft_wrap=False)
    console.print(table)


def as_text(frame: pd.DataFrame, form: str, **options: Any) -> str:
    """Return `frame` as csv, or as json with a line for each row; `options` are those of json."""
    if form == "csv":
        return frame.to_csv(index=False)
    if not len(frame):
        return ""
    text: str = frame.to_json(orient="records", lines=True, force_ascii=False, **options)
    return text


def print_data(frame: pd.DataFrame, form: str, **options: Any) -> None:
    """Print `as_text` in UTF-8, whatever the terminal's encoding: programs read it."""
    click.echo(as_text(frame, form, **options).encode(), nl=False)


def print_counts(records: pd.DataFrame) -> None:
    """Print how many of `records` there are of each round and node."""
    counts = records.groupby(["round", "node"]).size().unstack(fill_value=0)
    order = sorted(counts.columns, key=numbers_first)
    rows = [[number, *row, sum(row)] for number, row in zip(
        counts.index, counts[order].to_numpy().tolist(), strict=True)]  # fmt: skip
    headers = ["round", *order, "all"]
    print_table(headers, rows, right=headers)
