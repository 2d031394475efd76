"""Memory that is given out again once nobody holds it: new memory costs more than reading does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

_LARGEST = 2**26
"""Bytes of a block that is kept: one more batch stays in memory with what is read ahead."""


def _holders(blocks: Sequence[object], at: int) -> int:
    return sys.getrefcount(blocks[at])


_UNHELD = _holders([object()], 0)
"""What Python counts of an object that only a list holds."""


class Recycled:
    """Arrays whose memory was an earlier array's, which everybody has let go of.

    Whatever shares an array's memory (slices, torch's tensors and what is made of those without a
    copy) holds its block, so that Python's own count of who does tells when it is free: at the
    moment at which the memory would be returned to the system otherwise. Of one thread at a time.

    Parameters
    ----------
    most : int
        Blocks that are remembered, of up to 64 MiB; others are returned to the system as ever.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks: list[np.ndarray] = []
        # Without Python's global lock the count of another thread's objects is an estimate.
        self._counts = getattr(sys, "_is_gil_enabled", lambda: True)()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array that nobody else sees, contiguous; what is in it is undefined."""
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        array: np.ndarray = self._block(nbytes)[:nbytes].view(dtype).reshape(shape)
        return array

    def _block(self, nbytes: int) -> np.ndarray:
        for at in range(len(self._blocks)):
            if self._blocks[at].nbytes >= nbytes and _holders(self._blocks, at) == _UNHELD:
                return self._blocks[at]
        block = np.empty(nbytes, np.uint8)
        if self._counts and self._most and nbytes <= _LARGEST:
            self._blocks = [*self._blocks[1 - self._most :], block]
        return block
