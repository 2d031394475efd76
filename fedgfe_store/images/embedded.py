"""Pictures' features, kept on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.sample import drawn
from fedgfe_store.errors import NotFoundError
from fedgfe_store.images.folder import side_by_side
from fedgfe_store.images.scoring import opened

if TYPE_CHECKING:
    from fedgfe_store.images.features import Features

MOST = 10_000
"""Images of a set that are compared: of more, as many are drawn, always the same. Their features of
2,048 numbers are 80 MB, and FID's bias is small from there on."""

_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Features on the disk, and which of them are there."""

    values: np.ndarray
    there: np.ndarray

    def some(self, rows: np.ndarray) -> np.ndarray:
        """Return features of `rows`, or of as many as are compared."""
        rows = rows[self.there[rows]]
        return np.asarray(self.values[rows[drawn(len(rows), MOST)]])


class Embedder:
    """Embeds pictures into files of `folder`."""

    def __init__(
        self,
        features: Features,
        folder: Path,
        batch_size: int,
        progress: Callable[[int], object],
    ) -> None:
        self._features, self._folder = features, folder
        self._batch_size, self._progress = batch_size, progress
        self.left_out: dict[str, str] = {}

    def embed(self, files: Sequence[Path]) -> Embedded:
        values: np.ndarray | None = None
        there = np.zeros(len(files), bool)
        for start in range(0, len(files), self._batch_size):
            batch = files[start : start + self._batch_size]
            images = list(side_by_side(partial(opened, formats=_FORMATS), batch))
            sound = [place for place, image in enumerate(images) if image is not None]
            there[start + np.array(sound, int)] = True
            self.left_out |= {
                file.name: "damaged"
                for file, image in zip(batch, images, strict=True)
                if image is None
            }
            if sound:
                rows = self._features.embed([image for image in images if image is not None])
                if values is None:
                    values = self._room(len(files), rows.shape[1])
                values[start + np.array(sound)] = rows
            self._progress(len(batch))
        if values is None:
            raise NotFoundError(f"none of {len(files)} pictures in {files[0].parent} is sound")
        return Embedded(values, there)

    def _room(self, pictures: int, width: int) -> np.ndarray:
        file = tempfile.NamedTemporaryFile(dir=self._folder, delete=False)  # noqa: SIM115
        with file:
            return np.memmap(file, np.float32, "w+", shape=(pictures, width))
