"""Pictures of tables: measures over rounds, which class is taken for which, and maps of records."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedgfe_store.analysis.centroids import Group
from fedgfe_store.common.extra import extra
from fedgfe_store.common.words import numbers_first, shortened
from fedgfe_store.errors import NotFoundError, SchemaMismatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUMMARY = {
    "drift": "drift: cosine distance of a centroid to that of the previous round",
    "to_server": "to server: mean cosine distance of nodes' class centroids to the server's",
    "separation": "separation: distance between classes / within classes",
}
"""Columns of `summarize` that are drawn, and their titles."""

SHARES = frozenset(
    {
        *("accuracy", "agreement", "balanced_accuracy", "macro_f1", "f1"),
        *("nearest", "precision", "coverage", "tstr", "trts"),
        *("R@1", "R@5", "R@10"),
    }
)
"""Measures from 0 to 1, which are drawn on that scale."""

_MOST_LINES = 30
_MOST_TICKS = 12
_WIDE_RANGE = 30
_LONGEST_LABEL = 28
_FONT = 9
_WIDTH, _BETWEEN = 5.6, 0.75
_NODES = {"server": "server", "all": "all nodes"}
_STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class _Line:
    label: str
    rounds: np.ndarray
    values: np.ndarray
    number: int
    thin: bool = False

    @property
    def look(self) -> dict[str, Any]:
        """Colour and stroke: ten colours, then the same ones dashed and dotted."""
        look = {"color": f"C{self.number % 10}", "linestyle": _STYLES[self.number // 10 % 3]}
        if self.thin:
            return look | {"linewidth": 0.7, "alpha": 0.45}
        marked = len(self.rounds) <= _MOST_TICKS
        return look | {"linewidth": 1.6, "marker": "o" if marked else "", "markersize": 3.5}


def check_plot(file: Path, by: Sequence[str] | None = None) -> None:
    """Refuse a picture that could not be drawn, before anything is read.

    Parameters
    ----------
    file : Path
        Where the picture goes.
    by : sequence of str, optional
        The key columns of a table that is to be drawn over rounds.

    Raises
    ------
    NotFoundError
        If matplotlib or scikit-learn is not installed, or there is no folder for `file`.
    SchemaMismatchError
        If `file` is of no known kind, or `by` has no ``round``.
    """
    extra("sklearn", "a plot")
    kinds = _figure(1, 1).canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in kinds:
        raise SchemaMismatchError(f"{file}: expected a name ending in .png, .pdf or .svg")
    if not file.parent.is_dir():
        raise NotFoundError(f"{file}: there is no folder {file.parent}")
    if by is not None and "round" not in by:
        raise SchemaMismatchError(f"a plot is over rounds: expected them in {', '.join(by)}")


def plot_summary(table: pd.DataFrame, by: Sequence[str], file: Path, *, title: str = "") -> None:
    """Draw drift, distance to the server and separation of classes over the rounds.

    As `plot_rounds` of the table that `summarize` gives.
    """
    if not any(name in table and table[name].notna().any() for name in SUMMARY):
        raise SchemaMismatchError("a plot needs records of two rounds, or of a server and nodes")
    plot_rounds(table, by, SUMMARY, file, title=title)


def plot_rounds(
    table: pd.DataFrame,
    by: Sequence[str],
    measures: Mapping[str, str],
    file: Path,
    *,
    title: str = "",
) -> None:
    """Draw measures over the rounds, each in a panel of its own.

    A line for each group, with its name beside its end. Where there are too many, those of each
    value of the first key share a colour, and their mean is named.

    Parameters
    ----------
    table : DataFrame
        A row for each group, with `by` and the measures.
    by : sequence of str
        Its key columns, of which ``round`` is one.
    measures : mapping of str to str
        Columns, and the titles of their panels; those that the table lacks are left out.
    file : Path
        Where the picture goes; its ending tells the kind (png, pdf, svg).
    title : str
        A line above the picture.

    Raises
    ------
    NotFoundError
        If matplotlib or scikit-learn is not installed, or there is no folder for `file`.
    SchemaMismatchError
        If there is nothing to draw, or far too much.
    """
    check_plot(file, by)
    panels = [name for name in measures if name in table and table[name].notna().any()]
    if not panels:
        raise SchemaMismatchError(f"a plot needs values of {', '.join(measures)}, got none")
    others = [name for name in by if name != "round"]
    drawn = {name: _lines(table, others, name) for name in panels}
    named = max(sum(not line.thin for line in lines) for lines in drawn.values())
    height = max(2.4, 0.19 * named)
    figure, stacked = _panels(len(panels), height)
    for axes, name in zip(stacked, panels, strict=True):
        mean = " (thick: mean)" if any(line.thin for line in drawn[name]) else ""
        _draw(axes, drawn[name], f"{measures[name]}{mean}", share=name in SHARES)
    _mark_rounds(stacked[-1], table["round"].unique())
    for axes, name in zip(stacked, panels, strict=True):
        _name(axes, [line for line in drawn[name] if line.label and not line.thin], height)
    stacked[0].text(0, 1 + 0.4 / height, title, transform=stacked[0].transAxes,
                    fontsize=_FONT + 2, parse_math=False)  # fmt: skip
    _save(figure, file)


def plot_confusion(table: pd.DataFrame, file: Path, *, title: str = "") -> None:
    """Draw how often each class was taken for which, as shares of the class' own images.

    Parameters
    ----------
    table : DataFrame
        ``class_name``, ``closest`` and ``pictures``, as `images.classification.confusion` gives;
        rows of other groups are added up.
    file : Path
        Where the picture goes; its ending tells the kind (png, pdf, svg).
    title : str
        A line above the picture.

    Raises
    ------
    NotFoundError
        If matplotlib or scikit-learn is not installed, or there is no folder for `file`.
    SchemaMismatchError
        If `file` is of no known kind, or the table is empty.
    """
    check_plot(file)
    if not len(table):
        raise SchemaMismatchError("a plot needs images that were compared, got none")
    counts = table.pivot_table("pictures", "class_name", "closest", aggfunc="sum", fill_value=0)
    classes = sorted({*counts.index, *counts.columns})
    counts = counts.reindex(index=classes, columns=classes, fill_value=0)
    totals = counts.sum(axis=1).to_numpy()[:, np.newaxis]
    shares = np.divide(counts.to_numpy(), totals, out=np.zeros(counts.shape), where=totals > 0)
    side = max(2.4, 0.32 * len(classes))
    figure = _figure(side, side)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [shortened(name, _LONGEST_LABEL) for name in classes]
    places = range(len(classes))
    axes.set_xticks(places, labels, rotation=90, fontsize=_FONT, parse_math=False)
    axes.set_yticks(places, labels, fontsize=_FONT, parse_math=False)
    axes.set_xlabel("closest class", fontsize=_FONT)
    axes.set_ylabel("class of the image", fontsize=_FONT)
    for row, column in zip(*np.nonzero(counts.to_numpy()), strict=True):
        axes.text(
            column,
            row,
            f"{shares[row, column]:.0%}".removesuffix("%"),
            ha="center",
            va="center",
            fontsize=_FONT - 2,
            color="white" if shares[row, column] > 0.5 else "black",
        )
    axes.set_title(f"{title}\nper cent of a class' images".lstrip(), loc="left",
                   fontsize=_FONT + 1, parse_math=False)  # fmt: skip
    _save(figure, file)


def plot_map(frame: pd.DataFrame, by: str, file: Path, *, title: str = "") -> None:
    """Draw a map of records, those of each value of a key in a colour of their own.

    Parameters
    ----------
    frame : DataFrame
        ``x``, ``y`` and the key column `by` of each record, as `map_records` gives.
    by : str
        The key column; rounds go from light to dark.
    file : Path
        Where the picture goes; its ending tells the kind (png, pdf, svg).
    title : str
        A line above the picture.

    Raises
    ------
    NotFoundError
        If matplotlib or scikit-learn is not installed, or there is no folder for `file`.
    SchemaMismatchError
        If `file` is of no known kind, or there are more values than can be told apart.
    """
    check_plot(file)
    values = sorted(frame[by].unique(), key=lambda value: numbers_first(str(value)))
    if len(values) > _MOST_LINES and by != "round":
        raise SchemaMismatchError(
            f"a map has room for {_MOST_LINES} colours, got {len(values)} values of {by}: take "
            f"fewer with filters, or colour by something else"
        )
    figure = _figure(_WIDTH, _WIDTH)
    axes = figure.add_axes((0, 0, 1, 1))
    shades = extra("matplotlib", "a plot").colormaps["viridis_r"]
    # A legend of a hundred rounds would be longer than the picture.
    named = set(values[:: -(-len(values) // _MOST_LINES)])
    for place, value in enumerate(values):
        mine = frame[frame[by] == value]
        colour = shades(0.1 + 0.9 * place / max(1, len(values) - 1))
        look = {"color": colour} if by == "round" else {
            "color": f"C{place % 10}", "marker": "osv"[place // 10 % 3]}  # fmt: skip
        label = _label((value,), [by]) if by != "round" else f"round {value}"
        axes.scatter(mine["x"], mine["y"], s=14, linewidths=0, alpha=0.75,
                     label=label if value in named else None, **look)  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="left", fontsize=_FONT + 2, parse_math=False)
    key = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=_FONT, frameon=False)
    for text in key.get_texts():
        text.set_parse_math(False)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    with warnings.catch_warnings():
        # A sign that the font lacks is drawn as a box, which a warning does not mend.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, dpi=150, bbox_inches="tight", pad_inches=0.15)


def _figure(width: float, height: float) -> Any:
    return extra("matplotlib.figure", "a plot").Figure(figsize=(width, height))


def _panels(count: int, height: float) -> tuple[Any, Any]:
    """Return a figure and its panels, each `height` inches high; what lies outside widens it."""
    whole = count * height + (count - 1) * _BETWEEN
    figure = _figure(_WIDTH, whole)
    figure.subplots_adjust(0, 0, 1, 1, hspace=_BETWEEN / height)
    return figure, figure.subplots(count, squeeze=False, sharex=True)[:, 0]


def _lines(table: pd.DataFrame, others: list[str], column: str) -> list[_Line]:
    """Return a line for each group, or thin ones and their means where there are too many."""
    groups = list(dict.fromkeys(table[others].itertuples(index=False, name=None))) or [()]
    thin = len(groups) > _MOST_LINES
    first = list(dict.fromkeys(group[:1] for group in groups))
    if thin and len(first) > _MOST_LINES:
        raise SchemaMismatchError(
            f"a plot has room for {_MOST_LINES} lines, got {len(first)} values of {others[0]}: "
            f"take fewer with filters, or group by something else"
        )
    lines = []
    for place, group in enumerate(groups):
        number = first.index(group[:1]) if thin else place
        lines.append(_line(table, group, others, column, number, thin=thin))
    if thin:
        lines += [_line(table, g, others[:1], column, n) for n, g in enumerate(first)]
    return [line for line in lines if len(line.rounds)]


def _line(
    table: pd.DataFrame,
    group: Group,
    names: list[str],
    column: str,
    number: int,
    *,
    thin: bool = False,
) -> _Line:
    """Return the line of `group`, which has `names`: the mean over what these leave open."""
    mine = np.full(len(table), True)
    for name, value in zip(names, group, strict=True):
        mine &= (table[name] == value).to_numpy()
    means = table[mine & table[column].notna()].groupby("round")[column].mean()
    rounds, values = means.index.to_numpy(), means.to_numpy()
    return _Line(_label(group, names), rounds, values, number, thin)


def _label(values: Group, names: list[str]) -> str:
    said = {"class_name": "{}", "node": "node {}", "split": "{}", "index": "index {}"}
    words = [
        _NODES.get(value, said[name].format(value)) if name == "node" else said[name].format(value)
        for name, value in zip(names, values, strict=True)
    ]
    return shortened(" ".join(" ".join(words).split()), _LONGEST_LABEL)


def _draw(axes: Axes, lines: list[_Line], title: str, *, share: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    for line in lines:
        axes.plot(line.rounds, line.values, **line.look)
    values = np.concatenate([line.values for line in lines])
    if share:
        axes.set_ylim(-0.04, 1.04)
    elif values.min() > 0 and values.max() > _WIDE_RANGE * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title, loc="left", fontsize=_FONT + 1)
    axes.tick_params(labelsize=_FONT, labelbottom=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_rounds(axes: Axes, rounds: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round", fontsize=_FONT)
    if len(rounds) <= _MOST_TICKS:
        axes.set_xticks(np.sort(rounds))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name(axes: Axes, lines: list[_Line], height: float) -> None:
    """Write the lines' names to the right of their ends, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.rounds[-1], line.values[-1])) for line in lines]
    places = _apart(np.array([y for _, y in ends]), 1.3 * _FONT / (72 * height))
    for line, (x, y), place in zip(lines, ends, places, strict=True):
        style = {"color": line.look["color"], "transform": axes.transAxes, "clip_on": False}
        axes.plot([x, 1.03], [y, place], linewidth=0.5, **style)
        axes.text(1.035, place, line.label, va="center", fontsize=_FONT, parse_math=False, **style)


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Return the places nearest to `wanted`, in 0..1 and in their order, at least `gap` apart."""
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    free = max(0.0, 1 - gap * (len(wanted) - 1))
    places = np.empty(len(wanted))
    if len(wanted):
        nearest = extra("sklearn.isotonic", "a plot").isotonic_regression
        places[order] = nearest(wanted[order] - steps, y_min=0, y_max=free) + steps
    return places
