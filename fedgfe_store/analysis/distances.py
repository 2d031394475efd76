"""Distances between centroids: over rounds, to the server, and between classes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from fedgfe_store.analysis.centroids import Group, group_keys
from fedgfe_store.analysis.scan import Vectors, squares
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import SERVER

"""The node that others are compared with."""


def distance(one: Vectors, other: Vectors) -> tuple[float, float]:
    """Return the cosine distance, 0 to 2, and the L2 distance of two vectors.

    The cosine distance is NaN where a vector is zero and has no direction.
    """
    one, other = one.ravel(), other.ravel()
    lengths = np.sqrt([squares(one), squares(other)])
    straight = float(np.sqrt(squares(one - other)))
    if not lengths.all():
        return np.nan, straight
    # Half the squared distance of the unit vectors: 1 - cos loses all digits of small angles.
    return squares(one / lengths[0] - other / lengths[1]) / 2, straight


def drift(groups: xr.Dataset, *, pairs: Iterable[tuple[int, int]] | None = None) -> pd.DataFrame:
    """Return how far the centroids moved between rounds.

    Parameters
    ----------
    groups : Dataset
        A result of `centroids` by ``round`` and any other key columns.
    pairs : iterable of (int, int), optional
        Earlier and later round of each comparison. By default each round is compared with the
        previous one in which the group has records.

    Returns
    -------
    DataFrame
        The other key columns, ``previous``, ``round``, ``cosine`` and ``l2``: a row for each
        comparison whose two centroids are there.

    Raises
    ------
    SchemaMismatchError
        If `groups` is not by ``round``, or a pair is not one of whole numbers.
    """
    keys = group_keys(groups, "drift", "round")
    others = [name for name in keys.columns if name != "round"]
    values = groups["centroid"].to_numpy()
    wanted = None if pairs is None else [_rounds(pair) for pair in pairs]
    rows = []
    for label, places in _by(keys, others):
        at = dict(zip(keys["round"].iloc[places].tolist(), places, strict=True))
        rounds = sorted(at)
        for before, after in pairwise(rounds) if wanted is None else wanted:
            if before in at and after in at:
                moved = distance(values[at[before]], values[at[after]])
                rows.append((*label, before, after, *moved))
    frame = _frame(rows, keys, [*others, "previous", "round", "cosine", "l2"])
    return frame.astype({"previous": np.int64})


def _rounds(pair: Any) -> tuple[int, int]:
    both = list(pair) if isinstance(pair, Sequence | np.ndarray) else []
    if len(both) != 2 or not all(map(is_whole, both)):
        raise SchemaMismatchError(f"pairs: expected pairs of rounds such as (1, 5), got {pair!r}")
    return operator.index(both[0]), operator.index(both[1])


def distance_to_server(groups: xr.Dataset, *, server: str | int = SERVER) -> pd.DataFrame:
    """Return how far each node's centroids are from those of the server.

    Parameters
    ----------
    groups : Dataset
        A result of `centroids` by ``node`` and any other key columns.
    server : str or int
        The node that the others are compared with.

    Returns
    -------
    DataFrame
        The key columns, ``cosine`` and ``l2``: a row for each node's group of which the server
        has the same, but for the server's own.

    Raises
    ------
    SchemaMismatchError
        If `groups` is not by ``node``.
    """
    keys = group_keys(groups, "distance_to_server", "node")
    name = str(server) if is_whole(server) else server
    others = [name for name in keys.columns if name != "node"]
    values = groups["centroid"].to_numpy()
    labels = list(keys.itertuples(index=False, name=None))
    rows = []
    for _, places in _by(keys, others):
        nodes = dict(zip(keys["node"].iloc[places].tolist(), places, strict=True))
        centre = nodes.pop(name, None)
        if centre is not None:
            rows += [(*labels[p], *distance(values[p], values[centre])) for p in nodes.values()]
    return _frame(rows, keys, [*keys.columns, "cosine", "l2"])


def class_spread(groups: xr.Dataset) -> pd.DataFrame:
    """Return how far classes lie apart, beside how far their own records do.

    Parameters
    ----------
    groups : Dataset
        A result of `centroids` by ``class_name`` and any other key columns.

    Returns
    -------
    DataFrame
        The other key columns, the number of ``classes`` and of ``records``; ``within``, the root
        mean square of the records' L2 distances to their class's centroid; ``between``, that of
        the class centroids' distances to the common centroid, each class weighted by its records;
        and ``separation``, between / within: NaN for a single class, and where no record differs
        from its centroid.

    Raises
    ------
    SchemaMismatchError
        If `groups` is not by ``class_name``.
    """
    keys = group_keys(groups, "class_spread", "class_name")
    others = [name for name in keys.columns if name != "class_name"]
    values, spread = groups["centroid"].to_numpy(), groups["spread"].to_numpy()
    count = groups["count"].to_numpy()
    rows = []
    for label, places in _by(keys, others):
        share = count[places] / count[places].sum()
        within = float(np.sqrt(share @ spread[places] ** 2))
        between = _spread(values, places, share)
        ratio = between / within if within and len(places) > 1 else np.nan
        records = int(count[places].sum())
        rows.append((*label, len(places), records, within, between, ratio))
    columns = [*others, "classes", "records", "within", "between", "separation"]
    return _frame(rows, keys, columns)


def _spread(values: Vectors, places: list[int], share: Vectors) -> float:
    """Return the root mean square of the distances of some centroids to their weighted mean."""
    mean = np.zeros(values.shape[1:])
    for place, weight in zip(places, share, strict=True):
        mean += weight * values[place]
    return float(np.sqrt(share @ [squares(values[place] - mean) for place in places]))


def _by(keys: pd.DataFrame, columns: list[str]) -> Iterator[tuple[Group, list[int]]]:
    """Yield the places of the rows of `keys` that agree in `columns`, in order of appearance."""
    found: dict[Group, list[int]] = {}
    for place, row in enumerate(keys.to_dict("records")):
        found.setdefault(tuple(row[name] for name in columns), []).append(place)
    yield from found.items()


def _frame(rows: list[Group], keys: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return `rows` as a frame whose key columns have the types of `keys`, also without rows."""
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({name: keys[name].dtype for name in columns if name in keys})
