"""A run that cannot finish a batch in the time there is says so, and is not queued for ever."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.generation import prepare
from fedgfe_store.generation.parts import Part
from fedgfe_store.generation.plan import plan_images
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import Settings, fingerprint
from fedgfe_store.generation.stopping import SIGNAL_LEAD, Stop, expected_stop
from fedgfe_store.images.manifest import Manifest, read_manifest
from fedgfe_store.images.status import image_status
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.selection import Selection

OPTIONS: dict[str, Any] = {"steps": 3, "height": SIZE, "width": SIZE, "batch_size": 2}


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=2)
    return store.select()


class Stopping(FakePipeline):
    """Is asked to stop in the middle of a batch."""

    def __init__(self, folder: Path, stop: Stop, reason: str, *, batch: int) -> None:
        super().__init__(folder)
        self._stop, self._reason, self._batch = stop, reason, batch

    def denoise(self, *args: Any, **options: Any) -> Any:
        if len(self.batch_sizes) == self._batch:
            self._stop.request(self._reason)
        return super().denoise(*args, **options)


def stopped(
    selection: Selection,
    folder: Path,
    flux: Path,
    reason: str = "SIGUSR1",
    *,
    batch: int = 0,
    **more,
) -> GenerationReport:
    stop = Stop()
    pipeline = Stopping(flux, stop, reason, batch=batch)
    return generate(selection, folder, pipeline=pipeline, stop=stop, **OPTIONS, **more)


def test_two_runs_in_a_row_without_an_image_are_stuck(selection, flux, tmp_path: Path) -> None:
    found = [stopped(selection, tmp_path / "out", flux) for _ in range(4)]
    assert [report.stopped for report in found] == ["SIGUSR1"] * 4
    # Whoever goes on after that has probably changed something, and gets as many tries again.
    assert [report.stuck for report in found] == [False, True, False, True]


def test_an_image_in_between_makes_it_no_row(selection, flux, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert not stopped(selection, folder, flux).stuck
    between = stopped(selection, folder, flux, batch=1)
    assert (between.done, between.stuck) == (2, False)
    assert not stopped(selection, folder, flux).stuck
    assert stopped(selection, folder, flux).stuck


def test_other_parts_and_ctrl_c_do_not_count(selection, flux, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for i in range(2):
        report = stopped(selection, folder, flux, part=Part(i, 2))
        assert (report.done, report.stuck) == (0, False)
    for _ in range(3):
        assert not stopped(selection, folder, flux, "SIGINT").stuck
    assert not stopped(selection, folder, flux).stuck


def test_the_note_is_no_image(selection, flux, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    stopped(selection, folder, flux)
    (line,) = read_manifest(folder)
    assert (line["stopped"], line["times"]) == ("SIGUSR1", 1)
    assert image_status(selection, folder).totals["missing"] == 4
    assert generate(selection, folder, pipeline=FakePipeline(flux), **OPTIONS).done == 4


@pytest.fixture
def run(selection, flux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command, which gets a signal while it loads the weights."""

    def run(name: str | None, *more: str, **environ: str) -> Result:
        load = DiffusersImages.load

        def interrupted(*args: Any) -> object:
            assert name is not None
            signal.raise_signal(getattr(signal, name))
            return load(*args)

        words = ["--store", str(selection.path), "generate", "--model", str(flux), "--steps", "3"]
        words += ["--height", str(SIZE), "--width", str(SIZE), "--batch-size", "2"]
        words += ["--device", "cpu", "--output-dir", str(tmp_path / "out"), *more]
        with monkeypatch.context() as patched:
            if name:
                patched.setattr(DiffusersImages, "load", interrupted)
            return CliRunner().invoke(group, words, env=environ)

    return run


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_job_that_makes_nothing_is_queued_again_once(run, name: str) -> None:
    first, second = run(name), run(name)
    assert (first.exit_code, second.exit_code) == (75, 1)
    assert "if none is in the next run, it ends with an error" in first.output
    assert f"error: {name} stopped this run before it had finished a batch of 2" in second.stderr
    assert "goes on" not in second.stdout
    assert run(None).exit_code == 0


def test_a_job_that_is_stopped_while_it_plans_is_queued_again_once(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: Any, **options: Any) -> object:
        signal.raise_signal(signal.SIGUSR1)
        return plan_images(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "plan_images", interrupted)
        assert run(None, "--dry-run").exit_code == 75
        assert not (tmp_path / "out").exists()
        assert [run(None).exit_code for _ in range(2)] == [75, 1]
    assert run(None).exit_code == 0


def test_ctrl_c_may_be_pressed_as_often_as_one_likes(run) -> None:
    assert [run("SIGINT").exit_code for _ in range(3)] == [75] * 3


@pytest.fixture
def rated(selection, tmp_path: Path) -> Settings:
    """A folder whose images took 700 s each."""
    settings = Settings("m", "r", "float32", 3, 3.5, SIZE, SIZE)
    (tmp_path / "out").mkdir()
    with Manifest(tmp_path / "out") as manifest:
        manifest.append({"fingerprint": fingerprint(settings), "seconds": 700.0})
    return settings


def test_a_plan_knows_when_a_batch_takes_longer_than_is_left(selection, rated, tmp_path) -> None:
    plan = plan_images(selection, rated, tmp_path / "out")
    assert plan.shortage(2, None) is None
    assert plan.shortage(2, 1400.0) is None
    assert plan.shortage(2, 1000.0) == (
        "a batch of 2 takes about 23 min 20 s, and it is 16 min 40 s until this run has to stop: "
        "nothing of it would be finished; --batch-size 1 or a longer time limit helps"
    )
    shortage = plan.shortage(2, 600.0)
    assert shortage is not None
    assert shortage.endswith("nothing of it would be finished; a longer time limit helps")
    assert plan_images(selection, rated, tmp_path / "new").shortage(2, 1.0) is None
    assert (
        plan_images(selection, rated, tmp_path / "out", Request(limit=0)).shortage(2, 0.0) is None
    )


def test_slurm_says_when_a_run_has_to_stop() -> None:
    assert expected_stop({"SLURM_JOB_END_TIME": "1800000000"}) == 1_800_000_000 - SIGNAL_LEAD
    for environ in ({}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "Unknown"}):
        assert Stop(expected_stop(environ)).seconds_left is None
    assert Stop(expected_stop({"SLURM_JOB_END_TIME": "1"})).seconds_left == 0
    left = Stop(time.time() + 1000).seconds_left
    assert left is not None
    assert left > 500


def test_the_plan_on_the_command_line_says_so_too(run) -> None:
    assert run(None, "--limit", "1").exit_code == 0
    line = "until this run has to stop: nothing of it would be finished"
    assert line in run(None, "--dry-run", SLURM_JOB_END_TIME="1").stderr
    assert line not in run(None, "--dry-run").stderr
    assert (
        line not in run(None, "--dry-run", SLURM_JOB_END_TIME=str(int(time.time()) + 10**6)).stderr
    )


def test_the_first_steps_say_so_where_no_rate_is_known(selection, flux, tmp_path: Path) -> None:
    said: dict[str, list[str]] = {}
    for name, deadline in {"past": 0.0, "far": time.time() + 10**6, "unknown": None}.items():
        said[name] = []
        generate(
            selection,
            tmp_path / name,
            stop=Stop(deadline),
            pipeline=FakePipeline(flux),
            report=said[name].append,
            **OPTIONS,
        )
    assert (said["far"], said["unknown"]) == ([], [])
    (line,) = said["past"]
    assert line.startswith("a batch of 2 takes about ")
