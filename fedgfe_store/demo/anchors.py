"""Embeddings for the demo: one anchor for each class.

They have FLUX's real shapes, a T5 sequence [17, 4096] and a pooled CLIP vector [768], and entries
of zero mean and unit variance.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Embedding = tuple[Floats, Floats]
"""A T5 sequence, float32 [17, 4096], and a pooled CLIP vector, float32 [768]."""

T5_SHAPE = (17, 4096)
CLIP_SHAPE = (768,)


@cache
def class_anchor(class_name: str) -> Embedding:
    """Return the embedding that stands for a class, the same on every machine.

    Parameters
    ----------
    class_name : str
        Any name; the tiny FLUX knows those in `fedgfe_store.demo.pictograms.CLASSES`.

    Returns
    -------
    t5 : numpy.ndarray
        float32 [17, 4096], standard normal, read-only.
    clip : numpy.ndarray
        float32 [768], standard normal, read-only.
    """
    seed = int.from_bytes(hashlib.sha256(class_name.encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    t5 = rng.standard_normal(T5_SHAPE, dtype=np.float32)
    clip = rng.standard_normal(CLIP_SHAPE, dtype=np.float32)
    t5.flags.writeable = clip.flags.writeable = False
    return t5, clip
