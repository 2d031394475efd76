"""The Frechet distance of two sets of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = 500


def frechet(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the squared Frechet distance of normal distributions fitted to two sets of vectors.

    That of FID's definition. The trace of the root of the covariances' product is the sum of the
    singular values of what the centred sets have in common, so that no root of a matrix, which may
    not be unique, is taken.

    Parameters
    ----------
    first, second : ndarray, shape [n, width] and [m, width]
        The vectors; sums are in float64.

    Returns
    -------
    float
        From 0; NaN where a set has under two vectors.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        return float("nan")
    means = [vectors.mean(axis=0, dtype=np.float64) for vectors in (first, second)]
    one, other = _Centred.of(first, means[0]), _Centred.of(second, means[1])
    apart = np.square(means[0] - means[1]).sum()
    spread = one.squares() / (n - 1) + other.squares() / (m - 1)
    common = np.linalg.svd(one.products(other), compute_uv=False).sum()
    return max(0.0, float(apart + spread - 2 * common / np.sqrt((n - 1) * (m - 1))))


@dataclass(frozen=True, eq=False)
class _Centred:
    """Vectors less their mean, of which only a block is in memory in float64."""

    vectors: NDArray[np.floating]
    mean: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[np.floating], mean: NDArray[np.float64]) -> _Centred:
        """Return them, or if there are more than numbers in one, turned so that those suffice.

        Turning them changes neither sums of squares nor singular values.
        """
        width = vectors.shape[1]
        whole = cls(vectors, mean)
        if len(vectors) <= width:
            return whole
        rows = np.empty((0, width))
        for _, block in whole.blocks():
            rows = np.concatenate([rows, block])
            rows = np.asarray(np.linalg.qr(rows, mode="r"))
        return cls(rows, np.zeros(width))

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield where each block lies, and its centred vectors."""
        for start in range(0, len(self.vectors), _BLOCK):
            place = slice(start, start + _BLOCK)
            yield place, self.vectors[place] - self.mean

    def squares(self) -> float:
        """Return the sum of their squares."""
        return sum(float(np.square(block).sum()) for _, block in self.blocks())

    def products(self, other: _Centred) -> NDArray[np.float64]:
        """Return the product of each of them with each of others, ``[n, m]``."""
        found = np.empty((len(self.vectors), len(other.vectors)))
        for rows, block in self.blocks():
            for columns, beside in other.blocks():
                found[rows, columns] = block @ beside.T
        return found
