"""Pictures of rounds while training goes on: the command line, in a process of its own."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedgfe_store.common.location import Location
from fedgfe_store.common.words import whole_number
from fedgfe_store.errors import SchemaMismatchError

FOLDER = "previews"
"""Beside the store: sheets, pictures, and what the last preview said."""

_LAST_SECONDS = 5.0
"""How long a preview that is ended may take to stop by itself."""
_log = logging.getLogger("fedgfe_store")


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What `Recorder` has rendered of each round while training goes on.

    ``fedgfe-store preview`` runs in a process of its own, at the lowest priority, and writes
    ``previews/round_5.png`` beside the store.

    Parameters
    ----------
    records : int
        Records that are shown, one of each class before a second one of any.
    model : str, optional
        As ``generate --model``; by default ``FEDGFE_MODEL``, else the model that the store names.
        Without any of them nothing is rendered.
    device : str
        Where to render: by default the processor, where the process sees no GPU at all. A GPU such
        as ``"cuda:1"`` is used as it is named, whether training uses it or not.
    steps : int, optional
        Denoising steps, by default the model's.
    size : int, optional
        Width and height in pixels, by default the model's.
    node : str or int, optional
        Show this node's records; by default those of the first block of a round that is committed.
    log : str, optional
        Where the sheet goes as well: ``"tensorboard:DIR"``, ``"wandb"`` or ``"wandb:PROJECT"``.
    command : tuple of str, optional
        What starts the command line, by default ``python -m fedgfe_store`` of this environment.

    Raises
    ------
    SchemaMismatchError
        If a number is no whole one from 1.
    """

    records: int = 3
    model: str | None = None
    device: str = "cpu"
    steps: int | None = None
    size: int | None = None
    node: str | int | None = None
    log: str | None = None
    command: tuple[str, ...] = (sys.executable, "-m", "fedgfe_store")

    def __post_init__(self) -> None:
        for name in ("records", "steps", "size"):
            number = getattr(self, name)
            if number is not None and whole_number(f"preview.{name}", number) < 1:
                raise SchemaMismatchError(f"preview.{name}: expected at least 1, got {number}")

    def arguments(self, store: Location, node: str | None, round: int, file: Path) -> list[str]:
        """Return the command that renders records of `node` at `round` into `file`."""
        options = {
            "--round": round,
            "--node": node,
            "--records": self.records,
            "--device": self.device,
            "--model": self.model,
            "--steps": self.steps,
            "--size": self.size,
            "--log": self.log,
            "--output": file,
        }
        given = [str(w) for option in options.items() if option[1] is not None for w in option]
        return [*self.command, "--store", str(store), "preview", *given, "--while-stdin", "--quiet"]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the process: on the processor there is no GPU to be seen."""
        hidden = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
        on_cpu = self.device.partition(":")[0] == "cpu"
        return {**os.environ, **dict.fromkeys(hidden if on_cpu else (), "")}


def preview_of(given: Preview | int | None) -> Preview | None:
    """Return what is asked for: a number is that of the records, and 0 none."""
    if given is None or isinstance(given, Preview):
        return given
    return Preview(records=given) if whole_number("preview", given) else None


class Previews:
    """Starts previews of a store's rounds: one of a round, and one at a time.

    Parameters
    ----------
    store : Path or Address
        The store.
    preview : Preview
        What is shown.
    """

    def __init__(self, store: Location, preview: Preview) -> None:
        self._store, self._preview = store, preview
        self._folder = (store.parent if isinstance(store, Path) else Path()) / FOLDER

    def begin(self, node: str | None, round: int) -> None:
        """Start a preview of what was committed of `round`; problems are a line in the log."""
        wanted = None if self._preview.node is None else str(self._preview.node)
        if None not in (node, wanted) and node != wanted:
            return
        # By store: the mixins make a recorder for each call.
        key = str(self._store.resolve())
        with _lock:
            last = _last.get(key)
            if last is not None and round in (last.round, last.skipped):
                return
            if last is not None and last.process.poll() is None:
                last.skipped = round
                said = "the preview of round %d is left out: that of round %d is not done yet"
                _log.warning("%s: " + said, self._store, round, last.round)
                return
            started = self._start(wanted or node, round)
            if started is not None:
                _last[key] = started

    def _start(self, node: str | None, round: int) -> _Running | None:
        file, said = self._folder / f"round_{round}.png", self._folder / "preview.log"
        try:
            self._folder.mkdir(exist_ok=True)
            with said.open("wb") as output:
                process = subprocess.Popen(
                    self._preview.arguments(self._store, node, round, file),
                    stdin=subprocess.PIPE,  # ends with this process, however that ends
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._preview.environment,
                    start_new_session=True,  # a Ctrl-C is for the training
                )
        except OSError as error:
            _log.warning("%s: no preview of round %d: %s", self._store, round, error)
            return None
        running = _Running(process, round, file, said)
        # None can begin where the interpreter ends, which ends the preview as well.
        with suppress(RuntimeError):
            threading.Thread(target=running.watch, name="fedgfe-store-preview", daemon=True).start()
        return running


class _Running:
    """A preview that was started."""

    def __init__(self, process: subprocess.Popen[bytes], round: int, file: Path, said: Path):
        self.process, self.round, self.skipped = process, round, round
        self._file, self._said, self._ended = file, said, False

    def watch(self) -> None:
        """Wait for its end, in a thread of its own, and say what became of it."""
        code = self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self._ended:
            return
        if not code:
            _log.info("preview of round %d: %s", self.round, self._file)
            return
        _log.warning(
            "no preview of round %d (exit code %d): %s; see %s",
            self.round,
            code,
            self._last_words(),
            self._said,
        )

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self._said.read_text("utf-8", "replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return "what it said is gone"

    def end(self) -> None:
        """End it, as this process does: no preview outlives the training."""
        if self.process.poll() is not None:
            return
        self._ended = True
        _log.warning("the preview of round %d is ended with the training", self.round)
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


_lock = threading.Lock()  # only ever taken by writers' threads, which no Ctrl-C reaches
_last: dict[str, _Running] = {}
"""The preview that was started last of each store."""
_of_others: list[_Running] = []


def _end_all() -> None:
    for running in list(_last.values()):
        running.end()


def _forget() -> None:
    """Leave the previews of the process that this one was forked from to it."""
    global _lock
    _lock = threading.Lock()
    for running in _last.values():
        # Open here, it would outlive the training's own end, which is what tells the preview.
        if running.process.stdin is not None:
            running.process.stdin.close()
    # Kept: subprocess warns of one that is dropped while it runs.
    _of_others.extend(_last.values())
    _last.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget)
