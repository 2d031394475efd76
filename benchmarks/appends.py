"""Many small appends by one long-lived writer: what does the last one cost beside the first?

    python benchmarks/appends.py [--appends 10000] [--records 4]

Figures of one run on one machine: compare the ratios, not the seconds.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema

GROUP = 100
"""Appends at either end whose mean is compared."""


def append(store: EmbeddingStore, number: int, records: int) -> float:
    """Append `records` records as round `number`; return the seconds that it took."""
    rng = np.random.default_rng(number)
    tensors = {
        name: rng.standard_normal((records, *shape), dtype=np.float32)
        for name, shape in store.schema.columns.items()
    }
    start = time.perf_counter()
    with store.append(node=number % 8, round=number) as batch:
        batch.add(split="train", class_name="dog", index=range(records), **tensors)
    return time.perf_counter() - start


def fsync_seconds(folder: Path, repeats: int = 50) -> float:
    """Mean seconds of a small write and its flush: the disk's share of an append."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        with (folder / "probe").open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - start)
    return float(np.mean(times))


def report(name: str, seconds: float, more: str = "") -> None:
    click.echo(f"{name:<34}{seconds * 1000:>10.2f} ms  {more}")


@click.command()
@click.option("--appends", default=10_000, show_default=True)
@click.option("--records", default=4, show_default=True, help="Records of one append.")
@click.option("--every", default=1000, show_default=True, help="Show the mean of so many.")
def main(appends: int, records: int, every: int) -> None:
    """Append, then open the store and query it once, each as a new process would."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        probe = fsync_seconds(Path(folder))
        store = EmbeddingStore.create(
            Path(folder) / "s.zarr", Schema.flux(17, width=64, clip=(32,))
        )
        append(store, 0, records)  # imports and first use are not what is measured
        times = []
        for number in range(1, appends + 1):
            times.append(append(store, number, records))
            if number % every == 0:
                report(f"appends {number - every + 1} to {number}", float(np.mean(times[-every:])))
        first, last = float(np.mean(times[:GROUP])), float(np.mean(times[-GROUP:]))
        report(f"first {GROUP} appends, mean", first)
        report(f"last {GROUP} appends, mean", last, f"ratio {last / first:.2f}")
        report("write and fsync, before", probe)
        report("write and fsync, after", fsync_seconds(Path(folder)))
        start = time.perf_counter()
        opened = EmbeddingStore.open(store.path)
        report("open", time.perf_counter() - start, f"{opened.commit} commits")
        start = time.perf_counter()
        found = opened.select(round=appends // 2).records
        report("first query", time.perf_counter() - start, f"{len(found)} records")
        start = time.perf_counter()
        opened.select(round=appends // 2).read("t5")
        report("its t5", time.perf_counter() - start)


if __name__ == "__main__":
    main()
