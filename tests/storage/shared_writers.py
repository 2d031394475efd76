"""Writers of a shared store, each a process of its own: what they were told, and what is there."""

from __future__ import annotations

import fcntl
import random
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import values
from processes import started

from fedgfe_store import EmbeddingStore

RECORDS = 3


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


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
