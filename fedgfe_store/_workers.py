"""Threads that encode and decode: blosc, zstd, xxh3 and the disk all work without the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

    Of several errors the first in order is raised, and not before all that was begun has ended.
    """
    work: list[Future[T]] = []
    try:
        for each in arguments:
            work.append(pool.submit(function, *each))
        return [future.result() for future in work]
    finally:
        for future in work:
            future.cancel()
        wait(work)


def _forget() -> None:
    readers.cache_clear()
    writers.cache_clear()


# Threads do not survive a fork: the child makes its own.
os.register_at_fork(after_in_child=_forget)
