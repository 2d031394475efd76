"""Kill writers at random moments, and see whether a store loses anything.

    python tools/soak.py [--kills 200] [--seed 0] [--folder DIR]

A child process appends, replaces, deletes and compacts, and says on its standard output what it
begins and what it has finished. The parent kills it with SIGKILL, follows the same operations on
a plain dict, and compares: a finished operation must be there whole, the one in flight whole or
not at all. Then it writes as the next writer would, and looks for what was left lying about.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from fedgfe_store import EmbeddingStore, Schema, _append

SCHEMA = Schema.flux(3, width=8, clip=(4,), granule=4)
CLASSES = ("dog", "cat", "drum")
ROUNDS = 12
BUFFER_BYTES = 2000
"""So small that an append of many records writes while it gathers."""

Key = tuple[str, int, str, int]
Model = dict[Key, int]
"""Node, round, class and index of each live record, and the seed of its tensors."""


class Lost(Exception):
    """The store is not what the acknowledged operations made it."""


def tensors(seeds: list[int]) -> dict[str, np.ndarray]:
    """Return the tensors of one record per seed."""
    made: dict[str, list[np.ndarray]] = {name: [] for name in SCHEMA.columns}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for name, shape in SCHEMA.columns.items():
            made[name].append(rng.standard_normal(shape, dtype=np.float32))
    return {name: np.stack(arrays) for name, arrays in made.items()}


def operations(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield operations without end, drawn from `rng`."""
    while True:
        kind = rng.choices(["append", "replace", "delete", "compact", "reopen"], [9, 4, 4, 2, 1])[0]
        made: dict[str, Any] = {"kind": kind}
        if kind in ("append", "replace"):
            made |= {"node": str(rng.randrange(3)), "round": rng.randrange(ROUNDS)}
            made["class_name"] = rng.choice(CLASSES)
            made["index"] = sorted(rng.sample(range(40), rng.choice([1, 3, 4, 11, 30])))
            made["seeds"] = [rng.randrange(2**32) for _ in made["index"]]
        elif kind == "delete":
            made |= {"round": rng.randrange(ROUNDS), "class_name": rng.choice([None, *CLASSES])}
        yield made


def perform(store: EmbeddingStore, made: dict[str, Any]) -> EmbeddingStore:
    """Do one operation; an append leaves out the keys that are there."""
    if made["kind"] == "reopen":
        return EmbeddingStore.open(store.path)
    if made["kind"] == "compact":
        store.compact()
    elif made["kind"] == "delete":
        store.delete(round=made["round"], class_name=made["class_name"])
    else:
        if_exists: Any = "replace" if made["kind"] == "replace" else "skip"
        given = tensors(made["seeds"])
        with store.append(node=made["node"], round=made["round"], if_exists=if_exists) as batch:
            for i, index in enumerate(made["index"]):
                one = {name: values[i] for name, values in given.items()}
                batch.add(split="train", class_name=made["class_name"], index=index, **one)
    return store


def follow(model: Model, made: dict[str, Any]) -> Model:
    """Return what `model` becomes by one operation."""
    after = dict(model)
    if made["kind"] == "delete":
        for key in model:
            if key[1] == made["round"] and made["class_name"] in (None, key[2]):
                del after[key]
    elif made["kind"] in ("append", "replace"):
        for index, seed in zip(made["index"], made["seeds"], strict=True):
            key = made["node"], made["round"], made["class_name"], index
            if made["kind"] == "replace" or key not in model:
                after[key] = seed
    return after


def work(path: Path, seed: int) -> None:
    """Be the child: operate until killed, saying what begins and which commit it led to."""
    _append._BUFFER_BYTES = BUFFER_BYTES
    store = EmbeddingStore.open(path)
    for made in operations(random.Random(seed)):
        print(json.dumps(made), flush=True)
        store = perform(store, made)
        print(store.commit, flush=True)


@dataclass
class Soak:
    """The parent: the store, the model of it, and what has been counted."""

    path: Path
    rng: random.Random
    model: Model = field(default_factory=dict)
    commit: int = 0
    kills: int = 0
    operations: int = 0
    kept: int = 0
    undone: int = 0
    leftovers: int = 0

    def run(self, kills: int) -> None:
        """Kill `kills` writers and check after each."""
        for _ in range(kills):
            self._check(self._killed())
            self._write_on()
            self.kills += 1

    def _killed(self) -> dict[str, Any] | None:
        """Start a child, kill it, follow what it finished; return what it was at."""
        command = [sys.executable, __file__, "--child", str(self.path), "--seed"]
        child = subprocess.Popen(
            [*command, str(self.rng.randrange(2**32))], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(self.rng.uniform(0, self.rng.choice([0.1, 0.5, 2.0])))
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().splitlines()
        child.stdout.close()
        if child.wait() != -signal.SIGKILL:
            raise Lost(f"the writer ended by itself, exit code {child.returncode}")
        return self._followed(lines)

    def _followed(self, lines: list[str]) -> dict[str, Any] | None:
        begun: dict[str, Any] | None = None
        for line in lines:
            said = json.loads(line) if line.strip() else None
            if isinstance(said, dict):
                begun = said
            elif said is not None and begun is not None:
                self.model, self.commit, begun = follow(self.model, begun), said, None
                self.operations += 1
        return begun

    def _check(self, flying: dict[str, Any] | None) -> None:
        """Compare a fresh reader with the model, with or without the operation in flight."""
        store = EmbeddingStore.open(self.path)
        found = store.verify()
        self.leftovers += bool(found.leftovers)
        if not found.sound:
            raise Lost(f"verify: {found}")
        if store.commit not in (self.commit, self.commit + (flying is not None)):
            raise Lost(f"acknowledged commit {self.commit}, found {store.commit}")
        if flying is not None:
            published = store.commit > self.commit
            self.kept, self.undone = self.kept + published, self.undone + (not published)
            self.model = follow(self.model, flying) if published else self.model
        self.commit = store.commit
        self._compare(store)
        compare_plain(store)

    def _compare(self, store: EmbeddingStore) -> None:
        selection = store.select()
        keys = [(k.node, k.round, k.class_name, k.index) for k in selection.keys()]
        if sorted(keys) != sorted(self.model) or len(store) != len(self.model):
            wrong = set(keys) ^ set(self.model)
            raise Lost(f"commit {store.commit}: {len(wrong)} records too many or few: {wrong}")
        expected = tensors([self.model[key] for key in keys]) if keys else {}
        for name, values in expected.items():
            if not np.array_equal(selection.read(name), values):
                raise Lost(f"commit {store.commit}: {name} differs")

    def _write_on(self) -> None:
        """Be the next writer, and find nothing left over after that."""
        made = next(m for m in operations(self.rng) if m["kind"] == "replace")
        store = perform(EmbeddingStore.open(self.path), made)
        self.model, self.commit = follow(self.model, made), self.commit + 1
        self.operations += 1
        if store.commit != self.commit:
            raise Lost(f"the next writer came to commit {store.commit}, not {self.commit}")
        rest = [f for f in self.path.rglob("*") if f.name.endswith((".tmp", ".partial", "pending"))]
        granules = store._snapshot.point.records // SCHEMA.granule
        for name in SCHEMA.columns:
            tail = [f for f in (self.path / name).glob("c.*") if number_of(f) >= granules]
            rest += tail
        if rest:
            raise Lost(f"left over after commit {store.commit}: {rest}")


def number_of(file: Path) -> int:
    """Return the granule of a tensor file."""
    return int(file.name.split(".")[1])


def compare_plain(store: EmbeddingStore) -> None:
    """Compare with what any Zarr reader sees under the mask of the README."""
    import xarray as xr

    dataset = xr.open_zarr(store.path)
    commit = dataset.attrs["fedgfe_store"]["commit_point"]["commit"]
    created, deleted = dataset["created_in"].to_numpy(), dataset["deleted_in"].to_numpy()
    visible = (created > 0) & (created <= commit) & ~((deleted > 0) & (deleted <= commit))
    rows, selection = np.flatnonzero(visible), store.select()
    for name in ("node", "round", "class_name", "index"):
        if dataset[name].to_numpy()[rows].tolist() != selection.records[name].tolist():
            raise Lost(f"commit {commit}: xarray sees another {name}")
    if not np.array_equal(dataset["t5"].to_numpy()[rows], selection.read("t5")):
        raise Lost(f"commit {commit}: xarray sees another t5")


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where; by default a temporary one."
)
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
def main(kills: int, seed: int, folder: Path | None, child: Path | None) -> None:
    """Kill writers of one small store and print how much was lost."""
    if child is not None:
        return work(child, seed)
    where = Path(tempfile.mkdtemp(prefix="soak")) if folder is None else folder
    store = EmbeddingStore.create(where / f"soak{seed}.zarr", SCHEMA)
    _append._BUFFER_BYTES = BUFFER_BYTES
    soak, start, lost = Soak(store.path, random.Random(seed)), time.monotonic(), 0
    try:
        soak.run(kills)
        if folder is None:
            shutil.rmtree(where)
    except Exception as error:
        click.echo(f"{store.path}, seed {seed}: {type(error).__name__}: {error}", err=True)
        lost = 1
        raise
    finally:
        click.echo(
            f"kills {soak.kills}, commits {soak.commit}, operations {soak.operations}, "
            f"in flight: kept {soak.kept}, undone {soak.undone}, found files of a dead writer "
            f"{soak.leftovers} times, records {len(soak.model)}, "
            f"{time.monotonic() - start:.0f} s, lost {lost}"
        )


if __name__ == "__main__":
    main()
