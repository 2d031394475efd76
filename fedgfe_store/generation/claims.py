"""Claims: which process is at work on which image of a folder."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from fedgfe_store.errors import ConflictError
from fedgfe_store.generation.claim_files import ClaimFiles
from fedgfe_store.storage.claim_files import TAKEOVER_SECONDS
from fedgfe_store.storage.files import NOT_THROUGH_LINKS
from fedgfe_store.storage.lock import HELD, NOT_OFFERED

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CLAIMS_NAME = ".fedgfe-claims"

# The system counts bytes in 63 bits. The one behind all that names can have tries out whether
# there are locks.
_OFFSETS = 2**62
# Where a name's offset would stand, if a file is its claim.
_IN_A_FILE = -1
# Seconds. A living owner renews its claim every ten, see `RENEWAL_SECONDS`: so little more is not
# felt, and a stop is noticed at once.
_LOOKS_EVERY = 0.5
# Files that this process has open; see `Claims` for why no file may be twice.
_open: set[tuple[int, int, int]] = set()
_opening = threading.Lock()


class Claims:
    """Exclusive claims on names, between threads, processes and machines.

    A claim is a lock on one byte of the empty file ``.fedgfe-claims``, which stays in the folder
    for good: to remove it while somebody works would split the claims in two. The kernel gives
    the locks of a process back when it ends, however it ends, so none is ever stale.

    Where the file system refuses locks, a claim is a file, see `ClaimFiles`: then what a process
    of another machine held when it was killed is free a minute later.

    After `take` look at the image again, since another process may have finished it before.

    Parameters
    ----------
    folder : Path
        An existing folder.
    report : callable
        Hears of it, once, if there are no locks.
    ended : callable
        Whether to wait for others no longer.

    Raises
    ------
    ConflictError
        If this process has claims open on the folder already: closing the file anywhere in a
        process gives back all locks that the process has on it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        report: Callable[[str], object] = lambda line: None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        path = folder / CLAIMS_NAME
        with _opening:
            if path.exists() and _identity(os.stat(path)) in _open:
                raise ConflictError(f"{folder}: claims are open in this process already")
            # It is opened for writing, as locks need it, and touched: a link may lead anywhere.
            if path.is_symlink():
                raise ConflictError(f"{path}: expected a file, got a link; remove it")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | NOT_THROUGH_LINKS, 0o666)
            self._identity = _identity(os.fstat(self._file))
            _open.add(self._identity)
        self._lock = threading.Lock()
        self._taken: dict[str, int] = {}
        self._locked: Counter[int] = Counter()
        self._folder, self._report, self._ended = folder, report, ended
        self._files: ClaimFiles | None = None
        self._waiting = False
        try:
            if fcntl is None:
                self._go_on_with_files("this system has none")
            elif self._lock_byte(_OFFSETS):
                self._unlock_byte(_OFFSETS)
        except BaseException:
            self.close()
            raise

    def take(self, name: str, *, wait: bool = False) -> bool:
        """Claim a name.

        Parameters
        ----------
        name : str
            File name of an image.
        wait : bool
            Where files take the place of locks: if it is another's, wait until that process
            has shown that it is alive, or been silent for too long.

        Returns
        -------
        bool
            False if anybody has it: another process, or a thread of this one.
        """
        while True:
            with self._lock:
                if self._take(name):
                    return True
                if not wait or self._files is None or not self._files.is_silent(name):
                    return False
                if not self._waiting:
                    self._waiting = True
                    self._files.ask()
                    self._report(
                        f"waiting up to {TAKEOVER_SECONDS:.0f} s to learn whether the processes "
                        f"live that have claimed images in {self._folder}"
                    )
            # Without the lock, which other threads need to give names back.
            if self._ended():
                return False
            time.sleep(_LOOKS_EVERY)

    def _take(self, name: str) -> bool:
        if name in self._taken:
            return False
        offset = _offset(name)
        # Another name of ours may share the byte, and a process never excludes itself.
        locked = self._locked[offset] > 0 or (self._files is None and self._lock_byte(offset))
        if self._files is not None:
            if not self._files.take(name):
                return False
            offset = _IN_A_FILE
        elif not locked:
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
            if offset == _IN_A_FILE and self._files is not None:
                self._files.release(name)
            self._locked[offset] -= 1
            if not self._locked[offset]:
                del self._locked[offset]
                self._unlock_byte(offset)

    def _lock_byte(self, offset: int) -> bool:
        """Lock a byte; False if another process has it, or there are no locks."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError as error:
            if error.errno in NOT_OFFERED:
                self._go_on_with_files(os.strerror(error.errno))
            elif error.errno not in HELD:
                raise
            return False
        return True

    def _unlock_byte(self, offset: int) -> None:
        if offset != _IN_A_FILE and self._files is None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, offset)

    def _go_on_with_files(self, reason: str) -> None:
        self._report(
            f"no file locks in {self._folder} ({reason}): images are claimed by files instead"
        )
        self._files = ClaimFiles(self._folder, self._folder / CLAIMS_NAME)

    def close(self) -> None:
        """Give all names back."""
        try:
            if self._files is not None:
                self._files.close()
        finally:
            # Nobody may open it in between: this close would give back the new one's locks.
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
