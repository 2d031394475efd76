"""Rounds of made-up embeddings that are as dense, and as hard to compress, as real ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

CLASSES = (
    "dog", "baby_cry", "chainsaw", "drum", "fireworks",
    "helicopter", "printer", "rail_transport", "snoring", "water_flowing",
)  # fmt: skip
BATCH = 32
"""Records of one piece of a full scan."""


@dataclass(frozen=True)
class Shape:
    """Shapes of one record's two tensors, and how the arrays that hold them are cut."""

    tokens: int
    width: int
    clip: int
    granule: int
    chunk: int

    @property
    def nbytes(self) -> int:
        return 4 * (self.tokens * self.width + self.clip)


LONG = Shape(512, 4096, 768, granule=16, chunk=1)
SHORT = Shape(17, 4096, 768, granule=32, chunk=1)
TINY = Shape(4, 16, 8, granule=32, chunk=32)
"""So small that an append costs nothing but its bookkeeping."""


@dataclass(frozen=True)
class Round:
    """What one node records in one round: t5 [n, tokens, width], clip [n, clip], the keys."""

    number: int
    t5: np.ndarray
    clip: np.ndarray
    class_name: list[str]
    index: list[int]
    node: str = "0"
    split: str = "train"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sample_id(self) -> list[str]:
        return [f"train_{i}" for i in range(len(self))]

    @property
    def nbytes(self) -> int:
        return self.t5.nbytes + self.clip.nbytes

    def texts(self) -> dict[str, list[str]]:
        """Return the columns of text, one value per record."""
        n = len(self)
        keys = {"node": [self.node] * n, "split": [self.split] * n}
        return {**keys, "class_name": self.class_name, "sample_id": self.sample_id}


@cache
def _anchors(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    scale = rng.lognormal(-2, 0.6, shape.width).astype(np.float32)
    anchors = rng.standard_normal((len(CLASSES), shape.tokens, shape.width), dtype=np.float32)
    return scale, anchors * scale


def make_round(shape: Shape, number: int, records: int) -> Round:
    """Return a round whose records lie about their class's anchor, class after class."""
    rng = np.random.default_rng((number, records))
    codes = np.arange(records) * len(CLASSES) // records
    scale, anchors = _anchors(shape)
    t5 = rng.standard_normal((records, shape.tokens, shape.width), dtype=np.float32)
    for i, code in enumerate(codes):
        t5[i] *= scale
        t5[i] += anchors[code]
    starts = np.searchsorted(codes, codes)
    return Round(
        number,
        t5,
        rng.standard_normal((records, shape.clip), dtype=np.float32),
        [CLASSES[code] for code in codes],
        (np.arange(records) - starts).tolist(),
    )


@dataclass(frozen=True)
class Plan:
    """How much is written: one whole node-round first, smaller ones after it."""

    shape: Shape
    whole: int
    rounds: int
    small: int
    repeats: int
    sizes: tuple[int, ...]
    memory: tuple[str, ...]

    def records(self, number: int) -> int:
        return self.whole if number == 0 else self.small

    @property
    def total(self) -> int:
        return self.whole + (self.rounds - 1) * self.small

    def scattered(self, count: int = 64) -> np.ndarray:
        """Return positions in a random order, as a shuffled training epoch would ask for them."""
        rng = np.random.default_rng(3)
        return rng.permutation(self.total)[:count]


_EACH = ("append", "first", "of_class", "scattered", "scan", "centroids")
_SOME = ("append", "first", "scan")
FULL = (
    Plan(SHORT, whole=400, rounds=40, small=40, repeats=3, sizes=(1, 100, 400), memory=_EACH),
    Plan(LONG, whole=26, rounds=16, small=4, repeats=3, sizes=(), memory=_EACH),
)
QUICK = (
    Plan(SHORT, whole=400, rounds=8, small=40, repeats=3, sizes=(1, 20), memory=_SOME),
    Plan(LONG, whole=26, rounds=8, small=4, repeats=2, sizes=(), memory=_SOME),
)
