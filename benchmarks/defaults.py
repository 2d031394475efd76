"""The defaults of the format beside what they could have been: codec, chunks, files, threads.

    python -m benchmarks.defaults [--repeats 3] [--output benchmarks/results]

Figures of one run on one machine, the best of the repeats, which the variants take in turn: compare
the ratios, not the seconds. Writes a Markdown file of tables. The first variant of a table is what
the package does; the others are made by changing its constants in this process.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from benchmarks.compare.data import LONG, SHORT, Round, Shape, make_round
from benchmarks.compare.files import size
from benchmarks.compare.measure import timed
from benchmarks.compare.tables import table
from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.common import threads as pools
from fedgfe_store.storage import layout

KEY_CHUNK_MODULES = ("layout", "key_files", "key_chunks", "commit")


@dataclass(frozen=True)
class Variant:
    """One setting: its name, the constants that make it, and options of the schema."""

    name: str
    constants: dict[str, Any] = field(default_factory=dict)
    schema: dict[str, Any] = field(default_factory=dict)


def codec(cname: str, level: int, shuffle: str = "bitshuffle") -> Variant:
    constant = {**layout._BLOSC, "cname": cname, "clevel": level, "shuffle": shuffle}
    return Variant(f"{cname} {level}, {shuffle}", {"storage.layout._BLOSC": constant})


def chunk(records: int, shape: Shape) -> Variant:
    nbytes = 4 * shape.tokens * shape.width
    return Variant(f"chunks of {records} t5", {"schema._CHUNK_BYTES": records * nbytes})


def granule(records: int) -> Variant:
    return Variant(f"files of {records} records", schema={"granule": records})


def threads(n: int) -> Variant:
    return Variant(f"{n} thread{'s' * (n > 1)}", {"common.threads.count": lambda: n})


def key_chunk(rows: int) -> Variant:
    constants = {f"storage.{module}.KEY_CHUNK": rows for module in KEY_CHUNK_MODULES}
    return Variant(f"key chunks of {rows:,} rows", constants)


CODECS = [
    codec("lz4", 5), codec("lz4", 1), codec("lz4", 9), codec("lz4", 5, "shuffle"),
    codec("lz4", 5, "noshuffle"), codec("blosclz", 5), codec("zstd", 1), codec("zstd", 3),
]  # fmt: skip
BFLOAT16 = [replace(v, schema={"precision": "bfloat16"}) for v in CODECS]
TABLES: dict[str, tuple[Shape, int, list[Variant]]] = {
    "Codec, [17, 4096], float32": (SHORT, 400, CODECS),
    "Codec, [17, 4096], bfloat16": (SHORT, 400, BFLOAT16),
    "Codec, [512, 4096], float32": (LONG, 26, CODECS[:4]),
    "Records per inner chunk, [17, 4096]": (SHORT, 400, [chunk(n, SHORT) for n in (1, 2, 4, 8)]),
    "Records per file, [17, 4096]": (SHORT, 400, [granule(n) for n in (32, 8, 16, 64, 128, 400)]),
    "Records per file, [512, 4096]": (LONG, 26, [granule(n) for n in (16, 4, 8, 26)]),
    "Threads, [17, 4096]": (SHORT, 400, [threads(n) for n in (2, 1, 3, 4, 8)]),
    "Threads, [512, 4096]": (LONG, 26, [threads(n) for n in (2, 1, 3, 4, 8)]),
}
KEY_CHUNKS = [key_chunk(n) for n in (16384, 1024, 4096, 65536)]
HEAD = ["", "bytes a record", "files", "append", "first 4", "64 scattered", "scan"]

KEY_HEAD = ["", "bytes of keys a record", "append", "query of a round", "query of all"]


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Make `variant` hold, with pools of threads of its own."""
    with ExitStack() as stack:
        for name, value in variant.constants.items():
            stack.enter_context(patch(f"fedgfe_store.{name}", value))
        pools._forget()
        yield
    pools._forget()


def append(store: EmbeddingStore, data: Round) -> None:
    with store.append(node=data.node, round=data.number) as batch:
        keys = {"split": data.split, "class_name": data.class_name, "index": data.index}
        batch.add(**keys, t5=data.t5, clip=data.clip)


def measure(variant: Variant, shape: Shape, rounds: list[Round], folder: Path) -> list[float]:
    """Return the figures of `HEAD` for one variant."""
    schema = Schema.flux(shape.tokens, width=shape.width, clip=(shape.clip,), **variant.schema)
    with applied(variant):
        store = EmbeddingStore.create(folder / "s.zarr", schema)
        appended = min([timed(partial(append, store, data)) for data in rounds][1:])
        nbytes, files = size(store.path)
        rows = np.random.default_rng(3).permutation(sum(map(len, rounds)))[:64]
        path = store.path
        found = [
            nbytes / len(store),
            files,
            appended,
            timed(lambda: read(EmbeddingStore.open(path).select(round=1).take(slice(4)))),
            timed(lambda: read(EmbeddingStore.open(path).select().take(rows))),
            timed(lambda: [b["t5"].sum() for b in EmbeddingStore.open(path).select().batches(32)]),
        ]
    shutil.rmtree(folder / "s.zarr")
    return found


def read(selection: Any) -> None:
    selection.read("t5")
    selection.read("clip")


def measure_keys(variant: Variant, folder: Path) -> list[float]:
    """Return seconds of one more small append, and of queries, at 20,000 rows."""
    schema = Schema.flux(1, width=8, clip=(4,), granule=400)
    names, numbers = ["dog", "cat"] * 200, list(range(400))
    t5, clip = np.ones((400, 1, 8), np.float32), np.ones((400, 4), np.float32)
    with applied(variant):
        store = EmbeddingStore.create(folder / "s.zarr", schema)
        seconds = [
            timed(partial(append, store, Round(n, t5, clip, names, numbers))) for n in range(50)
        ]
        path = store.path
        query = timed(lambda: len(EmbeddingStore.open(path).select(class_name="dog", round=7)))
        every = timed(lambda: len(EmbeddingStore.open(path).select(class_name="dog")))
        nbytes = sum(size(path / n)[0] for n in store._snapshot.group.key_names)
        found = [nbytes / len(store), float(np.mean(seconds[-10:])), query, every]
    shutil.rmtree(folder / "s.zarr")
    return found


def rows_of(
    head: list[str], variants: list[Variant], repeats: int, one: Callable[[Variant], list[float]]
) -> list[list[str]]:
    """Measure the variants in turn, `repeats` times, and return the best figures as text."""
    taken: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            taken[variant.name].append(one(variant))
    best = {name: np.min(each, axis=0) for name, each in taken.items()}
    first = best[variants[0].name]
    return [[name, *map(cell, head[1:], figures, first)] for name, figures in best.items()]


def cell(head: str, value: float, base: float) -> str:
    if head.startswith(("bytes", "files")):
        shown = f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.1f}"
    else:
        shown = f"{value * 1e3:,.1f} ms"
    return f"{shown} ({value / base:.2f})"


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default="benchmarks/results", show_default=True
)
def main(repeats: int, output: Path) -> None:
    """Measure every table, and write them."""
    torch.set_num_threads(1)
    parts = ["# The defaults of the format beside others\n\nIn brackets: times the first row's."]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, (shape, records, variants) in TABLES.items():
            click.echo(title, err=True)
            rounds = [make_round(shape, number, records) for number in range(3)]
            one = partial(measure, shape=shape, rounds=rounds, folder=folder)
            rows = rows_of(HEAD, variants, repeats, one)
            parts += [f"## {title}", table(HEAD, rows)]
        click.echo("Key columns", err=True)
        rows = rows_of(KEY_HEAD, KEY_CHUNKS, repeats, lambda v: measure_keys(v, folder))
        parts += ["## Key columns, 20,000 rows", table(KEY_HEAD, rows)]
    output.mkdir(parents=True, exist_ok=True)
    (output / "defaults.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())
