"""Embeddings projected on the directions in which they differ most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from fedgfe_store.analysis.scan import (
    Features,
    Progress,
    Tokens,
    Vectors,
    check_selection,
    key_frame,
    read_vectors,
    with_values,
)
from fedgfe_store.common.extra import extra
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS
from fedgfe_store.selection import Selection

_KEPT = 32
_FIT_ROWS = 128
_FIT_BYTES = 64 * 2**20


def project(
    selection: Selection,
    *,
    column: str | None = None,
    components: int = 2,
    tokens: Tokens = "mean",
    progress: Progress = lambda records: None,
) -> xr.Dataset:
    """Return the records' places along their principal components.

    Fitted by scikit-learn's IncrementalPCA in float64, in one pass over the records; a second one
    projects them. More directions than asked for are kept between batches, up to 32, since those
    that are dropped early cannot come back: with records that vary in no more directions than
    that, or that fit one batch, the result is that of an exact PCA.

    Parameters
    ----------
    selection : Selection
        Records; those without a value in an optional column are left out.
    column : str, optional
        Tensor column, by default the first of embeddings, such as ``t5``.
    components : int
        How many components, at most as many as there are records and numbers in a vector.
    tokens : {"mean", "flat"}
        What becomes of a token axis, see `centroids`.
    progress : callable
        Called with the number of records just read; each record is read twice.

    Returns
    -------
    Dataset
        ``projection`` float64 ``[record, component]`` with the keys as a MultiIndex on
        ``record``; ``explained`` ``[component]``, the share of the whole variance;
        ``direction`` ``[component, feature]``, unit vectors; and ``mean`` ``[feature]``. A
        feature counts the numbers of a record's vector.

    Raises
    ------
    NotFoundError
        If scikit-learn is not installed.
    SchemaMismatchError
        If there are too few records for `components`, or an option is of no use.
    DamagedDataError
        If a record is not what was committed; names it.
    """
    check_selection("project", selection)
    features = Features.of(selection, column, tokens)
    found = with_values(selection, features.column)
    progress(2 * (len(selection) - len(found)))
    _check(components, len(found), features.width)
    pca = _fit(found, features, components, progress)
    places = np.empty((len(found), components))
    for positions, values in read_vectors(found, features):
        places[positions] = pca.transform(values)[:, :components]
        progress(len(values))
    index = pd.MultiIndex.from_frame(key_frame(found, KEY_COLUMNS))
    variables: dict[str, Any] = {
        "projection": (("record", "component"), places),
        "explained": ("component", pca.explained_variance_ratio_[:components]),
        "direction": (("component", "feature"), pca.components_[:components]),
        "mean": ("feature", pca.mean_),
    }
    attrs = {**features.describe(), "commit": selection.commit}
    coords = xr.Coordinates.from_pandas_multiindex(index, "record")
    return xr.Dataset(variables, coords, attrs).assign_coords(
        component=np.arange(1, components + 1)
    )


def _check(components: int, records: int, width: int) -> None:
    most = min(records, width)
    if not is_whole(components) or not 1 <= components <= most:
        raise SchemaMismatchError(
            f"components: expected 1 to {most} for {records} records of {width} numbers, "
            f"got {components!r}"
        )


def _fit(selection: Selection, features: Features, components: int, progress: Progress) -> Any:
    # The work grows with the square of the rows of a part.
    rows = max(4 * components, min(_FIT_ROWS, _FIT_BYTES // (8 * features.width)))
    kept = min(max(components, _KEPT), rows, len(selection), features.width)
    pca = extra("sklearn.decomposition", "project").IncrementalPCA(n_components=kept)
    # So small a problem gains nothing from several threads, which on a busy machine wait for
    # each other up to 40 times as long as the work takes.
    with extra("threadpoolctl", "project").threadpool_limits(1, "blas"):
        for values in _parts(selection, features, rows):
            pca.partial_fit(values)
            progress(len(values))
    return pca


def _parts(selection: Selection, features: Features, rows: int) -> Iterator[Vectors]:
    """Yield the vectors in parts of `rows` or somewhat more: none may be smaller than the fit."""
    count = max(1, len(selection) // rows)
    for positions in np.array_split(np.arange(len(selection)), count):
        part = selection.take(positions)
        yield np.concatenate([values for _, values in read_vectors(part, features)])
