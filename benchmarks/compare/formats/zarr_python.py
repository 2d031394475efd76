"""Plain zarr-python: the same shards, chunks and codecs, its own codec pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from ..data import Round, Shape
from .base import ArrayFormat, Columns, Writer, take_runs

TEXTS = ("node", "split", "class_name", "sample_id")


class ZarrPython(ArrayFormat):
    folder = "zarr_python"

    def writer(self, path: Path, shape: Shape) -> Writer:
        group = zarr.create_group(path)
        codec = BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="bitshuffle")
        for name, size in {"t5": (shape.tokens, shape.width), "clip": (shape.clip,)}.items():
            chunk = shape.chunk if name == "t5" else shape.granule
            group.create_array(
                name,
                shape=(0, *size),
                dtype="float32",
                chunks=(chunk, *size),
                shards=(shape.granule, *size),
                compressors=[codec],
            )
        for name in TEXTS:
            group.create_array(name, shape=(0,), dtype="str", chunks=(16384,))
        for name in ("round", "index"):
            group.create_array(name, shape=(0,), dtype="int64", chunks=(16384,))
        return _Writer(group)

    def open(self, path: Path) -> Columns:
        return _Columns(zarr.open_group(path, mode="r"))


class _Writer(Writer):
    def __init__(self, group: Any) -> None:
        self._arrays = dict(group.arrays())

    def append(self, data: Round) -> None:
        columns = {"t5": data.t5, "clip": data.clip}
        columns |= {n: np.array(v, np.dtypes.StringDType()) for n, v in data.texts().items()}
        columns["round"] = np.full(len(data), data.number)
        columns["index"] = np.array(data.index)
        for name, values in columns.items():
            self._arrays[name].append(values)


class _Columns(Columns):
    def __init__(self, group: Any) -> None:
        self._group = group

    def key(self, name: str) -> np.ndarray:
        return np.asarray(self._group[name][:])

    def take(self, column: str, rows: np.ndarray) -> np.ndarray:
        return take_runs(self._group[column], rows)
