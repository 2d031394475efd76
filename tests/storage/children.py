"""Child processes that do one thing and say what came of it."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

_FAILED = 70


class Child:
    """A forked process that calls `function` and hands over what it returns.

    Attributes
    ----------
    killed : bool
        After `result`: whether a signal ended it.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.killed = False
        self._reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reading)
            _answer(function, writing)
        os.close(writing)

    def result(self) -> Any:
        """Wait for the end of the child and return what it returned; None if it was killed."""
        with os.fdopen(self._reading, "rb") as answers:
            said = answers.read()
        _, status = os.waitpid(self.pid, 0)
        self.killed = os.WIFSIGNALED(status)
        if self.killed:
            return None
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError("the child failed; its traceback is on standard error")
        return pickle.loads(said)

    def ended(self) -> bool:
        """Whether the child has ended; it still waits for `result`."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is not None

    def pause(self) -> None:
        """Stop the child until `go_on`."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let the child go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill the child."""
        os.kill(self.pid, signal.SIGKILL)


def _answer(function: Callable[[], Any], writing: int) -> None:
    code = _FAILED
    try:
        with os.fdopen(writing, "wb") as answer:
            pickle.dump(function(), answer)
        code = 0
    except BaseException:  # noqa: BLE001 - the parent says that it failed
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(function: Callable[[], Any]) -> Any:
    """Call `function` in a child process and return what it returns; None if it was killed."""
    return Child(function).result()
