"""How torch's threads on the CPU share it with the machine's other work."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from pathlib import Path


def share_processors(
    environ: MutableMapping[str, str],
    *,
    own: Path = Path("/proc/self/cgroup"),
    mounted: Path = Path("/sys/fs/cgroup"),
) -> None:
    """Settle how torch's threads wait and how many they are; torch reads it as it is imported.

    A thread that has nothing to do sleeps. By default it waits busily for the others, which
    other work may keep off their processors: small operations then take many times as long as in
    one thread. There are as many threads as torch takes by itself, one a core that the process
    may use, but no more than the quota of the process's control group or its SLURM task pays for.

    Parameters
    ----------
    environ : mutable mapping
        The environment. What it says of these things already stays.
    own, mounted : Path
        Where Linux names the process's control group, and where it shows all of them (version 2).
    """
    environ.setdefault("OMP_WAIT_POLICY", "passive")
    limit = min(_limits(environ, own, mounted), default=None)
    if limit is not None and "MKL_NUM_THREADS" not in environ:
        environ.setdefault("OMP_NUM_THREADS", str(limit))


def _limits(environ: MutableMapping[str, str], own: Path, mounted: Path) -> Iterator[int]:
    # Not every cluster confines a task to the processors that it asked for.
    asked = environ.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdecimal() and int(asked):
        yield int(asked)
    for line in _lines(own):
        number, _, path = line.partition("::")
        if number == "0":
            group = Path(path.lstrip("/"))
            # The quotas of the groups around it count, too.
            for each in (group, *group.parents):
                yield from _paid_for(mounted / each / "cpu.max")


def _paid_for(file: Path) -> Iterator[int]:
    for line in _lines(file):
        quota, period = line.split()
        if quota != "max":
            yield math.ceil(int(quota) / int(period))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
