"""What a store costs as it grows: open, query, append, history and a part's plan, at any size.

    python benchmarks/growth.py [--keys 176000,1000000] [--folder DIR] [--before CHECKOUT]

Stores of tiny tensors are made, of 8 nodes and 10 classes, 4,000 records a round. Each question is
asked by a process of its own: CPU seconds and peak memory beyond what the imports took. Made
stores stay in the folder, so that another version of the package can be asked the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd  # noqa: F401 - what it takes to import is not measured

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.generation.parts import Part
from fedgfe_store.generation.plan import plan_images
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.settings import Settings
from fedgfe_store.records import NOTE_COLUMNS, RecordBatch
from fedgfe_store.storage.checksums import row_digests
from fedgfe_store.storage.commit import Transaction
from fedgfe_store.storage.entry import finished
from fedgfe_store.storage.incoming import checked
from fedgfe_store.storage.snapshot import Snapshot

NODES, CLASSES, PER_CLASS = 8, 10, 50
A_ROUND = NODES * CLASSES * PER_CLASS
GRANULE = 4000
ROUND = 20
SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)


def make(path: Path, keys: int) -> None:
    """Make a store of `keys` records or some more, without waiting for the disk."""
    os.fsync = lambda fd: None
    schema = Schema.flux(1, width=2, clip=(1,), granule=GRANULE)
    snapshot = EmbeddingStore.create(path, schema).snapshot
    assert isinstance(snapshot, Snapshot)
    records = some_records(schema, NODES, PER_CLASS)
    rounds = list(range(1, -(-keys // A_ROUND) + 1))
    for start in range(0, len(rounds), 20):
        with Transaction(snapshot, timeout=10) as transaction:
            for number in rounds[start : start + 20]:
                columns = {**records.columns, "round": np.full(len(records), number, np.int32)}
                columns["row_digest"] = row_digests(columns)
                transaction.write([RecordBatch(columns, records.tensors)])
            snapshot = transaction.publish("append")


def some_records(schema: Schema, nodes: int, each: int, number: int = 0) -> RecordBatch:
    n = nodes * CLASSES * each
    keys: dict[str, Any] = {
        "node": [str(i) for i in range(nodes) for _ in range(CLASSES * each)],
        "round": number,
        "split": "train",
        "class_name": [f"class {i}" for i in range(CLASSES) for _ in range(each)] * nodes,
        "index": list(range(each)) * (nodes * CLASSES),
    }
    notes: dict[str, Any] = dict.fromkeys(NOTE_COLUMNS)
    notes["sample_id"] = [f"train_{i}" for i in keys["index"]]
    tensors = {name: np.ones((n, *shape), np.float32) for name, shape in schema.columns.items()}
    return finished(checked(schema, keys, notes, tensors), schema)[0]


def opened(path: Path) -> int:
    return EmbeddingStore.open(path).commit


def query(path: Path) -> int:
    store = EmbeddingStore.open(path)
    return len(store.select(round=ROUND, class_name="class 3").rows)


def by_class(path: Path) -> int:
    return len(EmbeddingStore.open(path).select(class_name="class 3").rows)


def append(path: Path) -> int:
    store = EmbeddingStore.open(path)
    with store.append(node="0", round=1_000_000) as batch:
        batch.add_records(some_records(store.schema, 1, 4, 1_000_000))
    return len(store)


def history(path: Path) -> int:
    return len(EmbeddingStore.open(path).history())


def plan(path: Path, **filters: int) -> int:
    selection = EmbeddingStore.open(path).select(**filters)
    request = Request(part=Part(0, 8))
    with tempfile.TemporaryDirectory() as folder:
        return len(plan_images(selection, SETTINGS, Path(folder), request).items)


def plan_of_a_round(path: Path) -> int:
    return plan(path, round=ROUND)


QUESTIONS: dict[str, Callable[[Path], int]] = {
    "open": opened,
    "query of a round and class": query,
    "query of a class": by_class,
    "append of 40 records": append,
    "history": history,
    "plan of part 0/8 of a round": plan_of_a_round,
    "plan of part 0/8 of all": plan,
}


def peak() -> int:
    """Peak memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def asked(path: Path, question: str) -> dict[str, float]:
    """Ask one question in this process, once: what it imports was imported before."""
    copy = tempfile.mkdtemp(dir=path.parent)
    if question.startswith("append"):
        path = Path(shutil.copytree(path, Path(copy, "s.zarr"), copy_function=os.link))
    before, start, begun = peak(), time.process_time(), time.perf_counter()
    answer = QUESTIONS[question](path)
    found = {
        "cpu": time.process_time() - start,
        "wall": time.perf_counter() - begun,
        "mib": (peak() - before) / 2**20,
        "answer": answer,
    }
    shutil.rmtree(copy)
    return found


def best(path: Path, question: str, source: Path, repeats: int) -> dict[str, float]:
    """Return the least figures of a few processes that ask one question of the package there."""
    command = [sys.executable, __file__, "--ask", question, "--store", str(path)]
    found = []
    for _ in range(repeats):
        environment = {**os.environ, "PYTHONPATH": str(source)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout))
    return {name: min(each[name] for each in found) for name in found[0]}


@click.command()
@click.option("--keys", default="176000,1000000,5000000,10000000", show_default=True)
@click.option("--folder", default=None, help="Where the stores are made, and stay.")
@click.option("--before", default=None, help="Ask the package of this checkout, too.")
@click.option("--only", multiple=True, help="Questions to ask.")
@click.option("--repeats", default=3, show_default=True, help="The least figures are shown.")
@click.option("--ask", default=None, help="Ask this one question of --store, and print JSON.")
@click.option("--store", default=None)
def main(
    keys: str,
    folder: str | None,
    before: str | None,
    only: tuple[str, ...],
    repeats: int,
    ask: str | None,
    store: str | None,
) -> None:
    if ask is not None:
        click.echo(json.dumps(asked(Path(str(store)), ask)))
        return
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        for n in map(int, keys.split(",")):
            path = Path(folder or temporary) / f"{n}.zarr"
            if not path.exists():
                make(path, n)
            raw = (path / "zarr.json").stat().st_size
            click.echo(f"{n:,} keys: zarr.json {raw / 1000:,.0f} kB")
            for question in only or QUESTIONS:
                now = best(path, question, Path(__file__).parents[1], repeats)
                line = f"{now['cpu'] * 1000:>11,.1f} CPU ms {now['mib']:>8,.0f} MiB"
                if before:
                    then = best(path, question, Path(before), repeats)
                    assert then["answer"] == now["answer"]
                    line += f"   before {then['cpu'] * 1000:>11,.1f} {then['mib']:>8,.0f}"
                    line += f"   ratio {now['cpu'] / then['cpu']:.3f}"
                click.echo(f"  {question:<30}{line}   ({now['answer']:,})")


if __name__ == "__main__":
    main()
