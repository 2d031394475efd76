"""Kill writers at random moments of a long life, and see whether the store loses anything.

A child process appends, replaces, deletes and compacts, and writes down what it begins and what it
has finished. The parent kills it, follows the same operations on a plain dict, and compares: a
finished operation must be there whole, the one in flight whole or not at all.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from children import Child, in_child
from figures import Figures
from operations import PATIENCE, STORE, check_clean, plainly, small_buffer
from system_calls import no_flushes

from fedgfe_store import EmbeddingStore, Schema

SCHEMA = Schema.flux(3, width=8, clip=(4,), granule=4)
CLASSES = ("dog", "cat", "drum")
ROUNDS = 12

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
        store.compact(timeout=PATIENCE)
    elif made["kind"] == "delete":
        filters = {"round": made["round"], "class_name": made["class_name"]}
        store.delete(timeout=PATIENCE, **filters)
    else:
        if_exists: Any = "replace" if made["kind"] == "replace" else "skip"
        given = tensors(made["seeds"])
        options = {"if_exists": if_exists, "timeout": PATIENCE}
        with store.append(node=made["node"], round=made["round"], **options) as batch:
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


def work(path: Path, said: Path, seed: int) -> None:
    """Be the child: operate until killed, saying what begins and which commit it led to."""
    with no_flushes(), small_buffer(2000), said.open("w") as out:
        store = EmbeddingStore.open(path)
        for made in operations(random.Random(seed)):
            print(json.dumps(made), file=out, flush=True)
            store = perform(store, made)
            print(store.commit, file=out, flush=True)


@dataclass
class _Life:
    """The parent: the store, the model of it, and what has been counted."""

    path: Path
    rng: random.Random
    figures: Figures = field(default_factory=Figures)
    model: Model = field(default_factory=dict)
    commit: int = 0

    def kill(self, longest: float) -> str:
        """Kill a writer after a few operations and up to `longest` seconds; say what became."""
        seed, said = self.rng.randrange(2**32), self.path.with_name("said")
        said.write_text("")
        child = Child(lambda: work(self.path, said, seed))
        # At least so many lines, two for each operation that was finished, however slow it is.
        lines = self.rng.choice([1, 3, 5, 9])
        while said.read_text().count("\n") < lines and not child.ended():
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, longest))
        child.kill()
        child.result()
        if not child.killed:
            raise Lost("the writer had ended by itself")
        flying = self._followed(said.read_text().splitlines())
        with no_flushes():
            became = self._check(flying)
            self._write_on()
        return became

    def _followed(self, lines: list[str]) -> dict[str, Any] | None:
        begun: dict[str, Any] | None = None
        for line in lines:
            said = json.loads(line) if line.endswith("}") or line.isdigit() else None
            if isinstance(said, dict):
                begun = said
            elif said is not None and begun is not None:
                self.model, self.commit, begun = follow(self.model, begun), said, None
                self.figures.counts["operations"] += 1
        return begun

    def _check(self, flying: dict[str, Any] | None) -> str:
        """Compare a fresh reader with the model, with or without the operation in flight."""
        store, became = EmbeddingStore.open(self.path), "nothing in flight"
        found = store.verify()
        self.figures.counts["found files of a dead writer"] += bool(found.leftovers)
        if not found.sound:
            raise Lost(f"verify: {found}")
        if store.commit not in (self.commit, self.commit + (flying is not None)):
            raise Lost(f"acknowledged commit {self.commit}, found {store.commit}")
        if flying is not None:
            became = "kept" if store.commit > self.commit else "undone"
            self.model = follow(self.model, flying) if became == "kept" else self.model
        self.commit = store.commit
        self._compare(store)
        return became

    def _compare(self, store: EmbeddingStore) -> None:
        selection = store.select()
        keys = [(k.node, k.round, k.class_name, k.index) for k in selection.keys()]
        if sorted(keys) != sorted(self.model) or len(store) != len(self.model):
            wrong = set(keys) ^ set(self.model)
            raise Lost(f"commit {store.commit}: {len(wrong)} records too many or few: {wrong}")
        expected = tensors([self.model[key] for key in keys]) if keys else {}
        for name, values in expected.items():
            if not np.array_equal(selection.read(name), values):
                raise Lost(f"commit {store.commit}: other values in {name}")
        if self.figures.counts["tried"] % 4 == 0 and keys:
            seen, t5 = plainly(store.path, SCHEMA), selection.read("t5")
            read = zip(selection.keys(), t5, selection.read("clip"), strict=True)
            if seen != {str(key): a.tobytes() + b.tobytes() for key, a, b in read}:
                raise Lost(f"commit {store.commit}: a plain reader sees something else")

    def _write_on(self) -> None:
        """Write as the next writer would, and see that nothing is left lying about."""
        made = next(m for m in operations(self.rng) if m["kind"] == "replace")
        store = perform(EmbeddingStore.open(self.path), made)
        self.model, self.commit = follow(self.model, made), self.commit + 1
        if store.commit != self.commit:
            raise Lost(f"the next writer came to commit {store.commit}, not {self.commit}")
        found = store.verify()
        if not found.sound:
            raise Lost(f"verify after the next writer: {found}")
        check_clean(self.path, found.leftovers, compact=False)


def random_kills(root: Path, *, seed: int, most: int, longest: float) -> Figures:
    """Kill `most` writers of one store, each a few operations and up to `longest` seconds later."""
    in_child(lambda: EmbeddingStore.create(root / "random kills" / STORE, SCHEMA).commit)
    life = _Life(root / "random kills" / STORE, random.Random(seed))
    for number in range(most):
        life.figures.look(f"kill {number}", lambda: life.kill(longest))
        if life.figures.faults:  # the model is of no use any more
            break
    with no_flushes():
        store = EmbeddingStore.open(life.path)
        check_clean(life.path, store.verify().leftovers)
    life.figures.counts["commits"] = life.commit
    return life.figures
