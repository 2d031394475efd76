"""Measures over classes, as `score` and `quality` compute, print and draw them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .option_types import KeyList
from .tables import print_table

if TYPE_CHECKING:
    import pandas as pd
    from click.decorators import FC


def by_option(default: str) -> Callable[[FC], FC]:
    """Return the option ``--by`` of commands that group by keys."""
    return click.option(
        "--by",
        type=KeyList(),
        default=default,
        show_default=True,
        help="What forms a group: any of node, round, split, class, index.",
    )


per_call_option = click.option(
    "--batch-size",
    "--batch_size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images or sounds per call of the model.",
)

CLASSIFIED = ("averages", "classes", "confusion")
"""Values of ``--measure`` that need the class of each record and the one that was found."""

_BY = {"averages": ["node", "round"], "classes": [], "confusion": []}
_TITLES = {
    "accuracy": "accuracy: share of those of which the closest class is their own",
    "balanced_accuracy": "balanced accuracy: mean of the classes' accuracies",
    "macro_f1": "macro F1: mean of the classes' F1",
    "f1": "F1 of the class",
}
_WHOLE = ("round", "index", "image", "pictures", "others", "records", "found", "classes")


def grouping(
    measure: str, by: list[str] | None, plot: Path | None, default: list[str]
) -> list[str]:
    """Return the keys that make a group, and refuse what could not be computed or drawn.

    `default` is for a measure that is none of `CLASSIFIED`.
    """
    from fedgfe_store.analysis.plots import check_plot

    keys = _BY.get(measure, default) if by is None else by
    if measure == "averages" and "class_name" in keys:
        raise click.BadParameter(
            "averages are over classes; --measure classes has a row for each", param_hint="--by"
        )
    if plot is not None:
        check_plot(plot, None if measure == "confusion" else keys)
    return keys


def classified(frame: pd.DataFrame, measure: str, by: Sequence[str]) -> pd.DataFrame:
    """Return one of the `CLASSIFIED` measures of `frame`."""
    from fedgfe_store.images import classification

    measures = {
        "averages": classification.averages,
        "classes": classification.by_class,
        "confusion": classification.confusion,
    }
    return measures[measure](frame, by)


def print_measures(table: pd.DataFrame, forms: Mapping[str, str]) -> None:
    """Print a table of keys and measures; shares as per cent unless `forms` has a form for them."""
    shown = table.copy()
    right = [str(name) for name in table if name in _WHOLE]
    for name in table.select_dtypes("float"):
        form = forms.get(str(name), "{:.1%}")
        shown[name] = ["-" if isnan(value) else form.format(value) for value in table[name]]
        right.append(str(name))
    headers = {str(name): str(name).removesuffix("_name").replace("_", " ") for name in table}
    rows = shown.to_numpy().tolist()
    print_table(list(headers.values()), rows, right=[headers[name] for name in right])


def draw(
    table: pd.DataFrame,
    measure: str,
    by: Sequence[str],
    file: Path,
    *,
    titles: Mapping[str, str],
    title: str,
) -> None:
    """Draw a table of measures over the rounds, or a confusion as a square."""
    from fedgfe_store.analysis.plots import plot_confusion, plot_rounds

    if measure == "confusion":
        plot_confusion(table, file, title=title)
        return
    keys = dict.fromkeys([*by, *(["class_name"] if measure == "classes" else [])])
    plot_rounds(table, list(keys), {**titles, **_TITLES}, file, title=title)
