"""Peak memory of importing a folder of checkpoints and of rendering one round of it.

    python -m benchmarks.memory [--gigabytes 2]

Each job runs in a process of its own; its peak is counted above what the libraries' import took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.quick import checkpoint

_JOB = """
import json, resource, sys, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import torch, zarr, pandas, diffusers
from diffusers import FluxPipeline
from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.generation.run import generate
before, start = peak(), time.perf_counter()
result = {job}
seconds = time.perf_counter() - start
print(json.dumps({{"before": before, "peak": peak(), "seconds": seconds, "result": result}}))
"""


def run(job: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", _JOB.format(job=job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work [a temporary one].")
def main(gigabytes: float, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        measure(Path(name), gigabytes)


def measure(folder: Path, gigabytes: float) -> None:
    checkpoints, store, images = folder / "checkpoints", folder / "s.zarr", folder / "images"
    checkpoints.mkdir()
    per_file = 400
    count = max(1, round(gigabytes * 1e9 / (per_file * 281_600)))
    for number in range(count):
        checkpoint(checkpoints / f"node_0_embeddings_r{number}.pt", per_file, number)
    size = sum(file.stat().st_size for file in checkpoints.iterdir()) / 1e6
    done = run(f"import_checkpoints({str(store)!r}, {str(checkpoints)!r}).records")
    report("import", f"{size:,.0f} MB, {done['result']} records", done)
    click.echo(f"{'':<10}{size / done['seconds']:,.0f} MB/s")
    selection = f"EmbeddingStore.open({str(store)!r}).select(round=0)"
    done = run(f"generate({selection}, {str(images)!r}, model='tiny').done")
    report("generate", f"{done['result']} images", done)
    click.echo(f"{'':<10}{done['result'] / done['seconds']:,.1f} images/s")


def report(name: str, what: str, done: dict[str, float]) -> None:
    above = done["peak"] - done["before"]
    click.echo(
        f"{name:<10}{what}: {done['seconds']:.1f} s, peak {done['peak']:,.0f} MB, "
        f"{above:,.0f} MB above the libraries' {done['before']:,.0f} MB"
    )


if __name__ == "__main__":
    main()
