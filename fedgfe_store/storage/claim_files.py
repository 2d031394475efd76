"""Files by which processes claim something where a lock is refused, or granted to everyone.

A claim is a file that is made exclusively. Its owner touches it while it lives; what has not been
touched for a minute, by the clock of its file system, as hosts' clocks differ, may be taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue

from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.files import flushed, open_regular, read_regular

RENEWAL_SECONDS = 10.0
"""How often a living owner touches its claim."""
TAKEOVER_SECONDS = 60.0
"""Age at which a claim may be taken over: several renewals may be late on a busy network disk.
NFS itself trusts what it knows of a file for up to a minute (``acregmax`` in nfs(5))."""

_LONGEST = 2**16
"""Bytes of a claim, at most: one of ours has a few hundred, and a received store may hold any."""

held: set[str] = set()
"""Tokens of the claims that this process holds."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, as it stands in its file."""

    token: str
    pid: int
    started: float
    machine: str
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @classmethod
    def this(cls) -> Owner:
        """Return this process, under a new token."""
        since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        pid = os.getpid()
        started = started_at(pid)
        begun = -1.0 if started is None else started
        return cls(uuid.uuid4().hex, pid, begun, machine(), socket.gethostname(), since)

    @classmethod
    def of(cls, file: Path) -> Owner | None:
        """Return the owner named in the claim `file`; None where it is gone or names none."""
        try:
            return cls(**json.loads(read_regular(file, _LONGEST)))
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None

    @property
    def dead(self) -> bool:
        """Whether it is certain that nothing of it is at work any more."""
        # Of another machine nothing is certain: a minute of silence has to do.
        if self.machine != machine():
            return False
        # A claim that this process was interrupted in the middle of making, or has given up.
        if self.pid == os.getpid():
            return self.token not in held
        # The system counts a process's start in ticks since a boot time that it may correct.
        started = started_at(self.pid)
        return is_gone(self.pid) if started is None else abs(started - self.started) > 2


def started_at(pid: int) -> float | None:
    """Return when `pid` was started, seconds since 1970; -1 where it has ended, None unseen."""
    import psutil

    # A number that was given to another process since is told by the time of its start; one that
    # ended and that its parent has not asked for is none that works.
    try:
        process = psutil.Process(pid)
        return -1.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def is_gone(pid: int) -> bool:
    """Whether no process of this machine has the number `pid`."""
    # Not psutil, which also asks /proc: with hidepid that shows no processes of other users.
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no number of a process, as in a stranger's name
        return True
    except PermissionError:  # it runs, as another user's
        pass
    return False


@cache
def machine() -> str:
    """Return what is the same for two processes only if each sees whether the other lives."""
    # A boot begins to count processes anew, and a container counts its own; names of hosts repeat.
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux, where a host's name has to do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


# A child may be the first process of another namespace.
os.register_at_fork(after_in_child=machine.cache_clear)


def make(target: Path, data: bytes) -> bool:
    """Make the file `target` with `data` in it; False where it is there already."""
    made = False
    try:
        with flushed(target) as file:
            made = True
            file.write(data)
    except FileExistsError:
        return False
    except BaseException:
        if made:  # it is this process's: half a claim would keep others waiting
            target.unlink(missing_ok=True)
        raise
    return True


def renew(stop: SimpleQueue[None], held: Callable[[], Iterable[Path]]) -> None:
    """Touch the claims that are `held`, again and again, until something is put into `stop`."""
    while True:
        try:
            return stop.get(timeout=RENEWAL_SECONDS)
        except Empty:
            for file in held():
                # Given back meanwhile, or taken over, which its owner sees when it looks next; or
                # the disk fails, and the next renewal tries again.
                with contextlib.suppress(OSError):
                    os.utime(file)


def now(probe: Path) -> float:
    """Return the time by the clock of the file system on which `probe` lies; touches it."""
    os.utime(probe)
    return probe.stat().st_mtime


def touched(file: Path) -> float:
    """Return when the claim `file` was touched, by the clock of its file system.

    Raises
    ------
    FileNotFoundError
        If it is gone.
    DamagedDataError
        If it is no ordinary file.
    """
    try:
        # Opened first: network disks keep what they know of a file that no one opens.
        handle, _ = open_regular(file)
    except UnreadableError as error:
        raise DamagedDataError(f"{file}: {error}, and names no writer: remove it") from error
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def may_be_taken_over(age: float) -> bool:
    """Whether a claim that was touched `age` seconds ago is one of a dead process."""
    # One from the future was copied, or the clock was set back: no one touches it either.
    return abs(age) > TAKEOVER_SECONDS
