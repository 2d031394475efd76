"""Features of pictures and sounds, kept on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store.common.sample import drawn
from fedgfe_store.errors import NotFoundError
from fedgfe_store.images.folder import side_by_side
from fedgfe_store.images.scoring import opened

MOST = 10_000
"""Images of a set that are compared: of more, as many are drawn, always the same. Their features of
2,048 numbers are 80 MB, and FID's bias is small from there on."""

_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Features of files, in one of their own: of all of them, memory would grow with the folder.

    Parameters
    ----------
    path : Path
        float32 ``[files, width]``, without a header.
    width : int
        Numbers of a file.
    there : ndarray of bool, shape [files]
        Which files could be read.
    """

    path: Path
    width: int
    there: np.ndarray

    def compared(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` are compared: those that are there, or as many as there may be."""
        rows = rows[self.there[rows]]
        kept: np.ndarray = rows[drawn(len(rows), MOST)]
        return kept

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of `rows`, float32 ``[rows, width]``."""
        # Mapped for this call only: what was looked at counts as memory as long as it is mapped.
        values = np.memmap(self.path, np.float32, "r").reshape(-1, self.width)
        found: np.ndarray = np.asarray(values[rows])
        return found


class Embedder:
    """Embeds files into others in `folder`.

    Parameters
    ----------
    embed : callable
        Gives features of what `read` gives of some files, float32 ``[files, width]``.
    folder : Path
        Where the features go.
    batch_size : int
        Files in memory and in a call of `embed`.
    progress : callable
        Called with the number of files just embedded.
    read : callable
        Reads a file, by default a picture in RGB; None where it is damaged. Threads call it.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[Any]], np.ndarray],
        folder: Path,
        batch_size: int,
        progress: Callable[[int], object],
        read: Callable[[Path], Any] | None = None,
    ) -> None:
        self._embed, self._folder = embed, folder
        self._read = read or partial(opened, formats=_FORMATS)
        self._batch_size, self._progress = batch_size, progress
        self.left_out: dict[str, str] = {}

    def embed(self, files: Sequence[Path]) -> Embedded:
        """Embed files; those that are damaged are left out and named in `left_out`.

        Raises
        ------
        NotFoundError
            If none is sound.
        """
        there = np.zeros(len(files), bool)
        width = 0
        file = tempfile.NamedTemporaryFile(dir=self._folder, delete=False)  # noqa: SIM115
        with file:
            for start in range(0, len(files), self._batch_size):
                batch = files[start : start + self._batch_size]
                contents = list(side_by_side(self._read, batch))
                whole = [place for place, each in enumerate(contents) if each is not None]
                there[start + np.array(whole, int)] = True
                lost = set(range(len(batch))) - set(whole)
                self.left_out |= {batch[place].name: "damaged" for place in lost}
                if whole:
                    rows = self._embed([contents[place] for place in whole])
                    width = rows.shape[1]
                    part = np.zeros((len(batch), width), np.float32)
                    part[whole] = rows
                    file.seek(start * part.itemsize * width)
                    file.write(part.tobytes())
                self._progress(len(batch))
            # What is damaged at the end has its place, too.
            file.truncate(len(files) * np.float32().itemsize * width)
        if not there.any():
            raise NotFoundError(f"none of {len(files)} files such as {files[0]} can be read")
        return Embedded(Path(file.name), width, there)
