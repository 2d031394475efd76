"""This store, through its public API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401 - batches are torch tensors: its import is not what is measured

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.analysis import centroids
from fedgfe_store.selection import Selection

from ..data import BATCH, Round, Shape
from .base import Format, Tensors, Writer


class Exact(Format):
    folder = "ours_float32"
    precision: Any = "float32"
    compression: Any = "bitshuffle"

    def writer(self, path: Path, shape: Shape) -> Writer:
        schema = Schema.flux(
            shape.tokens,
            width=shape.width,
            clip=(shape.clip,),
            precision=self.precision,
            compression=self.compression,
        )
        return _Writer(EmbeddingStore.create(path, schema))

    def count(self, path: Path) -> int:
        return len(EmbeddingStore.open(path))

    def first(self, path: Path, number: int, n: int) -> Tensors:
        return _first(EmbeddingStore.open(path).select(round=number), n)

    def first_of_class(self, path: Path, class_name: str, n: int) -> Tensors:
        return _first(EmbeddingStore.open(path).select(class_name=class_name), n)

    def of_class(self, path: Path, class_name: str) -> Tensors:
        return _read(EmbeddingStore.open(path).select(class_name=class_name))

    def sample(self, path: Path, class_name: str, index: int) -> Tensors:
        return _read(EmbeddingStore.open(path).select(class_name=class_name, index=index))

    def at(self, path: Path, positions: np.ndarray) -> Tensors:
        return _read(EmbeddingStore.open(path).select().take(positions))

    def scan(self, path: Path) -> Iterator[Tensors]:
        for batch in EmbeddingStore.open(path).select().batches(BATCH):
            yield batch["t5"].numpy(), batch["clip"].numpy()

    def labelled(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in EmbeddingStore.open(path).select().batches(BATCH, columns=["t5"]):
            yield batch["t5"].numpy(), batch.records["class_name"].to_numpy()

    def centroids(self, path: Path) -> dict[str, np.ndarray]:
        found = centroids(EmbeddingStore.open(path).select(), ["class_name"])
        names = found["class_name"].to_numpy()
        return dict(zip(map(str, names), found["centroid"].to_numpy(), strict=True))


class Rounded(Exact):
    folder = "ours_bfloat16"
    exact = False
    precision = "bfloat16"


class Raw(Exact):
    folder = "ours_raw"
    compression = "none"


class _Writer(Writer):
    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store

    def append(self, data: Round) -> None:
        with self._store.append(node=data.node, round=data.number) as batch:
            batch.add(
                split=data.split,
                class_name=data.class_name,
                index=data.index,
                sample_id=data.sample_id,
                t5=data.t5,
                clip=data.clip,
            )


def _first(selection: Selection, n: int) -> Tensors:
    batch = next(iter(selection.batches(n, prefetch=0)))
    return batch["t5"].numpy(), batch["clip"].numpy()


def _read(selection: Selection) -> Tensors:
    return selection.read("t5"), selection.read("clip")
