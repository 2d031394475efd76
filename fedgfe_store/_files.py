"""Files that are on the disk, not just in its cache, before anything refers to them."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

_TEMPORARY = (".partial", ".tmp")
_SYNC_THREADS = 8


def sync_file(path: Path) -> None:
    """Flush the contents of the file `path` to the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Flush the names in the folder `path` to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Put `data` in place of `path` in one step: also after a crash it is the old or the new."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` in one step when the block ends."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write several files, each like `write_file`; the disk gathers their flushes."""
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(write_file, contents.keys(), contents.values()))


def sync_files(paths: Iterable[Path]) -> None:
    """Flush several files and then the folders that name them."""
    paths = list(paths)
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(sync_file, paths))
        list(pool.map(sync_folder, {path.parent for path in paths}))


def system_error(error: Exception, path: Path) -> OSError | None:
    """Return what the operating system refused at `path`, which zarrs says in words only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def make_folders(path: Path) -> None:
    """Make the folder `path` and the missing ones above it, and flush each one's name."""
    missing = [path, *path.parents]
    missing = [folder for folder in missing if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file that a killed writer left half written."""
    return path.name.endswith(_TEMPORARY) and path.is_file()


def remove_temporary(folder: Path) -> None:
    """Remove what a killed writer left half written in `folder`."""
    for path in folder.iterdir():
        if is_temporary(path):
            path.unlink(missing_ok=True)


class DurableStore(LocalStore):
    """A Zarr store on the local disk whose every value is flushed before it takes its name."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write `value` under `key`, see `write_file`."""
        import asyncio

        self._check_writable()
        path = self.root / key
        await asyncio.to_thread(write_file, path, value.as_buffer_like())


def usage(folder: Path) -> tuple[int, int]:
    """Return the bytes and the number of the files under `folder`, those of a writer included."""
    nbytes = count = 0
    for where, _, names in os.walk(folder):
        for name in names:
            # A writer renames and removes files meanwhile.
            with contextlib.suppress(FileNotFoundError):
                nbytes += os.lstat(os.path.join(where, name)).st_size
                count += 1
    return nbytes, count
