"""Files that are on the disk, not just in its cache, before anything refers to them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fedgfe_store.common import threads
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.checksums import UnreadableError

T = TypeVar("T")

NOT_THROUGH_LINKS: int = os.O_NOFOLLOW if os.name == "posix" else 0
"""Flag of `os.open` that refuses a link in place of the file."""

TEMPORARY = ".tmp"
"""How the names of files end that are not in place yet."""
# Linux's link(2), and what its disks answer: EPERM by FAT and exFAT, EOPNOTSUPP and ENOSYS by FUSE
# and network disks, EINVAL by some of those, EMLINK where a file has all the names it can have,
# EXDEV from one mount to another.
_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EMLINK,
    errno.EXDEV,
}
_EARLY_BYTES = 2**23
"""Bytes of a file at which the disk begins to write."""
_SYNC_FILE_RANGE_WRITE = 2
_LEFT_HALF_WRITTEN = (".partial", TEMPORARY)


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
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Put `data` in place of `path` in one step: also after a crash it is the old or the new."""
    with replacing(path) as file:
        file.write(data)


def open_regular(path: str | Path) -> tuple[int, int]:
    """Open `path` for reading if it is an ordinary file, or a link to one.

    What is none would keep a reader waiting, as a pipe does, or never end, as a device.

    Returns
    -------
    (int, int)
        Its handle, and its bytes.

    Raises
    ------
    UnreadableError
        If something else is there.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):  # a socket; links that lead nowhere
            raise UnreadableError("it is no ordinary file") from error
        raise
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode):
        return handle, status.st_size
    os.close(handle)
    raise UnreadableError("it is no ordinary file")


def read_regular(path: str | Path, most: int) -> bytes:
    """Return the contents of the ordinary file `path`, which is at most `most` bytes long.

    Raises
    ------
    UnreadableError
        If something else is there, it is longer, or the disk cannot read it.
    OSError
        What the system refuses else; names the file.
    """
    handle, size = open_regular(path)
    try:
        if size > most:
            raise UnreadableError(f"expected at most {most:,} bytes, got {size:,}")
        data = os.read(handle, size)
        # A call gives 2 GiB at most.
        while len(data) < size and (more := os.read(handle, size - len(data))):
            data += more
        return data
    except OSError as error:
        raise named_or_unreadable(error, path) from error
    finally:
        os.close(handle)


def named_or_unreadable(error: OSError, path: str | Path) -> Exception:
    """Return `error` with the file's name; where a sector is bad, what lies there is damaged."""
    if error.errno == errno.EIO:
        return UnreadableError(f"the disk cannot read it: {error}")
    error.filename = str(path)
    return error


@contextmanager
def flushed(path: str | Path, *, name: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that is not there yet; it is on the disk when the block ends.

    What the system refuses names `name`, or the file: writing and flushing do not say which.
    """
    with naming(name or path), open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def written_early(file: BinaryIO, parts: Callable[[slice], T]) -> Callable[[slice], T]:
    """Return `parts`, which are written to `file` one after another, so that the disk begins soon.

    While one is made ready the disk has those before it, which leaves less for the flush at the
    end. Linux alone can be asked to; elsewhere it begins with the flush.
    """
    done = 0

    def part(which: slice) -> T:
        nonlocal done
        size = file.tell()
        if size - done >= _EARLY_BYTES:
            file.flush()
            begin_writing(file, done, size - done)
            done = size
        return parts(which)

    return part


def begin_writing(file: BinaryIO, offset: int = 0, nbytes: int = 0) -> None:
    """Let the disk begin with `nbytes` of what Linux has of `file`, 0 for all from `offset` on."""
    start = _sync_file_range()
    if start is not None:
        # What it answers is not asked: the flush that follows tells what the disk refuses.
        where = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
        start(file.fileno(), *where, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Return the call of Linux's C library, None where there is none."""
    if sys.platform != "linux":
        return None
    call: Callable[..., int] | None = getattr(ctypes.CDLL(None), "sync_file_range", None)
    return call


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let what the system refuses name `path`, where it names no file, as a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` in one step when the block ends."""
    with placing(path) as temporary, flushed(temporary, name=path) as file:
        yield file
    sync_folder(path.parent)


@contextmanager
def placing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield where to make the file that takes the place of `path` when the block ends.

    Flushing it and its folder is left to the block: not every file has to outlive a crash.

    Parameters
    ----------
    path : Path
        The file; one that is there is replaced, and so is a link, which is not followed.
    temporary : Path, optional
        Another name for it until then, in the same folder; removed if the block raises.
    """
    temporary = temporary or path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def linked(source: Path, target: Path) -> bool:
    """Give the file `source` the name `target` too; False where the file system refuses links.

    Raises
    ------
    FileExistsError
        If something has that name.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def sync_folders(files: Iterable[Path]) -> None:
    """Flush the folders that name `files`."""
    folders = {file.parent for file in files}
    threads.run(threads.writers(), sync_folder, ((folder,) for folder in folders))


def sync_tree(folder: Path) -> None:
    """Flush `folder` with all that is in it to the disk."""
    for where, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(where, name))
        sync_folder(Path(where))


def make_folders(path: Path) -> None:
    """Make the folder `path` and the missing ones above it, and flush each one's name."""
    missing = [path, *path.parents]
    missing = [folder for folder in missing if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file that a killed writer left half written."""
    return is_temporary_name(path.name) and path.is_file()


def is_temporary_name(name: str) -> bool:
    """Whether files of this name are not in place yet."""
    return name.endswith(_LEFT_HALF_WRITTEN)


def temporaries(folder: Path) -> list[Path]:
    """Return what a killed writer left half written in `folder`; nothing where there is none."""
    found: list[Path] = []
    with _absent_ignored():
        found += folder.iterdir()
    return sorted(filter(is_temporary, found))


def remove_temporary(folder: Path) -> None:
    """Remove what a killed writer left half written in `folder`."""
    for path in temporaries(folder):
        path.unlink(missing_ok=True)


def usage(folder: Path) -> tuple[int, int]:
    """Return the bytes and the number of the files under `folder`, those of a writer included."""
    sizes = sizes_below(folder)
    return sum(sizes.values()), len(sizes)


def sizes_below(folder: Path) -> dict[str, int]:
    """Return the files under `folder`, by their names from there on, with their bytes."""
    sizes = {}
    for where, _, names in os.walk(folder):
        before = Path(where).relative_to(folder).as_posix()
        for name in names:
            # A writer renames and removes files meanwhile.
            with contextlib.suppress(FileNotFoundError):
                size = os.lstat(os.path.join(where, name)).st_size
                sizes[name if before == "." else f"{before}/{name}"] = size
    return sizes


def chunk_sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the chunk files in the folder of an array, with their bytes.

    One that a compaction removes meanwhile is left out.
    """
    for path in folder.glob("c.*"):
        size = None
        with _absent_ignored():
            size = path.stat().st_size
        if size is not None:
            yield path, size


def append_line(handle: int, line: Mapping[str, Any], name: str) -> None:
    """Append `line` as one line of JSON to the file `name`, which was opened in append mode.

    It goes out in one write, so that lines of several writers do not mix.
    """
    data = json.dumps(line).encode("ascii") + b"\n"
    written = os.write(handle, data)
    if written != len(data):
        raise OSError(f"{name}: expected to write {len(data)} bytes, got {written}")


def end_torn_line(handle: int) -> None:
    """End the half line that a killed writer left, so that the next one does not continue it."""
    size = os.lseek(handle, 0, os.SEEK_END)
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")


def parsed_line(text: bytes) -> dict[str, Any] | None:
    """Return the object in one line of JSON; None where it is torn, or holds something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _absent_ignored() -> Iterator[None]:
    """End the block where something is not there, or its folder or the link to it leads nowhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise


def check_own_folders(path: Path, arrays: Collection[str]) -> None:
    """Refuse to write to a store of whose `arrays` one lies elsewhere.

    Raises
    ------
    DamagedDataError
        If the folder of one is a link.
    """
    # A received store may lead to anyone's files, which a commit or `compact` would clear.
    for name in arrays:
        if os.path.islink(path / name):
            raise DamagedDataError(
                f"{path / name} is a link, and a store's files lie in its own folder: put the "
                f"folder that is meant in its place"
            )
