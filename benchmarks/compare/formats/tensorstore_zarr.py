"""TensorStore on Zarr v3 arrays of our layout and codecs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from ..data import CLASSES, Round, Shape
from .base import ArrayFormat, Columns, Writer

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}
_BLOSC = {
    "name": "blosc",
    "configuration": {
        "typesize": 4, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0,
    },
}  # fmt: skip
KEYS = ("node", "round", "class_name", "index")


class TensorStore(ArrayFormat):
    """Names are codes into ``classes.json``: TensorStore has no variable-length text in Zarr."""

    folder = "tensorstore"

    def writer(self, path: Path, shape: Shape) -> Writer:
        path.mkdir()
        (path / "classes.json").write_text(json.dumps(CLASSES))
        sizes = {"t5": (shape.tokens, shape.width), "clip": (shape.clip,)}
        opening = {name: _tensor(path / name, shape, size) for name, size in sizes.items()}
        opening |= {name: _key(path / name) for name in KEYS}
        return _Writer({name: future.result() for name, future in opening.items()})

    def open(self, path: Path) -> Columns:
        return _Columns(path)


def _spec(path: Path, data_type: str, chunk: list[int], fill: Any, codecs: list[Any]) -> Any:
    metadata = {
        "shape": [0, *chunk[1:]],
        "data_type": data_type,
        "fill_value": fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs,
    }
    kvstore = {"driver": "file", "path": str(path)}
    return ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}, create=True)


def _tensor(path: Path, shape: Shape, size: tuple[int, ...]) -> Any:
    chunk = shape.chunk if len(size) > 1 else shape.granule
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [chunk, *size],
            "codecs": [_BYTES, _BLOSC, _CRC32C],
            "index_codecs": [_BYTES, _CRC32C],
            "index_location": "end",
        },
    }
    return _spec(path, "float32", [shape.granule, *size], "NaN", [sharding])


def _key(path: Path) -> Any:
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
    return _spec(path, "int64", [16384], -1, [_BYTES, zstd, _CRC32C])


class _Writer(Writer):
    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays

    def append(self, data: Round) -> None:
        values = {
            "t5": data.t5,
            "clip": data.clip,
            "node": np.full(len(data), int(data.node)),
            "round": np.full(len(data), data.number),
            "class_name": np.array([CLASSES.index(name) for name in data.class_name]),
            "index": np.array(data.index),
        }
        start = self._arrays["round"].shape[0]
        resizing = {
            name: array.resize(exclusive_max=[start + len(data), *[None] * (array.rank - 1)])
            for name, array in self._arrays.items()
        }
        self._arrays = {name: future.result() for name, future in resizing.items()}
        writing = [self._arrays[name][start:].write(each) for name, each in values.items()]
        for future in writing:
            future.result()


class _Columns(Columns):
    def __init__(self, path: Path) -> None:
        self._path = path

    def _open(self, name: str) -> Any:
        kvstore = {"driver": "file", "path": str(self._path / name)}
        return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()

    def key(self, name: str) -> np.ndarray:
        values: np.ndarray = np.asarray(self._open(name).read().result())
        if name != "class_name":
            return values
        names = np.array(json.loads((self._path / "classes.json").read_text()))
        return np.take(names, values)

    def take(self, column: str, rows: np.ndarray) -> np.ndarray:
        array = self._open(column)
        if len(rows) == rows[-1] - rows[0] + 1 and np.all(np.diff(rows) == 1):
            return np.asarray(array[int(rows[0]) : int(rows[-1]) + 1].read().result())
        return np.asarray(array[rows].read().result())
