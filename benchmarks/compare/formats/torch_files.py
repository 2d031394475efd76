"""torch.save of a dict per node and round, as the training did; read whole, or mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import BATCH, Round, Shape
from .base import Format, Tensors, Writer

Entry = dict[str, Any]


class Loaded(Format):
    folder = "torch"
    mmap = False

    def writer(self, path: Path, shape: Shape) -> Writer:
        path.mkdir()
        return _Writer(path)

    def prepare(self, data: Round) -> dict[str, Any]:
        entries = [
            {
                "split": data.split,
                "index": index,
                "class_name": name,
                "t5_embedding": torch.from_numpy(data.t5[i].copy()),
                "clip_embedding": torch.from_numpy(data.clip[i].copy()),
                "sample_metadata": {"sample_id": f"train_{i}"},
            }
            for i, (name, index) in enumerate(zip(data.class_name, data.index, strict=True))
        ]
        return {"node_id": 0, "round": data.number, "embeddings": entries, "metadata": {}}

    def _load(self, file: Path) -> list[Entry]:
        loaded: list[Entry] = torch.load(file, weights_only=True, mmap=self.mmap)["embeddings"]
        return loaded

    def _entries(self, path: Path, wanted: Callable[[Entry], bool]) -> Tensors:
        # One file after the other: what is not wanted is dropped before the next is loaded.
        return _stack([e for file in _files(path) for e in self._load(file) if wanted(e)])

    def count(self, path: Path) -> int:
        return sum(len(self._load(file)) for file in _files(path))

    def first(self, path: Path, number: int, n: int) -> Tensors:
        return _stack(self._load(_file(path, number))[:n])

    def first_of_class(self, path: Path, class_name: str, n: int) -> Tensors:
        # As the old scripts did: all files are loaded before anything is picked.
        entries = [e for f in _files(path) for e in self._load(f) if e["class_name"] == class_name]
        return _stack(entries[:n])

    def of_class(self, path: Path, class_name: str) -> Tensors:
        return self._entries(path, lambda e: e["class_name"] == class_name)

    def sample(self, path: Path, class_name: str, index: int) -> Tensors:
        return self._entries(path, lambda e: (e["class_name"], e["index"]) == (class_name, index))

    def at(self, path: Path, positions: np.ndarray) -> Tensors:
        wanted = {int(p): i for i, p in enumerate(positions)}
        found: list[Entry] = [{}] * len(wanted)
        start = 0
        for file in _files(path):
            entries = self._load(file)
            for offset, entry in enumerate(entries, start):
                if offset in wanted:
                    found[wanted[offset]] = entry
            start += len(entries)
        return _stack(found)

    def _pieces(self, path: Path) -> Iterator[list[Entry]]:
        for file in _files(path):
            entries = self._load(file)
            for start in range(0, len(entries), BATCH):
                yield entries[start : start + BATCH]

    def scan(self, path: Path) -> Iterator[Tensors]:
        for entries in self._pieces(path):
            yield _stack(entries)

    def labelled(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for entries in self._pieces(path):
            t5 = torch.stack([e["t5_embedding"] for e in entries]).numpy()
            yield t5, np.array([e["class_name"] for e in entries])


class Mapped(Loaded):
    mmap = True


class _Writer(Writer):
    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, data: dict[str, Any]) -> None:
        torch.save(data, _file(self._path, data["round"]))


def _file(path: Path, number: int) -> Path:
    return path / f"node_0_embeddings_r{number}.pt"


def _files(path: Path) -> list[Path]:
    return [_file(path, number) for number in range(len(list(path.iterdir())))]


def _stack(entries: list[Entry]) -> Tensors:
    t5 = torch.stack([e["t5_embedding"] for e in entries])
    return t5.numpy(), torch.stack([e["clip_embedding"] for e in entries]).numpy()
