"""What tests ask of a picture: which pictogram it shows, and what it says about itself."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgfe_store.demo.pictograms import CLASSES, draw
from fedgfe_store.images.png import read_provenance


@cache
def _references(size: int) -> NDArray[np.float64]:
    return np.stack([np.asarray(draw(name, size=size), dtype=np.float64) for name in CLASSES])


def distances(image: ArrayLike) -> NDArray[np.float64]:
    """Mean absolute pixel distance of an RGB image, 0..255, to each class's reference picture."""
    pixels = np.asarray(image, dtype=np.float64)
    assert pixels.shape == (len(pixels), len(pixels), 3)
    return np.abs(_references(len(pixels)) - pixels).mean(axis=(1, 2, 3))


def nearest_class(image_array: ArrayLike) -> str:
    """Return the class whose reference is nearest to an RGB image, uint8 [size, size, 3]."""
    return CLASSES[int(distances(image_array).argmin())]


def accuracy(images: Sequence[ArrayLike], classes: Sequence[str]) -> float:
    """Return the share of the images that are nearest to their own class's reference picture."""
    assert len(images) == len(classes) > 0
    return float(np.mean([nearest_class(a) == b for a, b in zip(images, classes, strict=True)]))


def provenance_of(path: Path) -> dict[str, Any]:
    """Return what a sound image says about itself."""
    found = read_provenance(path)
    assert found is not None, path
    return found
