"""Times of all formats, taken in turn, so that each met the same machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import cases
from .data import BATCH, TINY, Plan, make_round
from .files import files, flush, forget, size
from .formats.base import Format
from .memory import peak_of

Report = Callable[[str], object]
Times = dict[str, dict[str, list[float]]]
"""Seconds of every repeat, by case and format."""

CLOCK_TICK = 0.05
"""Seconds by which a file's time of change may lag behind the clock, and more."""


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def writing(formats: Sequence[Format]) -> list[Format]:
    """Return one format for each kind of file."""
    return list({fmt.folder: fmt for fmt in reversed(formats)}.values())[::-1]


def build(formats: Sequence[Format], folder: Path, plan: Plan) -> dict[str, dict[str, float]]:
    """Write the rounds in every format; return bytes per record and number of files."""
    writers = {fmt: fmt.writer(folder / fmt.folder, plan.shape) for fmt in writing(formats)}
    for number in range(plan.rounds):
        data = make_round(plan.shape, number, plan.records(number))
        for fmt, writer in writers.items():
            writer.append(fmt.prepare(data))
    for writer in writers.values():
        writer.close()
    os.sync()
    sizes = {fmt.name: size(folder / fmt.folder) for fmt in formats}
    return {
        "bytes": {name: total / plan.total for name, (total, _) in sizes.items()},
        "files": {name: count for name, (_, count) in sizes.items()},
    }


def reads(
    formats: Sequence[Format], folder: Path, plan: Plan, *, cold: bool, report: Report
) -> Times:
    """Time every read; before that, fail if two formats return different values."""
    times: Times = {}
    for case in cases.CASES:
        report(f"{plan.shape.tokens} tokens: {case}")
        expected = None
        for fmt in formats:
            expected = cases.check(case, fmt, folder / fmt.folder, plan, expected)
        taken = times[case] = {fmt.name: [] for fmt in formats}
        for _ in range(plan.repeats):
            for fmt in formats:
                path = folder / fmt.folder
                if cold:
                    forget(path)
                taken[fmt.name].append(timed(partial(cases.run, case, fmt, path, plan)))
    return times


def appends(formats: Sequence[Format], folder: Path, plan: Plan, *, report: Report) -> Times:
    """Time the second append of a whole node-round, and that it takes until it is on the disk."""
    first, second = (make_round(plan.shape, number, plan.whole) for number in range(2))
    times: Times = {"append": {}, "append_flushed": {}}
    for repeat in range(plan.repeats):
        report(f"{plan.shape.tokens} tokens: append {repeat + 1} of {plan.repeats}")
        for fmt in writing(formats):
            path = folder / f"append_{fmt.folder}"
            writer, data = fmt.writer(path, plan.shape), fmt.prepare(second)
            writer.append(fmt.prepare(first))
            os.sync()
            began = time.time() - CLOCK_TICK
            seconds = timed(partial(writer.append, data))
            flushed = seconds + timed(partial(flush, path, began))
            writer.close()
            shutil.rmtree(path)
            times["append"].setdefault(fmt.name, []).append(seconds)
            times["append_flushed"].setdefault(fmt.name, []).append(flushed)
    return times


def growth(formats: Sequence[Format], folder: Path, plan: Plan, *, report: Report) -> Times:
    """Time appends of as many records with tiny tensors to stores of more and more commits."""
    chosen = [fmt for fmt in writing(formats) if fmt.exact]
    paths = {fmt: folder / f"growth_{fmt.folder}" for fmt in chosen}
    writers = {fmt: fmt.writer(path, TINY) for fmt, path in paths.items()}
    times: Times = {f"append_at_{commits}": {} for commits in plan.sizes}
    for number in range(max(plan.sizes, default=-plan.repeats) + plan.repeats):
        if number % 50 == 0:
            report(f"growth: commit {number}")
        data = make_round(TINY, number, plan.whole)
        for fmt, writer in writers.items():
            payload = fmt.prepare(data)
            seconds = timed(partial(writer.append, payload))
            for commits in plan.sizes:
                if commits <= number < commits + plan.repeats:
                    times[f"append_at_{commits}"].setdefault(fmt.name, []).append(seconds)
    for fmt, writer in writers.items():
        writer.close()
        shutil.rmtree(paths[fmt])
    return times


def memory(formats: Sequence[Format], folder: Path, plan: Plan, *, report: Report) -> Any:
    """Return the peak MB of some cases, each in a process of its own."""

    def peak(case: str, fmt: Format) -> float:
        path = folder / (fmt.folder if case != "append" else f"memory_{fmt.folder}")
        found = peak_of(fmt.name, case, path, plan)
        if case == "append":
            shutil.rmtree(path)
        return found

    peaks: dict[str, dict[str, float]] = {}
    for case in plan.memory:
        report(f"{plan.shape.tokens} tokens: memory of {case}")
        chosen = writing(formats) if case == "append" else formats
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(peak, [case] * len(chosen), chosen)
            peaks[case] = dict(zip([fmt.name for fmt in chosen], found, strict=True))
    return peaks


def bounds(folder: Path, plan: Plan) -> dict[str, float]:
    """Return the least seconds that moving the same bytes takes on this machine.

    ``memcpy`` and ``read`` (from the page cache) move those of a full scan in its pieces, ``write``
    those of one node-round into one file that is flushed.
    """
    piece = np.ones(BATCH * plan.shape.nbytes, np.uint8)
    total = plan.total * plan.shape.nbytes
    probe = folder / "probe"

    def copy() -> None:
        for _ in range(0, total, len(piece)):
            np.empty_like(piece)[:] = piece

    def read() -> None:
        for file in files(folder / "torch"):
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(np.empty_like(piece).data):
                    pass

    def write() -> None:
        with probe.open("wb", buffering=0) as opened:
            left = plan.whole * plan.shape.nbytes
            while left > 0:
                left -= opened.write(piece[:left].data) or 0
            os.fsync(opened.fileno())

    tasks = {"memcpy": copy, "read": read, "write": write}
    found = {name: min(timed(task) for _ in range(plan.repeats)) for name, task in tasks.items()}
    probe.unlink()
    return found
