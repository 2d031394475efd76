"""Threads that encode and decode tensors: blosc, xxh3 and the disk work without the GIL."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

_MOST = 8
"""Threads beyond which memory, not the processor, is the bound."""


def count() -> int:
    """Return the processors that this process may use, up to a sensible number."""
    affinity = getattr(os, "sched_getaffinity", None)
    available = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(available, _MOST)


@cache
def readers() -> ThreadPoolExecutor:
    """Return the pool that decodes for every reader of this process."""
    return ThreadPoolExecutor(count(), thread_name_prefix="fedgfe-store-read")


@cache
def writers() -> ThreadPoolExecutor:
    """Return the pool that writes for every writer of this process."""
    # More than processors: a thread that waits for the disk leaves its processor to another.
    return ThreadPoolExecutor(2 * count() + 2, thread_name_prefix="fedgfe-store-write")


def run(
    pool: ThreadPoolExecutor, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]
) -> list[T]:
    """Call `function` with each of `arguments` in `pool` and return the results in order.

    Of several errors the first in order is raised. No call is under way, or begins, when this has
    returned or raised, also where it was interrupted: what follows may undo what the calls did.
    """
    gate = _Gate()
    results: list[T] = []
    # Few at a time: a small read does not wait for all of a large one.
    waiting: deque[Future[T]] = deque()
    try:
        for each in arguments:
            if len(waiting) == 4 * count():
                results.append(waiting.popleft().result())
            waiting.append(pool.submit(gate.call, function, *each))
        while waiting:
            results.append(waiting.popleft().result())
    finally:
        gate.close()
    return results


class _Gate:
    """Counts calls that are under way, and lets none begin once it is closed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._closed = 0, False

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function`, unless the gate is closed."""
        with self._changed:
            if self._closed:
                raise CancelledError
            self._running += 1
        try:
            return function(*arguments)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Close the gate and wait for the calls under way; an interruption is raised after that."""
        interruption: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    self._closed = True
                    self._changed.wait_for(lambda: not self._running)
                break
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is not None:
            raise interruption


def _forget() -> None:
    readers.cache_clear()
    writers.cache_clear()


# Threads do not survive a fork: the child makes its own.
os.register_at_fork(after_in_child=_forget)
