"""The threads that read and write: nothing is under way when a call has returned or raised."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from conftest import SMALL, fill
from interruptions import strikes
from places import TESTS
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.common import threads
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.readers.torch import prefetch


@pytest.fixture(scope="module")
def pool():
    return threads.Pool(2)


def test_results_are_in_order_and_calls_are_drawn_as_they_are_made(pool):
    first = threading.Semaphore(0)
    drawn = []

    def arguments():
        for number in range(100):
            drawn.append(number)
            yield (number,)

    def square(number):
        if number < 2:
            first.acquire()
        return number**2

    results = []
    thread = threading.Thread(target=lambda: results.extend(threads.run(pool, square, arguments())))
    thread.start()
    while len(drawn) < 3:
        time.sleep(0.01)
    assert len(drawn) == 3
    first.release(2)
    thread.join()
    assert results == [n**2 for n in range(100)]


def test_a_small_piece_of_work_does_not_wait_for_all_of_a_large_one(pool):
    calls, begun = [], threading.Event()

    def large(number):
        begun.set()
        time.sleep(0.002)
        calls.append(number)

    thread = threading.Thread(target=threads.run, args=(pool, large, ((n,) for n in range(200))))
    thread.start()
    begun.wait()
    threads.run(pool, time.sleep, [(0,)])
    assert len(calls) < 150
    thread.join()
    assert sorted(calls) == list(range(200))


def test_the_first_error_in_order_is_raised_after_all_that_began_has_ended(pool):
    under_way = set()
    both = threading.Barrier(2)

    def work(number):
        under_way.add(number)
        both.wait()
        time.sleep(0.05 * (1 - number))
        under_way.remove(number)
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 0"):
        threads.run(pool, work, ((n,) for n in range(9)))
    assert not under_way


def test_an_error_of_what_gives_the_arguments_is_raised_after_all_that_began_has_ended(pool):
    ended = []

    def slow(number):
        time.sleep(0.05)
        ended.append(number)

    def arguments():
        yield (0,)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.run(pool, slow, arguments())
    assert ended == [0]


def refuse(*arguments: object, **options: object) -> None:
    raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_started_the_caller_makes_the_calls(monkeypatch):
    monkeypatch.setattr("_thread.start_new_thread", refuse)
    idents: list[int] = []

    def call(n: int) -> int:
        idents.append(threading.get_ident())
        return 10 // n

    pool = threads.Pool(2)
    assert threads.run(pool, call, [(1,), (2,)]) == [10, 5]
    with pytest.raises(ZeroDivisionError):
        threads.run(pool, call, [(1,), (0,), (2,)])
    assert idents == 4 * [threading.get_ident()]
    monkeypatch.undo()
    assert threads.run(pool, call, [(1,), (2,)]) == [10, 5]
    assert threading.get_ident() not in idents[4:]


def test_a_process_that_can_start_no_thread_writes_and_reads(store, tmp_path):
    """As one of Python 3.12.0 and 3.12.1 that ends: a recorder still has to write what waits."""
    code = f"""
import _thread
from conftest import fill
from fedgfe_store import EmbeddingStore
def refuse(*arguments):
    raise RuntimeError("can't create new thread at interpreter shutdown")
_thread.start_new_thread = refuse
store = EmbeddingStore.open({str(store.path)!r})
fill(store, node=0, round=1)
print(store.select().read("t5").tobytes().hex())
"""
    done = finished([sys.executable, "-c", code], check=False, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    fill(other, node=0, round=1)
    assert done.stdout.strip() == other.select().read("t5").tobytes().hex()
    store.refresh()
    assert store.select().read("t5").tobytes().hex() == done.stdout.strip()


def test_where_no_second_thread_can_be_started_one_does_it_all(monkeypatch):
    def refused(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert threads.run(threads.Pool(3), abs, ((-n,) for n in range(20))) == list(range(20))


# Ctrl-C


def test_an_interruption_at_any_step_of_a_run_leaves_nothing_under_way_and_no_other_error(pool):
    under_way, results = set(), []

    def work(number):
        under_way.add(number)
        time.sleep(0.001)
        under_way.remove(number)
        return number

    def interrupted():
        results.append(threads.run(pool, work, ((n,) for n in range(4))))

    for place in strikes(interrupted, "threads.py"):
        assert not under_way, place
    assert results == [[0, 1, 2, 3]]


def test_an_interruption_at_any_step_of_reading_ahead_ends_its_thread():
    made, results = [], []

    def items():
        yield from range(4)

    def read():
        made.append(items())
        results.append(list(prefetch(made[-1], 2)))

    for place in strikes(read, "torch.py"):
        assert not any(generator.gi_running for generator in made), place
    for place in strikes(read, "threads.py"):
        assert not any(generator.gi_running for generator in made), place
    assert results == [[0, 1, 2, 3]] * 2


def test_an_interruption_at_any_step_of_an_append_commits_all_or_nothing(store):
    for _ in strikes(lambda: fill(store, node=0, round=store.commit + 1), "threads.py", every=97):
        count = len(EmbeddingStore.open(store.path))
        assert count in (6 * store.commit, 6 * store.commit + 6)
        store.refresh()
    assert store.verify().sound


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt: a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_again_and_again_it_still_waits(pool):
    under_way, begun = set(), threading.Event()

    def work(number):
        under_way.add(number)
        begun.set()
        time.sleep(0.2)
        under_way.remove(number)

    main = threading.main_thread().ident
    assert main is not None

    def interrupt():
        begun.wait()
        for _ in range(5):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        threads.run(pool, work, ((n,) for n in range(9)))
    assert not under_way
    thread.join()


# memory and processes


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
from fedgfe_store.errors import ConflictError

store = EmbeddingStore.open(sys.argv[1])
store.select().read("t5")
ahead = iter(store.select().batches(2))
next(ahead)
child = os.fork()
if not child:
    code = 1
    try:
        try:
            next(ahead)
        except ConflictError as error:
            assert "are read ahead by a thread of process" in str(error)
        del ahead
        fill(store, node=0, round=2)
        code = 0 if len(store.select().read("t5")) == 12 else 2
    finally:
        os._exit(code)
list(ahead)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_forked_child_reads_and_writes_with_threads_of_its_own(store):
    fill(store, node=0, round=1)
    # In a process of its own: what other tests have loaded may not like a fork.
    command = [sys.executable, "-c", FORK, str(store.path)]
    assert finished(command, cwd=TESTS, check=False).returncode == 0
    assert len(EmbeddingStore.open(store.path)) == 12


def test_calls_that_ask_the_same_pool_again_do_not_wait_for_one_another():
    pool = threads.Pool(2)
    together = threading.Barrier(2, timeout=60)

    def outer(number):
        together.wait()  # no thread of the pool is left
        return sum(threads.run(pool, lambda n: n * number, [(1,), (2,), (3,)]))

    assert threads.run(pool, outer, [(10,), (100,)]) == [60, 600]
