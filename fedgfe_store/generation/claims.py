"""Claims: which process is at work on which image of a folder."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from fedgfe_store.errors import ConflictError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CLAIMS_NAME = ".fedgfe-claims"

_OFFSETS = 2**62
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_open: set[tuple[int, int, int]] = set()
_opening = threading.Lock()


class Claims:
    """Exclusive claims on names, between threads, processes and machines.

    A claim is a lock on one byte of the empty file ``.fedgfe-claims``, which stays in the folder
    for good: to remove it while somebody works would split the claims in two. The kernel gives
    the locks of a process back when it ends, however it ends, so none is ever stale.

    After `take` look at the image again, since another process may have finished it before.

    Parameters
    ----------
    folder : Path
        An existing folder.

    Raises
    ------
    ConflictError
        If this process has claims open on the folder already: closing the file anywhere in a
        process gives back all locks that the process has on it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / CLAIMS_NAME
        with _opening:
            if path.exists() and _identity(os.stat(path)) in _open:
                raise ConflictError(f"{folder}: claims are open in this process already")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._identity = _identity(os.fstat(self._file))
            _open.add(self._identity)
        self._lock = threading.Lock()
        self._taken: dict[str, int] = {}
        self._locked: Counter[int] = Counter()
        self._supported = fcntl is not None
        if self._lock_byte(_OFFSETS):
            self._unlock_byte(_OFFSETS)

    @property
    def supported(self) -> bool:
        """Whether file system and operating system have such locks.

        Where they have none, every name that this process has not taken may be taken.
        """
        return self._supported

    def take(self, name: str) -> bool:
        """Claim a name, without waiting.

        Parameters
        ----------
        name : str
            File name of an image.

        Returns
        -------
        bool
            False if anybody has it: another process, or a thread of this one.
        """
        offset = _offset(name)
        with self._lock:
            if name in self._taken:
                return False
            # Another name of ours may share the byte, and a process never excludes itself.
            if not self._locked[offset] and not self._lock_byte(offset):
                return False
            self._taken[name] = offset
            self._locked[offset] += 1
            return True

    def release(self, name: str) -> None:
        """Give a name back.

        Raises
        ------
        KeyError
            If it is not taken.
        """
        with self._lock:
            offset = self._taken.pop(name)
            self._locked[offset] -= 1
            if not self._locked[offset]:
                del self._locked[offset]
                self._unlock_byte(offset)

    def _lock_byte(self, offset: int) -> bool:
        if not self._supported:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            self._supported = False
        return True

    def _unlock_byte(self, offset: int) -> None:
        if self._supported:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, offset)

    def close(self) -> None:
        """Give all names back."""
        with _opening:
            os.close(self._file)
            _open.discard(self._identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _offset(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) % _OFFSETS


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    """Tell one file in one process; a forked child inherits no locks, so it may open its own."""
    return os.getpid(), found.st_dev, found.st_ino
