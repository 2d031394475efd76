"""Recording, importing and verifying, each beside what it cannot be faster than.

    python -m benchmarks.upkeep [--records 400] [--rounds 6] [--turns 3]

Every turn of either side is a process of its own, and the two take turns. Training with the
recorder is beside the same training that records nothing; importing `.pt` files beside copying
these files and flushing the copy; `verify` beside reading the store's files. Seconds are medians,
of wall and of CPU time; memory is the peak beyond what was there when it began.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch

from benchmarks.compare.files import files
from benchmarks.compare.memory import _peak, _start
from benchmarks.recorder import Samples, loop, train
from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.recording import Recorder

PIECE = 2**23
STEPS = 400
"""Steps of a round of toy training, a second or so."""
PAIRS = (("recorded", "trained"), ("imported", "copied"), ("verified", "read"))


def trained(folder: Path, records: int, rounds: int) -> None:
    _ = Samples(records)
    loop(rounds, STEPS, lambda number: None)


def recorded(folder: Path, records: int, rounds: int) -> None:
    samples = Samples(records)
    with Recorder(folder / "recorded.zarr", background=True) as recorder:
        loop(rounds, STEPS, lambda number: samples.record(recorder, number))


def imported(folder: Path, records: int, rounds: int) -> None:
    import_checkpoints(folder / "imported.zarr", folder / "checkpoints")
    assert len(EmbeddingStore.open(folder / "imported.zarr")) == records * rounds


def copied(folder: Path, records: int, rounds: int) -> None:
    (folder / "copied").mkdir()
    for file in files(folder / "checkpoints"):
        with file.open("rb") as source, (folder / "copied" / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, PIECE)
            target.flush()
            os.fsync(target.fileno())


def verified(folder: Path, records: int, rounds: int) -> None:
    assert EmbeddingStore.open(folder / "store.zarr").verify().sound


def read(folder: Path, records: int, rounds: int) -> None:
    memory = bytearray(PIECE)
    for file in files(folder / "store.zarr"):
        with file.open("rb", buffering=0) as source:
            while source.readinto(memory):
                pass


TASKS: dict[str, Callable[[Path, int, int], None]] = {
    task.__name__: task for task in (trained, recorded, imported, copied, verified, read)
}


def make(folder: Path, records: int, rounds: int) -> float:
    """Write checkpoints and a store of the same records; return the MB of their values."""
    samples = Samples(records)
    (folder / "checkpoints").mkdir()
    for number in range(rounds):
        samples.save(folder / "checkpoints", number)
    import_checkpoints(folder / "store.zarr", folder / "checkpoints")
    os.sync()
    return rounds * (samples.t5.nbytes + samples.clip.nbytes) / 1e6


def once(task: str, folder: Path, records: int, rounds: int) -> list[float]:
    """Return wall seconds, CPU seconds and MB of one task, in a process of its own."""
    told = json.dumps([task, str(folder), records, rounds])
    command = [sys.executable, "-m", "benchmarks.upkeep", "--task", told]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for name in ("recorded.zarr", "imported.zarr", "copied"):
        shutil.rmtree(folder / name, ignore_errors=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(task: str, folder: str, records: int, rounds: int) -> list[float]:
    torch.set_num_threads(1)
    train(20, torch.randn(512, 512))
    before, wall, cpu = _start(), time.perf_counter(), time.process_time()
    TASKS[task](Path(folder), records, rounds)
    return [time.perf_counter() - wall, time.process_time() - cpu, _peak() - before]


@click.command()
@click.option("--records", default=400, show_default=True, help="Of [17, 4096] and [768], a round.")
@click.option("--rounds", default=6, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--task", hidden=True)
def main(records: int, rounds: int, turns: int, task: str | None) -> None:
    if task is not None:
        click.echo(json.dumps(measured(*json.loads(task))))
        return
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        nbytes = make(folder, records, rounds)
        head = f"{'':<10}{'wall s':>9}{'CPU s':>9}{'MB/s':>9}{'MB more':>9}"
        click.echo(f"{head}   ratio of wall, CPU")
        for pair in PAIRS:
            taken: dict[str, list[list[float]]] = {each: [] for each in pair}
            for turn in range(turns):
                for each in pair if turn % 2 else pair[::-1]:
                    taken[each].append(once(each, folder, records, rounds))
            middle = {each: list(map(median, zip(*taken[each], strict=True))) for each in pair}
            base = middle[pair[1]]
            for each, (wall, cpu, memory) in middle.items():
                ratios = f"{wall / base[0]:.2f}, {cpu / base[1]:.2f}"
                row = f"{each:<10}{wall:>9.2f}{cpu:>9.2f}{nbytes / wall:>9.0f}{memory:>9.0f}"
                click.echo(f"{row}   {ratios}")


if __name__ == "__main__":
    main()
