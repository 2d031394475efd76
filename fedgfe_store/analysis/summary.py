"""One table of what people ask of embeddings: counts, norms, spread, drift, distances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr

from fedgfe_store.analysis.centroids import Group, centroids_of_each, combine, group_keys
from fedgfe_store.analysis.distances import class_spread, distance, distance_to_server
from fedgfe_store.analysis.scan import Progress, Tokens, Vectors, check_selection, key_frame
from fedgfe_store.records import SERVER, check_keys, key_order
from fedgfe_store.selection import Selection

if TYPE_CHECKING:
    from distributed import Client

_NUMBERS = (
    "records", "norm", "spread", "separation", "drift", "drift_l2", "to_server", "to_server_l2"
)  # fmt: skip


def summarize(
    selection: Selection,
    by: Sequence[str] = ("round", "class_name"),
    *,
    column: str | None = None,
    tokens: Tokens = "mean",
    client: Client | None = None,
    progress: Progress = lambda records: None,
) -> pd.DataFrame:
    """Return one row of numbers for each group of records.

    Rounds are read one after another, so that only the centroids of one round, and of the latest
    round of each group, are in memory.

    Parameters
    ----------
    selection : Selection
        Records; those without a value in an optional column are left out.
    by, column, tokens, client
        See `centroids`.
    progress : callable
        Called with the number of records just read.

    Returns
    -------
    DataFrame
        The columns `by`; the number of ``records``; ``norm``, the mean L2 norm of their vectors;
        ``spread``, the root mean square of their L2 distances to the centroid. Then, where they
        have a meaning (NaN where a row has nothing to compare with):

        - ``separation``, if `by` has no ``class_name``: `class_spread`'s between / within.
        - ``drift`` and ``drift_l2``, if `by` has ``round``: cosine and L2 distance of the
          centroid to that of the previous round in which the group has records.
        - ``to_server`` and ``to_server_l2``, if there are a server and other nodes: cosine and L2
          distance of a node's class centroid to the server's of that class, as a mean over the
          nodes and classes of the row.

    Raises
    ------
    SchemaMismatchError
        If `by`, `column`, `tokens` or `client` is of no use.
    DamagedDataError
        If a record is not what was committed; names it.
    """
    check_selection("summarize", selection)
    check_keys("by", by)
    nodes = set(key_frame(selection, ["node"])["node"])
    compared = SERVER in nodes and len(nodes) > 1
    finer = ["class_name", "node"] if compared else ["class_name"]
    fine = list(dict.fromkeys([*by, *finer]))
    latest: dict[Group, Vectors] = {}
    parts = []
    rounds = _rounds(selection) if "round" in by else [selection]
    for groups in centroids_of_each(
        rounds, fine, column=column, tokens=tokens, client=client, progress=progress
    ):
        wide = combine(groups, by)
        table = _rows(groups, wide, list(by), compared=compared)
        if "round" in by:
            table[["drift", "drift_l2"]] = _moves(wide, latest)
        parts.append(table)
    return _sorted(pd.concat(parts, ignore_index=True), by)


def _sorted(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    order = key_order(by)
    labels = list(table[list(by)].itertuples(index=False, name=None))
    rows = sorted(range(len(labels)), key=lambda row: order(labels[row]))
    columns = [*by, *(name for name in _NUMBERS if name in table)]
    return table.loc[rows, columns].reset_index(drop=True)


def _rounds(selection: Selection) -> Iterator[Selection]:
    rounds = key_frame(selection, ["round"])["round"].to_numpy()
    for number in np.unique(rounds):
        yield selection.take(np.flatnonzero(rounds == number))
    if not len(rounds):
        yield selection


def _rows(fine: xr.Dataset, wide: xr.Dataset, by: list[str], *, compared: bool) -> pd.DataFrame:
    table = group_keys(wide, "summarize").assign(
        records=wide["count"].to_numpy(),
        norm=wide["norm"].to_numpy(),
        spread=wide["spread"].to_numpy(),
    )
    if "class_name" not in by:
        classes = class_spread(combine(fine, [*by, "class_name"]))
        table = table.merge(classes[[*by, "separation"]], "left", on=by)
    if compared:
        far = distance_to_server(fine).groupby(by, as_index=False)[["cosine", "l2"]].mean()
        names = {"cosine": "to_server", "l2": "to_server_l2"}
        table = table.merge(far.rename(columns=names), "left", on=by)
    return table


def _moves(wide: xr.Dataset, latest: dict[Group, Vectors]) -> Vectors:
    """Return how far the centroids of one round are from the `latest` ones, which it updates."""
    others = group_keys(wide, "summarize").drop(columns="round").to_dict("records")
    moves = np.full((len(others), 2), np.nan)
    for row, (other, centroid) in enumerate(zip(others, wide["centroid"].to_numpy(), strict=True)):
        label = tuple(other.values())
        if label in latest:
            moves[row] = distance(latest[label], centroid)
        latest[label] = centroid
    return moves
