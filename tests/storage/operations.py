"""Everything that changes a store, and what the store has to tell before and after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import DamagedDataError, NotFoundError
from fedgfe_store.storage import append

SCHEMA = Schema.flux(2, width=8, clip=(4,), audio=(3, 4), granule=4)
STORE, SOURCE = "s.zarr", "source.zarr"
PATIENCE = 5.0
"""Seconds that a writer waits where nobody else writes: after them the store is stuck."""


def tensors(
    n: int, seed: int, *, audio: bool = True, schema: Schema = SCHEMA
) -> dict[str, np.ndarray]:
    """Return the tensors of `n` records."""
    rng = np.random.default_rng(seed)
    return {
        tensor.name: rng.standard_normal((n, *tensor.shape), np.float32)
        for tensor in schema.tensors
        if audio or not tensor.optional
    }


def put(
    store: EmbeddingStore,
    *,
    node: int | str,
    round: int,
    n: int,
    seed: int,
    audio: bool = True,
    if_exists: Any = "error",
    class_name: str = "dog",
    timeout: float = PATIENCE,
    **notes: Any,
) -> None:
    """Append `n` records with every kind of note, in one commit."""
    with store.append(node=node, round=round, if_exists=if_exists, timeout=timeout) as batch:
        batch.add(
            split="train",
            class_name=class_name,
            index=range(n),
            sample_id=[f"sample {i}, é" for i in range(n)],
            extra=[{"i": i} for i in range(n)],
            timestamp=datetime(2024, 1, 2),
            **tensors(n, seed, audio=audio, schema=store.schema),
            **notes,
        )


def make_base(path: Path) -> None:
    """Make a store that has lived: several commits, replaced and deleted records, thin files."""
    store = EmbeddingStore.create(path, SCHEMA)
    put(store, node=0, round=0, n=5, seed=1)
    put(store, node=1, round=0, n=3, seed=2, audio=False)
    store.delete(node=1, index=[0, 1])
    put(store, node=0, round=0, n=1, seed=3, if_exists="replace")
    put(store, node=2, round=1, n=1, seed=4, class_name="cat")


def make_source(path: Path) -> None:
    """Make a store to merge from."""
    store = EmbeddingStore.create(path, SCHEMA)
    put(store, node=20, round=0, n=3, seed=80)
    put(store, node=21, round=0, n=2, seed=81, audio=False)


Record = tuple[bytes | None, str]
"""The tensors of a record, None where they cannot be read, and all that is noted of it."""


@dataclass(frozen=True)
class Told:
    """What a store tells of itself: each record by its key, and the commits."""

    commit: int
    records: dict[str, Record]
    history: str
    times: tuple[Any, ...] = field(compare=False)

    @property
    def damaged(self) -> set[str]:
        """Keys of the records that cannot be read."""
        return {key for key, record in self.records.items() if record[0] is None}


def told(path: Path) -> Told:
    """Read all that the store at `path` tells."""
    store = EmbeddingStore.open(path)
    history = store.history()
    times = tuple(history["time"].tolist())
    commits = repr(history.drop(columns=["bytes", "time"]).to_dict("list"))
    return Told(store.commit, _records(store), commits, times)


def _records(store: EmbeddingStore) -> dict[str, Record]:
    selection = store.select()
    read = [_values(selection, name) for name in selection.schema.columns]
    notes = selection.records.to_dict("records")
    records: dict[str, Record] = {}
    for key, note, *values in zip(selection.keys(), notes, *read, strict=True):
        whole = b"".join(values) if None not in values else None
        records[str(key)] = whole, repr(sorted(note.items()))
    if len(records) != len(selection) or len(records) != len(store):
        raise AssertionError(f"{len(store)} records, of which {len(records)} differ by key")
    return records


def _values(selection: Any, name: str) -> list[bytes | None]:
    try:
        return [value.tobytes() for value in selection.read(name)]
    except DamagedDataError:
        return [_value(selection, name, i) for i in range(len(selection))]


def _value(selection: Any, name: str, i: int) -> bytes | None:
    try:
        return bytes(selection.take([i]).read(name).tobytes())
    except DamagedDataError:
        return None


def plainly(path: Path, schema: Schema = SCHEMA) -> dict[str, bytes]:
    """Return what `xarray` reads under the README's mask: each record's tensors, by its key."""
    dataset = xr.open_zarr(path, chunks=None)
    commit = dataset.attrs["fedgfe_store"]["commit_point"]["commit"]
    visible = (dataset.created_in > 0) & ~(
        (dataset.deleted_in > 0) & (dataset.deleted_in <= commit)
    )
    seen = dataset.isel(record=np.flatnonzero(visible)).load()
    keys = zip(
        *(seen[name].values for name in ("node", "round", "split", "class_name", "index")),
        strict=True,
    )
    return {
        f"node {node}, round {round_}, split {split}, class {class_name}, index {index}": b"".join(
            seen[name].values[i].tobytes() for name in schema.columns
        )
        for i, (node, round_, split, class_name, index) in enumerate(keys)
    }


def make_version_1(path: Path) -> None:
    """Put a store there that the first release wrote."""
    shutil.copytree(Path(__file__).parents[1] / "data" / "version1.zarr", path)


def make_backup(path: Path) -> None:
    """Put a backup there of the source, which has gone on since."""
    source = path.with_name(SOURCE)
    make_source(source)
    EmbeddingStore.open(source).backup(path)
    EmbeddingStore.open(source).delete(node=20, index=1)
    put(EmbeddingStore.open(source), node=22, round=1, n=2, seed=82, class_name="bird")


Change = Callable[[Path], object]


def _append_records(path: Path) -> None:
    put(EmbeddingStore.open(path), node=7, round=7, n=6, seed=50)


def _append_while_gathering(path: Path) -> None:
    with small_buffer(600), EmbeddingStore.open(path).append(node=8, round=8) as batch:
        for i in range(3):
            there = range(10 * i, 10 * i + 3)
            given = tensors(3, 60 + i) | {"timestamp": datetime(2024, 1, 2)}
            batch.add(split="train", class_name="new class", index=there, **given)


@contextmanager
def small_buffer(nbytes: int) -> Iterator[None]:
    """Let an append write while it gathers, as one of more than 256 MiB does."""
    usual = append._BUFFER_BYTES
    append._BUFFER_BYTES = nbytes
    try:
        yield
    finally:
        append._BUFFER_BYTES = usual


def _replace_records(path: Path) -> None:
    put(EmbeddingStore.open(path), node=0, round=0, n=6, seed=51, if_exists="replace")


def _delete(path: Path) -> None:
    EmbeddingStore.open(path).delete(node=[0, 1], index=range(1, 4))


def _merge(path: Path) -> None:
    EmbeddingStore.open(path).merge(EmbeddingStore.open(path.with_name(SOURCE)))


def _back_up(path: Path) -> None:
    EmbeddingStore.open(path.with_name(SOURCE)).backup(path)


def _identify(path: Path) -> None:
    """Append what only stores of version 2 hold."""
    put(EmbeddingStore.open(path), node=7, round=7, n=2, seed=52, file_id="file é")


def _damage(path: Path) -> None:
    """Change a byte of the file that holds the first records."""
    file = path / "clip" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[2] ^= 255
    file.write_bytes(data)


def _repair(path: Path) -> None:
    found = EmbeddingStore.open(path).verify(repair=True)
    if found.problems:  # is said so, and nothing is changed
        raise DamagedDataError(found.problems[0])


def _nothing(path: Path) -> None:
    """Change nothing."""


@dataclass(frozen=True)
class Operation:
    """A change of the store at a path; `prepare` makes of the usual base what it begins with."""

    change: Change
    prepare: Change = make_base
    damage: Change = _nothing
    after_death_of: str | None = None
    """An operation that another process began, and died of."""
    below: str = "."
    """A folder in which the store lies, and which is not there yet."""
    resumes: bool = False
    """Whether it is for the operation, done again, to finish what a dead process began."""


OPERATIONS = {
    "create": Operation(
        lambda path: EmbeddingStore.create(path, SCHEMA), _nothing, below="new/folders"
    ),
    "append": Operation(_append_records),
    "append while gathering": Operation(_append_while_gathering),
    "replace": Operation(_replace_records),
    "delete": Operation(_delete),
    "compact": Operation(lambda path: EmbeddingStore.open(path).compact()),
    "merge": Operation(_merge),
    "repair": Operation(_repair, damage=_damage),
    "back up": Operation(_back_up, _nothing, resumes=True),
    "back up again": Operation(_back_up, make_backup, resumes=True),
    "append to version 1": Operation(_append_records, make_version_1),
    "upgrade": Operation(lambda path: EmbeddingStore.open(path).upgrade(), make_version_1),
    "append that upgrades": Operation(_identify, make_version_1),
}
_ROLLED_BACK = ("append while gathering", "replace", "delete", "compact", "append to version 1")
OPERATIONS |= {
    f"roll back {name}": Operation(
        lambda path: EmbeddingStore.open(path).delete(node="nobody"),
        OPERATIONS[name].prepare,
        after_death_of=name,
    )
    for name in (*_ROLLED_BACK, "upgrade")
}


def prepare(operation: Operation, root: Path) -> Path:
    """Make the folder `root` with what `operation` begins with; return the store's path."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    path = root / operation.below / STORE
    operation.prepare(path)
    if not (root / SOURCE).exists():
        make_source(root / SOURCE)
    operation.damage(path)
    return path


@dataclass(frozen=True)
class Expected:
    """What the store tells before an operation, None where there is none, and after it.

    `again` does the operation once more: it has to make the store where there is none, and, if it
    `resumes`, to finish what was begun.
    """

    before: Told | None
    after: Told
    again: Change
    resumes: bool = False


def check(path: Path, expected: Expected, *, plain: bool, power_cut: bool = False) -> str:
    """Look at what a crash left as every reader and the next writer would.

    Parameters
    ----------
    path : Path
        The store.
    expected : Expected
        What it may tell: the one or the other.
    plain : bool
        Also compare with what a plain Zarr reader sees, which takes longer.
    power_cut : bool
        Whether arrays' own metadata may be torn, until the next commit.

    Returns
    -------
    str
        ``"before"`` or ``"after"``.

    Raises
    ------
    AssertionError
        If it tells anything else, is not sound, or the next writer changes more than its own.
    """
    try:
        now = told(path)
    except NotFoundError:
        if expected.before is not None:
            raise
        expected.again(path)
        now, found = expected.after, "before"
        assert told(path) == now, "what the next writer makes differs"
    else:
        found = _which(now, expected)
    _verified(path, now, power_cut=power_cut)
    if plain and not now.damaged:
        seen = {key: record[0] for key, record in now.records.items()}
        assert plainly(path) == seen, "a plain reader sees something else"
    if expected.resumes:
        expected.again(path)
        now = told(path)
        assert now == expected.after, "done again, it came to something else"
    put(EmbeddingStore.open(path), node=99, round=9, n=3, seed=99, class_name="later")
    later = _records(EmbeddingStore.open(path))
    assert len(later) == len(now.records) + 3, "the next append lost or added records"
    others = {key: record for key, record in later.items() if not key.startswith("node 99,")}
    assert others == now.records, "the next append changed other records"
    check_clean(path, _verified(path, now))
    return found


def _which(now: Told, expected: Expected) -> str:
    if expected.before is not None:
        known = expected.before.times
        assert now.times[: len(known)] == known, "an earlier commit has another time"
    if now == expected.after:
        return "after"
    assert expected.before is not None, "half a store is there"
    assert now.records == expected.before.records or now.records == expected.after.records, (
        f"commit {now.commit} has other records than before and after"
    )
    assert now == expected.before, f"commit {now.commit} has another history than before and after"
    return "before"


def _verified(path: Path, now: Told, *, power_cut: bool = False) -> tuple[str, ...]:
    """See that `verify` finds what was damaged before, and nothing else; return the leftovers.

    After a `power_cut` it also finds which arrays' metadata other readers cannot rely on.
    """
    found = EmbeddingStore.open(path).verify()
    mended = {name for name in found.problems if "the next commit, or verify --repair" in name}
    assert power_cut or not mended, f"verify: {min(mended)}"
    wrong = [line for line in found.problems if line not in mended]
    assert not wrong, f"verify: {wrong[0]}"
    if power_cut:
        assert len(mended) == sum(not _is_whole(path, name) for name in _arrays(path))
    damaged = {str(record.key) for record in found.damaged}
    assert damaged == now.damaged, f"verify: {len(damaged)} damaged records"
    return found.leftovers


def _arrays(path: Path) -> dict[str, Any]:
    """Return the metadata of the store's arrays, as its `zarr.json` has it."""
    document = json.loads((path / "zarr.json").read_bytes())
    found: dict[str, Any] = document["consolidated_metadata"]["metadata"]
    return found


def _is_whole(path: Path, name: str) -> bool:
    """Whether an array's own metadata is what other readers need: parsed here, and as long."""
    try:
        own = json.loads((path / name / "zarr.json").read_bytes())
    except ValueError:
        return False
    due = _arrays(path)[name]
    long_enough = own["shape"][0] >= due["shape"][0]
    return bool(long_enough) and {**own, "shape": 0} == {**due, "shape": 0}


def check_clean(path: Path, left: tuple[str, ...], *, compact: bool = True) -> None:
    """See that the next writer has cleared what lay about.

    Parameters
    ----------
    path : Path
        The store.
    left : tuple of str
        What `verify` says is left.
    compact : bool
        Let a compaction clear what is its own to clear, files whose records are all dead.
    """
    unneeded = "no record that a reader can reach"
    if compact and any(unneeded in line for line in left):
        EmbeddingStore.open(path).compact(timeout=PATIENCE)
        left = EmbeddingStore.open(path).verify().leftovers
    known = ("but no live record lies there", *([] if compact else [unneeded]))
    lying = [line for line in left if not any(words in line for words in known)]
    assert not lying, f"left over: {lying[0]}"
    half = [file for file in path.rglob("*") if file.name.endswith((".tmp", ".partial"))]
    assert not half, f"left over: {half[0].name}"
