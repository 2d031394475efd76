"""CPU time of picking key columns out of large stores: in order, thinned out, and shuffled.

    python benchmarks/key_columns.py [--rows 1000000,10000000]

The columns lie in memory, as after a first look at them, so that picking alone is timed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.storage.layout import KEY_CHUNK
from fedgfe_store.storage.snapshot import Snapshot


def snapshot_of(folder: Path, rows: int) -> Snapshot:
    """A store's state whose columns round and class_name are in memory, of any length."""
    snapshot = EmbeddingStore.create(folder / f"{rows}.zarr", Schema.flux(3)).snapshot
    assert isinstance(snapshot, Snapshot)
    rounds = np.arange(rows, dtype=np.int32)
    names = np.array([f"class {i}" for i in range(KEY_CHUNK)], np.dtypes.StringDType())
    for start in range(0, rows, KEY_CHUNK):
        part = rounds[start : start + KEY_CHUNK]
        snapshot.mend({("round", start // KEY_CHUNK): part})
        snapshot.mend({("class_name", start // KEY_CHUNK): names[: len(part)]})
    return snapshot


@click.command()
@click.option("--rows", default="1000000,10000000", show_default=True)
def main(rows: str) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for n in map(int, rows.split(",")):
            snapshot = snapshot_of(Path(name), n)
            wanted = {
                "all": np.arange(n),
                "every 10th": np.arange(0, n, 10),
                "shuffled": rng.permutation(n),
            }
            for column in ("round", "class_name"):
                for title, picked in wanted.items():
                    start = time.process_time()
                    values = snapshot.column_at(column, picked)
                    seconds = time.process_time() - start
                    if column == "round":
                        assert (values == picked).all()
                    click.echo(f"{n:>12,} rows   {column:<11}{title:<12}{seconds:7.3f} CPU s")


if __name__ == "__main__":
    main()
