"""How easy the package is to walk: what a record, a batch and an image pass through.

    python -m tools.walk [--files] [--json FILE] [--against FILE]

Five trips are made in this process, each once to import what it needs and fill what is kept, then
once more, in another folder, under a profiler. What they use is the public API and the command
line, in one function a trip; what each needs beforehand is made before the profiler looks.

- Entered: files of ``fedgfe_store`` and ``cli`` of which code was called, in any thread, worker
  threads included. Those of ``cli`` are also counted apart: a trip that begins at the command line
  passes through them.
- A call is one of a function, method, lambda or comprehension of such a file; a generator is called
  each time it goes on. Code that has no file, as the ``__init__`` of a dataclass, is no call.
- A change of file is a call in another file than the last call of its thread: how often somebody
  who follows the calls turns to another file.
- A call across is one whose caller, the nearest on the stack that is of such a file, is another.

Worker threads share work as it comes: calls and changes of file may differ a little between runs,
and more between machines of other processors. `tools.house` measures the sources.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np
import torch
from click.testing import CliRunner
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.recording import Recorder
from tools import house

ROOTS = {
    package: Path(import_module(package).__path__[0])
    for package in ("fedgfe_store", "fedgfe_store.cli")
}
"""The folders that are walked, by the name that they are imported as."""

WIDTH = 160
"""Characters of a line, also where the output goes into a file."""

SCHEMA = Schema.flux(17)
KEYS = {"split": "train", "class_name": "dog"}
Tensors = Mapping[str, np.ndarray]


def values(n: int) -> Tensors:
    """Return tensors of `n` records."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal((n, *shape), dtype=np.float32)
        for name, shape in SCHEMA.columns.items()
    }


def record(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Record one sample, as a training loop does, and wait until it is on the disk."""
    with Recorder(path) as recorder, recorder.record(node=0, round=5) as batch:
        batch.add(index=[0], **KEYS, **tensors)


def append(path: Path, tensors: Tensors, *, round: int = 5, n: int = 1) -> None:
    """Append records of a round as one commit to the store that is there."""
    with EmbeddingStore.open(path).append(node=0, round=round) as batch:
        batch.add(index=range(n), **KEYS, **tensors)


def read_batch(path: Path) -> None:
    """Read a batch of four records as tensors of torch."""
    for _ in EmbeddingStore.open(path).select(round=5).batches(4):
        pass


def command(*arguments: object) -> None:
    """Run the command line in this process."""
    done = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if done.exit_code:
        raise click.ClickException(f"{' '.join(map(str, arguments))}: {done.output}")


def save_checkpoint(file: Path) -> None:
    """Save one sample as FedGFE's nodes do."""
    tensors = {f"{name}_embedding": torch.from_numpy(a[0]) for name, a in values(1).items()}
    keys = {"index": 0, "image_filename": "node_0_train_dog_0_r5.png", **KEYS}
    entry = {**keys, **tensors, "sample_metadata": {"sample_id": "train_0"}}
    metadata = {"diffusion_type": "flux", "selected_classes": ["dog"]}
    content = {"node_id": 0, "round": 5, "embeddings": [entry], "metadata": metadata}
    torch.save(content, file)


def make_store(folder: Path, *, round: int, n: int = 1) -> Path:
    """Make a store with records of one round."""
    store = folder / "embeddings.zarr"
    EmbeddingStore.create(store, SCHEMA)
    append(store, values(n), round=round, n=n)
    return store


def recording(folder: Path) -> Callable[[], None]:
    """Make a store with a round in it, to record the next."""
    tensors = {name: torch.from_numpy(array) for name, array in values(1).items()}
    return partial(record, make_store(folder, round=1), tensors)


def appending(folder: Path) -> Callable[[], None]:
    """Make a store with a round in it, to append the next."""
    return partial(append, make_store(folder, round=1), values(1))


def reading(folder: Path) -> Callable[[], None]:
    """Make a store with a batch in it."""
    return partial(read_batch, make_store(folder, round=5, n=4))


def generating(folder: Path) -> Callable[[], None]:
    """Make a store with one record, of which the tiny FLUX draws an image."""
    store = make_store(folder, round=5)
    options = ["--model", "tiny", "--steps", 1, "--images", folder / "images"]
    return partial(command, "--store", store, "generate", *options)


def importing(folder: Path) -> Callable[[], None]:
    """Save a checkpoint that holds one record."""
    checkpoint = folder / "node_0_embeddings_r5.pt"
    save_checkpoint(checkpoint)
    return partial(command, "--store", folder / "embeddings.zarr", "import", checkpoint)


TRIPS: dict[str, Callable[[Path], Callable[[], None]]] = {
    "one recorded sample": recording,
    "one append": appending,
    "one batch": reading,
    "one image": generating,
    "one .pt": importing,
}
"""What makes ready for a trip, in an empty folder, and returns it."""


@dataclass(frozen=True)
class Walk:
    """What a trip passed through."""

    entered: Sequence[str]
    """Files in the order in which they were entered."""
    calls: int
    changes: int
    """Calls in another file than the last call of the thread."""
    across: int
    """Calls from one file into another."""

    @property
    def figures(self) -> dict[str, int]:
        """The numbers, by what they say."""
        of_commands = [file for file in self.entered if file.startswith("cli/")]
        return {
            "files entered": len(self.entered),
            "of which cli": len(of_commands),
            "calls": self.calls,
            "changes of file": self.changes,
            "calls across": self.across,
        }


@dataclass(frozen=True)
class Call:
    """A call of a function in one of the files."""

    thread: int
    file: str
    caller: str | None
    """The file of the nearest caller that is of one of the files, too."""


class Profiler:
    """Sees calls in all threads that begin after it was made.

    Threads of a pool live on from the first, unseen trip, so each has to have the hook by then.
    """

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = [(f"{root}/", f"{root.name}/") for root in roots]
        self._files: dict[str, str | None] = {}
        self._calls: list[Call] = []
        self._seeing = self._ended = False

    def __enter__(self) -> Profiler:
        self._before = threading.getprofile()
        threading.setprofile(self._hook)
        return self

    def __exit__(self, *error: object) -> None:
        threading.setprofile(self._before)
        self._ended = True

    def walk(self, trip: Callable[[], None]) -> Walk:
        """Make a trip and return what it passed through."""
        self._calls.clear()
        with self._looking():
            trip()
        calls = list(self._calls)
        last: dict[int, str] = {}
        changes = 0
        for call in calls:
            changes += last.get(call.thread, call.file) != call.file
            last[call.thread] = call.file
        entered = list(dict.fromkeys(call.file for call in calls))
        across = sum(call.caller not in (None, call.file) for call in calls)
        return Walk(entered, len(calls), changes, across)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        before = sys.getprofile()
        self._seeing = True
        sys.setprofile(self._hook)
        try:
            yield
        finally:
            sys.setprofile(before)
            self._seeing = False

    def _hook(self, frame: FrameType, event: str, argument: object) -> None:
        if self._ended:  # a thread that lives on
            sys.setprofile(None)
        if not self._seeing or event != "call":
            return
        file = self._file(frame)
        if file is not None:
            self._calls.append(Call(threading.get_ident(), file, self._caller(frame)))

    def _caller(self, frame: FrameType) -> str | None:
        above = frame.f_back
        while above is not None:
            file = self._file(above)
            if file is not None:
                return file
            above = above.f_back
        return None

    def _file(self, frame: FrameType) -> str | None:
        """Return a frame's file as it is shown, None if it is of none of the folders."""
        path = frame.f_code.co_filename
        if path not in self._files:
            within = [each for each in self._roots if path.startswith(each[0])]
            self._files[path] = path.replace(*within[0], 1) if within else None
        return self._files[path]


def walk(names: Iterable[str], folder: Path) -> dict[str, Walk]:
    """Make trips, each twice in folders of its own, and return what the second passed through."""
    walks = {}
    with Profiler(ROOTS.values()) as profiler:
        for number, name in enumerate(names):
            first, second = folder / f"{number}" / "first", folder / f"{number}" / "second"
            for each in (first, second):
                each.mkdir(parents=True)
            TRIPS[name](first)()
            walks[name] = profiler.walk(TRIPS[name](second))
    return walks


def commit() -> str:
    """Return the commit of the tree that is walked."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.check_output(command, cwd=ROOTS["fedgfe_store"], text=True).strip()


def measure(trips: Iterable[str]) -> dict[str, Any]:
    """Return all figures, as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        walks = walk(trips, Path(folder))
    return {
        "commit": commit(),
        "trips": {name: {**each.figures, "files": each.entered} for name, each in walks.items()},
        "house": {
            each.name: {"value": each.value, "where": each.where} for each in house.figures(ROOTS)
        },
    }


def lines(report: Mapping[str, Any]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return the figures of a report and where they are so, by subject and name."""
    trips = {
        (trip, name): (f"{value}", "")
        for trip, figures in report["trips"].items()
        for name, value in figures.items()
        if name != "files"
    }
    static = {
        ("the house", name): (f"{figure['value']}", figure["where"])
        for name, figure in report["house"].items()
    }
    return trips | static


def table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """Draw the figures of reports side by side, in the order of the last."""
    drawn = Table(box=SIMPLE)
    for name in ("", "figure"):
        drawn.add_column(name, no_wrap=True)
    for report in reports:
        drawn.add_column(report["commit"], justify="right", no_wrap=True)
    drawn.add_column("where", no_wrap=True)
    figures = [lines(report) for report in reports]
    keys = dict.fromkeys(key for each in reversed(figures) for key in each)
    for subject, of_it in groupby(keys, key=itemgetter(0)):
        drawn.add_section()
        for number, key in enumerate(of_it):
            found = [each.get(key, ("-", "")) for each in figures]
            values = [value for value, _ in found]
            drawn.add_row("" if number else subject, key[1], *values, found[-1][1])
    return drawn


@click.command()
@click.option(
    "--trip", "trips", multiple=True, type=click.Choice(list(TRIPS)), help="Make only this trip."
)
@click.option("--files", is_flag=True, help="List the files that each trip enters, in order.")
@click.option(
    "--json", "saved", type=click.Path(dir_okay=False, path_type=Path), help="Save the figures."
)
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show figures that were saved beside those of now.",
)
def main(*, trips: Sequence[str], files: bool, saved: Path | None, against: Path | None) -> None:
    """Show how easy the package is to walk: what a record, a batch and an image pass through."""
    if len({root.parent for root in ROOTS.values()}) > 1:
        raise click.ClickException(f"parts of two trees: {', '.join(map(str, ROOTS.values()))}")
    now = measure(trips or TRIPS)
    before = json.loads(against.read_text(encoding="utf-8")) if against else None
    console = Console(width=WIDTH, highlight=False)
    console.print(table([before, now] if before else [now]))
    if files:
        for name, figures in now["trips"].items():
            console.print("\n".join([f"{name}:", *(f"  {file}" for file in figures["files"])]))
    if saved:
        saved.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
