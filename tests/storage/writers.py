"""Writers at the same time, where locks are not what they say: granted to all, or not offered."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from children import Child, in_child
from figures import Figures
from operations import SCHEMA, STORE, tensors
from system_calls import CHANGING, Killer, no_flushes

from fedgfe_store import EmbeddingStore, FedgfeStoreError
from fedgfe_store.errors import BusyError, ConflictError
from fedgfe_store.storage import claim_files

RECORDS = 3
TAKEOVER = 0.6
"""Seconds after which a writer that gives no sign is taken for dead, in these tests."""
_TIMEOUT = 20.0
_NOT_OFFERED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Ended:
    """How one append ended: ``"acknowledged"``, ``"conflict"``, ``"busy"`` or what was raised."""

    node: int
    round: int
    how: str


def grant_locks(host: str) -> None:
    """Let every lock call of this process succeed, as on another host that is called `host`."""
    fcntl.flock = fcntl.lockf = lambda *arguments: None
    socket.gethostname = lambda: host


def refuse_locks(code: int) -> None:
    """Let every lock call of this process fail as on a file system without locks."""

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    fcntl.flock = fcntl.lockf = refuse


def hurry() -> None:
    """Let a writer that gives no sign be taken for dead after `TAKEOVER` seconds."""
    claim_files.RENEWAL_SECONDS, claim_files.TAKEOVER_SECONDS = TAKEOVER / 6, TAKEOVER


def _append(path: Path, node: int, number: int) -> Ended:
    given = tensors(RECORDS, 100 * node + number)
    try:
        with EmbeddingStore.open(path).append(node=node, round=number, timeout=_TIMEOUT) as batch:
            batch.add(split="train", class_name="dog", index=range(RECORDS), **given)
    except ConflictError:
        return Ended(node, number, "conflict")
    except BusyError:
        return Ended(node, number, "busy")
    except Exception as error:  # noqa: BLE001 - any other error is a fault, and is shown
        return Ended(node, number, f"{type(error).__name__}: {error}")
    return Ended(node, number, "acknowledged")


def _race(path: Path, writers: int, rounds: int, prepare: Callable[[int], None]) -> list[Ended]:
    """Append from several processes that begin at once."""
    waiting, go = os.pipe()

    def work(node: int) -> list[Ended]:
        os.close(go)
        prepare(node)
        os.read(waiting, 1)
        ended: list[Ended] = []
        with no_flushes():
            for number in range(rounds):
                ended.append(_append(path, node, number))
                if ended[-1].how == "busy":  # each one of them would take as long
                    break
        return ended

    children = [Child(partial(work, node)) for node in range(writers)]
    os.close(waiting)
    os.close(go)
    return [ended for child in children for ended in child.result()]


def _judge(path: Path, ended: list[Ended], label: str, figures: Figures) -> None:
    """Compare what writers were told with what the store holds."""
    counts = figures.counts
    for each in ended:
        known = each.how in ("acknowledged", "conflict", "busy")
        counts[each.how if known else "raw error"] += 1
        if not known:
            figures.faults.append(f"{label}: node {each.node}, round {each.round}: {each.how}")
    acknowledged = {(e.node, e.round) for e in ended if e.how == "acknowledged"}
    try:
        store = EmbeddingStore.open(path)
        found = store.verify()
        groups = {(int(k.node), k.round) for k in store.select().keys()}
    except FedgfeStoreError as error:
        counts["unreadable"] += 1
        figures.faults.append(f"{label}: unreadable: {error}")
        return
    wrong = {group for group in acknowledged if not _is_whole(store, *group)}
    unasked = groups - acknowledged
    for what, many in {
        "acknowledged commits lost or damaged": len(wrong),
        "records damaged": len(found.damaged),
        "problems": len(found.problems),
        "refused commits that are there": len(unasked),
        "commits too many": store.commit - len(acknowledged) if not (wrong or unasked) else 0,
    }.items():
        counts[what] += many
        if many:
            figures.faults.append(f"{label}: {many} {what}")


def _is_whole(store: EmbeddingStore, node: int, number: int) -> bool:
    selection = store.select(node=node, round=number)
    expected = tensors(RECORDS, 100 * node + number)
    try:
        return len(selection) == RECORDS and all(
            np.array_equal(selection.read(name), values) for name, values in expected.items()
        )
    except FedgfeStoreError:
        return False


def granted_locks(root: Path, *, runs: int, shapes: list[tuple[int, int]]) -> Figures:
    """Let writers on several hosts append at once where each is granted every lock.

    Parameters
    ----------
    root : Path
        A folder to work in.
    runs : int
        How many times.
    shapes : list of (int, int)
        How many writers, and how many appends each.
    """
    figures = Figures()
    for run in range(runs):
        for writers, rounds in shapes:
            path = _fresh(root / f"granted {writers}x{rounds} {run}")
            ended = _race(path, writers, rounds, lambda node: grant_locks(f"host{node}"))
            _judge(path, ended, f"{writers} x {rounds}, run {run}", figures)
    return figures


def _fresh(root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    in_child(lambda: EmbeddingStore.create(root / STORE, SCHEMA).commit)
    return root / STORE


def locks_not_offered(root: Path) -> Figures:
    """Write where lock calls fail: a writer says so once and goes on, and two do not clash."""
    figures = Figures()
    for code in _NOT_OFFERED:
        name = errno.errorcode[code]
        path = _fresh(root / f"without {name}")
        ended, remarks = in_child(lambda: _without_locks(path, code))  # noqa: B023
        _judge(path, ended, f"{name}, alone", figures)
        refused = [e for e in ended if e.how != "acknowledged"]
        if refused:
            figures.faults.append(f"{name}, alone: {refused[0].how}")
        if len(remarks) != 1:
            figures.faults.append(f"{name}: {len(remarks)} remarks, not one: {remarks[:2]}")
        path = _fresh(root / f"without {name} 2")
        ended = _race(path, 2, 5, lambda node: refuse_locks(code))  # noqa: B023
        _judge(path, ended, f"{name}, two writers", figures)
    return figures


def _without_locks(path: Path, code: int) -> tuple[list[Ended], list[str]]:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logging.getLogger("fedgfe_store").addHandler(Ear(logging.WARNING))
    refuse_locks(code)
    return [_append(path, 0, number) for number in range(3)], heard


def stopped_writers(root: Path, *, seed: int, most: int | None) -> Figures:
    """Stop a writer before a call, let another host take over, and let the first go on.

    It has to notice: nothing that was acknowledged, its own or the other's, may be lost.
    """
    figures, rng = Figures(), random.Random(seed)
    total = in_child(lambda: _count(_fresh(root / "counted")))
    moments = range(total) if most is None else sorted(rng.sample(range(total), most))
    for at in moments:
        path = _fresh(root / f"stopped {at}")
        first = Child(lambda: _stopped(path, at))  # noqa: B023
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the writer was not stopped at call {at} of {total}")
        time.sleep(1.5 * TAKEOVER)
        other = in_child(lambda: _on("host1", lambda: _append(path, 1, 0)))  # noqa: B023
        os.kill(first.pid, signal.SIGCONT)
        label = f"stopped before call {at} of {total}"
        _judge(path, [first.result(), other], label, figures)
        if other.how != "acknowledged":
            figures.faults.append(f"{label}: nobody took over: {other.how}")
    return figures


def _on(host: str, function: Callable[[], Ended]) -> Ended:
    grant_locks(host)
    hurry()
    return function()


def _stopped(path: Path, at: int) -> Ended:
    with Killer(path.parent, at, signal=signal.SIGSTOP):
        return _on("host0", lambda: _append(path, 0, 0))


def _count(path: Path) -> int:
    with Killer(path.parent, None, CHANGING) as watch:
        _on("host0", lambda: _append(path, 0, 0))
    return watch.count
