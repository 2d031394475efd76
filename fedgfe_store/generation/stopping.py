"""Stopping a run when the system asks for it, so that nothing finished is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

# torchrun and srun hand a signal on to processes that the terminal or the scheduler, which signal a
# whole group, have reached already: what follows so soon is the same request.
_ECHO_SECONDS = 0.5

# One denoising step, and decoding and writing what is denoised, have to fit. By sbatch's manual the
# signal may also come up to 60 seconds earlier than it is asked for.
SIGNAL_LEAD = 120
"""Seconds before its time limit at which the printed SLURM script has a run stopped."""

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Preemption, Ctrl-C, and the warning that SLURM sends before the time limit."""


class Stopped(BaseException):
    """A run was asked to stop; like `KeyboardInterrupt`, nobody takes it for a fault."""


class Stop:
    """A request to stop, and whether it may interrupt what is being done.

    A run looks at it after each denoising step and finishes what is denoised. Where there is
    nothing to finish, as while weights are loaded, the request itself interrupts.

    Parameters
    ----------
    deadline : float, optional
        When a stop is to be expected, in seconds since 1970.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.reason: str | None = None
        self._interrupts = False
        self._deadline = deadline

    @property
    def seconds_left(self) -> float | None:
        """Seconds until a stop is to be expected; None where that is not known."""
        return None if self._deadline is None else max(0.0, self._deadline - time.time())

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for a stop; `reason` is the name of the signal."""
        self.reason = reason
        # A signal's handler calls this, so it comes out of whatever the main thread is doing: where
        # images are under way that would lose them, and `check` between two steps asks instead.
        if self._interrupts:
            raise Stopped(reason)

    def check(self) -> None:
        """Raise `Stopped` if a stop was asked for."""
        if self.reason is not None:
            raise Stopped(self.reason)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request, or one that came before, interrupt the block by `Stopped`."""
        self._interrupts = True
        try:
            self.check()
            yield
        finally:
            self._interrupts = False


def expected_stop(environ: Mapping[str, str]) -> float | None:
    """Tell when SLURM will ask for a stop.

    Parameters
    ----------
    environ : mapping
        Such as `os.environ`; SLURM_JOB_END_TIME counts.

    Returns
    -------
    float or None
        Seconds since 1970; None where the environment does not say.
    """
    end = environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - SIGNAL_LEAD if end.isascii() and end.isdecimal() else None


@contextmanager
def stop_on_signals(stop: Stop, *, announce: Callable[[str], object]) -> Iterator[None]:
    """Turn signals into a request to stop; a second one ends the process at once.

    Parameters
    ----------
    stop : Stop
        Gets the request.
    announce : callable
        Gets the name of the first signal.

    Notes
    -----
    Python runs signal handlers in the main thread only; elsewhere this changes nothing.
    """
    # `signal.signal` raises ValueError elsewhere.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not stop.requested:
            first = time.monotonic()
        elif time.monotonic() - first > _ECHO_SECONDS:
            # Not `sys.exit`, which waits for the writer's threads: whoever asks twice means now.
            # An image is renamed into place, so none is cut; 128 + number is what shells say.
            os._exit(128 + number)
        else:  # a launcher hands on what has reached its processes already
            return
        name = signal.Signals(number).name
        # Nobody may be there to hear it, or the signal may have come while a line was printed.
        with suppress(OSError, RuntimeError):
            announce(name)
        stop.request(name)

    # Windows has no SIGUSR1.
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
