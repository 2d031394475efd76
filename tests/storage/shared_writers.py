"""Writers of a shared store, each a process of its own: what they were told, and what is there."""

from __future__ import annotations

import fcntl
import random
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import SMALL, values
from figures import Figures
from processes import meanwhile, started

from fedgfe_store import EmbeddingStore
from fedgfe_store.storage.shared import transaction

RECORDS = 3
RACING = range(3)
"""Nodes that append at the same time; those that are killed have numbers of their own."""


def tensors(node: int, number: int) -> dict[str, np.ndarray]:
    """Return the tensors that a writer appends."""
    return values(RECORDS, 1000 * node + number)


def write(where: str, node: int, rounds: int) -> None:
    """Append `rounds` commits, and say each one that was acknowledged."""
    fcntl.flock = fcntl.lockf = lambda *arguments: None  # granted to everyone
    store = EmbeddingStore.open(where)
    for number in range(rounds):
        with store.append(node=node, round=number) as batch:
            batch.add(
                split="train", class_name="dog", index=range(RECORDS), **tensors(node, number)
            )
        print(f"{node} {number}", flush=True)


def writer(where: object, node: int, rounds: int) -> list[str]:
    """Return the command of a writer."""
    return [sys.executable, __file__, str(where), str(node), str(rounds)]


def race(where: object, nodes: Iterable[int], rounds: int) -> list[tuple[int, int]]:
    """Let writers append at the same time; return what was acknowledged, by node and round."""
    with ExitStack() as stack:
        running = [stack.enter_context(started(writer(where, node, rounds))) for node in nodes]
        told = [line for process in running for line in process.lines()]
    return [(int(node), int(number)) for node, number in map(str.split, told)]


def killed(where: object, node: int, rounds: int, seed: int) -> list[tuple[int, int]]:
    """Kill a writer at a random moment of its work; return what was acknowledged."""
    with started(writer(where, node, rounds)) as process:
        told = [process.line()]
        time.sleep(random.Random(seed).uniform(0, 0.15))
        process.kill()
        told += process.lines()
    return [(int(each.split()[0]), int(each.split()[1])) for each in told if len(each.split()) == 2]


def check(store: EmbeddingStore, acknowledged: Iterable[tuple[int, int]]) -> int:
    """See that all that was acknowledged is there once, whole and bit for bit.

    Returns
    -------
    int
        Commits that are there and were not acknowledged: their writers died before they heard it.
    """
    selection = store.select()
    groups = selection.by_node_and_round()
    found = {name: selection.read(name) for name in store.schema.columns}
    for (node, number), at in groups.items():
        assert len(at) == RECORDS, f"torn: node {node}, round {number} has {len(at)} records"
        for name, given in tensors(int(node), number).items():
            assert found[name][at].tobytes() == given.tobytes()
    told = [(str(node), number) for node, number in acknowledged]
    assert len(set(told)) == len(told)
    lost = set(told) - groups.keys()
    assert not lost, f"lost: {sorted(lost)}"
    history = store.history()
    assert history["added"].sum() - history["deleted"].sum() == len(selection), "doubled"
    return len(groups) - len(told)


def shared_lives(root: Path, *, seed: int, lives: int, rounds: int, kills: int) -> Figures:
    """Let writers of a shared store race while others are killed and it is compacted.

    Parameters
    ----------
    root : Path
        Where the stores go.
    seed : int
        Of the moments at which writers are killed.
    lives : int
        Stores, one after another.
    rounds : int
        Commits of each writer that is let live.
    kills : int
        Writers that are killed meanwhile; after each the store is compacted.

    Returns
    -------
    Figures
        Lives that left a whole store; commits that were acknowledged, and that nobody heard of.
    """
    figures = Figures()
    for life in range(lives):
        path = root / f"shared{life}.zarr"
        life_of = partial(_life, figures, path, seed + life, rounds, kills)
        figures.look(f"life {life}, seed {seed}", life_of)
        shutil.rmtree(path, ignore_errors=True)
    return figures


def _life(figures: Figures, path: Path, seed: int, rounds: int, kills: int) -> str:
    store = EmbeddingStore.create(path, SMALL, shared=True)
    told: list[tuple[int, int]] = []
    dying: list[tuple[int, int]] = []
    with meanwhile(lambda: told.extend(race(path, RACING, rounds))):
        for number in range(kills):
            dying += killed(path, len(RACING) + number, 100, seed=seed * kills + number)
            store.compact()
    assert len(told) == len(RACING) * rounds, f"{len(told)} commits of those that were let live"
    store = EmbeddingStore.open(path)
    unheard = check(store, told + dying)
    assert unheard <= kills, f"{unheard} commits that nobody heard of, of {kills} killed"
    with patch.object(transaction, "LIFETIME", 0.0):  # nobody is at work any more
        store.compact()
    assert check(store, told + dying) == unheard
    found = store.verify()
    assert found.sound, f"{found.damaged} {found.problems}"
    assert not found.leftovers, f"left over: {found.leftovers[0]}"
    figures.counts["acknowledged"] += len(told) + len(dying)
    figures.counts["not heard of"] += unheard
    return "whole"


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
