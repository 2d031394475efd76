"""Where a store's bytes are: a folder of this machine, or what `objects` reads."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgfe_store.common.location import Address, Location
from fedgfe_store.storage import files
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.files import named_or_unreadable, open_regular, read_regular
from fedgfe_store.storage.place import Place, Range


class LocalFile:
    """An ordinary file that is open."""

    __slots__ = ("_handle", "_path", "size")

    def __init__(self, path: str) -> None:
        self._path = path
        self._handle, self.size = open_regular(path)

    def fetch(self, ranges: Sequence[Range]) -> None:
        """Do nothing: the system reads ahead."""

    def read(self, nbytes: int, offset: int) -> bytes:
        """Return `nbytes` from `offset` on."""
        data = b""
        while len(data) < nbytes:
            try:
                more = os.pread(self._handle, nbytes - len(data), offset + len(data))
            except OSError as error:
                raise named_or_unreadable(error, self._path) from error
            if not more:
                raise UnreadableError("it is too short")
            data = data + more if data else more
        return data

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Fill pieces of `memory` with what lies from `offset` on."""
        left = list(memory)
        while left:
            try:
                n = os.preadv(self._handle, left, offset)
            except OSError as error:
                raise named_or_unreadable(error, self._path) from error
            if not n:
                raise UnreadableError("it is too short")
            offset += n
            while left and n >= len(left[0]):
                n -= len(left.pop(0))
            if n:
                left[0] = left[0][n:]

    def close(self) -> None:
        """Close it."""
        os.close(self._handle)


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    folder: Path
    distant = False

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str, most: int) -> bytes:
        """Return the contents of a file."""
        try:
            # Not a Path: joining one takes longer than opening the file.
            return read_regular(f"{self.folder}/{name}", most)
        except NotADirectoryError as error:
            raise UnreadableError("its folder is none") from error

    def open(self, name: str, end: int) -> LocalFile:
        """Open a file."""
        try:
            return LocalFile(f"{self.folder}/{name}")
        except NotADirectoryError as error:
            raise UnreadableError("its folder is none") from error

    def waits(self, name: str) -> bool:
        """Whether the disk has to be asked for the beginning of a file, as far as Linux can say."""
        try:
            handle, _ = open_regular(f"{self.folder}/{name}")
        except (OSError, UnreadableError):  # who reads it says why
            return False
        try:
            os.preadv(handle, [bytearray(1)], 0, getattr(os, "RWF_NOWAIT", 0))
        except BlockingIOError:
            return True
        except OSError:  # a file system that cannot tell
            return False
        finally:
            os.close(handle)
        return False

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).exists()

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return names and bytes of the files below `folder`."""
        return files.sizes_below(self.folder / folder)

    def put_new(self, name: str, data: bytes) -> bool:
        """Make a file that is not there; False where there is one."""
        path = self.folder / name
        files.make_folders(path.parent)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{files.TEMPORARY}")
        try:
            with files.flushed(temporary, name=path) as file:
                file.write(data)
            if not files.linked(temporary, path):  # no links here
                with files.flushed(path) as file:
                    file.write(data)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def ages(self, folder: str) -> dict[str, float]:
        """Return names and seconds since the last change of the files below `folder`."""
        clock = self.folder / f".{uuid.uuid4().hex}{files.TEMPORARY}"
        clock.touch()
        try:
            now = clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)
        found = {}
        for name in files.sizes_below(self.folder / folder):
            with contextlib.suppress(FileNotFoundError):
                found[name] = now - (self.folder / folder / name).stat().st_mtime
        return found


def place_of(location: Location) -> Place:
    """Return the place at `location`; the library that reads from URLs is imported for one.

    Raises
    ------
    SchemaMismatchError
        If it is a URL, and that library is not installed or does not take it.
    """
    if not isinstance(location, Address):
        # What a relative path means must not change with the working directory.
        return LocalFolder(location.absolute())
    from fedgfe_store.storage.objects import ObjectStore

    return ObjectStore(location)
