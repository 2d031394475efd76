"""Embeddings as the tiny FLUX was trained on them: anchors of classes under noise."""

from __future__ import annotations

import numpy as np

from fedgfe_store.demo.anchors import Embedding, Floats, class_anchor
from fedgfe_store.demo.pictograms import CLASSES

CONFUSION = 0.8
"""Share of the noise's variance that lies along the classes' anchors.

Noise that is independent in each of 70,000 entries would average out, so that a class could be
told at almost any level. An adapter that has not yet learnt its classes rather mixes them up.
"""


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
    """
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
