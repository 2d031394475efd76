"""Records on a map of two dimensions, where those that are alike lie together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedgfe_store.analysis.projection import project
from fedgfe_store.analysis.scan import (
    Features,
    Progress,
    Tokens,
    Vectors,
    check_selection,
    key_frame,
    with_values,
)
from fedgfe_store.common.extra import extra
from fedgfe_store.common.sample import drawn
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS
from fedgfe_store.selection import Selection

MOST = 5_000
"""Records on a map: of more as many are drawn, always the same. Neighbours of more take minutes,
and points lie on one another."""
LEAST = 10
"""Records that a map needs: fewer have no neighbours to keep."""
COMPONENTS = 50
"""Principal components among which neighbours are looked for, as t-SNE's author takes them."""


@dataclass(frozen=True, eq=False)
class RecordMap:
    """Where records lie.

    Parameters
    ----------
    frame : DataFrame
        A row for each record: its key columns, ``x`` and ``y`` (float64, without unit).
    title : str
        What it is of: ``UMAP of t5, 5,000 of 9,000 records``.
    """

    frame: pd.DataFrame
    title: str


def map_records(
    selection: Selection,
    method: str = "umap",
    *,
    column: str | None = None,
    tokens: Tokens = "mean",
    progress: Progress = lambda records: None,
) -> RecordMap:
    """Lay records out in two dimensions.

    In memory are 50 numbers of each of at most 5,000 records, and a few records' tensors. The same
    records give the same map.

    Parameters
    ----------
    selection : Selection
        Records; those without a value in an optional column are left out.
    method : {"pca", "umap", "tsne"}
        The two directions of largest variance, see `project`; or UMAP or t-SNE of the first 50
        principal components, with what their libraries do by default. There only neighbourhoods
        mean something, distances and sizes of clusters do not.
    column, tokens
        See `centroids`.
    progress : callable
        Called with the number of records just read; each is read twice.

    Returns
    -------
    RecordMap
        The places.

    Raises
    ------
    NotFoundError
        If scikit-learn or umap-learn is not installed.
    SchemaMismatchError
        If there is no such method or column, or there are fewer than ten records.
    DamagedDataError
        If a record is not what was committed; names it.
    """
    check_selection("map_records", selection)
    if method not in METHODS:
        raise SchemaMismatchError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    features = Features.of(selection, column, tokens)
    whole = with_values(selection, features.column)
    if len(whole) < LEAST:
        raise SchemaMismatchError(
            f"a map needs {LEAST} records with a value in {features.column}, got {len(whole)}"
        )
    name, lay_out = METHODS[method]
    some = whole.take(drawn(len(whole), MOST))
    components = 2 if method == "pca" else min(COMPONENTS, features.width, len(some))
    found = project(
        some, column=features.column, components=components, tokens=tokens, progress=progress
    )
    places = lay_out(found["projection"].to_numpy())
    frame = key_frame(some, KEY_COLUMNS).assign(x=places[:, 0], y=places[:, 1])
    title = f"{name} of {features.column}, {len(some):,} of {len(whole):,} records"
    return RecordMap(frame, title)


def _tsne(vectors: Vectors) -> Vectors:
    module = extra("sklearn.manifold", "t-SNE")
    few = min(30.0, (len(vectors) - 1) / 3)
    places: Vectors = module.TSNE(perplexity=few, random_state=0).fit_transform(vectors)
    return places.astype(np.float64)


def _umap(vectors: Vectors) -> Vectors:
    module = extra("umap", "a UMAP", "map")
    few = min(15, len(vectors) - 1)
    # With a seed it works in one thread in any case, and says so where it is not told to.
    found = module.UMAP(n_neighbors=few, init="pca", random_state=0, n_jobs=1)
    places: Vectors = found.fit_transform(vectors)
    return places.astype(np.float64)


METHODS: Mapping[str, tuple[str, Callable[[Vectors], Any]]] = {
    "pca": ("PCA", lambda vectors: vectors),
    "umap": ("UMAP", _umap),
    "tsne": ("t-SNE", _tsne),
}
"""Names of the methods, and how they lay out principal components."""
