"""So many of many, always the same ones."""

from __future__ import annotations

import numpy as np


def drawn(count: int, most: int) -> np.ndarray:
    """Return positions of at most `most` of `count` things, in their order.

    Where there are more they are drawn at random, the same ones whenever it is asked for.
    """
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))
