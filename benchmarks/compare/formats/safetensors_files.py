"""safetensors: one file per node and round, stacked tensors, the keys in its header."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..data import BATCH, Round, Shape
from .base import Format, Tensors, Writer, take_runs

Keys = dict[str, np.ndarray]


class Safetensors(Format):
    folder = "safetensors"

    def writer(self, path: Path, shape: Shape) -> Writer:
        path.mkdir()
        return _Writer(path)

    def _collect(self, path: Path, wanted: Callable[[Keys], np.ndarray]) -> Tensors:
        parts = []
        for file in _files(path):
            with safe_open(file, "numpy") as opened:
                rows = np.flatnonzero(wanted(_keys(opened)))
                if len(rows):
                    parts.append(_take(opened, rows))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def count(self, path: Path) -> int:
        total = 0
        for file in _files(path):
            with safe_open(file, "numpy") as opened:
                total += opened.get_slice("clip").get_shape()[0]
        return total

    def first(self, path: Path, number: int, n: int) -> Tensors:
        with safe_open(_file(path, number), "numpy") as opened:
            return _take(opened, np.arange(n))

    def first_of_class(self, path: Path, class_name: str, n: int) -> Tensors:
        parts: list[Tensors] = []
        for file in _files(path):
            with safe_open(file, "numpy") as opened:
                rows = np.flatnonzero(_keys(opened)["class_name"] == class_name)[:n]
                if len(rows):
                    parts.append(_take(opened, rows))
            n -= len(rows)
            if not n:
                break
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def of_class(self, path: Path, class_name: str) -> Tensors:
        return self._collect(path, lambda k: k["class_name"] == class_name)

    def sample(self, path: Path, class_name: str, index: int) -> Tensors:
        return self._collect(
            path, lambda k: (k["class_name"] == class_name) & (k["index"] == index)
        )

    def at(self, path: Path, positions: np.ndarray) -> Tensors:
        start, out = 0, None
        for file in _files(path):
            with safe_open(file, "numpy") as opened:
                shapes = [opened.get_slice(name).get_shape() for name in ("t5", "clip")]
                n = shapes[0][0]
                here = np.flatnonzero((positions >= start) & (positions < start + n))
                if out is None:
                    out = tuple(np.empty((len(positions), *s[1:]), np.float32) for s in shapes)
                if len(here):
                    for array, values in zip(
                        out, _take(opened, positions[here] - start), strict=True
                    ):
                        array[here] = values
            start += n
        assert out is not None
        return out[0], out[1]

    def scan(self, path: Path) -> Iterator[Tensors]:
        for file in _files(path):
            with safe_open(file, "numpy") as opened:
                for rows in _pieces(opened):
                    yield _take(opened, rows)

    def labelled(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for file in _files(path):
            with safe_open(file, "numpy") as opened:
                names = _keys(opened)["class_name"]
                for rows in _pieces(opened):
                    yield opened.get_slice("t5")[rows[0] : rows[-1] + 1], names[rows]


class _Writer(Writer):
    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, data: Round) -> None:
        keys = {name: json.dumps(values) for name, values in data.texts().items()}
        keys |= {"round": str(data.number), "index": json.dumps(data.index)}
        tensors = {"t5": data.t5, "clip": data.clip}
        save_file(tensors, _file(self._path, data.number), metadata=keys)


def _file(path: Path, number: int) -> Path:
    return path / f"node_0_embeddings_r{number}.safetensors"


def _files(path: Path) -> list[Path]:
    return [_file(path, number) for number in range(len(list(path.iterdir())))]


def _keys(opened: Any) -> Keys:
    return {name: np.array(json.loads(opened.metadata()[name])) for name in ("class_name", "index")}


def _pieces(opened: Any) -> Iterator[np.ndarray]:
    n = opened.get_slice("clip").get_shape()[0]
    for start in range(0, n, BATCH):
        yield np.arange(start, min(start + BATCH, n))


class _Slices:
    """A tensor of an open file, with the shape that `take_runs` asks for."""

    def __init__(self, opened: Any, name: str) -> None:
        self._slice = opened.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, rows: slice) -> Any:
        return self._slice[rows]


def _take(opened: Any, rows: np.ndarray) -> Tensors:
    return take_runs(_Slices(opened, "t5"), rows), take_runs(_Slices(opened, "clip"), rows)
