"""Threads that encode and decode tensors: blosc, xxh3 and the disk work without the GIL.

A Ctrl-C is raised between any two steps of the main thread, also inside the standard library's own
Python code: within `threading.Condition`, on which `queue.Queue` and `concurrent.futures` stand, it
leaves a lock locked for ever, or has one released twice. So the main thread takes no lock here. It
hands work over, and waits for it, by `queue.SimpleQueue`, whose calls take place whole or not at
all; everything else is done by the threads, which are never interrupted.
"""

from __future__ import annotations

import _thread
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MOST = 8
"""Threads beyond which memory, not the processor, is the bound."""
# S3 answers a small request after 10 to 100 ms, whatever the processors do meanwhile.
_REQUESTS = 16
"""Threads that ask servers; each may hold a few files' parts in memory."""


def count() -> int:
    """Return the processors that this process may use, up to a sensible number."""
    affinity = getattr(os, "sched_getaffinity", None)
    available = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(available, _MOST)


_own = threading.local()
"""In a thread of a pool, `pool` is that."""


@cache
def readers() -> Pool:
    """Return the pool that decodes for every reader of this process."""
    return Pool(count(), "fedgfe-store-read")


@cache
def writers() -> Pool:
    """Return the pool that writes for every writer of this process."""
    # More than processors: a thread that waits for the disk leaves its processor to another.
    return Pool(2 * count() + 2, "fedgfe-store-write")


@cache
def fetchers() -> Pool:
    """Return the pool that waits for servers, for every reader of this process."""
    return Pool(_REQUESTS, "fedgfe-store-fetch")


def run(pool: Pool, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    """Call `function` with each of `arguments` in `pool` and return the results in order.

    Of several errors the first in order is raised. No call is under way, or begins, when this has
    returned or raised, also where it was interrupted: what follows may undo what the calls did.
    `arguments` are drawn in the pool's threads, one at a time and as they are needed. Where no
    thread can begin, as when the interpreter ends, this one makes the calls; and so does one of the
    pool's own, since where all of them waited for others none would be left.
    """
    if getattr(_own, "pool", None) is pool or not pool.begin():
        return [function(*each) for each in arguments]
    task = _Task(pool, function, arguments)
    try:
        try:
            pool.tasks.put(task)
            task.ended.get()
        finally:
            task.settle()
    finally:  # where the first `settle` was interrupted before it could begin to wait
        task.settle()
    return task.outcome()


class Thread:
    """A function that is called once, in a thread of its own.

    What `threading.Thread` lacks: `start` and `join` may be interrupted anywhere, and called again.

    Parameters
    ----------
    function : callable
        Called without arguments; must not raise.
    name : str
        Name of the thread.
    """

    def __init__(self, function: Callable[[], object], name: str) -> None:
        self._name = name
        self._process = os.getpid()
        self._ticket: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._ticket.put(function)
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._coming = self._done = False

    @property
    def process(self) -> int | None:
        """The process that the thread is of, if this one was forked from it; threads stay there."""
        return None if self._process == os.getpid() else self._process

    def start(self) -> None:
        """Let the function be called, unless it is or was already."""
        if not self._ticket.empty():
            try:
                _thread.start_new_thread(self._begin, ())
            except RuntimeError:  # there cannot be another thread: the one before will do
                if not self._coming:
                    raise
            self._coming = True

    def join(self) -> None:
        """Wait until the function has returned; it is called if `start` was interrupted."""
        while not self._done and self.process is None:
            self.start()
            self._ended.get()

    def _begin(self) -> None:
        """Become a thread with a name, or at least go on without one."""
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:  # there cannot be another thread
            self._run()

    def _run(self) -> None:
        try:
            function = self._ticket.get_nowait()
        except Empty:
            return
        try:
            function()
        finally:
            self._done = True
            self._ended.put(None)


class Line:
    """Calls that are made one after another, in a thread that begins with the first.

    Every method may be interrupted anywhere, and called again.

    Parameters
    ----------
    name : str
        Name of the thread.
    owner : object
        Where nobody holds it any more, the thread ends after the calls that are there.
    """

    def __init__(self, name: str, owner: object) -> None:
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        # The queue's own method: an interruption in Python code that is called back would be lost.
        self._owner = weakref.ref(owner, self._calls.put)
        self._thread = Thread(self._work, name)
        self._begun = False

    def submit(self, call: Callable[[], object]) -> None:
        """Make `call`, which must not raise, after those that came before."""
        self._begun = True
        self._calls.put(call)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all calls that were submitted before this have been made."""
        if not self._begun:
            return
        reached: SimpleQueue[None] = SimpleQueue()
        self.submit(lambda: reached.put(None))
        reached.get()

    def close(self) -> None:
        """Make the calls that are there, and end the thread; later ones need another `close`."""
        if not self._begun:
            return
        self._calls.put(None)
        self._thread.join()
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            if call is not None:
                call()

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is None or call is self._owner:
                return
            call()
            del call


class Pool:
    """Up to `size` threads that make the calls of `run`, and live as long as the process."""

    def __init__(self, size: int, name: str = "fedgfe-store") -> None:
        self.tasks: SimpleQueue[_Task[Any]] = SimpleQueue()
        self._size, self._name = size, name
        self._lock = threading.Lock()
        self._threads = self._idle = 0

    def begin(self) -> bool:
        """See to it that there is a thread, or say that there cannot be; they make further ones."""
        if not self._threads:
            try:
                Thread(self._work, self._name).start()
            except RuntimeError:
                return False
        return True

    def grow(self) -> None:
        """Make another thread if all have something to do."""
        with self._lock:
            wanted = not self._idle and self._threads < self._size
        if wanted:
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError:  # there cannot be another thread: fewer do it, too
                return

    def _work(self) -> None:
        with self._lock:
            if self._threads == self._size:
                return
            self._threads += 1
        _own.pool = self
        while True:
            with self._lock:
                self._idle += 1
            task = self.tasks.get()
            with self._lock:
                self._idle -= 1
            task.step()
            del task  # a thread that waits keeps nothing of what it did


class _Task(Generic[T]):
    """The calls of one `run`: whichever thread is free makes the next.

    While calls are left it lies in the pool's queue, behind what others have put there: a small
    read does not wait for all of a large one.
    """

    def __init__(
        self, pool: Pool, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]
    ) -> None:
        self.ended: SimpleQueue[None] = SimpleQueue()
        self._pool, self._function, self._arguments = pool, function, enumerate(arguments)
        self._results: dict[int, T] = {}
        self._errors: dict[int, BaseException] = {}
        self._lock = threading.Lock()  # only ever taken by the pool's threads
        self._next: tuple[int, tuple[Any, ...]] | None = None
        self._drawn = self._running = 0
        self._closed = self._done = False

    def settle(self) -> None:
        """Let no further call begin and wait for those under way; interruptions come after that."""
        interruption: BaseException | None = None
        while not self._done:
            try:
                self._closed = True
                # In the queue again: a thread has to see it, and may not have been given it yet.
                self._pool.tasks.put(self)
                self.ended.get()
            except BaseException as error:  # noqa: BLE001 - raised below
                interruption = error
        if interruption is not None:
            try:
                raise interruption
            finally:
                del interruption  # it holds this frame

    def outcome(self) -> list[T]:
        """Return the results in order, or raise the first error."""
        errors, self._errors = self._errors, {}
        if errors:
            error = errors[min(errors)]
            try:
                raise error
            finally:
                del error, errors
        return [self._results[number] for number in range(len(self._results))]

    def step(self) -> None:
        """Make the next call, in a thread of the pool, unless there is none."""
        call = self._begun()
        if call is None:
            return
        number, arguments = call
        try:
            self._results[number] = self._function(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised by `outcome`
            self._errors[number] = error
            self._closed = True
        with self._lock:
            self._running -= 1
            self._end_if_all_is_done()

    def _begun(self) -> tuple[int, tuple[Any, ...]] | None:
        with self._lock:
            if self._done:
                return None
            if not self._drawn:
                self._draw()
            call, self._next = (None if self._closed else self._next), None
            if call is not None:
                self._running += 1
                self._draw()
            more = self._next is not None
            self._end_if_all_is_done()
        if more:
            self._pool.tasks.put(self)
            self._pool.grow()
        return call

    def _draw(self) -> None:
        """Draw a call ahead: with the last one it is known that no thread has to look again."""
        try:
            self._next = next(self._arguments, None)
        except BaseException as error:  # noqa: BLE001 - raised by `outcome`
            self._errors[self._drawn] = error
            self._next = None
        self._drawn += 1

    def _end_if_all_is_done(self) -> None:
        if not self._running and (self._closed or self._next is None):
            self._done = True
            self.ended.put(None)


def _forget() -> None:
    readers.cache_clear()
    writers.cache_clear()
    fetchers.cache_clear()


# Threads do not survive a fork: the child makes its own.
os.register_at_fork(after_in_child=_forget)
