"""Peak memory of one case in this process, run by itself: above what it held before it began."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

from .cases import run
from .data import Plan, Shape, make_round
from .formats import load

_ROOT = Path(__file__).parents[2]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(name: str, case: str, path: Path, plan: Plan) -> float:
    """Return the MB that `case` takes at its peak, in a process of its own."""
    task = json.dumps([name, case, str(path), astuple(plan)])
    command = [sys.executable, "-W", "ignore", "-m", __name__, task]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _peak() -> float:
    if _STATUS.exists():  # ru_maxrss starts from the parent's on Linux
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _start() -> float:
    if _RESET.exists():
        _RESET.write_text("5")
    return _peak()


def main() -> None:
    name, case, place, fields = json.loads(sys.argv[1])
    shape, *rest = fields
    plan = Plan(Shape(*shape), *rest)
    fmt, path = load(name), Path(place)
    if case == "append":
        writer = fmt.writer(path, plan.shape)
        data = fmt.prepare(make_round(plan.shape, 0, plan.whole))
        before = _start()
        writer.append(data)
        writer.close()
    else:
        before = _start()
        run(case, fmt, path, plan)
    print(_peak() - before)


if __name__ == "__main__":
    main()
