"""What a test starts beside itself, processes and threads: none outlives it, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

HANG = 600.0
"""Seconds after which something counts as hung. The slowest child takes one minute where nothing
else runs; what is bounded by less fails where a machine is busy."""
_LAST_WORDS = 3.0


class Process(subprocess.Popen[str]):
    """A process that is spoken to line by line."""

    hung = False

    def line(self) -> str:
        """Wait for the next line that it prints; empty if it has ended."""
        assert self.stdout is not None
        return self.stdout.readline().removesuffix("\n")

    def lines(self) -> list[str]:
        """Wait for all further lines, until it has ended."""
        assert self.stdout is not None
        return self.stdout.read().splitlines()

    def tell(self, line: str = "") -> None:
        """Write a line that it reads."""
        assert self.stdin is not None
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def family(self) -> list[psutil.Process]:
        """Find the process and its descendants, those in sessions of their own too."""
        if self.poll() is not None:
            return []
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self, family: Sequence[psutil.Process]) -> None:
        """Kill its process group, which may outlive it, and `family`."""
        self.signal_group(signal.SIGKILL)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to all of its process group that is left."""
        # macOS denies what only zombies would get.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def end_as_hung(self) -> None:
        """Kill it so that readers of its pipes go on; Python says first what its threads do."""
        self.hung = True
        family = self.family()
        self.signal_group(signal.SIGABRT)
        time.sleep(_LAST_WORDS)
        if self.poll() is None:
            self.end(family)
        for each in family[1:]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@contextmanager
def started(
    command: Sequence[str | Path],
    *,
    seconds: float = HANG,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Process]:
    """Start a process in a group of its own; at the end of the block all of the group is killed.

    Parameters
    ----------
    command : sequence of str or Path
        The program and its arguments.
    seconds : float
        After which it counts as hung and is killed, so that whatever waits for it goes on.
    env : dict, optional
        Its environment.
    **options
        Of `subprocess.Popen`; its input and output are pipes unless said otherwise.

    Raises
    ------
    TimeoutError
        If it hung.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    given = {**pipes, **options, "start_new_session": True, "env": environment}
    with Process([os.fspath(word) for word in command], **given) as process:
        alarm = threading.Timer(seconds, process.end_as_hung)
        alarm.daemon = True
        alarm.start()
        try:
            yield process
        finally:
            alarm.cancel()
            process.end(process.family())
            if process.hung:
                raise TimeoutError(f"had not ended after {seconds:.0f} s: {process.args!r}")


def finished(
    command: Sequence[str | Path],
    *,
    input: str | None = None,
    check: bool = True,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end and return what it printed.

    Parameters
    ----------
    command : sequence of str or Path
        The program and its arguments.
    input : str, optional
        What it reads; by default nothing is there.
    check : bool
        Whether it has to succeed.
    **options
        Of `started`.

    Raises
    ------
    subprocess.CalledProcessError
        If it failed.
    TimeoutError
        If it hung.

    Notes
    -----
    What it prints on standard error is printed there too, for whoever looks at a failed test.
    """
    reads = subprocess.DEVNULL if input is None else subprocess.PIPE
    with started(command, **{"stdin": reads, "stderr": subprocess.PIPE, **options}) as process:
        out, said = process.communicate(input)
        sys.stderr.write(said)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, said)
    if check:
        done.check_returncode()
    return done


@contextmanager
def meanwhile(*calls: Callable[[], object]) -> Iterator[None]:
    """Make each of `calls` in a thread while the block runs; what one raises is raised at its end.

    Raises
    ------
    TimeoutError
        If one hung.
    """
    errors: list[BaseException] = []

    def make(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=make, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(HANG)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"a thread had not ended after {HANG:.0f} s")


def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds.

    Raises
    ------
    TimeoutError
        If it never does.
    """
    end = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"did not hold after {HANG:.0f} s")
        time.sleep(0.01)
