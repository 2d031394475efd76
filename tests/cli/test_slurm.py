"""The SLURM script: checked when it is printed, sound bash, and it queues itself again."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from processes import finished

from fedgfe_store.cli.main import group

ARRAY = {"SLURM_JOB_ID": "1003", "SLURM_ARRAY_JOB_ID": "1000", "SLURM_ARRAY_TASK_ID": "3"}
FAKE = '#!/bin/bash\nprintf "%s\\0" "$(basename "$0")" "$@" >> "$CALLS"\nexit "${CODE:-0}"\n'


def run(*words: str) -> Result:
    return CliRunner().invoke(group, words)


def script(*words: str, store: str = "embeddings.zarr") -> str:
    result = run("--store", store, "slurm", *words)
    assert result.exit_code == 0, result.output
    return result.stdout


def directives(text: str) -> list[str]:
    """Read the options as sbatch does, whose rules for double quotes are those of a shell."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    words = [shlex.split(line, comments=True) for line in lines]
    assert all(len(each) == 1 for each in words)
    return [word for (word,) in words]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a script as SLURM's node would; returns its exit code and the programs it called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)

    def submit(text: str, code: int, environ: dict[str, str]) -> tuple[int, list[list[str]]]:
        calls = tmp_path / "calls"
        calls.write_bytes(b"")
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        path = f"{programs}{os.pathsep}{outside['PATH']}"
        inside = {**outside, **environ, "PATH": path, "CALLS": str(calls), "CODE": str(code)}
        done = finished(["bash"], input=text, cwd="/", env=inside, check=False)
        found: list[list[str]] = []
        for word in calls.read_text().split("\0")[:-1]:
            if word in ("srun", "scontrol"):
                found.append([])
            found[-1].append(word)
        return done.returncode, found

    return submit


def test_the_script_asks_for_an_array_that_may_be_queued_again() -> None:
    found = directives(script("--parts", "8", "--partition", "gpu", "--", "--round", "5"))
    assert found == [
        "--job-name=fedgfe",
        "--array=0-7",
        "--time=24:00:00",
        "--partition=gpu",
        "--gres=gpu:1",
        "--requeue",
        "--signal=USR1@120",
        "--open-mode=append",
        "--output=%x-%A_%a.out",
    ]


def test_checkpoints_go_with_the_store_among_them_unless_one_is_named() -> None:
    arguments = ["slurm", "--parts", "2", "--", "--checkpoint_dir", "checkpoints"]
    named = CliRunner().invoke(group, arguments).stdout
    assert "fedgfe-store generate --checkpoint_dir checkpoints --part" in named
    assert "--store" not in named
    result = CliRunner().invoke(
        group, ["--store", "a.zarr", "slurm", "--", "--checkpoint_dir", "checkpoints"]
    )
    assert "fedgfe-store --store a.zarr generate --checkpoint_dir checkpoints" in result.output
    both = ["slurm", "--", "--checkpoint", "a.pt", "--checkpoint_dir", "checkpoints"]
    assert CliRunner().invoke(group, both).exit_code == 2


def test_one_part_is_a_job_without_array() -> None:
    text = script("--gres", "", "--time", "1-0", "--", "--round", "5")
    assert "array" not in text.lower()
    assert " --part 0/1\n" in text
    assert {"--time=1-0", "--output=%x-%j.out"} < set(directives(text))
    assert "--gres" not in text


@pytest.mark.parametrize("limit", ["90", "90:30", "12:00:00", "2-12", "2-12:30:00", "unlimited"])
def test_a_time_limit_is_one_that_sbatch_takes(limit: str) -> None:
    assert f"--time={limit}" in directives(script("--time", limit))
    for wrong in ("12h", "1:2:3:4", "2-", ""):
        result = CliRunner().invoke(group, ["slurm", "--time", wrong])
        assert result.exit_code == 2
        assert f"expected such as 12:00:00, 90 (minutes) or 2-12, got {wrong!r}" in result.output


def test_a_task_runs_its_part_in_the_folder_of_the_script(submit, tmp_path, monkeypatch) -> None:
    folder = tmp_path / 'it\'s a "folder" $HOME'
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = ["--class", "a b,it's", "--output-dir", '$HOME/"x" `y`', "--steps", "4"]
    text = script(
        "--parts", "8", "--setup", "pwd > where", "--setup", "export CUDA=1", "--", *words,
        store="my store's.zarr",
    )  # fmt: skip
    assert submit(text, 0, ARRAY) == (
        0,
        [["srun", "fedgfe-store", "--store", "my store's.zarr", "generate", *words,
          "--part", "auto/8"]],
    )  # fmt: skip
    assert (folder / "where").read_text() == f"{folder}\n"


@pytest.mark.parametrize("code", [0, 1, 3, 137])
def test_other_exit_codes_are_passed_on(submit, code: int) -> None:
    text = script("--parts", "4", "--", "--round", "5")
    status, calls = submit(text, code, ARRAY)
    assert (status, [call[0] for call in calls]) == (code, ["srun"])


def test_a_stopped_task_is_queued_again_and_no_other(submit) -> None:
    text = script("--parts", "4", "--", "--round", "5")
    status, calls = submit(text, 75, ARRAY)
    assert (status, calls[1:]) == (75, [["scontrol", "requeue", "1000_3"]])
    text = script("--", "--round", "5")
    status, calls = submit(text, 75, {"SLURM_JOB_ID": "1003"})
    assert (status, calls[1:]) == (75, [["scontrol", "requeue", "1003"]])


def test_cpus_are_named_to_srun_where_the_job_has_asked_for_some(submit) -> None:
    text = script("--sbatch", "--cpus-per-task=6", "--", "--round", "5")
    assert "--cpus-per-task=6" in directives(text)
    environ = {"SLURM_JOB_ID": "1003", "SLURM_CPUS_PER_TASK": "6"}
    assert submit(text, 0, environ)[1][0][:3] == ["srun", "--cpus-per-task=6", "fedgfe-store"]


def test_options_of_sbatch_with_spaces_and_quotes() -> None:
    given = ['--comment=it\'s a \\ "test" #1', "--account=x", "--exclusive", "--constraint=a&b"]
    words = [word for option in given for word in ("--sbatch", option)]
    text = script(*words, "--job-name", "two words", "--", "--round", "5")
    assert directives(text)[0] == "--job-name=two words"
    assert directives(text)[-4:] == given
    assert finished(["bash", "-n"], input=text, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "--rond", "5"], "No such option"),
        (["--", "--round", "x"], "expected numbers such as 1,5,10-20"),
        (["--", "round"], "unexpected extra argument"),
        (["--", "--steps", "0"], "--num_inference_steps"),
        (["--parts", "4", "--", "--round", "5", "--part", "0/4"], "--part: the script itself"),
        (["--", "--shard=0/4"], "--shard: the script itself"),
        (["--", "--part=auto"], "--part: the script itself"),
        (["--parts", "0", "--", "--round", "5"], "--parts"),
        (["--partition", "a\nrm -rf x", "--", "--round", "5"], "expected one line"),
        (["--sbatch", "--account=a\nrm x", "--", "--round", "5"], "expected one line"),
        (["--sbatch", "account=x", "--", "--round", "5"], "expected such as --account=NAME"),
        (["--sbatch", "--account x", "--", "--round", "5"], "expected such as --account=NAME"),
        (["--job-name", "a/b", "--", "--round", "5"], "expected a name without /"),
    ],
)
def test_mistakes_are_found_before_the_queue(words: list[str], message: str) -> None:
    result = run("slurm", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
