"""The memory of the host: how much of it a process may take, and what pinning takes of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch

# Up to here torch goes on rounding what it pins, which is little; above it nothing is lost.
_EXACT_FROM_MB = 1
_THRESHOLD = "pinned_max_round_threshold_mb"
_PAGE = 4096


def free_host_bytes(
    processes: int = 1,
    *,
    own: Path = Path("/proc/self/cgroup"),
    mounted: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Give the host's memory that this process may still take.

    Parameters
    ----------
    processes : int
        Processes of this run on the machine, which share it evenly.
    own, mounted : Path
        Where Linux names the process's control groups, and where it shows all of them.

    Returns
    -------
    int
        Bytes; no more than what control groups leave, such as those of ``--mem`` of SLURM and of
        containers.
    """
    left: int = min((psutil.virtual_memory().available, *_left(own, mounted)))
    return max(0, left) // max(1, processes)


def _left(own: Path, mounted: Path) -> Iterator[int]:
    for line in _lines(own):
        number, kinds, path = line.split(":", 2)
        if number == "0":
            root, limit, used, cached = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            root, cached = mounted / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        # Groups around it have limits, too. In a container the path may be the host's, which is
        # not there; its own group is then shown as the root.
        for folder in (root / each for each in (group, *group.parents)):
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                # Pages of files that are not in use make room by themselves.
                yield most - taken + _of_stat(folder / "memory.stat", cached)


def _number(file: Path) -> int | None:
    """Read a limit; None where there is none, for which version 2 says ``max``."""
    word = " ".join(_lines(file)).strip()
    return int(word) if word.isdecimal() else None


def _of_stat(file: Path, name: str) -> int:
    values = dict(line.split(maxsplit=1) for line in _lines(file))
    return int(values.get(name, 0))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def pinned_bytes(sizes: Iterable[int], *, exact: bool) -> int:
    """Give what tensors take of the host once they are pinned.

    Parameters
    ----------
    sizes : iterable of int
        Bytes of each tensor.
    exact : bool
        Whether `pin_exactly` has been heard. By itself torch rounds each up to a power of two, so
        that FLUX.1's 22 GiB take 35.
    """
    most = _EXACT_FROM_MB * 2**20 if exact else float("inf")
    return sum(
        max(_PAGE, 1 << (size - 1).bit_length()) if size <= most else -(-size // _PAGE) * _PAGE
        for size in sizes
        if size
    )


def pin_exactly() -> bool:
    """Ask torch not to round large tensors that it pins; whether that is so from here on.

    What ``PYTORCH_ALLOC_CONF`` says of it stays.
    """
    asked = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if any(_THRESHOLD in each for each in asked):
        return False  # it may be another threshold; rounding is the more that it can take
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if change is None or get is None:  # not public: another torch may have it elsewhere
        return False
    before = get() or ""
    if _THRESHOLD not in before:
        # Together with the others: some of those that are not named again go back to defaults.
        change(",".join(filter(None, [before, f"{_THRESHOLD}:{_EXACT_FROM_MB}"])))
    return True
