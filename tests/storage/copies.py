"""Copies of a store that is being written: sound, or refused, and never damaged later on."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
from children import Child, in_child
from figures import Figures
from operations import PATIENCE, STORE
from system_calls import no_flushes
from writers import hurry

from fedgfe_store import EmbeddingStore, FedgfeStoreError, Schema

TINY = Schema.flux(1, width=2, clip=(2,), granule=512)
MANY = 17_000
"""Records of which the first lie in another chunk of the key columns than later ones."""


def _put(store: EmbeddingStore, node: str, round: int, n: int) -> None:
    rng = np.random.default_rng(round)
    tensors = {"t5": rng.random((n, 1, 2), np.float32), "clip": rng.random((n, 2), np.float32)}
    with store.append(node=node, round=round, timeout=PATIENCE) as batch:
        batch.add(
            split="train",
            class_name="dog",
            index=range(n),
            timestamp=datetime(2024, 1, 2),
            **tensors,
        )


@cache
def _base(root: Path) -> Path:
    """Make the store that every piece begins with, once."""

    def make() -> None:
        with no_flushes():
            _put(EmbeddingStore.create(root / "base.zarr", TINY), "many", 0, MANY)

    in_child(make)
    return root / "base.zarr"


def _be_busy(path: Path) -> None:
    """Append and delete until killed, so that old rows are marked all the time."""
    store = EmbeddingStore.open(path)
    with no_flushes():
        for number in range(MANY):
            store.delete(node="many", index=range(20 * number, 20 * number + 20))
            _put(store, "busy", number, 3)
            if number % 8 == 7:
                store.compact()


def zarr_json_first(source: Path, dest: Path, rng: random.Random) -> None:
    """Copy the file that says which commit is the latest, and the rest after it."""
    _copy(source, dest, sorted(_files(source), key=lambda file: (len(file.parts), file)))


def in_any_order(source: Path, dest: Path, rng: random.Random) -> None:
    """Copy the files as some tool happens to come across them."""
    files = _files(source)
    rng.shuffle(files)
    _copy(source, dest, files)


def _files(source: Path) -> list[Path]:
    return [
        Path(where, name).relative_to(source)
        for where, _, names in os.walk(source)
        for name in sorted(names)
    ]


def _copy(source: Path, dest: Path, files: list[Path]) -> None:
    for file in files:
        to = dest / file
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source / file, to)
        except FileNotFoundError:  # renamed or removed since it was listed
            to.unlink(missing_ok=True)


def backed_up(source: Path, dest: Path, rng: random.Random) -> None:
    """Copy as the store itself does."""
    EmbeddingStore.open(source).backup(dest)


Copy = Callable[[Path, Path, random.Random], None]


def live_copies(root: Path, copy: Copy, *, seed: int, copies: int, all_sound: bool) -> Figures:
    """Copy a store while a process writes it, and go on writing each copy.

    Parameters
    ----------
    root : Path
        A folder to work in.
    copy : callable
        How: from a path, to a path, with what is to be drawn.
    seed : int
        Of what is drawn.
    copies : int
        How many.
    all_sound : bool
        Whether every copy has to be whole; otherwise one may be refused, with one line.
    """
    figures, rng = Figures(), random.Random(seed)
    source = root / copy.__name__ / STORE
    shutil.copytree(_base(root), source)
    writer = Child(lambda: _be_busy(source))
    try:
        for number in range(copies):
            dest = source.with_name(f"copy{number}.zarr")
            label = f"copy {number}, {copy.__name__}"
            figures.look(label, lambda: _tried(copy, source, dest, rng, all_sound, writer))  # noqa: B023
            shutil.rmtree(dest, ignore_errors=True)
    finally:
        writer.kill()
        if writer.result() is not None:
            figures.faults.append("the writer had stopped")
    return figures


def _tried(
    copy: Copy, source: Path, dest: Path, rng: random.Random, all_sound: bool, writer: Child
) -> str:
    writer.go_on()
    copy(source, dest, rng)
    writer.pause()  # the copy is looked at without it, in half the time
    hurry()  # a copy may hold the claim of the writer, which does not touch it there
    with no_flushes():
        refused = _refused(dest)
        if refused is not None:
            assert "\n" not in refused, f"more than a line: {refused}"
            assert not all_sound, f"refused: {refused}"
            _grows_no_worse(dest, refused)
            return "refused"
        before = _contents(dest)
        _put(EmbeddingStore.open(dest), "later", 1, 1)
        refused = _refused(dest)
        assert refused is None, f"the next append damaged it: {refused}"
        after = _contents(dest)
        assert {key: after.get(key) for key in before} == before, "the next append changed others"
        assert len(after) == len(before) + 1, "the next append lost or added records"
    return "sound"


def _refused(path: Path) -> str | None:
    """Return in one line why the store at `path` is refused; None for a sound one."""
    try:
        found = EmbeddingStore.open(path).verify()
    except FedgfeStoreError as error:
        return str(error)
    named = [*found.problems, *(record.reason for record in found.damaged)]
    return None if found.sound else named[0]


def _grows_no_worse(path: Path, refused: str) -> None:
    """Append to a copy that is refused: refused again, or no worse than before."""
    try:
        before = len(EmbeddingStore.open(path).verify().damaged)
        _put(EmbeddingStore.open(path), "later", 1, 1)
    except FedgfeStoreError:
        return
    after = len(EmbeddingStore.open(path).verify().damaged)
    assert after <= before, f"refused ({refused}), and {after - before} more records damaged later"


def _contents(path: Path) -> dict[str, bytes]:
    selection = EmbeddingStore.open(path).select()
    pairs = zip(selection.keys(), selection.read("t5"), selection.read("clip"), strict=True)
    return {str(key): t5.tobytes() + clip.tobytes() for key, t5, clip in pairs}
