"""The lock of a store: one writer at a time, and a note on who it is."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from fedgfe_store.common import threads
from fedgfe_store.errors import BusyError
from fedgfe_store.storage import files

T = TypeVar("T")

_PATIENCE = 1.0
"""Seconds of waiting for another writer that go without saying."""
# flock and lockf wait for ever or not at all, and what waits for ever cannot be given up.
_PAUSE = 0.05
"""Seconds between two tries."""
NOT_OFFERED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What a system answers that has no locks: none of this kind, no room for one, or none here."""
HELD = {errno.EACCES, errno.EAGAIN}
"""What it answers where another process holds the lock; POSIX allows either."""

_log = logging.getLogger("fedgfe_store")
_without: set[Path] = set()
"""Locks that the system did not offer, which has been said."""


class WriterLock:
    """The lock of a store: one writer at a time, over threads and processes.

    A dead process's lock is free at once. Beside the lock lies a note on who holds it. On a disk
    without locks, or where they are granted to everyone, the claim on a commit (`Claim`) keeps
    writers apart.

    Parameters
    ----------
    path : Path
        The store; two names of one folder share one lock.
    timeout : float
        Seconds to wait for another writer.

    Raises
    ------
    BusyError
        If another writer still holds it then; says which process, where and since when.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        real = path.resolve()
        self._file = real.with_name(f".{real.name}.lock")
        self._ranges = _RangeLock(real.with_name(f".{real.name}.lockf"))
        self._lock = _in_another_thread(self._made)
        self._note = real.with_name(f".{real.name}.writer")
        try:
            self._wait(path, timeout)
            self._put_note()
        except BaseException:
            self._give_back()
            raise

    def _wait(self, path: Path, timeout: float) -> None:
        started = time.monotonic()
        if self._acquired(min(timeout, _PATIENCE)):
            return
        if timeout > _PATIENCE:
            _log.warning("%s: waiting up to %g s for %s", path, timeout, self._holder())
        if not self._acquired(max(0, timeout - (time.monotonic() - started))):
            raise BusyError(
                f"{path} is being written by {self._holder()}: gave up after {timeout:g} s"
            )

    def _acquired(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not self._try():
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_PAUSE, left))
        return True

    def _made(self) -> FileLock:
        # A lock that is no lock but a file which a dead writer leaves behind would never be free.
        return FileLock(
            self._file, thread_local=False, fallback_to_soft=False, on_acquired=self._ranges.lock
        )

    def _try(self) -> bool:
        """Take the lock if it is free."""
        try:
            _in_another_thread(partial(self._lock.acquire, timeout=0))
        except (Timeout, _HeldElsewhereError):
            return False
        except NotImplementedError:
            self._do_without("the system offers none")
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                error.filename = error.filename or str(self._file)
                raise
            self._do_without(os.strerror(error.errno))
        return True

    def _do_without(self, reason: str) -> None:
        if self._file in _without:
            return
        _without.add(self._file)
        _log.warning(
            "%s: no lock on this file system (%s): claims on each commit keep writers apart, more "
            "slowly; mount it with locks (NFS: lockd; Lustre: -o flock) if several write at once",
            self._file,
            reason,
        )

    def _put_note(self) -> None:
        # Under another name first, so that nothing is written through a link that lies there.
        with files.placing(self._note) as temporary, files.naming(self._note):
            temporary.write_text(_signature(), encoding="utf-8")

    def _holder(self) -> str:
        try:
            return self._note.read_text(encoding="utf-8", errors="replace") or "another writer"
        except OSError:
            return "another writer"

    def release(self) -> None:
        """Let the next writer in."""
        try:
            self._note.unlink(missing_ok=True)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        try:
            _in_another_thread(self._unlock)
        finally:  # where that was interrupted before it began
            if self._lock.is_locked:
                _in_another_thread(self._unlock)

    def _unlock(self) -> None:
        try:
            self._ranges.release()
        finally:
            self._lock.release()


def _in_another_thread(call: Callable[[], T]) -> T:
    """Return what `call` does, in a thread that is never interrupted.

    An interruption within `FileLock`'s own locks would let every later one wait for ever.
    """
    return threads.run(threads.writers(), call, [()])[0]


class _HeldElsewhereError(Exception):
    """One kind of lock was granted, the other is held by another host."""


class _RangeLock:
    """The other kind of lock, `lockf`: of some network disks only one crosses hosts.

    On a file of its own: NFS, Lustre and BSD let the two kinds exclude each other, also for one
    process. Only who has the first kind opens it, as closing any handle of it drops the lock.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None

    def lock(self, _: int) -> None:
        """Take it, or raise `_HeldElsewhereError`; where the system offers none, do without."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | files.NOT_THROUGH_LINKS
        self._handle = os.open(self._file, flags, 0o666)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NOT_OFFERED:
                return
            self.release()
            if error.errno in HELD:
                raise _HeldElsewhereError from error
            raise

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    __del__ = release


def _signature() -> str:
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"
