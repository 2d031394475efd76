"""Lance: one table with fixed-size-list columns, read by filters and by `take`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from ..data import BATCH, Round, Shape
from .base import Format, Tensors, Writer

TENSORS = ["t5", "clip"]


class Lance(Format):
    folder = "lance"

    def writer(self, path: Path, shape: Shape) -> Writer:
        return _Writer(path, shape)

    def _open(self, path: Path) -> Any:
        return lance.dataset(str(path))

    def count(self, path: Path) -> int:
        return int(self._open(path).count_rows())

    def first(self, path: Path, number: int, n: int) -> Tensors:
        dataset = self._open(path)
        return _tensors(dataset, dataset.to_table(TENSORS, filter=f"round = {number}", limit=n))

    def first_of_class(self, path: Path, class_name: str, n: int) -> Tensors:
        dataset = self._open(path)
        wanted = f"class_name = '{class_name}'"
        return _tensors(dataset, dataset.to_table(TENSORS, filter=wanted, limit=n))

    def of_class(self, path: Path, class_name: str) -> Tensors:
        dataset = self._open(path)
        wanted = f"class_name = '{class_name}'"
        return _tensors(dataset, dataset.to_table(TENSORS, filter=wanted))

    def sample(self, path: Path, class_name: str, index: int) -> Tensors:
        dataset = self._open(path)
        wanted = f"class_name = '{class_name}' and index = {index}"
        return _tensors(dataset, dataset.to_table(TENSORS, filter=wanted))

    def at(self, path: Path, positions: np.ndarray) -> Tensors:
        dataset = self._open(path)
        return _tensors(dataset, dataset.take(positions.tolist(), TENSORS))

    def scan(self, path: Path) -> Iterator[Tensors]:
        dataset = self._open(path)
        for batch in dataset.to_batches(columns=TENSORS, batch_size=BATCH):
            yield _tensors(dataset, batch)

    def labelled(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        dataset = self._open(path)
        shape = _shape(dataset)
        for batch in dataset.to_batches(columns=["t5", "class_name"], batch_size=BATCH):
            names = batch.column("class_name").to_numpy(zero_copy_only=False)
            yield _values(batch.column("t5"), shape), names.astype(str)


class _Writer(Writer):
    def __init__(self, path: Path, shape: Shape) -> None:
        self._path, self._dataset = path, None
        self._metadata = {"shape": f"{shape.tokens},{shape.width}"}

    def append(self, data: Round) -> None:
        columns: dict[str, Any] = {
            "t5": _fixed(data.t5.reshape(len(data), -1)),
            "clip": _fixed(data.clip),
            "round": pa.array([data.number] * len(data), pa.int32()),
            "index": pa.array(data.index, pa.int64()),
            **{name: pa.array(values) for name, values in data.texts().items()},
        }
        table = pa.table(columns).replace_schema_metadata(self._metadata)
        mode = "create" if self._dataset is None else "append"
        target = str(self._path) if self._dataset is None else self._dataset
        self._dataset = lance.write_dataset(table, target, mode=mode)


def _fixed(values: np.ndarray) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _shape(dataset: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in dataset.schema.metadata[b"shape"].split(b","))


def _values(column: Any, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), *shape)


def _tensors(dataset: Any, table: Any) -> Tensors:
    shape = _shape(dataset)
    clip = table.column("clip")
    return _values(table.column("t5"), shape), _values(clip, (clip.type.list_size,))
