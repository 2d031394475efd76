"""Interrupt reading, appending, recording and reading ahead at random moments, as Ctrl-C does.

    python tools/interrupt.py [--times 2000] [--twice 0.3] [--seed 0]

A timer raises KeyboardInterrupt in the middle of an operation, some of them a second time shortly
after. Nothing else may come out of it, nothing may hang (a minute of silence ends the process with
the stack of every thread), every commit is there whole or not at all, and an acknowledged one is.
"""

from __future__ import annotations

import faulthandler
import logging
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.federated import Recorder

SCHEMA = Schema.flux(3, width=8, clip=(4,), granule=4)
RECORDS = 6
SILENCE = 60
"""Seconds without an end of an operation that count as a hang."""


class Lost(Exception):
    """The store is not what the acknowledged operations made it."""


def tensors() -> dict[str, np.ndarray]:
    """Return values of the records of one commit."""
    return {name: np.ones((RECORDS, *shape), np.float32) for name, shape in SCHEMA.columns.items()}


class Work:
    """Operations on one store, and which rounds they acknowledged."""

    def __init__(self, path: Path) -> None:
        self.store = EmbeddingStore.create(path, SCHEMA)
        self.begun = 0
        self.done: set[int] = set()

    def append(self) -> None:
        """Append a round."""
        number = self.begun = self.begun + 1
        with self.store.append(node=0, round=number) as batch:
            batch.add(split="train", class_name="dog", index=range(RECORDS), **tensors())
        self.done.add(number)

    def record(self) -> None:
        """Record a round in the background, and flush."""
        number = self.begun = self.begun + 1
        with Recorder(self.store.path) as recorder:
            with recorder.record(node=0, round=number) as batch:
                batch.add(split="train", class_name="dog", index=range(RECORDS), **tensors())
            recorder.flush()
            self.done.add(number)

    def read(self) -> None:
        """Read every tensor."""
        self.store.refresh()
        for name in SCHEMA.columns:
            self.store.select().read(name)

    def read_ahead(self) -> None:
        """Iterate over batches that are read ahead."""
        self.store.refresh()
        for _ in self.store.select().batches(4):
            pass

    def check(self) -> None:
        """Compare the store with what was acknowledged."""
        store = EmbeddingStore.open(self.store.path)
        counts = Counter(store.select().records["round"].tolist())
        if set(counts.values()) - {RECORDS}:
            raise Lost(f"commit {store.commit}: a part of a block: {counts}")
        if not self.done <= counts.keys():
            raise Lost(f"commit {store.commit}: acknowledged, not there: {self.done - set(counts)}")


def interrupted(operation: Callable[[], object], rng: random.Random, twice: float) -> int:
    """Call `operation` and interrupt it once or twice; return how often that met it."""
    met = 0

    def strike(*_: object) -> None:
        nonlocal met
        met += 1
        if met == 1 and rng.random() < twice:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, strike)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, rng.choice([0.002, 0.02, 0.15])))
            operation()
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
    except KeyboardInterrupt:
        # The second may have come before the first was dealt with.
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return met


@click.command()
@click.option("--times", default=2000, show_default=True)
@click.option("--twice", default=0.3, show_default=True, help="How many are struck once more.")
@click.option("--seed", default=0, show_default=True)
def main(times: int, twice: float, seed: int) -> None:
    """Interrupt operations on a small store, and check it after each."""
    logging.getLogger("fedgfe_store").setLevel(logging.CRITICAL)
    rng, met, start = random.Random(seed), 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="interrupt") as folder:
        work = Work(Path(folder) / "interrupted.zarr")
        for number in range(times):
            faulthandler.dump_traceback_later(SILENCE, exit=True)
            if work.begun % 100 == 99:  # a small store, so that a check takes no time
                work = Work(Path(folder) / f"interrupted{number}.zarr")
            operation = rng.choice([work.append, work.record, work.read, work.read_ahead])
            met += interrupted(operation, rng, twice)
            work.check()
        faulthandler.cancel_dump_traceback_later()
        if not work.store.verify().sound:
            raise Lost("verify")
    seconds = time.monotonic() - start
    click.echo(f"{times} operations, {met} interruptions, {seconds:.0f} s, lost 0, hung 0")


if __name__ == "__main__":
    main()
