"""Ctrl-C at each step of some code, one after another: no luck and no timing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fedgfe_store

PACKAGE = str(Path(fedgfe_store.__file__).parent)
THREADING = (
    "threading.py",
    "queue.py",
    "concurrent/futures/thread.py",
    "concurrent/futures/_base.py",
)
"""Python's own code that takes locks and is interrupted, too."""


class Strike:
    """Raises KeyboardInterrupt before one of the steps that this thread makes in some files.

    Parameters
    ----------
    files : str or tuple of str
        How their names end, for those of the package; Python's own of threads are added.
    step : int
        Which step; a step is what one instruction of Python's virtual machine does.
    """

    def __init__(self, files: str | tuple[str, ...], step: int) -> None:
        self.place = ""
        self._files, self._step = files, step

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        ours = name.startswith(PACKAGE) and name.endswith(self._files)
        if not (ours or name.endswith(THREADING)):
            return None
        frame.f_trace_opcodes = True
        return self._within

    def _within(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            self._step -= 1
            if not self._step:
                self.place = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self._within


def strikes(
    call: Callable[[], object], files: str | tuple[str, ...], *, every: int = 1
) -> Iterator[str]:
    """Interrupt `call` at its first step in `files`, call it again, interrupt its second, ...

    Yields
    ------
    str
        Where it was interrupted; nothing but the interruption was raised. The last call, which
        this is too few steps for, ends by itself.
    """
    step, before = 1, sys.gettrace()
    while True:
        strike = Strike(files, step)
        sys.settrace(strike)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if not strike.place:
            return
        yield strike.place
        step += every
