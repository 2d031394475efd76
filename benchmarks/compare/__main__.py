"""The store beside torch.save, safetensors, HDF5, Lance, TensorStore and zarr-python.

    python -m benchmarks.compare [--quick] [--cold] [--output benchmarks/results]

Needs the extra `bench`. Writes one JSON file and one Markdown file of tables.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from . import measure, tables
from .data import FULL, QUICK, TINY, Plan
from .formats import NAMES, load
from .formats.base import Format

PACKAGES = (
    "torch", "numpy", "zarr", "safetensors", "h5py", "pylance", "tensorstore",
)  # fmt: skip


@click.command()
@click.option("--quick", is_flag=True, help="Fewer rounds, repeats and commits.")
@click.option("--cold", is_flag=True, help="Drop the files from the page cache before each read.")
@click.option("--no-memory", is_flag=True, help="Leave the peak memory out.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work [a temporary one].")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="benchmarks/results",
    show_default=True,
    help="Folder of the results.",
)
def main(quick: bool, cold: bool, no_memory: bool, folder: Path | None, output: Path) -> None:
    """Measure everything in temporary folders, and write the tables."""
    if cold and not hasattr(os, "posix_fadvise"):
        raise click.UsageError("--cold: this system has no posix_fadvise to drop cached pages with")
    torch.set_num_threads(1)  # its threads wait busily: stacking took up to 20 times as long
    began, load_before = time.perf_counter(), os.getloadavg()[0]
    formats = [load(name) for name in NAMES]
    plans = QUICK if quick else FULL
    shapes = [
        one_shape(formats, plan, folder, cold=cold, memory=not no_memory, report=note)
        for plan in plans
    ]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        growth = measure.growth(formats, Path(name), plans[0], report=note)
    results = {
        "formats": NAMES,
        "cold": cold,
        "quick": quick,
        "seconds": time.perf_counter() - began,
        "machine": {
            "cores": os.cpu_count(),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "versions": {name: version(name) for name in PACKAGES},
        "shapes": shapes,
        "growth": growth,
        "growth_shape": {
            "tokens": TINY.tokens, "width": TINY.width, "clip": TINY.clip,
            "bytes": TINY.nbytes, "records": plans[0].whole,
        },
    }  # fmt: skip
    write(output, "quick" if quick else "full", results)


def one_shape(
    formats: list[Format], plan: Plan, folder: Path | None, *, cold: bool, memory: bool, report: Any
) -> dict[str, Any]:
    """Measure all formats at one shape of records."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        times = measure.appends(formats, place, plan, report=report)
        report(f"{plan.shape.tokens} tokens: writing {plan.total} records in every format")
        sizes = measure.build(formats, place, plan)
        times |= measure.reads(formats, place, plan, cold=cold, report=report)
        peaks = measure.memory(formats, place, plan, report=report) if memory else {}
        bounds = measure.bounds(place, plan)
    return {
        "shape": f"[{plan.shape.tokens}, {plan.shape.width}] and [{plan.shape.clip}], float32",
        "records": plan.total,
        "bytes_per_record": plan.shape.nbytes,
        "rounds": plan.rounds,
        "whole": plan.whole,
        "small": plan.small,
        "repeats": plan.repeats,
        **sizes,
        "times": times,
        "memory": peaks,
        "bounds": bounds,
    }


def note(text: str) -> None:
    click.echo(text, err=True)


def write(output: Path, name: str, results: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    text = tables.markdown(results)
    (output / f"compare_{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / f"compare_{name}.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    sys.exit(main())
