"""Which part of a run is this process's, as SLURM, torchrun, accelerate or srun say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.parts import WHOLE, Part

_AUTO = re.compile(r"auto/([0-9]+)")


@dataclass(frozen=True)
class AskedPart:
    """The part that a user asks for: one, or what the place in a SLURM array says.

    Parameters
    ----------
    part : Part or None
        The part itself, such as ``3/8``; then the environment does not matter.
    array : bool
        Whether each task of a SLURM array is a part: ``auto``.
    count : int or None
        Parts of the array: ``auto/8``. Without it the array itself has to show its size.
    """

    part: Part | None = None
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
        return cls(Part.parse(text))


def detect_part(environ: Mapping[str, str], asked: AskedPart | None = None) -> tuple[Part, str]:
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
    part : Part
        ``0/1`` where nothing says that there are several.
    reason : str
        The variables that say so, for the user.

    Raises
    ------
    SchemaMismatchError
        If a variable is malformed, or the size of an array is asked for and not known.
    """
    asked = asked or AskedPart()
    if asked.part is not None:
        return asked.part, "asked for"
    part, reasons = WHOLE, []
    task = _array_task(environ, asked.count) if asked.array else None
    # A task may itself start several processes: its own share is shared out among them.
    for found in (task, _process(environ)):
        if found is not None:
            inner, reason = found
            part = _within(part, inner)
            reasons.append(reason)
    return part, ", ".join(reasons) or "one process"


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
    # torchrun's number first: a launcher that srun started sees one SLURM_LOCALID for all of its
    # processes. The remainder, since a scheduler may show each task its own GPU only.
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environ.get(name) and count:
            return _whole(environ, name) % count
    return None


def processes_here(environ: Mapping[str, str]) -> int:
    """Tell how many processes of this run share the machine.

    Parameters
    ----------
    environ : mapping
        Such as `os.environ`; LOCAL_WORLD_SIZE counts, else the tasks that srun started on a node,
        the most on any.

    Raises
    ------
    SchemaMismatchError
        If the variable is malformed.
    """
    if environ.get("LOCAL_WORLD_SIZE"):
        return max(1, _whole(environ, "LOCAL_WORLD_SIZE"))
    # Only srun sets it: such as 4(x2),3 for two nodes of four tasks and one of three.
    tasks = re.sub(r"\(x[0-9]+\)", "", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max((int(each) for each in tasks.split(",") if each.isdecimal()), default=1)


def _within(outer: Part, inner: Part) -> Part:
    return Part(outer.index * inner.count + inner.index, outer.count * inner.count)


def _array_task(environ: Mapping[str, str], parts: int | None) -> tuple[Part, str] | None:
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
    # Of an array such as 1,4,5 the numbers do not say which place a task has: only even steps do.
    position, beside = divmod(task - first, step)
    if beside or last - first != step * (count - 1) or not 0 <= position < count:
        raise _unknown_array(f"{count} tasks from {first} to {last} leave gaps")
    return Part(position, count), f"SLURM_ARRAY_TASK_ID {task} of {first}-{last}"


def _task_of(environ: Mapping[str, str], parts: int) -> tuple[Part, str]:
    """Take the task's own number for that of the part: also where only some tasks are queued."""
    task = _whole(environ, "SLURM_ARRAY_TASK_ID")
    if task >= parts:
        raise SchemaMismatchError(
            f"SLURM_ARRAY_TASK_ID: expected less than {parts} for --part auto/{parts}, got {task}; "
            f"the tasks are numbered from 0, as in --array=0-{parts - 1}"
        )
    return Part(task, parts), f"SLURM_ARRAY_TASK_ID {task} of {parts} parts"


def _process(environ: Mapping[str, str]) -> tuple[Part, str] | None:
    # The names that torch.distributed reads; torchrun and accelerate set both.
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


def _each_task_launched_its_own(environ: Mapping[str, str], rank: Part, task: Part) -> bool:
    """Tell ``srun torchrun --standalone`` from ranks that number the tasks of srun."""
    if task.count == 1 or not environ.get("LOCAL_WORLD_SIZE"):
        return False
    if _whole(environ, "LOCAL_WORLD_SIZE") != rank.count:
        return False
    # Equal sizes: the launcher knows one node only. On several nodes each has then its own;
    # on one, torchrun leaves its run's id, while ranks set by hand from srun's numbers have none.
    nodes = next((n for n in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if environ.get(n)), None)
    several = nodes is not None and _whole(environ, nodes) > 1
    return several or "TORCHELASTIC_RUN_ID" in environ


def _place(environ: Mapping[str, str], index: str, count: str) -> tuple[Part, str] | None:
    if not environ.get(index) and not environ.get(count):
        return None
    for name, other in ((index, count), (count, index)):
        if not environ.get(name):
            raise SchemaMismatchError(f"{name}: expected beside {other}, got nothing; {_HINT}")
    part, parts = _whole(environ, index), _whole(environ, count)
    if part >= parts:
        raise SchemaMismatchError(f"{index}: expected less than {count} {parts}, got {part}")
    return Part(part, parts), f"{index} {part} of {count} {parts}"


_HINT = "--part i/n goes before the environment"


def _whole(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdecimal()):
        raise SchemaMismatchError(f"{name}: expected a whole number, got {value!r}; {_HINT}")
    return int(value)


def _unknown_array(why: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"SLURM_ARRAY_TASK_ID: expected an array such as 0-7, whose size N is known, but {why}; "
        "pass --part auto/N, or $SLURM_ARRAY_TASK_ID/N"
    )
