"""Import, size, reading and rendering beside torch.save and torch.load, in one run.

    python benchmarks/quick.py [--records 400]

Figures of one run on one machine: compare the ratios, not the seconds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.checkpoints import import_checkpoints


def best(function: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls: the others waited for something else."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def checkpoint(path: Path, records: int, round_number: int) -> None:
    rng = np.random.default_rng(round_number)
    entries = [
        {
            "split": "train",
            "index": i // 10,
            "class_name": f"class_{i % 10}",
            "t5_embedding": torch.from_numpy(rng.standard_normal((17, 4096), dtype=np.float32)),
            "clip_embedding": torch.from_numpy(rng.standard_normal(768, dtype=np.float32)),
            "sample_metadata": {"sample_id": f"train_{i}"},
        }
        for i in range(records)
    ]
    head = {"node_id": 0, "round": round_number, "timestamp": "2026-01-22T12:00:00"}
    metadata = {"diffusion_type": "flux", "selected_classes": []}
    torch.save({**head, "embeddings": entries, "metadata": metadata}, path)


def row(name: str, ours: float, theirs: float, unit: str, what: str) -> None:
    click.echo(f"{name:<42}{ours:>12,.3f}{theirs:>12,.3f} {unit:<9}{ours / theirs:>8.3f}  {what}")


@click.command()
@click.option("--records", default=400, show_default=True)
def main(records: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), records)


def measure(folder: Path, records: int) -> None:
    click.echo(f"{'':<42}{'store':>12}{'.pt':>12} {'':<9}{'ratio':>8}")
    files = [folder / f"node_0_embeddings_r{r}.pt" for r in range(4)]
    saving = []
    for number, file in enumerate(files):
        start = time.perf_counter()
        checkpoint(file, records, number)
        saving.append(time.perf_counter() - start)
    loaded = torch.load(files[0], weights_only=True)
    saved = best(lambda: torch.save(loaded, folder / "again.pt"), 3)
    megabytes = records * (17 * 4096 + 768) * 4 / 1e6
    for precision in ("float32", "bfloat16"):
        path = folder / f"{precision}.zarr"
        start = time.perf_counter()
        import_checkpoints(path, files, precision=precision)
        seconds = (time.perf_counter() - start) / len(files)
        row(f"import against torch.save, {precision}", megabytes / seconds, megabytes / saved,
            "MB/s", "higher is better")  # fmt: skip
        ours = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / len(files) / records
        row(f"bytes per record, {precision}", ours / 1e3, files[0].stat().st_size / records / 1e3,
            "kB", "lower")  # fmt: skip
        appends = [append(folder / f"a{precision}{i}.zarr", loaded, precision) for i in range(3)]
        row(f"append against torch.save, {precision}", megabytes / min(appends), megabytes / saved,
            "MB/s", "higher")  # fmt: skip
        compare_reads(path, files[0], precision)


def append(path: Path, loaded: dict[str, Any], precision: Any) -> float:
    entries = loaded["embeddings"]
    store = EmbeddingStore.create(path, Schema.flux(17, precision=precision))
    t5 = torch.stack([e["t5_embedding"] for e in entries])
    clip = torch.stack([e["clip_embedding"] for e in entries])
    names = [e["class_name"] for e in entries]
    index = [e["index"] for e in entries]
    start = time.perf_counter()
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name=names, index=index, t5=t5, clip=clip)
    return time.perf_counter() - start


def compare_reads(path: Path, file: Path, precision: str) -> None:
    def first() -> Any:
        return next(iter(EmbeddingStore.open(path).select(round=0).batches(4, prefetch=0)))

    def scan() -> int:
        return sum(len(b) for b in EmbeddingStore.open(path).select(round=0).batches(32))

    def load() -> Any:
        return torch.load(file, weights_only=True)

    row(f"first batch of 4, {precision}", best(first) * 1e3, best(load) * 1e3, "ms", "lower")
    row(f"whole round, {precision}", best(scan) * 1e3, best(load) * 1e3, "ms", "lower")


def help_time() -> float:
    return best(lambda: subprocess.run(["fedgfe-store", "--help"], capture_output=True, check=True))


if __name__ == "__main__":
    click.echo(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}"
    )
    click.echo(f"fedgfe-store --help: {help_time():.2f} s")
    main()
