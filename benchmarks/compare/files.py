"""Files of a store: their bytes, their cached pages, and flushing them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files(path: Path) -> Iterator[Path]:
    """Yield all files below `path`."""
    return (file for file in path.rglob("*") if file.is_file())


def size(path: Path) -> tuple[int, int]:
    """Return how many bytes and how many files there are."""
    sizes = [file.stat().st_size for file in files(path)]
    return sum(sizes), len(sizes)


def flush(path: Path, since: float) -> None:
    """Flush the files that were written after `since`, and their folders, to the disk."""
    changed = [file for file in files(path) if file.stat().st_mtime >= since]
    for place in [*changed, *{file.parent for file in changed}]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def forget(path: Path) -> None:
    """Drop the files' cached pages, so that they are read from the disk again."""
    for file in files(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
