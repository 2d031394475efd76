"""Where the processor's time goes, by cause: what `perf` sees of reads and an append.

    python -m benchmarks.causes [--tokens 17] [--layout bfloat16] [--case scan] [--turns 20]

Needs Linux's `perf`, and leave to use it (`kernel.perf_event_paranoid` of 1 or less, or root). Each
question is a process of its own, which asks once to import and to fill the page cache; then `perf`
looks 5,000 times a second and CPU where it is. Of each look the first rule counts that fits: where
the kernel is, then whose code runs. Figures are CPU milliseconds of one question; `waiting` is
wall time in which neither of its threads ran.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.compare.cases import CASES
from benchmarks.compare.data import LONG, SHORT, TINY, Plan, make_round
from benchmarks.compare.formats.base import Format
from benchmarks.compare.formats.ours import Exact, Raw, Rounded

FREQUENCY = 5000
QUESTIONS = ("scan", "first", "scattered", "sample", "append")
PLANS = {
    4: Plan(TINY, whole=400, rounds=16, small=40, repeats=3, sizes=(), memory=()),
    17: Plan(SHORT, whole=400, rounds=16, small=40, repeats=3, sizes=(), memory=()),
    512: Plan(LONG, whole=26, rounds=6, small=4, repeats=3, sizes=(), memory=()),
}
FORMATS: dict[str, type[Format]] = {"float32": Exact, "bfloat16": Rounded, "raw": Raw}
CAUSES = (
    ("fresh memory", r"page_fault|do_anonymous|munmap|madvise|exit_mmap|sys_brk"),
    ("flush", r"fsync|fdatasync|sync_file_range"),
    ("files to memory", r"vfs_read|ksys_pread|do_preadv|vfs_readv|filemap_read"),
    ("memory to files", r"vfs_write|ksys_write|do_writev"),
    ("names of files", r"sys_(open|close|newfstat|unlink|rename|link|mkdir|getdents|readlink)"),
    ("codec", r"/blosc|libblosc"),
    ("keys' codec", r"numcodecs"),
    ("digest", r"xxhash"),
    ("crc32c", r"crc32c"),
    ("copy and check", r"mem(cpy|move|set)|numpy|libtorch|libc10"),
    ("Python", r"python|\[vdso\]|libc\.|ld-linux|lib-dynload"),
)


@contextmanager
def watched(control: str | None) -> Iterator[None]:
    """Let `perf` look while the block runs; it waits at the two pipes before `control`."""

    def tell(word: str) -> None:
        if control:
            with open(f"{control}.ctl", "w") as pipe:
                pipe.write(word + "\n")
            with open(f"{control}.ack") as pipe:
                pipe.readline()

    tell("enable")
    try:
        yield
    finally:
        tell("disable")


def ask(case: str, fmt: Format, folder: Path, plan: Plan, turns: int, control: str | None) -> None:
    """Ask a question `turns` times, and print the wall and CPU milliseconds of one."""
    question: Callable[[], Any]
    if case == "append":
        writer = fmt.writer(folder / f"append_{os.getpid()}", plan.shape)
        rounds = iter([fmt.prepare(make_round(plan.shape, n, plan.whole)) for n in range(2)] * 99)
        numbers = iter(range(10**6))

        def question() -> None:
            data = next(rounds)
            object.__setattr__(data, "number", next(numbers))
            writer.append(data)
    else:

        def question() -> None:
            CASES[case](fmt, folder / fmt.folder, plan)

    question()
    with watched(control):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(turns):
            question()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    click.echo(f"{wall / turns * 1000} {cpu / turns * 1000}")


def cause(stack: str) -> str:
    """Return the cause of one look: `stack` has a line a frame, the innermost first."""
    inner, kernel = stack.split("\n", 1)[0], "[kernel" in stack.split("\n", 1)[0]
    for name, pattern in CAUSES:
        is_of_kernel = name in ("fresh memory", "flush") or "file" in name
        if is_of_kernel == kernel and re.search(pattern, stack if kernel else inner):
            return name
    return "kernel, other" if kernel else "other"


def looked(data: Path) -> Counter[str]:
    """Return how many looks have which cause."""
    command = ["perf", "script", "-i", str(data), "-F", "ip,sym,dso"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Counter(cause(stack.strip()) for stack in found.split("\n\n") if stack.strip())


def profiled(case: str, options: list[str], turns: int, folder: Path) -> dict[str, float]:
    """Return milliseconds of one question by cause, all its CPU time, and what it waited."""
    control, data = str(folder / case), folder / f"{case}.data"
    for end in ("ctl", "ack"):
        os.mkfifo(f"{control}.{end}")
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY), "-g", "-D", "-1"]
    command += [f"--control=fifo:{control}.ctl,{control}.ack", "-o", str(data), "--"]
    command += [sys.executable, "-m", "benchmarks.causes", *options, "--case", case]
    command += ["--turns", str(turns), "--ask", str(folder), "--control", control]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split()[-2:])
    looks = looked(data)
    share = {name: cpu * count / looks.total() for name, count in looks.items()}
    data.unlink()
    return {"wall": wall, "CPU": cpu, **share}


@click.command()
@click.option("--tokens", type=click.Choice([*map(str, PLANS)]), default="17", show_default=True)
@click.option("--layout", type=click.Choice([*FORMATS]), default="float32", show_default=True)
@click.option("--case", type=click.Choice(QUESTIONS), help="By default all.")
@click.option("--turns", default=20, show_default=True)
@click.option("--ask", "folder", hidden=True)
@click.option("--control", hidden=True)
def main(
    tokens: str,
    layout: str,
    case: str | None,
    turns: int,
    folder: str | None,
    control: str | None,
) -> None:
    plan, fmt = PLANS[int(tokens)], FORMATS[layout]()
    if folder is not None:
        assert case is not None
        ask(case, fmt, Path(folder), plan, turns, control)
        return
    options = ["--tokens", tokens, "--layout", layout]
    with tempfile.TemporaryDirectory(dir=".") as made:
        path = Path(made)
        writer = fmt.writer(path / fmt.folder, plan.shape)
        for number in range(plan.rounds):
            writer.append(fmt.prepare(make_round(plan.shape, number, plan.records(number))))
        writer.close()
        cases = QUESTIONS if case is None else (case,)
        found = {each: profiled(each, options, turns, path) for each in cases}
    names = ["wall", "CPU", *(name for name, _ in CAUSES), "kernel, other", "other"]
    click.echo(
        f"| ms of one, [{tokens}, {plan.shape.width}], {layout} | " + " | ".join(cases) + " |"
    )
    click.echo("| --- |" + " ---: |" * len(cases))
    for name in names:
        row = [f"{found[each].get(name, 0.0):.2f}" for each in cases]
        click.echo(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
