"""Planning one part of a run beside planning all of it, in one run.

    python benchmarks/planning.py [--records 160000] [--parts 64]

Figures of one run on one machine: compare the ratios, not the seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.generation.parts import WHOLE, Part
from fedgfe_store.generation.plan import plan_images
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.settings import Settings
from fedgfe_store.selection import Selection

SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)
COMMITS = 40


def make(path: Path, records: int) -> EmbeddingStore:
    store = EmbeddingStore.create(path, Schema.flux(1, width=1, clip=(1,)))
    n = records // COMMITS
    for commit in range(COMMITS):
        with store.append(node=commit % 4, round=commit // 4) as batch:
            batch.add(
                split="train",
                class_name=[f"class_{i % 10}" for i in range(n)],
                index=[i // 10 for i in range(n)],
                sample_id=[f"train_{i // 10}" for i in range(n)],
                extra=[{"image_path": f"output_images/{commit}_{i}.png"} for i in range(n)],
                t5=np.ones((n, 1, 1), np.float32),
                clip=np.ones((n, 1), np.float32),
            )
    return EmbeddingStore.open(path)


def best(store: EmbeddingStore, function: Callable[[Selection], Any], repeats: int = 5) -> float:
    """CPU seconds of the best of a few calls, each with a selection that has read nothing."""
    times = []
    for _ in range(repeats):
        selection = EmbeddingStore.open(store.path).select()
        start = time.process_time()
        function(selection)
        times.append(time.process_time() - start)
    return min(times)


@click.command()
@click.option("--records", default=160_000, show_default=True)
@click.option("--parts", default=64, show_default=True)
def main(records: int, parts: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder, "embeddings.zarr"), records)

        def plan(part: Part) -> Callable[[Selection], Any]:
            return lambda selection: plan_images(
                selection, SETTINGS, Path(folder, "images"), Request(part=part)
            )

        keys = best(store, lambda selection: selection.key_columns())
        whole, part = best(store, plan(WHOLE)), best(store, plan(Part(0, parts)))
    click.echo(f"reading the keys of {records:,} records: {keys:.2f} CPU s")
    click.echo(f"planning all of them: {whole:.2f} CPU s")
    click.echo(f"planning part 0/{parts}: {part:.2f} CPU s, {part / whole:.2f} of all")
    click.echo(f"beside reading the keys: {part - keys:.2f} CPU s")


if __name__ == "__main__":
    main()
