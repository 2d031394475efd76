"""Job scripts of the old script become ours: every way in which they call it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fedgfe_store.cli.main import group

NAME = "generate_images_from_checkpoint.py"
FOLDER = "--checkpoint_dir checkpoints/embeddings/"
CALLS = [
    f"python system/{NAME}",
    f"python3 system/{NAME}",
    f"python3.11 -u system/{NAME}",
    f"python -u system/{NAME}",
    f"python -W ignore -u -X dev system/{NAME}",
    f"python -m system.{NAME[:-3]}",
    f"python {NAME}",
    f"python ./{NAME}",
    f'python "$HOME/fedgfe/system/{NAME}"',
    f"$HOME/conda/envs/flvit/bin/python system/{NAME}",
    f"/opt/conda/bin/python3 -u /data/x/system/{NAME}",
    f"$PYTHON system/{NAME}",
    f'"${{PYTHON_BIN}}" -u system/{NAME}',
    f"python \\\n    -u \\\n    system/{NAME}",
]
BEFORE = ["", "srun ", "CUDA_VISIBLE_DEVICES=0 ", "time ", "nohup ", "srun --gres=gpu:1 -n 1 "]


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(group, ["adopt", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def adopted(folder: Path, text: str) -> str:
    path = folder / "job.sbatch"
    path.write_text(text)
    assert run(path, "--in-place").exit_code == 0
    (folder / "job.sbatch.orig").unlink()
    return path.read_text()


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("call", CALLS)
def test_every_form_of_the_call(tmp_path: Path, call: str, before: str) -> None:
    after = f" \\\n    {FOLDER} \\\n    --batch_size 2 2>&1 | tee log\n"
    text = f"#!/bin/bash\n#SBATCH --time=24:00:00\nif true; then\n  {before}{call}{after}fi\n"
    made = adopted(tmp_path, text)
    assert made == text.replace(call, "fedgfe-store generate")


def test_what_the_old_script_took_without_flags(tmp_path: Path) -> None:
    text = f"python -u system/{NAME}\npython system/{NAME} --batch_size 4 && echo done\n"
    named = "fedgfe-store generate --checkpoint_dir checkpoints/embeddings"
    assert adopted(tmp_path, text) == f"{named}\n{named} --batch_size 4 && echo done\n"


def test_options_that_only_the_job_knows(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(f'python system/{NAME} "$@"\n')
    result = run(path)
    assert result.exit_code == 0
    assert '+fedgfe-store generate "$@"' in result.stdout
    assert f"{path}:1: if no checkpoint is named there, add --checkpoint_dir" in result.stderr


def test_nothing_is_changed_unless_that_is_asked_for(tmp_path: Path) -> None:
    slow = f"# python system/{NAME} was slow\n"
    text = f"#!/bin/bash\n{slow}python system/main.py\npython system/{NAME} {FOLDER}\n"
    paths = [tmp_path / name for name in ("a.sh", "b.sbatch", "c.slurm")]
    for path in paths:
        path.write_text(text)
    paths[2].write_text("echo nothing\n")
    result = run(*paths)
    assert result.exit_code == 0
    assert result.stdout.count(f"-python system/{NAME} {FOLDER}\n+fedgfe-store generate ") == 2
    assert result.stderr == "3 files, 2 to change; --in-place does it\n"
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in paths]
    assert paths[0].read_text() == text
    assert run(paths[2]).stderr == "1 file, nothing to change\n"


def test_the_old_file_is_kept_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    data = f"python system/{NAME} {FOLDER}\r\n# \xff\r\n".encode("latin-1")
    path.write_bytes(data)
    path.chmod(0o755)
    assert "1 file, 1 changed" in run(path, "--in-place").output
    assert path.read_bytes() == f"fedgfe-store generate {FOLDER}\r\n# \xff\r\n".encode("latin-1")
    assert os.access(path, os.X_OK)
    backup = tmp_path / "job.sh.orig"
    assert backup.read_bytes() == data
    path.write_bytes(data)
    result = run(path, "--in-place")
    assert result.exit_code == 1
    assert re.search(r"job\.sh\.orig: is there already; .*job\.sh was not changed", result.stderr)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [f"torchrun --nproc-per-node 2 system/{NAME}", f"SCRIPT=system/{NAME}", f"./system/{NAME}"],
)
def test_a_form_that_is_not_known_is_left_and_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "job.sh"
    path.write_text(f"{line}\n")
    result = run(path, "--in-place")
    assert result.exit_code == 3
    assert f"left as it is: {path}:1: {line}" in result.stderr
    assert path.read_text() == f"{line}\n"
