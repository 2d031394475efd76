"""HDF5 through h5py: one dataset per column, tensors in chunks of one record."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from ..data import Round, Shape
from .base import ArrayFormat, Columns, Writer, take_runs

TEXTS = ("node", "split", "class_name", "sample_id")


class Hdf5(ArrayFormat):
    folder = "hdf5"

    def writer(self, path: Path, shape: Shape) -> Writer:
        path.mkdir()
        file = h5py.File(path / "data.h5", "w", libver="latest")
        for name, size in {"t5": (shape.tokens, shape.width), "clip": (shape.clip,)}.items():
            file.create_dataset(
                name, (0, *size), np.float32, maxshape=(None, *size), chunks=(1, *size)
            )
        for name in TEXTS:
            file.create_dataset(name, (0,), h5py.string_dtype(), maxshape=(None,), chunks=(16384,))
        for name in ("round", "index"):
            file.create_dataset(name, (0,), np.int64, maxshape=(None,), chunks=(16384,))
        return _Writer(file)

    def open(self, path: Path) -> Columns:
        return _Columns(h5py.File(path / "data.h5", "r"))


class _Writer(Writer):
    def __init__(self, file: h5py.File) -> None:
        self._file = file

    def append(self, data: Round) -> None:
        columns = {"t5": data.t5, "clip": data.clip, **data.texts()}
        columns |= {"round": [data.number] * len(data), "index": data.index}
        for name, values in columns.items():
            dataset = self._file[name]
            start = len(dataset)
            dataset.resize(start + len(data), axis=0)
            dataset[start:] = values
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Columns(Columns):
    def __init__(self, file: h5py.File) -> None:
        self._file = file

    def key(self, name: str) -> np.ndarray:
        if name in TEXTS:
            return np.asarray(self._file[name].asstr()[:])
        return np.asarray(self._file[name][:])

    def take(self, column: str, rows: np.ndarray) -> np.ndarray:
        return take_runs(self._file[column], rows)

    def close(self) -> None:
        self._file.close()
