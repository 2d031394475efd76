"""Parts of a run: which records each of several processes renders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import RecordKey

_PARTS = re.compile(r"([0-9]+)/([0-9]+)")
_AUTO = re.compile(r"auto/([0-9]+)")


@dataclass(frozen=True)
class Shard:
    """One of `count` disjoint parts of any selection.

    Parameters
    ----------
    index : int
        Which part, from 0.
    count : int
        Number of parts.

    Raises
    ------
    SchemaMismatchError
        Unless ``0 <= index < count``.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise _not_a_shard(str(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``i/n``, such as ``0/4``.

        Raises
        ------
        SchemaMismatchError
            If it is anything else, or not ``i < n``.
        """
        found = _PARTS.fullmatch(text)
        if not found:
            raise _not_a_shard(text)
        return cls(int(found[1]), int(found[2]))

    def holds(self, key: RecordKey) -> bool:
        """Tell whether a record, with all its images, belongs to this shard.

        It depends on the key alone: not on the other records, nor on what is done.
        """
        return self.count == 1 or shard_of(key, self.count) == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)
"""The one part of a run that is not split."""


def shard_of(key: RecordKey, count: int) -> int:
    """Give the index of the shard of `count` that a record belongs to, the same for ever."""
    node, split, name = (json.dumps(text) for text in (key.node, key.split, key.class_name))
    return _hash(node, key.round, split, name, key.index) % count


def parts_of(keys: Iterable[RecordKey], count: int) -> list[int]:
    """Give the indices of the shards of `count` that any of the records belongs to."""
    return sorted({shard_of(key, count) for key in keys})


def places_of(columns: Mapping[str, np.ndarray], shard: Shard) -> np.ndarray:
    """Tell which of many records belong to a shard, without an object for each of the others.

    Parameters
    ----------
    columns : mapping of str to ndarray
        Key columns of the records.
    shard : Shard
        Which part.

    Returns
    -------
    ndarray of int64
        Places of the records, as `Shard.holds` of their keys says.
    """
    n, count, index = len(columns["index"]), shard.count, shard.index
    if count == 1:
        return np.arange(n)
    texts = (columns[name].tolist() for name in ("node", "split", "class_name"))
    nodes, splits, names = (_quoted(values) for values in texts)
    rounds, indices = (columns[name].tolist() for name in ("round", "index"))
    keys = zip(nodes, rounds, splits, names, indices, strict=True)
    return np.array([i for i, key in enumerate(keys) if _hash(*key) % count == index], np.int64)


def _quoted(texts: list[str]) -> Iterator[str]:
    """Give each text as JSON has it; most are the same as many others."""
    known = {text: json.dumps(text) for text in set(texts)}
    return map(known.__getitem__, texts)


def _hash(node: str, round_: int, split: str, name: str, index: int) -> int:
    """Hash a key whose texts are JSON already: as JSON, its fields in alphabetical order."""
    canonical = (
        f'{{"class_name":{name},"index":{index},"node":{node},"round":{round_},"split":{split}}}'
    )
    return xxhash.xxh3_64_intdigest(canonical.encode("ascii"))


@dataclass(frozen=True)
class AskedPart:
    """The part that a user asks for: one, or what the place in a SLURM array says.

    Parameters
    ----------
    shard : Shard or None
        The part itself, such as ``3/8``; then the environment does not matter.
    array : bool
        Whether each task of a SLURM array is a part: ``auto``.
    count : int or None
        Parts of the array: ``auto/8``. Without it the array itself has to show its size.
    """

    shard: Shard | None = None
    array: bool = False
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``i/n``, ``auto`` or ``auto/n``.

        Raises
        ------
        SchemaMismatchError
            If it is anything else.
        """
        if text == "auto":
            return cls(array=True)
        found = _AUTO.fullmatch(text)
        if found and int(found[1]):
            return cls(array=True, count=int(found[1]))
        return cls(Shard.parse(text))


def detect_shard(environ: Mapping[str, str], asked: AskedPart | None = None) -> tuple[Shard, str]:
    """Tell which of several processes this one is.

    The processes of torchrun, accelerate or srun are parts. The tasks of a SLURM array are only
    where that is asked for, since an array may as well count nodes, rounds or settings; then the
    tasks and, within each, its processes together make up the parts.

    Parameters
    ----------
    environ : mapping
        Such as `os.environ`.
    asked : AskedPart, optional
        What the user asks for.

    Returns
    -------
    shard : Shard
        ``0/1`` where nothing says that there are several.
    reason : str
        The variables that say so, for the user.

    Raises
    ------
    SchemaMismatchError
        If a variable is malformed, or the size of an array is asked for and not known.
    """
    asked = asked or AskedPart()
    if asked.shard is not None:
        return asked.shard, "asked for"
    shard, reasons = WHOLE, []
    task = _array_task(environ, asked.count) if asked.array else None
    for found in (task, _process(environ)):
        if found is not None:
            part, reason = found
            shard = _within(shard, part)
            reasons.append(reason)
    return shard, ", ".join(reasons) or "one process"


def in_array(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a SLURM array, or may be."""
    given = bool(environ.get("SLURM_ARRAY_TASK_ID"))
    return given and environ.get("SLURM_ARRAY_TASK_COUNT") != "1"


def local_device(environ: Mapping[str, str], count: int) -> int | None:
    """Choose among the devices that this process sees.

    Parameters
    ----------
    environ : mapping
        Such as `os.environ`; LOCAL_RANK counts, else SLURM_LOCALID.
    count : int
        Number of devices that are visible.

    Returns
    -------
    int or None
        Number of the device; None where nothing says which.

    Raises
    ------
    SchemaMismatchError
        If the variable is malformed.
    """
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environ.get(name) and count:
            return _whole(environ, name) % count
    return None


def _within(outer: Shard, inner: Shard) -> Shard:
    return Shard(outer.index * inner.count + inner.index, outer.count * inner.count)


def _array_task(environ: Mapping[str, str], parts: int | None) -> tuple[Shard, str] | None:
    if not environ.get("SLURM_ARRAY_TASK_ID"):
        if parts is None:
            return None
        raise SchemaMismatchError(
            f"SLURM_ARRAY_TASK_ID: expected the number of a task for --part auto/{parts}, got "
            f"nothing; outside an array --part i/{parts} names the part"
        )
    if parts is not None:
        return _task_of(environ, parts)
    names = [f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "MIN", "MAX", "COUNT", "STEP")]
    task, first, last, count, step = (_whole(environ, n) if environ.get(n) else None for n in names)
    step = step or 1
    if task is None or first is None or last is None or count is None:
        missing = [name for name in names[1:4] if not environ.get(name)]
        raise _unknown_array(f"{missing[0]} is not set")
    position, beside = divmod(task - first, step)
    if beside or last - first != step * (count - 1) or not 0 <= position < count:
        raise _unknown_array(f"{count} tasks from {first} to {last} leave gaps")
    return Shard(position, count), f"SLURM_ARRAY_TASK_ID {task} of {first}-{last}"


def _task_of(environ: Mapping[str, str], parts: int) -> tuple[Shard, str]:
    """Take the task's own number for that of the part: also where only some tasks are queued."""
    task = _whole(environ, "SLURM_ARRAY_TASK_ID")
    if task >= parts:
        raise SchemaMismatchError(
            f"SLURM_ARRAY_TASK_ID: expected less than {parts} for --part auto/{parts}, got {task}; "
            f"the tasks are numbered from 0, as in --array=0-{parts - 1}"
        )
    return Shard(task, parts), f"SLURM_ARRAY_TASK_ID {task} of {parts} parts"


def _process(environ: Mapping[str, str]) -> tuple[Shard, str] | None:
    rank = _place(environ, "RANK", "WORLD_SIZE")
    # Only srun sets the number of a step's tasks. The batch script itself is no step: it has
    # SLURM_PROCID=0 and SLURM_NTASKS=4 while it is the only process.
    task = None
    if environ.get("SLURM_STEP_NUM_TASKS"):
        task = _place(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if rank is None or task is None:
        return rank or task
    if _each_task_launched_its_own(environ, rank[0], task[0]):
        return _within(task[0], rank[0]), f"{task[1]}, {rank[1]}"
    return rank


def _each_task_launched_its_own(environ: Mapping[str, str], rank: Shard, task: Shard) -> bool:
    """Tell ``srun torchrun --standalone`` from ranks that number the tasks of srun."""
    if task.count == 1 or not environ.get("LOCAL_WORLD_SIZE"):
        return False
    if _whole(environ, "LOCAL_WORLD_SIZE") != rank.count:
        return False
    nodes = next((n for n in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if environ.get(n)), None)
    several = nodes is not None and _whole(environ, nodes) > 1
    return several or "TORCHELASTIC_RUN_ID" in environ


def _place(environ: Mapping[str, str], index: str, count: str) -> tuple[Shard, str] | None:
    if not environ.get(index) and not environ.get(count):
        return None
    for name, other in ((index, count), (count, index)):
        if not environ.get(name):
            raise SchemaMismatchError(f"{name}: expected beside {other}, got nothing; {_HINT}")
    part, parts = _whole(environ, index), _whole(environ, count)
    if part >= parts:
        raise SchemaMismatchError(f"{index}: expected less than {count} {parts}, got {part}")
    return Shard(part, parts), f"{index} {part} of {count} {parts}"


_HINT = "--part i/n goes before the environment"


def _whole(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdecimal()):
        raise SchemaMismatchError(f"{name}: expected a whole number, got {value!r}; {_HINT}")
    return int(value)


def _not_a_shard(text: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"part: expected i/n with 0 <= i < n, such as 0/4, or auto, got {text!r}"
    )


def _unknown_array(why: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"SLURM_ARRAY_TASK_ID: expected an array such as 0-7, whose size N is known, but {why}; "
        "pass --part auto/N, or $SLURM_ARRAY_TASK_ID/N"
    )
