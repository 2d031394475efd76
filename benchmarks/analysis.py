"""Peak memory and time of centroids, drift, the summary and a projection of a large store.

    python benchmarks/analysis.py [--gigabytes 2] [--tokens 17]

The store is built in a temporary folder. Each job runs in a process of its own; its peak is the
whole process's, libraries included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema

NODES = (*range(4), "server")
CLASSES = [f"class_{i}" for i in range(10)]
PER_COMMIT = 100

_JOB = """
import json, time
def peak():  # not ru_maxrss, which starts from the parent's
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
from fedgfe_store import EmbeddingStore
from fedgfe_store.analysis import centroids, drift, project, summarize
import sklearn.decomposition
selection = EmbeddingStore.open({path!r}).select()
before, start = peak(), time.perf_counter()
result = {job}
print(json.dumps([before, peak(), time.perf_counter() - start, len(result)]))
"""

JOBS = {
    "centroids, drift": "drift(centroids(selection))",
    "centroids, drift, flat": "drift(centroids(selection, tokens='flat'))",
    "summary by round, class": "summarize(selection)",
    "summary, flat": "summarize(selection, tokens='flat')",
    "summary by round, clip": "summarize(selection, ['round'], column='clip')",
    "projection, 2 components": "project(selection)['projection']",
}


def build(path: Path, gigabytes: float, tokens: int) -> EmbeddingStore:
    store = EmbeddingStore.create(path, Schema.flux(tokens, precision="bfloat16"))
    commits = max(1, round(gigabytes * 1e9 / store.schema.record_nbytes / PER_COMMIT))
    rng = np.random.default_rng(0)
    names = [CLASSES[i % 10] for i in range(PER_COMMIT)]
    for number in range(commits):
        node, round_number = NODES[number % len(NODES)], number // len(NODES)
        with store.append(node=node, round=round_number) as batch:
            for index, name in enumerate(names):
                t5 = rng.standard_normal((tokens, 4096), dtype=np.float32)
                t5 += CLASSES.index(name) / (round_number + 1)
                clip = rng.standard_normal(768, dtype=np.float32)
                batch.add(split="train", class_name=name, index=index // 10, t5=t5, clip=clip)
    return store


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True)
@click.option("--tokens", default=17, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work [a temporary one].")
def main(gigabytes: float, tokens: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        start = time.perf_counter()
        store = build(Path(name) / "s.zarr", gigabytes, tokens)
        values = len(store) * store.schema.record_nbytes
        rounds = len(store.select().counts("round"))
        click.echo(
            f"{len(store):,} records [{tokens}, 4096] of {len(NODES)} nodes and {rounds} rounds, "
            f"{values / 1e9:.2f} GB of float32, built in {time.perf_counter() - start:.0f} s"
        )
        for title, job in JOBS.items():
            code = _JOB.format(path=str(store.path), job=job)
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            before, peak, seconds, rows = json.loads(done.stdout.splitlines()[-1])
            click.echo(
                f"{title:<26}{seconds:6.1f} s {values / seconds / 1e6:8,.0f} MB/s   peak "
                f"{peak:5,.0f} MB ({before:,.0f} MB before it read)   {rows:,} rows"
            )


if __name__ == "__main__":
    main()
