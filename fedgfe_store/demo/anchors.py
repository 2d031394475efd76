"""Embeddings for the demo: one anchor for each class, and anchors under noise.

They have FLUX's real shapes, a T5 sequence [17, 4096] and a pooled CLIP vector [768], and entries
of zero mean and unit variance at every noise level.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.errors import SchemaMismatchError

Floats = NDArray[np.float32]
Embedding = tuple[Floats, Floats]
"""A T5 sequence, float32 [17, 4096], and a pooled CLIP vector, float32 [768]."""

T5_SHAPE = (17, 4096)
CLIP_SHAPE = (768,)

CONFUSION = 0.8
"""Share of the noise's variance that lies along the classes' anchors.

Noise that is independent in each of 70,000 entries would average out, so that a class could be
told at almost any level. An adapter that has not yet learnt its classes rather mixes them up.
"""


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


def noisy(anchor: Embedding, noise: float, rng: np.random.Generator) -> Embedding:
    """Mix an anchor with noise of the same scale.

    Parameters
    ----------
    anchor : tuple of numpy.ndarray
        T5 [17, 4096] and CLIP [768], as `class_anchor` gives them.
    noise : float
        Share of the noise in the variance: 0 is the anchor itself, 1 knows nothing of it. The
        tiny FLUX draws clear pictures up to about 0.3 and unclear ones from about 0.6.
    rng : numpy.random.Generator
        Source of the noise.

    Returns
    -------
    t5 : numpy.ndarray
        float32 [17, 4096] of zero mean and unit variance.
    clip : numpy.ndarray
        float32 [768], likewise; its noise is independent of the T5's.

    Raises
    ------
    SchemaMismatchError
        If ``noise`` is not within 0 and 1.
    """
    if not 0 <= noise <= 1:
        raise SchemaMismatchError(f"noise: expected a number from 0 to 1, got {noise}")
    known = [class_anchor(name) for name in CLASSES]
    t5, clip = (
        _mix(anchor[part], np.stack([other[part] for other in known]), noise, rng)
        for part in (0, 1)
    )
    return t5, clip


def _mix(anchor: Floats, known: Floats, noise: float, rng: np.random.Generator) -> Floats:
    coefficients = rng.standard_normal(len(known), dtype=np.float32) / np.sqrt(len(known))
    shared = np.tensordot(coefficients, known, axes=1)
    own = rng.standard_normal(anchor.shape, dtype=np.float32)
    disturbance = np.sqrt(CONFUSION) * shared + np.sqrt(1 - CONFUSION) * own
    mixed: Floats = (np.sqrt(1 - noise) * anchor + np.sqrt(noise) * disturbance).astype(np.float32)
    return mixed
