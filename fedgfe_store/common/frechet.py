"""The Frechet distance of two sets of vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1_000


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
    one, other = _factor(first, means[0]), _factor(second, means[1])
    apart = np.square(means[0] - means[1]).sum()
    spread = np.square(one).sum() / (n - 1) + np.square(other).sum() / (m - 1)
    common = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return max(0.0, float(apart + spread - 2 * common / np.sqrt((n - 1) * (m - 1))))


def _factor(vectors: NDArray[np.floating], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centred vectors turned so that at most `width` rows are not 0, and those rows.

    Turning changes neither sums of squares nor singular values; where there are more vectors than
    numbers in one, it is done block by block, and no more than a block is in memory in float64.
    """
    width = vectors.shape[1]
    if len(vectors) <= width:
        return vectors - mean
    rows = np.empty((0, width))
    for start in range(0, len(vectors), _BLOCK):
        centred = vectors[start : start + _BLOCK] - mean
        rows = np.asarray(np.linalg.qr(np.concatenate([rows, centred]), mode="r"))
    return rows
