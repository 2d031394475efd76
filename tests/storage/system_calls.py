"""What a process does to the files below a folder, call by call: watched, cut short or refused.

Every write of this package goes through Python's `os` and `open`; here they are replaced for a
while. `open` becomes the one of `_pyio`, the same library in Python, which itself calls `os`. No
compiler is needed, and `Recorder` finds out if anything was written past it: what it recorded,
done again, has to give what lies there.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]  # typeshed has no stub of it
import builtins
import errno
import io
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPENING = frozenset({"look", "open", "create"})
CHANGING = frozenset(
    {"open", "create", "write", "truncate", "flush", "rename", "link", "unlink"}
    | {"mkdir", "rmdir", "utime"}
)
GROWING = frozenset({"create", "write", "truncate", "flush", "rename", "link", "mkdir"})
"""Calls that a full disk refuses."""


@dataclass(frozen=True)
class Call:
    """One call that succeeded.

    `node` numbers the file or folder that it was about, and is never used twice; `offset` is where
    `data` was written, or the length that was left.
    """

    kind: str
    path: str
    to: str = ""
    node: int = 0
    offset: int = 0
    data: bytes = b""


class Watch:
    """Replaces `os` and `open` for the calls below `folder`, as a context.

    Below it nothing is really flushed, which takes no time and changes nothing that a process can
    see. Calls are one at a time, so that their order is known.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self._real: dict[str, Any] = {}
        self._lock = threading.RLock()

    def before(self, kind: str, path: str, half: Callable[[], object]) -> None:
        """Look at a call that is about to be made; `half` does half of a write."""

    def after(self, call: Call, inode: int) -> None:
        """Look at a call that succeeded, on the file or folder `inode`."""

    def __enter__(self) -> Self:
        for name in dir(self):
            if name.startswith("_os_"):
                self._real[name[4:]] = getattr(os, name[4:])
                setattr(os, name[4:], getattr(self, name))
        self._real["builtins.open"] = builtins.open
        builtins.open = io.open = self._open
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        builtins.open = io.open = self._real.pop("builtins.open")
        for name, function in self._real.items():
            setattr(os, name, function)

    def _below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return `path` with its folder resolved, if it lies below the watched folder."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        else:
            folder, name = os.path.split(os.fsdecode(path))
            if dir_fd is not None:
                folder = os.path.join(f"/proc/self/fd/{dir_fd}", folder)
            full = os.path.join(os.path.realpath(folder), name)
        return full if full.startswith(self.folder + "/") or full == self.folder else None

    def _open(self, file: Any, mode: str = "r", *options: Any, **named: Any) -> Any:
        if isinstance(file, int) or self._below(file) is None:
            return self._real["builtins.open"](file, mode, *options, **named)
        return _pyio.open(file, mode, *options, **named)

    def _os_open(
        self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        full = self._below(path, dir_fd)
        if full is None:
            return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        with self._lock:
            there = os.path.lexists(full)
            kind = "look"
            if flags & _WRITING:
                kind = "open" if there else "create"
            self.before(kind, full, _nothing)
            handle = int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
            if flags & _WRITING:
                there_too = kind == "open" and flags & os.O_TRUNC
                inode = os.fstat(handle).st_ino
                self.after(Call("truncate" if there_too else kind, full), inode)
            return handle

    def _os_write(self, handle: int, data: Any) -> int:
        return self._written("write", (handle, data), data)

    def _os_pwrite(self, handle: int, data: Any, offset: int) -> int:
        return self._written("pwrite", (handle, data, offset), data, offset)

    def _os_writev(self, handle: int, parts: Any) -> int:
        return self._written("writev", (handle, parts), b"".join(map(bytes, parts)))

    def _os_sendfile(self, to: int, source: int, offset: Any, count: int, *more: Any) -> int:
        return self._written("sendfile", (to, source, offset, count, *more), None)

    def _os_copy_file_range(self, source: int, to: int, count: int, *more: Any) -> int:
        return self._written("copy_file_range", (source, to, count, *more), None, handle=to)

    def _written(
        self,
        name: str,
        arguments: tuple[Any, ...],
        data: Any,
        offset: int | None = None,
        *,
        handle: int | None = None,
    ) -> int:
        handle = arguments[0] if handle is None else handle
        full = self._below(handle)
        if full is None:
            return int(self._real[name](*arguments))
        with self._lock:
            if data is not None:
                data = bytes(data)

            def half() -> None:
                if data is not None and offset is None:
                    self._real["write"](handle, data[: len(data) // 2])

            self.before("write", full, half)
            written = int(self._real[name](*arguments))
            begin = os.lseek(handle, 0, os.SEEK_CUR) - written if offset is None else offset
            if data is None:
                data = Path(full).read_bytes()[begin:]
            self.after(Call("write", full, "", 0, begin, data[:written]), os.fstat(handle).st_ino)
            return written

    def _os_ftruncate(self, handle: int, length: int) -> None:
        self._cut("ftruncate", handle, length)

    def _os_truncate(self, path: Any, length: int) -> None:
        self._cut("truncate", path, length)

    def _os_posix_fallocate(self, handle: int, offset: int, length: int) -> None:
        full = self._below(handle)
        with self._lock:
            self._real["posix_fallocate"](handle, offset, length)
            if full is not None:
                found = os.fstat(handle)
                self.after(Call("truncate", full, offset=found.st_size), found.st_ino)

    def _cut(self, name: str, file: Any, length: int) -> None:
        full = self._below(file)
        with self._lock:
            if full is not None:
                self.before("truncate", full, _nothing)
            self._real[name](file, length)
            if full is not None:
                self.after(Call("truncate", full, offset=length), os.stat(file).st_ino)

    def _os_fsync(self, handle: Any) -> None:
        self._flush("fsync", handle)

    def _os_fdatasync(self, handle: Any) -> None:
        self._flush("fdatasync", handle)

    def _flush(self, name: str, file: Any) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        full = self._below(handle)
        if full is None:
            self._real[name](handle)
            return
        with self._lock:
            self.before("flush", full, _nothing)
            found = os.fstat(handle)
            kind = "flush folder" if stat.S_ISDIR(found.st_mode) else "flush"
            self.after(Call(kind, full), found.st_ino)

    def _os_rename(self, old: Any, new: Any, **places: Any) -> None:
        self._rename("rename", old, new, places)

    def _os_replace(self, old: Any, new: Any, **places: Any) -> None:
        self._rename("replace", old, new, places)

    def _rename(self, name: str, old: Any, new: Any, places: dict[str, Any]) -> None:
        source = self._below(old, places.get("src_dir_fd"))
        target = self._below(new, places.get("dst_dir_fd"))
        self._changed(name, "rename", (old, new), places, source, to=target or "")

    def _os_link(self, old: Any, new: Any, **options: Any) -> None:
        target = self._below(new, options.get("dst_dir_fd"))
        self._changed("link", "link", (old, new), options, target)

    def _os_unlink(self, path: Any, **place: Any) -> None:
        self._changed("unlink", "unlink", (path,), place, self._below(path, place.get("dir_fd")))

    def _os_remove(self, path: Any, **place: Any) -> None:
        self._changed("remove", "unlink", (path,), place, self._below(path, place.get("dir_fd")))

    def _os_rmdir(self, path: Any, **place: Any) -> None:
        self._changed("rmdir", "rmdir", (path,), place, self._below(path, place.get("dir_fd")))

    def _os_mkdir(self, path: Any, mode: int = 0o777, **place: Any) -> None:
        full = self._below(path, place.get("dir_fd"))
        self._changed("mkdir", "mkdir", (path, mode), place, full)

    def _os_utime(self, path: Any, *times: Any, **options: Any) -> None:
        full = self._below(path, options.get("dir_fd"))
        self._changed("utime", "utime", (path, *times), options, full)

    def _changed(
        self,
        name: str,
        kind: str,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        full: str | None,
        *,
        to: str = "",
    ) -> None:
        if full is None:
            self._real[name](*arguments, **options)
            return
        with self._lock:
            self.before(kind, full, _nothing)
            self._real[name](*arguments, **options)
            gone = kind in ("unlink", "rmdir")
            inode = 0 if gone else os.lstat(to or full).st_ino
            self.after(Call(kind, full, to), inode)


def _nothing() -> None:
    """Do half of a call that has no halves."""


@dataclass(frozen=True)
class Recording:
    """What lay below a folder, and each call that changed it.

    `start` holds the number and the bytes of each file by its path, and None for a folder's bytes.
    """

    folder: str
    start: dict[str, tuple[int, bytes | None]]
    calls: list[Call]


class Recorder(Watch):
    """Writes down what is done below a folder, in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._nodes: dict[int, int] = {}
        self._start: dict[str, tuple[int, bytes | None]] = {}
        self._calls: list[Call] = []
        for path in [Path(self.folder), *sorted(Path(self.folder).rglob("*"))]:
            node = self._nodes.setdefault(path.lstat().st_ino, len(self._nodes))
            self._start[str(path)] = node, None if path.is_dir() else path.read_bytes()
        self._count = len(self._nodes)

    def after(self, call: Call, inode: int) -> None:
        """Write the call down; the system gives the number of a file that is gone to a new one."""
        if call.kind in ("create", "mkdir"):
            self._nodes[inode], self._count = self._count, self._count + 1
        node = self._nodes.get(inode, 0)
        self._calls.append(Call(call.kind, call.path, call.to, node, call.offset, call.data))

    @property
    def recording(self) -> Recording:
        """What has been recorded up to now."""
        return Recording(self.folder, self._start, list(self._calls))


@dataclass
class _Counted(Watch):
    """Does something at the call number `at` of some kinds, counted from 0; at None it counts."""

    root: Path
    at: int | None
    kinds: frozenset[str] = CHANGING
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__init__(self.root)

    def counted(self, kind: str) -> int:
        """Return the number of this call, -1 for one of another kind."""
        if kind not in self.kinds:
            return -1
        self.count += 1
        return self.count - 1


@dataclass
class Killer(_Counted):
    """Ends, or stops, its own process before, within or after a call."""

    where: str = "before"
    signal: signal.Signals = signal.SIGKILL
    _last: int = field(default=-1, init=False)

    def before(self, kind: str, path: str, half: Callable[[], object]) -> None:
        """Send the signal, after half of a write if asked."""
        self._last = self.counted(kind)
        if self._last == self.at and self.where != "after":
            if self.where == "within":
                half()
            os.kill(os.getpid(), self.signal)

    def after(self, call: Call, inode: int) -> None:
        """Send the signal."""
        if self._last == self.at and self.where == "after":
            os.kill(os.getpid(), self.signal)


class PublicationKiller(Watch):
    """Kills its own process when a file is about to take the name `place`."""

    def __init__(self, root: Path, place: str) -> None:
        super().__init__(root)
        self._place = os.path.realpath(place)

    def before(self, kind: str, path: str, half: Callable[[], object]) -> None:
        """Send the signal before a rename: temporary names begin with that of the place."""
        if kind == "rename" and path.startswith(self._place):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Refuser(_Counted):
    """Lets a call, or all from one on, fail as the system does."""

    code: int = errno.EIO
    for_good: bool = False
    refused: list[str] = field(default_factory=list, init=False)

    def before(self, kind: str, path: str, half: Callable[[], object]) -> None:
        """Raise what the system would; writes and flushes do not say which file they were about."""
        number = self.counted(kind)
        if number == self.at or (self.for_good and number > (self.at or 0)):
            self.refused.append(f"{kind} {path}")
            half()
            error = OSError(self.code, os.strerror(self.code))
            if kind not in ("write", "flush", "truncate"):
                error.filename = path
            raise error


REFUSED = {errno.EMFILE: OPENING, errno.ENOSPC: GROWING, errno.EIO: CHANGING}
"""Which calls fail with which error."""


@contextmanager
def no_flushes() -> Iterator[None]:
    """Let flushes take no time, where only what is seen by processes matters."""
    real = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = lambda fd: None
    try:
        yield
    finally:
        os.fsync, os.fdatasync = real
