"""How embeddings compare with a reference: closeness, nearest neighbours, diversity, coverage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

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
from fedgfe_store.common.frechet import frechet
from fedgfe_store.common.sample import drawn
from fedgfe_store.errors import NotFoundError
from fedgfe_store.images.status import natural_rank
from fedgfe_store.records import KEY_COLUMNS, check_keys
from fedgfe_store.selection import Selection

MOST = 2_000
"""Records of a group that are looked at; of more as many are drawn, always the same. Vectors of
4,096 numbers are 65 MB then, and singular values of one group against another take seconds."""
NEIGHBOURS = 5
"""Neighbours that make up a record's surroundings (Naeem et al., arXiv 2002.09797)."""

MEASURES = {
    "cosine": "cosine: mean cosine similarity to the class' mean in the reference",
    "mse": "mse: mean squared difference from the class' mean in the reference",
    "frechet": "frechet: Frechet distance to the reference's records of these classes",
    "nearest": "nearest: share of records whose nearest reference record is of their class",
    "diversity": "diversity: mean cosine distance between two records",
    "precision": "precision: share of records within the reference's surroundings",
    "coverage": "coverage: share of reference records with a record in their surroundings",
}
"""Columns of `quality`, and what they mean."""


def quality(
    selection: Selection,
    reference: Selection,
    by: Sequence[str] = ("node", "round", "class_name"),
    *,
    column: str | None = None,
    tokens: Tokens = "mean",
    progress: Progress = lambda records: None,
) -> pd.DataFrame:
    """Measure each group of records beside a reference, such as the encoders' own embeddings.

    In memory are the vectors of the reference and of one group, of each at most 2,000.

    Parameters
    ----------
    selection : Selection
        Records; those without a value in an optional column are left out.
    reference : Selection
        What they are compared with: ``store.select(node="text")``, the server's, a split's. Where
        it has records of a group's round, with these only: the server's of the same round.
    by : sequence of str
        Key columns that make a group.
    column, tokens
        See `centroids`.
    progress : callable
        Called with the number of records just done.

    Returns
    -------
    DataFrame
        A row for each group: the columns `by`, ``records``, and `MEASURES`, in float64: ``cosine``
        from -1 to 1, ``mse`` and ``frechet`` from 0, ``nearest``, ``precision`` and ``coverage``
        from 0 to 1, ``diversity`` from 0 to 2. NaN where one has no meaning: the reference lacks
        the classes, has one class only (``nearest``) or no more than five records of them
        (``precision``, ``coverage``), or a set has one record.

    Raises
    ------
    NotFoundError
        If the reference is empty, or scikit-learn is not installed.
    SchemaMismatchError
        If `by`, `column` or `tokens` is of no use.
    DamagedDataError
        If a record is not what was committed; names it.
    """
    check_selection("quality", selection)
    check_keys("by", by)
    rows = []
    for some, beside in _by_round(selection, reference, column, tokens, apart="round" in by):
        for key, group in _groups(some, by):
            vectors, classes = _read(group, beside.features)
            rows.append([*key, len(group), *beside.measure(vectors, classes).values()])
            progress(len(group))
    table = pd.DataFrame(rows, columns=[*by, "records", *MEASURES])
    return table.sort_values(list(by), key=natural_rank, ignore_index=True)


def nearest_classes(
    selection: Selection,
    reference: Selection,
    *,
    column: str | None = None,
    tokens: Tokens = "mean",
    progress: Progress = lambda records: None,
) -> pd.DataFrame:
    """Find the class of each record's nearest reference record, by cosine.

    Parameters
    ----------
    selection, reference, column, tokens, progress
        See `quality`.

    Returns
    -------
    DataFrame
        The key columns of each record and ``closest``, as `images.classification` takes it for
        accuracy, precision, recall, F1 and confusions.

    Raises
    ------
    NotFoundError, SchemaMismatchError, DamagedDataError
        As `quality`.
    """
    check_selection("nearest_classes", selection)
    parts = [key_frame(selection.take(slice(0)), KEY_COLUMNS).assign(closest="")]
    for some, beside in _by_round(selection, reference, column, tokens, apart=True):
        closest = np.empty(len(some), object)
        for positions, vectors in read_vectors(some, beside.features):
            closest[positions] = beside.closest(vectors)
            progress(len(vectors))
        parts.append(key_frame(some, KEY_COLUMNS).assign(closest=closest))
    return pd.concat(parts[1:] or parts, ignore_index=True)


@dataclass(frozen=True, eq=False)
class _Reference:
    """The vectors that others are compared with, and their classes."""

    features: Features
    vectors: Vectors
    classes: np.ndarray
    # Distances to the fifth neighbour by classes: many groups are of the same ones.
    known_radii: dict[frozenset[str], Vectors] = field(default_factory=dict)

    @classmethod
    def read(cls, reference: Selection, column: str | None, tokens: Tokens) -> _Reference:
        features = Features.of(reference, column, tokens)
        if not len(reference):
            raise NotFoundError(f"{reference.location}: no record to compare with")
        return cls(features, *_read(reference, features))

    @cached_property
    def lengths(self) -> Vectors:
        """The vectors' lengths; 1 for one that has no direction."""
        return _lengths(self.vectors)

    def closest(self, vectors: Vectors) -> np.ndarray:
        """Return the class of the reference record that is nearest to each of `vectors`."""
        # By how long they are themselves their nearest does not change.
        nearest = np.argmax(vectors @ self.vectors.T / self.lengths, axis=1)
        return np.asarray(self.classes[nearest])

    def _beside_means(self, vectors: Vectors, classes: np.ndarray, known: int) -> dict[str, float]:
        """Compare vectors with their class' means, a class at a time; `known` have one."""
        cosines = squares = 0.0
        for name in set(classes) & set(self.classes):
            own, mean = vectors[classes == name], self.vectors[self.classes == name].mean(axis=0)
            length = np.linalg.norm(mean) or 1.0
            cosines += float((own @ mean / _lengths(own)).sum() / length)
            squares += float(np.square(own - mean).sum())
        return {"cosine": cosines / known, "mse": squares / known / vectors.shape[1]}

    def _radii(self, classes: np.ndarray, others: Vectors) -> Vectors:
        """Return how far the fifth neighbour is of each of `others`, the records of `classes`."""
        names = frozenset(classes)
        if names not in self.known_radii:
            module = extra("sklearn.neighbors", "precision and coverage")
            neighbours = module.NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(others)
            # The nearest is the record itself.
            self.known_radii[names] = neighbours.kneighbors(others)[0][:, -1]
        return self.known_radii[names]

    def measure(self, vectors: Vectors, classes: np.ndarray) -> dict[str, float]:
        """Return the `MEASURES` of a group."""
        known = np.isin(classes, self.classes)
        found = dict.fromkeys(MEASURES, float("nan"))
        if known.any():
            found |= self._beside_means(vectors, classes, int(known.sum()))
            wanted = np.isin(self.classes, classes)
            others = self.vectors if wanted.all() else self.vectors[wanted]
            found["frechet"] = frechet(vectors, others)
            if len(others) > NEIGHBOURS:
                found |= _surroundings(vectors, others, self._radii(classes, others))
        if len(set(self.classes)) > 1:
            found["nearest"] = float((self.closest(vectors) == classes).mean())
        if len(vectors) > 1:
            found["diversity"] = _diversity(vectors)
        return found


def _by_round(
    selection: Selection,
    reference: Selection,
    column: str | None,
    tokens: Tokens,
    *,
    apart: bool,
) -> Iterator[tuple[Selection, _Reference]]:
    """Yield records and what they are compared with, of one round at a time where it has several.

    Without `apart` all are compared with all.
    """
    check_selection("reference", reference)
    features = Features.of(selection, column, tokens)
    selection = with_values(selection, features.column)
    rounds = selection.column("round")
    reference = with_values(reference, Features.of(reference, column, tokens).column)
    of_reference = reference.column("round")
    alike = np.intersect1d(rounds, of_reference) if apart else np.empty(0, np.int64)
    for number in alike.tolist():
        some = reference.take(np.flatnonzero(of_reference == number))
        beside = _Reference.read(some, column, tokens)
        yield selection.take(np.flatnonzero(rounds == number)), beside
    rest = np.flatnonzero(~np.isin(rounds, alike))
    if len(rest) or not len(reference):
        yield selection.take(rest), _Reference.read(reference, column, tokens)


def _groups(selection: Selection, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], Selection]]:
    frame = key_frame(selection, by)
    for key, positions in frame.groupby(list(by), sort=False).indices.items():
        yield key if isinstance(key, tuple) else (key,), selection.take(np.asarray(positions))


def _read(selection: Selection, features: Features) -> tuple[Vectors, np.ndarray]:
    """Return the vectors and classes of the records, or of as many as are looked at."""
    selection = selection.take(drawn(len(selection), MOST))
    vectors = np.empty((len(selection), features.width))
    for positions, part in read_vectors(selection, features):
        vectors[positions] = part
    return vectors, np.array(selection.column("class_name").tolist(), object)


def _lengths(vectors: Vectors) -> Vectors:
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return np.where(lengths > 0, lengths, 1.0)


def _diversity(vectors: Vectors) -> float:
    """Return the mean cosine distance over all pairs, from the length of the sum of directions."""
    n = len(vectors)
    together = np.square((1 / _lengths(vectors)) @ vectors).sum()
    return float(1 - (together - n) / (n * (n - 1)))


def _surroundings(vectors: Vectors, others: Vectors, radii: Vectors) -> dict[str, float]:
    """Return precision and coverage: who lies within the distance to a record's fifth neighbour."""
    metrics = extra("sklearn.metrics", "precision and coverage")
    within = metrics.pairwise_distances(vectors, others) <= radii
    return {
        "precision": float(within.any(axis=1).mean()),
        "coverage": float(within.any(axis=0).mean()),
    }
