"""The threads that read and write: nothing is under way when a call has returned or raised."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, fill

from fedgfe_store import EmbeddingStore, _workers
from fedgfe_store.errors import DamagedDataError


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def test_results_are_in_order_and_few_calls_wait_at_a_time(pool):
    begun = threading.Semaphore(0)
    drawn = []

    def arguments():
        for number in range(100):
            drawn.append(number)
            yield (number,)

    def square(number):
        if number == 0:
            begun.acquire()
        return number**2

    timer = threading.Timer(0.2, begun.release)
    timer.start()
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(_workers.run(pool, square, arguments()))
    )
    thread.start()
    time.sleep(0.1)
    assert len(drawn) <= 4 * _workers.count() + 1
    thread.join()
    assert results == [n**2 for n in range(100)]


def test_the_first_error_in_order_is_raised_after_all_that_began_has_ended(pool):
    under_way = set()

    def work(number):
        under_way.add(number)
        time.sleep(0.05 * (3 - number))
        under_way.remove(number)
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 0"):
        _workers.run(pool, work, ((n,) for n in range(3)))
    assert not under_way


def test_interrupted_again_and_again_it_still_waits(pool, monkeypatch):
    ended = []
    interruptions = iter([KeyboardInterrupt, KeyboardInterrupt])
    wait_for = threading.Condition.wait_for

    def interrupted(self, predicate, timeout=None):
        for error in interruptions:
            raise error
        return wait_for(self, predicate, timeout)

    monkeypatch.setattr(threading.Condition, "wait_for", interrupted)

    def slow(number):
        time.sleep(0.1)
        ended.append(number)

    def arguments():
        yield (0,)
        time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _workers.run(pool, slow, arguments())
    assert ended == [0]


def test_what_was_queued_before_submitting_failed_never_runs():
    ran = []

    class Limited(ThreadPoolExecutor):
        def submit(self, *args):
            super().submit(time.sleep, 0.1)
            super().submit(*args)
            raise RuntimeError("can't start new thread")

    with Limited(1) as pool, pytest.raises(RuntimeError, match="new thread"):
        _workers.run(pool, ran.append, [(1,)])
    assert ran == []


def test_a_failed_read_keeps_no_memory(store):
    fill(store, node=0, round=1)
    (store.path / "t5" / "c.1.0.0").unlink()
    selection = EmbeddingStore.open(store.path).select()
    out = np.empty((6, *SMALL.columns["t5"]), np.float32)
    kept = weakref.ref(out)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DamagedDataError):
            selection.read("t5", out=out)
        del out
        assert kept() is None
    finally:
        gc.enable()


FORK = """
import os, sys
from conftest import fill
from fedgfe_store import EmbeddingStore

store = EmbeddingStore.open(sys.argv[1])
store.select().read("t5")
child = os.fork()
if not child:
    code = 1
    try:
        fill(store, node=0, round=2)
        code = 0 if len(store.select().read("t5")) == 12 else 2
    finally:
        os._exit(code)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_reads_and_writes_with_threads_of_its_own(store):
    fill(store, node=0, round=1)
    # In a process of its own: what other tests have loaded may not like a fork.
    command = [sys.executable, "-c", FORK, str(store.path)]
    assert subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode == 0
    assert len(EmbeddingStore.open(store.path)) == 12
