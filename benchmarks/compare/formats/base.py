"""What is asked of every format, and what those made of one array per column share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data import BATCH, Round, Shape

Tensors = tuple[np.ndarray, np.ndarray]
"""t5 [n, tokens, width] and clip [n, clip], float32, in memory of their own."""


class Format(ABC):
    """One way of keeping the rounds; every reading method opens the files anew."""

    name: str
    exact = True
    folder: str
    """Formats with the same folder read the same files."""

    @abstractmethod
    def writer(self, path: Path, shape: Shape) -> Writer:
        """Make an empty store at `path`."""

    def prepare(self, data: Round) -> Any:
        """Return `data` as the training would hold it; not timed."""
        return data

    @abstractmethod
    def count(self, path: Path) -> int:
        """Open, and count the records."""

    @abstractmethod
    def first(self, path: Path, number: int, n: int) -> Tensors:
        """Return the first `n` records of one round."""

    @abstractmethod
    def first_of_class(self, path: Path, class_name: str, n: int) -> Tensors:
        """Return the first `n` records of a class, of whatever round."""

    @abstractmethod
    def of_class(self, path: Path, class_name: str) -> Tensors:
        """Return all records of a class."""

    @abstractmethod
    def sample(self, path: Path, class_name: str, index: int) -> Tensors:
        """Return one sample of every round."""

    @abstractmethod
    def at(self, path: Path, positions: np.ndarray) -> Tensors:
        """Return the records at `positions`, counted over all rounds, in that order."""

    @abstractmethod
    def scan(self, path: Path) -> Iterator[Tensors]:
        """Yield everything, some 32 records at a time."""

    @abstractmethod
    def labelled(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield t5 and its class names, some 32 records at a time."""

    def centroids(self, path: Path) -> dict[str, np.ndarray]:
        """Return the mean of t5 over tokens and records, [width], of each class."""
        sums: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for t5, names in self.labelled(path):
            vectors = t5.mean(axis=1, dtype=np.float64)
            for name in np.unique(names):
                mine = vectors[names == name]
                sums[str(name)] = sums.get(str(name), 0) + mine.sum(axis=0)
                counts[str(name)] = counts.get(str(name), 0) + len(mine)
        return {name: sums[name] / counts[name] for name in sums}


class Writer(ABC):
    """A writer that stays open over many rounds."""

    @abstractmethod
    def append(self, data: Any) -> None:
        """Add one round, so that a reader who opens the files then sees it."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close what is open."""


class Columns(ABC):
    """Opened files of a format that keeps one array per column."""

    @abstractmethod
    def key(self, name: str) -> np.ndarray:
        """Return ``round``, ``index`` or ``class_name`` of all records."""

    @abstractmethod
    def take(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Return the tensors of `rows`, in that order."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Close what is open."""


class ArrayFormat(Format):
    """A format that finds rows by its key columns and then reads them."""

    @abstractmethod
    def open(self, path: Path) -> Columns: ...

    def _read(self, path: Path, where: Any) -> Tensors:
        columns = self.open(path)
        try:
            rows = where(columns)
            return columns.take("t5", rows), columns.take("clip", rows)
        finally:
            columns.close()

    def count(self, path: Path) -> int:
        columns = self.open(path)
        try:
            return len(columns.key("round"))
        finally:
            columns.close()

    def first(self, path: Path, number: int, n: int) -> Tensors:
        return self._read(path, lambda c: np.flatnonzero(c.key("round") == number)[:n])

    def first_of_class(self, path: Path, class_name: str, n: int) -> Tensors:
        return self._read(path, lambda c: np.flatnonzero(c.key("class_name") == class_name)[:n])

    def of_class(self, path: Path, class_name: str) -> Tensors:
        return self._read(path, lambda c: np.flatnonzero(c.key("class_name") == class_name))

    def sample(self, path: Path, class_name: str, index: int) -> Tensors:
        return self._read(
            path,
            lambda c: np.flatnonzero(
                (c.key("index") == index) & (c.key("class_name") == class_name)
            ),
        )

    def at(self, path: Path, positions: np.ndarray) -> Tensors:
        return self._read(path, lambda c: positions)

    def _pieces(self, total: int) -> Iterator[np.ndarray]:
        for start in range(0, total, BATCH):
            yield np.arange(start, min(start + BATCH, total))

    def scan(self, path: Path) -> Iterator[Tensors]:
        columns = self.open(path)
        try:
            for rows in self._pieces(len(columns.key("round"))):
                yield columns.take("t5", rows), columns.take("clip", rows)
        finally:
            columns.close()

    def labelled(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        columns = self.open(path)
        try:
            names = columns.key("class_name")
            for rows in self._pieces(len(names)):
                yield columns.take("t5", rows), names[rows]
        finally:
            columns.close()


def take_runs(array: Any, rows: np.ndarray) -> np.ndarray:
    """Read `rows` of an array as few slices: faster than its own fancy indexing."""
    order = np.argsort(rows, kind="stable")
    wanted = rows[order]
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
    if len(runs) == 1 and np.array_equal(rows, wanted):
        return np.asarray(array[int(rows[0]) : int(rows[-1]) + 1])
    out = np.empty((len(rows), *array.shape[1:]), np.float32)
    done = 0
    for run in runs:
        out[order[done : done + len(run)]] = array[int(run[0]) : int(run[-1]) + 1]
        done += len(run)
    return out
