"""CPU seconds of reading, beside those of another checkout of the package, in turns.

    python benchmarks/reading.py --before CHECKOUT [--records 2000] [--turns 10]

One store of [17, 4096] and [768]; each turn is a process of either, which opens the store and reads
once to import and to fill the page cache, then a few times for the least figure. Of all turns the
median is shown, and the ratio of each pair of turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema

CLASSES = 10


def make(path: Path, records: int) -> None:
    store = EmbeddingStore.create(path, Schema.flux())
    rng = np.random.default_rng(0)
    each = records // 20
    for number in range(20):
        with store.append(node=number % 4, round=number // 4) as batch:
            batch.add(
                split="train",
                class_name=[f"class {i % CLASSES}" for i in range(each)],
                index=range(each),
                t5=rng.standard_normal((each, 17, 4096), dtype=np.float32),
                clip=rng.standard_normal((each, 768), dtype=np.float32),
            )


def scan(path: Path) -> None:
    for _ in EmbeddingStore.open(path).select().batches(32):
        pass


def scattered(path: Path) -> None:
    selection = EmbeddingStore.open(path).select()
    places = np.random.default_rng(1).permutation(len(selection))[:64]
    for name in selection.schema.columns:
        selection.take(places).read(name)


def query(path: Path) -> None:
    selection = EmbeddingStore.open(path).select(round=2, class_name="class 3")
    assert len(selection.records)


def opened(path: Path) -> None:
    assert len(EmbeddingStore.open(path))


def first(path: Path, **filters: Any) -> None:
    next(iter(EmbeddingStore.open(path).select(**filters).batches(4, prefetch=0)))


QUESTIONS: dict[str, tuple[Callable[[Path], None], int]] = {
    "open, count the records": (opened, 100),
    "first batch of 4 of a round": (partial(first, round=2), 50),
    "first batch of 4 of a class": (partial(first, class_name="class 3"), 50),
    "full scan, batches of 32": (scan, 3),
    "64 scattered records": (scattered, 20),
    "query of a round and class": (query, 50),
}


def asked(path: Path) -> dict[str, float]:
    """Return the CPU seconds of each question, the least of several times."""
    found = {}
    for name, (question, times) in QUESTIONS.items():
        question(path)
        seconds = []
        for _ in range(times):
            start = time.process_time()
            question(path)
            seconds.append(time.process_time() - start)
        found[name] = min(seconds)
    return found


@click.command()
@click.option("--before", help="The other checkout.")
@click.option("--records", default=2000, show_default=True)
@click.option("--turns", default=10, show_default=True)
@click.option("--ask", default=None, help="Ask the questions of this store, and print JSON.")
def main(before: str, records: int, turns: int, ask: str | None) -> None:
    if ask is not None:
        click.echo(json.dumps(asked(Path(ask))))
        return
    sources = (Path(before), Path(__file__).parents[1])
    found: list[list[dict[str, float]]] = [[], []]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "s.zarr")
        make(path, records)
        for turn in range(turns):
            for which in (0, 1) if turn % 2 else (1, 0):
                environment = {**os.environ, "PYTHONPATH": str(sources[which])}
                command = [sys.executable, __file__, "--ask", str(path)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=environment
                )
                found[which].append(json.loads(done.stdout))
    for name in QUESTIONS:
        then, now = (np.array([each[name] for each in turn]) for turn in found)
        low, middle, high = np.percentile(now / then, [25, 50, 75])
        click.echo(
            f"{name:<30}before {np.median(then) * 1000:>8.2f}  now {np.median(now) * 1000:>8.2f} "
            f"CPU ms  ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
