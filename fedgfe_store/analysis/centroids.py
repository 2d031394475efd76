"""Centroids of groups of records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from fedgfe_store.analysis.scan import (
    Features,
    Progress,
    Tokens,
    Vectors,
    batch_records,
    check_selection,
    key_frame,
    squares,
    with_values,
)
from fedgfe_store.analysis.workers import Batch, results
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.pairing import sample_numbers
from fedgfe_store.records import KEY_COLUMNS, RecordKey, check_keys, key_order
from fedgfe_store.selection import Selection

if TYPE_CHECKING:
    from distributed import Client

Group = tuple[Any, ...]


@dataclass(frozen=True)
class _BatchSums:
    """What one batch adds to its groups: all that has to come back from a worker."""

    groups: np.ndarray
    count: np.ndarray
    mean: Vectors
    lengths: Vectors
    squares: Vectors

    @classmethod
    def of(cls, vectors: Vectors, codes: np.ndarray) -> _BatchSums:
        groups = np.unique(codes)
        found = cls(
            groups,
            np.zeros(len(groups), np.int64),
            np.zeros((len(groups), vectors.shape[1])),
            np.zeros(len(groups)),
            np.zeros(len(groups)),
        )
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        for place, group in enumerate(groups):
            mask = codes == group
            own = vectors[mask]
            found.count[place] = len(own)
            found.mean[place] = own.mean(axis=0)
            found.lengths[place] = lengths[mask].sum()
            own -= found.mean[place]
            found.squares[place] = squares(own)
        return found


class _Sums:
    """Count, mean, mean length and squared deviations of each group, updated batch by batch.

    Squares are summed about each batch's own mean and moved to the common one (Chan, Golub and
    LeVeque, 1979), so that a spread that is small beside the mean keeps its digits.
    """

    def __init__(self, groups: int, width: int) -> None:
        self.count = np.zeros(groups, np.int64)
        self.mean = np.zeros((groups, width))
        self.lengths = np.zeros(groups)
        self.squares = np.zeros(groups)

    def add(self, batch: _BatchSums) -> None:
        for place, group in enumerate(batch.groups):
            self.merge(
                group,
                int(batch.count[place]),
                batch.mean[place],
                float(batch.lengths[place]),
                float(batch.squares[place]),
            )

    def merge(self, group: int, n: int, mean: Vectors, lengths: float, own: float) -> None:
        total = self.count[group] + n
        delta = mean - self.mean[group]
        self.squares[group] += own + squares(delta) * self.count[group] * n / total
        self.mean[group] += delta * (n / total)
        self.lengths[group] += lengths
        self.count[group] = total


@dataclass(frozen=True, eq=False)
class _Scan:
    """A selection that is to be read: its records with a value, and the group of each."""

    selection: Selection
    features: Features
    groups: list[Group]
    codes: np.ndarray
    without: int

    @classmethod
    def of(
        cls, selection: Selection, by: Sequence[str], column: str | None, tokens: Tokens
    ) -> _Scan:
        features = Features.of(selection, column, tokens)
        found = with_values(selection, features.column)
        groups, codes = _groups(_sample_frame(found, by))
        return cls(found, features, groups, codes, len(selection) - len(found))

    def batches(self) -> Iterator[Batch]:
        """Yield what is read at a time: an empty batch where there are no records."""
        size = batch_records(self.selection, self.features)
        for start in range(0, max(1, len(self.codes)), size):
            positions = slice(start, start + size)
            yield Batch(self, self.selection, positions, (self.features, self.codes[positions]))

    def dataset(self, sums: _Sums, by: Sequence[str]) -> xr.Dataset:
        attrs = {**self.features.describe(), "commit": self.selection.commit}
        shape = dict(zip(self.features.dims, self.features.shape, strict=True))
        return _dataset(self.groups, by, sums, shape, attrs)


def _batch_sums(rows: Selection, features: Features, codes: np.ndarray) -> _BatchSums:
    return _BatchSums.of(features.read(rows), codes)


def centroids(
    selection: Selection,
    by: Sequence[str] = ("round", "class_name"),
    *,
    column: str | None = None,
    tokens: Tokens = "mean",
    client: Client | None = None,
    progress: Progress = lambda records: None,
) -> xr.Dataset:
    r"""Return the centroid, spread and mean length of groups of records.

    Parameters
    ----------
    selection : Selection
        Records; those without a value in an optional column are left out.
    by : sequence of str
        Key columns: records that agree in all of them form a group. By ``round`` and ``index``
        together, ``index`` is that of the first round which has the sample, as its ``file_id``
        tells: loaders shuffle, and `drift` is to compare a sample with itself.
    column : str, optional
        Tensor column, by default the first of embeddings, such as ``t5``.
    tokens : {"mean", "flat"}
        What becomes of a token axis. ``"mean"``: a record's vector is the mean over its tokens,
        as is usual for sentence embeddings. ``"flat"``: each token keeps its place, so that
        distances are those of the whole tensors, as the image model is given them; the result
        takes as many times the space as there are tokens.
    client : dask.distributed.Client, optional
        Read and sum on its workers, which see the store under the same path; what comes back is
        combined here, in the order of the records: the result is the same to the last bit.
    progress : callable
        Called with the number of records just read.

    Returns
    -------
    Dataset
        Along ``group``, a MultiIndex of the columns `by`, so that ``.sel(round=5)`` works:
        ``centroid`` float64 ``[group, \*shape]``, ``count`` of records, ``norm``, the mean L2
        norm of the records' vectors, and ``spread``, the root mean square of their L2 distances
        to the centroid.

    Raises
    ------
    SchemaMismatchError
        If `by`, `column`, `tokens` or `client` is of no use.
    DamagedDataError
        If a record is not what was committed; names it.
    """
    check_selection("centroids", selection)
    (found,) = centroids_of_each(
        [selection], by, column=column, tokens=tokens, client=client, progress=progress
    )
    return found


def centroids_of_each(
    selections: Iterable[Selection],
    by: Sequence[str],
    *,
    column: str | None,
    tokens: Tokens,
    client: Client | None,
    progress: Progress,
) -> Iterator[xr.Dataset]:
    """Yield the `centroids` of several selections; workers read the next one meanwhile."""
    check_keys("by", by)
    scans = (_Scan.of(selection, by, column, tokens) for selection in selections)
    batches = (batch for scan in scans for batch in scan.batches())
    done = results(_batch_sums, batches, client)
    for scan, found in groupby(done, key=lambda pair: pair[0].scan):
        progress(scan.without)
        sums = _Sums(len(scan.groups), scan.features.width)
        for _, batch in found:
            sums.add(batch)
            progress(int(batch.count.sum()))
        yield scan.dataset(sums, by)


def combine(groups: xr.Dataset, by: Sequence[str]) -> xr.Dataset:
    """Return the centroids of wider groups, without reading the records again.

    Parameters
    ----------
    groups : Dataset
        A result of `centroids`.
    by : sequence of str
        Some of the key columns that it was grouped by.

    Returns
    -------
    Dataset
        What `centroids` gives for `by`.
    """
    check_keys("by", by)
    keys = group_keys(groups, "combine", *by)
    wider, codes = _groups(keys[list(by)])
    values = groups["centroid"].to_numpy()
    flat = values.reshape(len(values), prod(values.shape[1:]))
    sums = _Sums(len(wider), flat.shape[1])
    count, norm, spread = (groups[name].to_numpy() for name in ("count", "norm", "spread"))
    for i, group in enumerate(codes):
        n = int(count[i])
        sums.merge(group, n, flat[i], float(norm[i]) * n, float(spread[i]) ** 2 * n)
    shape = {str(name): groups.sizes[name] for name in groups["centroid"].dims[1:]}
    return _dataset(wider, by, sums, shape, groups.attrs)


def group_keys(groups: xr.Dataset, what: str, *needed: str) -> pd.DataFrame:
    """Return the key columns that `groups`, a result of `centroids`, was grouped by.

    Raises
    ------
    SchemaMismatchError
        If it is none, or one of the columns `needed` by the function `what` is missing.
    """
    if not isinstance(groups, xr.Dataset):
        raise SchemaMismatchError(
            f"{what}: expected a result of centroids, such as centroids(store.select()), "
            f"got {type(groups).__name__}"
        )
    if "group" not in groups.dims or "centroid" not in groups:
        got = ", ".join(map(str, groups)) or "nothing"
        raise SchemaMismatchError(f"{what}: expected a result of centroids, got a dataset of {got}")
    names = [str(name) for name in groups["group"].coords if name != "group"]
    missing = [name for name in needed if name not in names]
    if missing:
        raise SchemaMismatchError(
            f"{what}: expected centroids by {', '.join(missing)} too, got by {', '.join(names)}"
        )
    return pd.DataFrame({name: groups[name].to_numpy() for name in names})


def _sample_frame(selection: Selection, by: Sequence[str]) -> pd.DataFrame:
    """Return the columns `by` of the records, the index the same for a sample in all rounds."""
    if not {"round", "index"} <= set(by):
        return key_frame(selection, by)
    frame = key_frame(selection, (*KEY_COLUMNS, "file_id"))
    keys = [RecordKey(*row) for row in frame[list(KEY_COLUMNS)].itertuples(index=False)]
    numbers = sample_numbers(keys, frame["file_id"].tolist())
    return frame.assign(index=np.array(numbers, np.int64))[list(by)]


def _groups(keys: pd.DataFrame) -> tuple[list[Group], np.ndarray]:
    """Return the distinct rows of `keys`, sorted, and the place of each row among them."""
    rows = list(keys.itertuples(index=False, name=None))
    groups = sorted(set(rows), key=key_order(keys.columns))
    place = {group: number for number, group in enumerate(groups)}
    return groups, np.array([place[row] for row in rows], np.int64)


def _dataset(
    groups: list[Group],
    by: Sequence[str],
    sums: _Sums,
    shape: Mapping[str, int],
    attrs: Mapping[Any, Any],
) -> xr.Dataset:
    values = zip(*groups, strict=True) if groups else [()] * len(by)
    types = [np.int64 if name in ("round", "index") else object for name in by]
    levels = [np.array(v, dtype=t) for v, t in zip(values, types, strict=True)]
    index = pd.MultiIndex.from_arrays(levels, names=list(by))
    count = np.maximum(sums.count, 1)
    variables = {
        "centroid": (("group", *shape), sums.mean.reshape(len(groups), *shape.values())),
        "count": ("group", sums.count),
        "norm": ("group", sums.lengths / count),
        "spread": ("group", np.sqrt(sums.squares / count)),
    }
    return xr.Dataset(variables, xr.Coordinates.from_pandas_multiindex(index, "group"), dict(attrs))
