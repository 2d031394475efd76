"""Ways to pack the same records: bytes, and CPU milliseconds of an append and of reading all.

    python -m benchmarks.compressions [--store demo/embeddings.zarr] [--turns 7]

Made-up embeddings of [17, 4096], or those of a store. The ways take turns in one process, and the
median of each one's turns is shown; in brackets, times the first row's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from benchmarks.compare.data import SHORT, make_round
from benchmarks.compare.files import size
from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.schema import Compression, Precision


def cpu(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1000


def given(store: str | None) -> tuple[Schema, dict[str, np.ndarray]]:
    """Return a schema, and up to 400 records that fit it."""
    if store is None:
        made = make_round(SHORT, 0, 400)
        return Schema.flux(), {"t5": made.t5, "clip": made.clip}
    selection = EmbeddingStore.open(store).select().take(slice(400))
    return selection.schema, {name: selection.read(name) for name in selection.schema.columns}


def append(store: EmbeddingStore, number: int, tensors: dict[str, np.ndarray]) -> None:
    n = len(next(iter(tensors.values())))
    with store.append(node=0, round=number) as batch:
        batch.add(split="train", class_name="a", index=range(n), **tensors)


def scan(path: Path) -> None:
    for batch in EmbeddingStore.open(path).select().batches(32):
        for tensor in batch.tensors.values():
            tensor[:, ..., ::1024].sum()


@click.command()
@click.option("--store", help="Use the records of this store.")
@click.option("--turns", default=7, show_default=True)
def main(store: str | None, turns: int) -> None:
    schema, tensors = given(store)
    ways: list[Any] = [*product(get_args(Precision), get_args(Compression))][:-1]
    raw = sum(values.nbytes for values in tensors.values())
    with tempfile.TemporaryDirectory(dir=".") as name:
        found: dict[Any, list[list[float]]] = {way: [] for way in ways}
        stores = {}
        for way in ways:
            packed = replace(schema, precision=way[0], compression=way[1])
            stores[way] = EmbeddingStore.create(Path(name, "-".join(way)), packed)
            append(stores[way], 0, tensors)
        shares = {way: size(each.path)[0] / raw for way, each in stores.items()}
        for turn in range(1, turns + 1):
            for way in ways if turn % 2 else ways[::-1]:
                each = stores[way]
                appended = cpu(partial(append, each, turn, tensors))
                each.select(round=turn).read("t5")
                read = cpu(partial(scan, each.path))
                each.delete(round=turn)
                found[way].append([appended, read])
    medians = {way: np.median(each, axis=0) for way, each in found.items()}
    first = medians[ways[0]]
    click.echo(
        "| precision | compression | bytes, of the values' | append, CPU ms | scan, CPU ms |"
    )
    click.echo("| --- | --- | ---: | ---: | ---: |")
    for way, (appended, read) in medians.items():
        cells = [
            f"{value:.0f} ({value / base:.2f})"
            for value, base in zip((appended, read), first, strict=True)
        ]
        click.echo(f"| {way[0]} | {way[1]} | {shares[way]:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
