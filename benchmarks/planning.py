"""Planning one part of a run beside planning all of it, and a second run beside the first.

    python benchmarks/planning.py [--records 160000] [--parts 64]

The second run finds all images done, of 8 x 8 pixels: at first it reads every one, as where nothing
is noted of them, and then none.

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
from fedgfe_store.generation.prepare import Run
from fedgfe_store.generation.provenance import Provenance
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import render
from fedgfe_store.generation.settings import Settings
from fedgfe_store.images.checked import SETTLED_NS
from fedgfe_store.images.manifest import Manifest, timestamp
from fedgfe_store.images.png import png_bytes
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Placement
from fedgfe_store.models.tiny import TINY_FLUX
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
        again(store, Path(folder, "images"))


def again(store: EmbeddingStore, folder: Path) -> None:
    """Print what planning takes where every image is done."""
    model, placement = resolve_model(str(TINY_FLUX)), Placement("float32", "cpu")

    def planned() -> Run:
        selection = EmbeddingStore.open(store.path).select()
        plan = plan_images(selection, SETTINGS, folder)
        return Run(selection, plan.request, plan, model, placement, batch_size=8, columns={})

    first = planned()
    put_images(first)
    time.sleep(SETTLED_NS / 1e9)
    for name in ("with all files read", "with none read"):
        start, cpu = time.perf_counter(), time.process_time()
        run = planned()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
        click.echo(f"planning again, {name}: {cpu:.2f} CPU s, {wall:.2f} s")
        assert run.plan.counts["done"] == len(first.plan.items)
        start, cpu = time.perf_counter(), time.process_time()
        assert render(run).done == 0
        cpu, wall = time.process_time() - cpu, time.perf_counter() - start
        click.echo(f"and ending, with nothing to do: {cpu:.2f} CPU s, {wall:.2f} s")


def put_images(run: Run) -> None:
    """Put the images of a run in place with their manifest, unflushed."""
    said = Provenance(run, run.placement)
    pixels = np.full((SETTINGS.height, SETTINGS.width, 3), 99, np.uint8)
    run.plan.folder.mkdir()
    with Manifest(run.plan.folder) as manifest:
        for item in run.plan.items:
            text = said.of(item, batch_size=8, tiled=False, offload="none")
            item.path.write_bytes(png_bytes(pixels, text))
            facts = {"bytes": 0, "seconds": 0.02, "created": timestamp()}
            manifest.append({"file": item.path.name, **text, **facts})


if __name__ == "__main__":
    main()
