"""The list of the images in a folder: ``manifest.jsonl``, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MANIFEST_NAME = "manifest.jsonl"
_TAIL_BYTES = 256 * 1024
_RATE_LINES = 100


class Manifest:
    """Appends lines to a folder's manifest; threads and processes may append at once.

    Each line goes out in one write in append mode, so that lines of several writers do not mix.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    """

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        self._file = os.open(folder / MANIFEST_NAME, flags, 0o666)
        self._lock = threading.Lock()
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        # A writer that was killed may have left half a line; the next one must not continue it.
        size = os.lseek(self._file, 0, os.SEEK_END)
        if size:
            os.lseek(self._file, size - 1, os.SEEK_SET)
            if os.read(self._file, 1) != b"\n":
                os.write(self._file, b"\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one image's line."""
        data = json.dumps(line).encode("ascii") + b"\n"
        with self._lock:
            written = os.write(self._file, data)
        if written != len(data):
            raise OSError(f"{MANIFEST_NAME}: expected to write {len(data)} bytes, got {written}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)


def read_manifest(folder: Path, *, tail_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Read the lines of a folder's manifest, oldest first; torn lines are left out.

    Parameters
    ----------
    folder : Path
        Folder of the images; without a manifest there are no lines.
    tail_bytes : int, optional
        Read so many bytes at the end only.

    Yields
    ------
    dict
        Provenance of an image, with ``file`` and ``bytes``; ``seconds`` and ``created`` are
        missing where the line was added later, from the image.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        if tail_bytes is not None and path.stat().st_size > tail_bytes:
            file.seek(-tail_bytes, os.SEEK_END)
            file.readline()
        for line in file:
            # A killed writer leaves half a line; its image has the same facts inside.
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def seconds_per_image(folder: Path, fingerprint: str) -> float | None:
    """Give the mean rendering time of the latest images made with some settings.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    fingerprint : str
        The settings' fingerprint.

    Returns
    -------
    float or None
        Seconds an image; None where none was made.
    """
    lines = list(read_manifest(folder, tail_bytes=_TAIL_BYTES))
    latest = [
        line["seconds"]
        for line in lines
        if line.get("fingerprint") == fingerprint and "seconds" in line
    ][-_RATE_LINES:]
    return sum(latest) / len(latest) if latest else None
