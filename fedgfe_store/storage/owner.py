"""Who holds a claim, and whether it is certain that nothing of it is at work any more."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from fedgfe_store.storage.files import read_regular

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
        return cls(uuid.uuid4().hex, pid, started_at(pid), machine(), socket.gethostname(), since)

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
        if self.machine != machine():
            return False
        if self.pid == os.getpid():
            return self.token not in held
        # The system counts a process's start in ticks since a boot time that it may correct.
        return abs(started_at(self.pid) - self.started) > 2


def started_at(pid: int) -> float:
    """Return when the process `pid` was started, seconds since 1970; -1 where none runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        return -1.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return -1.0


@cache
def machine() -> str:
    """Return what is the same for two processes only if each sees whether the other lives."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux, where a host's name has to do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


os.register_at_fork(after_in_child=machine.cache_clear)
