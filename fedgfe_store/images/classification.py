"""How well images are told apart by class: scikit-learn's measures and confusions, by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedgfe_store.common.extra import extra
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.status import natural_rank

if TYPE_CHECKING:
    import pandas as pd

MEASURES = (
    "accuracy",
    "balanced_accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "weighted_f1",
)
"""Columns of `averages`."""

_TRUE, _PREDICTED = "class_name", "closest"


def averages(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Measure each group over all of its classes.

    They are scikit-learn's ``accuracy_score``, ``balanced_accuracy_score``,
    ``precision_recall_fscore_support`` and ``f1_score`` with what these do by default: the macro
    averages are over every class that a group has images of or that was found in one, and a
    precision of a class that was never found counts as 0. ``balanced_accuracy`` is over the classes
    that the group has images of.

    Parameters
    ----------
    frame : DataFrame
        A row for each image, with `by`, ``class_name`` and ``closest`` (the class found in it).
    by : sequence of str
        Columns that make a group; with none there is one.

    Returns
    -------
    DataFrame
        A row for each group, in the order of `by`: its columns, ``pictures``, then `MEASURES`, each
        from 0 to 1.

    Raises
    ------
    NotFoundError
        If scikit-learn is not installed.
    SchemaMismatchError
        If ``class_name`` is in `by`: a group of one class has no averages over classes.
    """
    if _TRUE in by:
        raise SchemaMismatchError(
            f"by: expected no {_TRUE}, over which averages are taken, got {list(by)}"
        )
    return _grouped(frame, by, lambda group: [_averages(group)], ("pictures", *MEASURES))


def by_class(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Measure each class of each group.

    Parameters
    ----------
    frame, by
        As for `averages`.

    Returns
    -------
    DataFrame
        A row for each group and class that it has images of or that was found in one: the columns
        of `by`, ``class_name``, ``pictures`` (of that class), ``found`` (images in which it was
        found), ``precision``, ``recall`` and ``f1``, from 0 to 1, and 0 where one is not defined.

    Raises
    ------
    NotFoundError
        If scikit-learn is not installed.
    """
    rest = [name for name in by if name != _TRUE]
    columns = (_TRUE, "pictures", "found", "precision", "recall", "f1")
    return _grouped(frame, rest, _classes, columns)


def confusion(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Count how many images of each class show which one.

    Parameters
    ----------
    frame, by
        As for `averages`.

    Returns
    -------
    DataFrame
        A row for each group, class and class found in images of it: the columns of `by`,
        ``class_name``, ``closest`` and ``pictures``. Pairs that do not occur have no row.
    """
    columns = [*(name for name in by if name not in (_TRUE, _PREDICTED)), _TRUE, _PREDICTED]
    table = frame.groupby(columns, as_index=False).agg(pictures=(_TRUE, "size"))
    return table.sort_values(columns, key=natural_rank, ignore_index=True)


def _grouped(
    frame: pd.DataFrame,
    by: Sequence[str],
    rows: Callable[[pd.DataFrame], list[list[Any]]],
    columns: Sequence[str],
) -> pd.DataFrame:
    """Return what `rows` gives of each group as a table with its columns of `by` before."""
    import pandas as pd

    found = [[*key, *row] for key, group in _groups(frame, by) for row in rows(group)]
    table = pd.DataFrame(found, columns=[*by, *columns])
    order = [*by, _TRUE] if _TRUE in columns else list(by)
    return table.sort_values(order, key=natural_rank, ignore_index=True) if order else table


def _groups(
    frame: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    if by:
        yield from frame.groupby(list(by))
    else:
        yield (), frame


def _averages(group: pd.DataFrame) -> list[Any]:
    metrics = extra("sklearn.metrics", "precision, recall and F1")
    true, found = group[_TRUE].to_numpy(), group[_PREDICTED].to_numpy()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true, found, average="macro", zero_division=0
    )
    # Not balanced_accuracy_score, which warns of classes that were found and are not there.
    balanced = metrics.recall_score(
        true, found, labels=sorted(set(true)), average="macro", zero_division=0
    )
    weighted = metrics.f1_score(true, found, average="weighted", zero_division=0)
    accuracy = metrics.accuracy_score(true, found)
    return [len(group), *map(float, (accuracy, balanced, precision, recall, f1, weighted))]


def _classes(group: pd.DataFrame) -> list[list[Any]]:
    metrics = extra("sklearn.metrics", "precision, recall and F1")
    true, found = group[_TRUE].to_numpy(), group[_PREDICTED].to_numpy()
    names = sorted({*true, *found})
    measures = metrics.precision_recall_fscore_support(true, found, labels=names, zero_division=0)
    precision, recall, f1, support = measures
    counts = [int((found == name).sum()) for name in names]
    columns = (names, support.tolist(), counts, precision.tolist(), recall.tolist(), f1.tolist())
    return [list(row) for row in zip(*columns, strict=True)]
