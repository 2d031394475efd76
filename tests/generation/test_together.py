"""Several processes on one folder: every image is made, none twice, and no file is torn."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import finished, started

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.generation.claims import Claims
from fedgfe_store.generation.parts import Part
from fedgfe_store.generation.plan import plan_images
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import Settings
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection

RECORDS = 120
SETTINGS: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "batch_size": 2}


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    folder = tmp_path_factory.mktemp("store") / "embeddings.zarr"
    store = EmbeddingStore.create(folder, SMALL)
    fill(store, node=0, round=5, n=RECORDS // 2)
    return store.select()


def command(selection: Selection, flux: Path, folder: Path) -> list[str]:
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "2", "--batch-size", "2"]
    arguments = ["--store", str(selection.path), "generate", "--model", str(flux), *size]
    return [*arguments, "--device", "cpu", "--output-dir", str(folder)]


PROGRAM = [sys.executable, "-m", "fedgfe_store.cli.main"]


def check_whole(selection: Selection, folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == sorted(image_name(key) for key in selection.keys())
    for name in names:
        with Image.open(folder / name) as image:
            image.load()
    listed = Counter(line["file"] for line in read_manifest(folder))
    assert set(listed) == set(names)
    assert set(listed.values()) == {1}, "an image was made twice"
    assert not list(folder.glob(".fedgfe-*.tmp"))


@pytest.mark.slow
def test_two_processes_share_the_work(flux: Path, selection: Selection, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    program = [*PROGRAM, *command(selection, flux, folder)]
    with ExitStack() as stack:
        both = [stack.enter_context(started(program, stderr=subprocess.STDOUT)) for _ in range(2)]
        outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    check_whole(selection, folder)


def test_where_locks_are_refused_a_run_says_so_once_and_leaves_no_claims(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    part = selection.take(range(8))
    remarks: list[str] = []
    options: dict[str, Any] = {**SETTINGS, "pipeline": FakePipeline(flux), "report": remarks.append}
    assert generate(part, tmp_path / "out", **options).done == 8
    assert ["no file locks in" in remark for remark in remarks] == [True]
    assert not list((tmp_path / "out").glob(".fedgfe-claim-*"))


def test_what_another_process_holds_or_has_made_is_left_to_it(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    names = [image_name(key) for key in selection.keys()[:8]]

    class Meanwhile(FakePipeline):
        """Another process makes the last image while this one makes the first."""

        def denoise(self, *args: Any, **options: Any) -> Any:
            if not self.batch_sizes:
                other = selection.take([7])
                options_of_other: dict[str, Any] = {**SETTINGS, "pipeline": FakePipeline(flux)}
                generate(other, tmp_path / "other", **options_of_other)
                os.rename(tmp_path / "other" / names[7], tmp_path / "out" / names[7])
            return super().denoise(*args, **options)

    (tmp_path / "out").mkdir()
    with started([sys.executable, "-c", HOLDER, tmp_path / "out", names[1]]) as holder:
        assert holder.line() == "held"
        part = selection.take(range(8))
        options: dict[str, Any] = {**SETTINGS, "batch_size": 1, "pipeline": Meanwhile(flux)}
        report = generate(part, tmp_path / "out", **options)
    assert (report.done, report.elsewhere, report.left) == (6, 2, 0)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {*names} - {names[1]}
    assert generate(part, tmp_path / "out", **{**options, "pipeline": FakePipeline(flux)}).done == 1


HOLDER = """
import sys
from pathlib import Path
from fedgfe_store.generation.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    assert claims.take(sys.argv[2])
    print("held", flush=True)
    sys.stdin.read()
"""


def test_claims_are_given_back_as_images_are_written(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    release = Claims.release

    def watched(self: Claims, name: str) -> None:
        held.append(len(self._taken))
        release(self, name)

    monkeypatch.setattr(Claims, "release", watched)
    generate(selection, tmp_path, **SETTINGS, pipeline=FakePipeline(flux))
    assert len(held) == RECORDS
    assert max(held) < 40, "no more than is read ahead, rendered and waiting to be written"


@pytest.mark.slow
@pytest.mark.long
def test_one_command_for_all_gpus_of_a_machine(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(sys.executable).with_name("fedgfe-store")
    arguments = [str(program), *command(selection, flux, tmp_path / "out")]
    result = finished([sys.executable, *launcher, "--no-python", *arguments], check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "part 0/2" in result.stdout + result.stderr
    check_whole(selection, tmp_path / "out")
    manifests = sorted(path.name for path in (tmp_path / "out").glob("manifest*"))
    assert manifests == ["manifest-0-of-2.jsonl", "manifest-1-of-2.jsonl"]


def test_parts_by_hand_make_one_folder(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(selection, flux, tmp_path / "out")
    counts = []
    for text in ("0/3", "1/3", "2/3"):
        result = CliRunner().invoke(group, [*arguments, "--part", text])
        assert result.exit_code == 0, result.output
        counts.append(len(list((tmp_path / "out").glob("*.png"))))
    assert 0 < counts[0] < counts[1] < counts[2] == RECORDS
    check_whole(selection, tmp_path / "out")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    for name, value in (("MIN", "0"), ("MAX", "7"), ("COUNT", "8"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    result = CliRunner().invoke(group, [*arguments, "--part", "auto", "--dry-run"])
    assert "part 5/8" in result.output
    result = CliRunner().invoke(group, [*arguments, "--shard", "3/3"])
    assert (result.exit_code, "expected i/n with 0 <= i < n" in result.output) == (1, True)


def test_a_rank_without_work_is_done(flux: Path, selection: Selection, tmp_path: Path) -> None:
    arguments = command(selection, flux, tmp_path / "out")
    chosen = next(key for key in selection.keys() if not Part(0, 2).holds(key))
    filters = ["--index", str(chosen.index), "--class", chosen.class_name, "--split", chosen.split]
    result = CliRunner().invoke(group, [*arguments, *filters, "--shard", "0/2"])
    assert result.exit_code == 0, result.output
    assert "0 images rendered" in result.output


@pytest.mark.slow
@settings(max_examples=30)  # each makes up to 33 plans
@given(
    n=st.integers(1, 16),
    done=st.sets(st.integers(0, RECORDS - 1)),
    chosen=st.sampled_from(["all", "dog", "cat"]),
)
def test_parts_are_disjoint_complete_and_stable(
    selection: Selection, n: int, done: set[int], chosen: str, tmp_path_factory: object
) -> None:
    """Over the plans that runs really make, whatever the filter and whatever is done."""
    settings = Settings("m", "r", "float32", 2, 3.5, SIZE, SIZE)
    keys = selection.keys()
    positions = [i for i, key in enumerate(keys) if chosen in ("all", key.class_name)]
    part = selection.take(positions)
    plans = [
        plan_images(part, settings, Path("/nowhere"), Request(part=Part(i, n))) for i in range(n)
    ]
    shares = [[item.key for item in plan.items] for plan in plans]
    held = sorted((key for share in shares for key in share), key=lambda key: key.rank)
    assert held == sorted(keys[i] for i in positions)
    left = selection.take([i for i in positions if i not in done])
    if len(left):
        for index, share in enumerate(shares):
            again = plan_images(left, settings, Path("/nowhere"), Request(part=Part(index, n)))
            assert {item.key for item in again.items} <= set(share)


KILLS = 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.kill
def test_killed_runs_lose_nothing_and_repeat_only_what_was_in_flight(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    """A few of the kills of ``tools/kill_runs.py``, at random moments of a run's rendering."""
    folder, rng = tmp_path / "out", random.Random(5)
    for _ in range(KILLS):
        before = len(list(folder.glob("*.png")))
        images = before + rng.randint(1, 20)
        program = [*PROGRAM, *command(selection, flux, folder)]
        with started(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(folder.glob("*.png"))) < images:
                time.sleep(0.01)
            process.kill()
    result = CliRunner().invoke(group, command(selection, flux, folder))
    assert result.exit_code == 0, result.output
    check_whole(selection, folder)
    lines = [json.loads(x) for x in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == RECORDS
