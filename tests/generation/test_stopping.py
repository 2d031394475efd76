"""Signals at every point of a run: nothing finished is lost, and the same command goes on."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline
from PIL import Image
from processes import started, until

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.generation import write as writing
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.stopping import Stop, Stopped, stop_on_signals
from fedgfe_store.images.png import Stamp, write_png
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection

NAMES = ["SIGTERM", "SIGUSR1", "SIGINT"]


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=5)
    return store.select()


def once(name: str, at: int = 1) -> Callable[[], None]:
    """A function that sends this process a signal when it is called for the `at`-th time."""
    calls = iter(range(1, 10**6))

    def call() -> None:
        if next(calls) == at:
            signal.raise_signal(getattr(signal, name))

    return call


def interrupt_decoding(monkeypatch: pytest.MonkeyPatch, name: str, *, at: int) -> None:
    send, decode = once(name, at), DiffusersImages.decode

    def interrupted(self: DiffusersImages, *args: Any, **options: Any) -> Any:
        send()
        return decode(self, *args, **options)

    monkeypatch.setattr(DiffusersImages, "decode", interrupted)


def command(selection: Selection, folder: Path, flux: Path, *more: str) -> tuple[int, str]:
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "3", "--batch-size", "2"]
    arguments = ["--store", str(selection.path), "generate", "--model", str(flux), *size]
    arguments += ["--device", "cpu", "--output-dir", str(folder), *more]
    result = CliRunner().invoke(group, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def sound(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*.png"))
    for name in names:
        with Image.open(folder / name) as image:
            image.load()
    return names


def go_on(selection: Selection, folder: Path, flux: Path, done: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    code, output = command(selection, folder, flux)
    assert code == 0
    assert f"{10 - done} images rendered" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is made twice"
    assert sound(folder) == sorted(image_name(key) for key in selection.keys())


@pytest.mark.parametrize("name", NAMES)
def test_while_weights_are_loaded(
    flux: Path,
    selection: Selection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    load, send = DiffusersImages.load, once(name)

    def interrupted(*args: Any) -> DiffusersImages:
        send()
        return load(*args)

    monkeypatch.setattr(DiffusersImages, "load", interrupted)
    code, output = command(selection, tmp_path / "out", flux)
    assert code == 75
    assert f"stopped by {name} with 10 images left" in output
    go_on(selection, tmp_path / "out", flux, 0)


@pytest.mark.parametrize("name", NAMES)
def test_while_denoising_it_stops_at_the_next_step(
    flux: Path,
    selection: Selection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    steps: list[int] = []
    send, denoise = once(name, at=8), DiffusersImages.denoise

    def interrupted(self: DiffusersImages, *args: Any, on_step: Callable[[], None]) -> torch.Tensor:
        def step() -> None:
            steps.append(1)
            send()
            on_step()

        return denoise(self, *args, on_step=step)

    monkeypatch.setattr(DiffusersImages, "denoise", interrupted)
    code, output = command(selection, tmp_path / "out", flux)
    assert code == 75
    assert len(steps) == 8, "the second of the third batch's three steps is the last"
    assert len(sound(tmp_path / "out")) == 4
    assert f"stopped by {name} with 6 images left; the same command goes on" in output
    go_on(selection, tmp_path / "out", flux, 4)


@pytest.mark.parametrize("name", NAMES)
def test_while_decoding_the_batch_is_decoded_and_saved(
    flux: Path,
    selection: Selection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    interrupt_decoding(monkeypatch, name, at=2)
    code, _ = command(selection, tmp_path / "out", flux)
    assert (code, len(sound(tmp_path / "out"))) == (75, 4)
    go_on(selection, tmp_path / "out", flux, 4)


@pytest.mark.parametrize("name", NAMES)
def test_while_saving_all_that_is_decoded_is_saved(
    flux: Path,
    selection: Selection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    number = getattr(signal, name)
    calls = itertools.count()

    def interrupted(path: Path, *args: Any) -> Stamp:
        if next(calls) == 0:
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        return write_png(path, *args)

    monkeypatch.setattr(writing, "write_png", interrupted)
    code, _ = command(selection, tmp_path / "out", flux)
    done = len(sound(tmp_path / "out"))
    assert (code, done % 2) == (75, 0)
    assert 2 <= done < 10
    go_on(selection, tmp_path / "out", flux, done)


def test_denoised_batches_of_a_group_are_decoded_and_saved(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    stop = Stop()

    class Interrupted(FakePipeline):
        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            if len(self.batch_sizes) == 2:
                stop.request("SIGTERM")
            return super().denoise(*args, **options)

    pipeline = Interrupted(flux, batches_per_swap=4)
    options: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "batch_size": 2}
    report = generate(selection, tmp_path / "out", pipeline=pipeline, stop=stop, **options)
    assert (report.done, report.left, report.stopped) == (4, 6, "SIGTERM")
    assert pipeline.calls == ["denoise", "denoise", "denoise", "decode", "decode"]
    assert len(sound(tmp_path / "out")) == 4


def test_a_run_that_was_done_anyway_is_done(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_decoding(monkeypatch, "SIGTERM", at=5)
    assert command(selection, tmp_path / "out", flux)[0] == 0
    assert len(sound(tmp_path / "out")) == 10


def test_handlers_are_as_before_afterwards(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    command(selection, tmp_path / "out", flux, "--dry-run")
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before


def test_a_request_interrupts_only_where_it_may() -> None:
    stop = Stop()
    heard: list[str] = []
    with stop_on_signals(stop, announce=heard.append):
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.requested, heard) == (True, ["SIGUSR1"])
        with pytest.raises(Stopped), stop.interrupting():
            raise AssertionError("a stop that came before must be seen")


def test_a_stop_works_where_nobody_hears_of_it() -> None:
    """Ctrl-C on ``| tee`` ends tee too, and a line may be half printed when a signal comes."""
    for error in (BrokenPipeError(), RuntimeError("reentrant call")):
        stop = Stop()

        def announce(name: str, error: Exception = error) -> None:
            raise error

        with stop_on_signals(stop, announce=announce):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_with_a_pipe_that_breaks_keeps_its_exit_code(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "200", "--batch-size", "1"]
    arguments = ["--store", str(selection.path), "generate", "--model", str(flux), *size]
    arguments += ["--device", "cpu", "--output-dir", str(tmp_path / "out"), "--verbose"]
    program = [sys.executable, "-m", "fedgfe_store.cli.main", *arguments]
    with started(program, stderr=subprocess.STDOUT) as process:
        until(lambda: list((tmp_path / "out").glob("*.png")))
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75
    assert 0 < len(sound(tmp_path / "out")) < 10


SECOND = """
import signal, sys, time
from fedgfe_store.generation.stopping import Stop, stop_on_signals
stop = Stop()
with stop_on_signals(stop, announce=lambda name: print(name, flush=True)):
    print("ready", flush=True)
    while True:
        time.sleep(10**6)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_second_signal_ends_the_process_at_once(name: str) -> None:
    number = getattr(signal, name)
    with started([sys.executable, "-c", SECOND]) as process:
        assert process.line() == "ready"
        process.send_signal(number)
        assert process.line() == name
        process.send_signal(number)  # a launcher's echo of the first
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait() == 128 + number
