"""Walks: what lies between two records, or two means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self, get_args

import numpy as np

from fedgfe_store.common.words import is_whole
from fedgfe_store.derived.mean import Means
from fedgfe_store.derived.record import Derived, combined_digest
from fedgfe_store.derived_keys import MeanKey, Mode, WalkKey
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import RecordKey
from fedgfe_store.rows import Rows

# Below it an arc is straight to more digits than float32 has, and above it the opposite way is
# as long in every direction.
_PARALLEL = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class Walk(Derived):
    """Frames between two records, made by `walk`.

    Parameters
    ----------
    start, end : Rows or Means
        Its ends, one record or mean each.
    frames : tuple of WalkKey
        The frames.
    """

    start: Rows | Means
    end: Rows | Means
    frames: tuple[WalkKey, ...]
    # What the ends are: a mean is then read once for all batches of frames, also of taken ones.
    _ends: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def source(self) -> Rows:
        """Records that the start is made of."""
        return self.start.source if isinstance(self.start, Means) else self.start

    def keys(self) -> list[WalkKey]:
        """Return what identifies each frame."""
        return list(self.frames)

    @property
    def file_ids(self) -> list[str]:
        """That of the start for each frame, since all have its noise."""
        return [str(self.start.records["file_id"][0])] * len(self.frames)

    @property
    def counts(self) -> list[int]:
        """How many records both ends are made of."""
        ends = sum(e.counts[0] if isinstance(e, Means) else 1 for e in (self.start, self.end))
        return [ends] * len(self.frames)

    def take(self, positions: Sequence[int] | np.ndarray) -> Self:
        """Return the frames at `positions`, whole numbers from 0, in that order."""
        frames = tuple(self.frames[place] for place in positions)
        return type(self)(self.start, self.end, frames, self._ends)

    def digests(self, column: str) -> np.ndarray:
        """Return a digest of both ends' digests and the weight, uint64 ``[n]``.

        Those of the ends themselves are their records': they depend on nothing else.
        """
        ends = [int(each.digests(column)[0]) for each in (self.start, self.end)]
        found = []
        for key in self.frames:
            recipe = f"{key.mode} {key.frame} of {key.frames}"
            between = combined_digest(recipe, ends)
            found.append({0.0: ends[0], 1.0: ends[1]}.get(key.weight, between))
        return np.array(found, np.uint64)

    def check(self, column: str) -> None:
        """Refuse ends that nothing lies between in a tensor column, see `Derived.check`."""
        known = self.schema.column(column)
        for each in (self.start, self.end):
            if isinstance(each, Means):
                each.check(column)
            elif known.optional and not each.read(f"has_{column}")[0]:
                raise SchemaMismatchError(f"{each.keys()[0]}: expected {column}, got none")
        if known.ragged:
            lengths = [int(e.read(f"length_{column}")[0]) for e in (self.start, self.end)]
            if lengths[0] != lengths[1]:
                raise SchemaMismatchError(
                    f"walk: expected ends of one length in {column}, whose tokens stand for the "
                    f"same, got {lengths[0]} and {lengths[1]}"
                )
        if known.dtype != "float32" and self.start.digests(column) != self.end.digests(column):
            raise SchemaMismatchError(f"walk: expected ends of the same {column}, got different")

    def _values(self, column: str) -> np.ndarray:
        if column not in self._ends:
            self._ends[column] = self.start.read(column)[0], self.end.read(column)[0]
        start, end = self._ends[column]
        if column not in self.schema.columns or self.schema.column(column).dtype != "float32":
            return np.stack([start] * len(self.frames))
        return np.stack([between(start, end, key.weight, key.mode) for key in self.frames])

    def describe(self) -> str:
        """Return in words what it is."""
        key = self.frames[0]
        some = "" if len(self.frames) == key.frames else f" ({len(self.frames)} taken)"
        return f"{key.label}{some}"


def walk(start: Any, end: Any, frames: int = 9, *, mode: Mode = "slerp") -> Walk:
    """Return what lies between two records or means, which is computed as it is read.

    Parameters
    ----------
    start, end : Selection or Means
        Its ends: one record or mean each, of the same store and commit.
    frames : int
        Frames, the two ends among them.
    mode : {"slerp", "lerp"}
        Along the arc between two vectors, with lengths that grow evenly, or straight. A vector is
        that of one token; where two have no arc between them, since they are parallel, opposite or
        zero, the way is straight.

    Returns
    -------
    Walk
        For `generate`, or to `read`. No tensor is read. The first and the last frame are the ends,
        bit for bit. All frames have the noise of the start.

    Raises
    ------
    SchemaMismatchError
        If an end is not one record or mean, the ends are the same or of different stores, or
        another argument is of no use.
    """
    if mode not in get_args(Mode):
        raise SchemaMismatchError(f"mode: expected {' or '.join(get_args(Mode))}, got {mode!r}")
    if not is_whole(frames) or frames < 2:
        raise SchemaMismatchError(f"frames: expected a whole number from 2 up, got {frames!r}")
    first, last = _end("start", start), _end("end", end)
    places = {(str(each.location), each.commit) for each in (start, end)}
    if len(places) > 1:
        said = " and ".join(f"{place}, commit {commit}" for place, commit in sorted(places))
        raise SchemaMismatchError(f"walk: expected ends of one store and commit, got {said}")
    if first == last:
        raise SchemaMismatchError(f"walk: expected two different ends, got {first} twice")
    keys = (WalkKey(first, last, mode, int(frames), frame) for frame in range(frames))
    return Walk(start, end, tuple(keys))


def _end(name: str, end: Any) -> RecordKey | MeanKey:
    if not isinstance(end, Rows | Means):
        raise SchemaMismatchError(
            f"{name}: expected a record or a mean, such as store.select(...) of one record, got "
            f"{type(end).__name__}"
        )
    if len(end) != 1:
        raise SchemaMismatchError(f"{name}: expected one record or mean, got {len(end)}")
    return end.keys()[0]


def between(start: np.ndarray, end: np.ndarray, weight: float, mode: Mode) -> np.ndarray:
    """Return what lies between two tensors, float32: computed in float64, the ends bit for bit."""
    if weight in (0.0, 1.0):
        return start if weight == 0.0 else end
    a, b = start.astype(np.float64), end.astype(np.float64)
    straight = (1 - weight) * a + weight * b
    if mode == "lerp" or not a.ndim:
        return straight.astype(np.float32)
    lengths = [np.linalg.norm(each, axis=-1, keepdims=True) for each in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        u, v = a / lengths[0], b / lengths[1]
        # Exact for small angles too, which a cosine near 1 does not tell from one another.
        apart = np.linalg.norm(u - v, axis=-1, keepdims=True)
        angle = 2 * np.arctan2(apart, np.linalg.norm(u + v, axis=-1, keepdims=True))
        sine = np.sin(angle)
        arc = (np.sin((1 - weight) * angle) * u + np.sin(weight * angle) * v) / sine
        bent = ((1 - weight) * lengths[0] + weight * lengths[1]) * arc
    has_arc = np.nan_to_num(sine) > _PARALLEL
    return np.where(has_arc, bent, straight).astype(np.float32)
