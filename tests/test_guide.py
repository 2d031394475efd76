"""Every command of the old system's guide, its script's name replaced, does what the guide says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import legacy
import pytest
from click.testing import CliRunner
from generation_fakes import save_random_sd
from places import ROOT
from processes import finished

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.cli.main import group

pytestmark = pytest.mark.model
OLD = "python system/generate_images_from_checkpoint.py"

EXPERIMENT = "vegas-10n-10c-400s-avg"
NAMED = f"output_images/{EXPERIMENT}"
CHECKPOINTS = "checkpoints/embeddings"
ROUND_1 = {(node, 1) for node in ("0", "4", "5", "9", "server")}
LATER = {("0", number) for number in (5, 10, 15, 20)}
ALL = ROUND_1 | LATER
SLURM = {("0", 5), ("server", 5)}

# The command, the folder of its pictures, the nodes and rounds that it renders, what it prints.
COMMANDS = {
    "one checkpoint": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint checkpoints/embeddings/node_0_embeddings_r5.pt
        """,
        NAMED,
        {("0", 5)},
        " rendered in ",
    ),
    "all of a folder": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/
        """,
        NAMED,
        ALL,
        " rendered in ",
    ),
    "another output folder": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/ \
            --output_dir output_images/round_5/
        """,
        "output_images/round_5",
        ALL,
        " rendered in ",
    ),
    "in batches": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/ \
            --batch_size 4
        """,
        NAMED,
        ALL,
        "in 3 batches of 4",
    ),
    "on the CPU": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/ \
            --device cpu
        """,
        NAMED,
        ALL,
        "float32 on cpu",
    ),
    "other parameters": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint checkpoints/embeddings/node_0_embeddings_r5.pt \
            --output_dir output_images/high_quality/ \
            --num_inference_steps 100 \
            --guidance_scale 10.0
        """,
        "output_images/high_quality",
        {("0", 5)},
        "100 steps, guidance 10,",
    ),
    "GPU 0": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/ \
            --pattern "node_[0-4]*.pt" \
            --device cuda:0
        """,
        NAMED,
        {("0", 1), ("4", 1)} | LATER,
        " rendered in ",
    ),
    "GPU 1": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/ \
            --pattern "node_[5-9]*.pt" \
            --device cuda:1
        """,
        NAMED,
        {("5", 1), ("9", 1)},
        " rendered in ",
    ),
    "out of memory": (
        r"""
        python system/generate_images_from_checkpoint.py \
            --checkpoint_dir checkpoints/embeddings/ \
            --batch_size 1 \
            --clear_cache_every 10
        """,
        NAMED,
        ALL,
        "in 9 batches of 1",
    ),
}
STABLE_DIFFUSION = r"""
python system/generate_images_from_checkpoint.py \
    --checkpoint_dir checkpoints/embeddings/ \
    --diffusion_type sd
"""

VERBOSE = r"""
python system/generate_images_from_checkpoint.py \
    --checkpoint checkpoint.pt \
    --verbose \
    2>&1 | tee generation.log
"""

ROUNDS = r"""
for round in 1 5 10 15 20; do
    python system/generate_images_from_checkpoint.py \
        --checkpoint checkpoints/embeddings/node_0_embeddings_r${round}.pt \
        --output_dir output_images/round_${round}/
done
"""

SBATCH = r"""#!/bin/bash
#SBATCH --job-name=gen_imgs
#SBATCH --partition=gpu
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00

cd $HOME/fedgfe
source $(conda info --base)/etc/profile.d/conda.sh
conda activate flvit

# Genera tutte le immagini
python system/generate_images_from_checkpoint.py \
    --checkpoint_dir checkpoints/embeddings/vegas_10n_10c/ \
    --batch_size 2 \
    --output_dir output_images/final/

echo "Generation complete!"
"""


def tensors_of(node: str, number: int):
    t5, clip = legacy.tensors(1, 100 * number + (99 if node == "server" else int(node)))
    return t5[0], clip[0]


def write_file(folder: Path, node: str, number: int, name: str | None = None) -> None:
    """Write a checkpoint as training left it: the server's samples stacked, no index or name."""
    t5, clip = tensors_of(node, number)
    owner = "server" if node == "server" else f"node_{node}"
    path = f"/home/someone/fedgfe/output_images/{EXPERIMENT}/{owner}_train_dog_0_r{number}.png"
    if node == "server":
        entries = [legacy.stack(t5[None], clip[None], image_path=path)]
    else:
        entries = [legacy.entry(t5, clip, image_path=path)]
    value = legacy.content(entries, node if node == "server" else int(node), number)
    legacy.save(folder, value, name or f"{owner}_embeddings_r{number}.pt")


def write_store(folder: Path, origins: set[tuple[str, int]]) -> None:
    """Write a store as training leaves it that appends to it straight away."""
    metadata = Metadata(experiment=EXPERIMENT, diffusion_type="flux", classes=("dog",))
    store = EmbeddingStore.create(folder / "embeddings.zarr", Schema.flux(17, metadata=metadata))
    for node, number in sorted(origins):
        t5, clip = tensors_of(node, number)
        with store.append(node=node, round=number) as batch:
            batch.add(split="train", class_name="dog", index=0, t5=t5, clip=clip)


@pytest.fixture(scope="module")
def experiments(tmp_path_factory) -> dict[str, Path]:
    """The guide's folders after training: checkpoint files, or stores and no file."""
    folders = {"files": {CHECKPOINTS: ALL, f"{CHECKPOINTS}/vegas_10n_10c": SLURM}}
    folders["store"] = folders["files"]
    made = {}
    for layout, contents in folders.items():
        made[layout] = tmp_path_factory.mktemp(layout)
        for name, origins in contents.items():
            folder = made[layout] / name
            folder.mkdir(parents=True, exist_ok=True)
            if layout == "store":
                write_store(folder, origins)
                continue
            for origin in origins:
                write_file(folder, *origin)
    write_file(made["files"], "3", 7, "checkpoint.pt")
    assert not list(made["store"].rglob("*.pt"))
    return made


@pytest.fixture(params=["files", "store"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def fedgfe(experiments, layout, tmp_path, monkeypatch) -> Path:
    """Stand in a copy of the guide's folder."""
    monkeypatch.setenv("FEDGFE_MODEL", "tiny")
    monkeypatch.delenv("FEDGFE_STORE", raising=False)
    folder = shutil.copytree(experiments[layout], tmp_path / "fedgfe")
    monkeypatch.chdir(folder)
    return folder


def here(command: str) -> str:
    """Replace the script's name, and the guide's GPUs, which not every machine has."""
    assert OLD in command
    return re.sub(r"cuda:\d", "cpu", command.replace(OLD, "fedgfe-store generate"))


def run(command: str):
    program, *words = shlex.split(here(command).replace("\\\n", " "))
    assert program == "fedgfe-store"
    return CliRunner().invoke(group, words)


def in_bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the installed `fedgfe-store` on the path."""
    programs = folder_of_programs(folder.parent)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return finished(
        ["bash", "-e", "-c", here(script)],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        check=False,
    )


def folder_of_programs(folder: Path) -> Path:
    """Return the folder whose programs `in_bash` finds first."""
    (folder / "bin").mkdir(exist_ok=True)
    return folder / "bin"


def run_by_word(script: str, folder: Path, **environment: str) -> tuple[str, list[str]]:
    """Run a script, but each `fedgfe-store` of it here; return what it and they print.

    The program on its path only notes its words: starting the real one takes seconds each time.
    """
    program, noted = folder_of_programs(folder.parent) / "fedgfe-store", folder.parent / "noted"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" '' >> '{noted}'\n")
    program.chmod(0o755)
    done = in_bash(script, folder, **environment)
    assert done.returncode == 0, done.stderr
    outputs = []
    for command in noted.read_text().removesuffix("\n\n").split("\n\n"):
        result = CliRunner().invoke(group, command.split("\n"))
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    return done.stdout, outputs


def pictures(folder: Path) -> dict[str, set[str]]:
    """Names of the pictures below `output_images`, by folder."""
    found: dict[str, set[str]] = {}
    for path in (folder / "output_images").rglob("*.png"):
        found.setdefault(str(path.parent.relative_to(folder)), set()).add(path.name)
    return found


def named(origins: set[tuple[str, int]]) -> set[str]:
    owners = {node: "server" if node == "server" else f"node_{node}" for node, _ in origins}
    return {f"{owners[node]}_train_dog_0_r{number}.png" for node, number in origins}


def test_the_page_for_users_of_the_old_script_shows_every_command():
    page = (ROOT / "docs" / "from_the_old_script.md").read_text()
    for command in [*(text for text, *_ in COMMANDS.values()), STABLE_DIFFUSION, VERBOSE]:
        options = " ".join(command.replace("\\\n", " ").split())
        in_a_table = options.removeprefix(OLD).strip().replace("|", r"\|")
        assert f"| `{in_a_table}` |" in page
    for script in (ROUNDS, SBATCH):
        assert f"```sh\n{here(script).strip()}\n```" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_command(fedgfe, layout, name):
    command, output, origins, says = COMMANDS[name]
    result = run(command)
    assert result.exit_code == 0, result.output
    assert pictures(fedgfe) == {output: named(origins)}
    noun = "image" if len(origins) == 1 else "images"
    assert f"{len(origins)} {noun} rendered" in result.output
    assert says in result.output
    stored = EmbeddingStore.open(f"{CHECKPOINTS}/embeddings.zarr").select().keys()
    imported = {(key.node, key.round) for key in stored}
    assert imported == (ALL if layout == "store" else origins)


def test_two_gpus_and_then_the_rest(fedgfe, layout):
    """The guide's patterns leave the server out; a third run adds it and nothing else."""
    for name in ("GPU 0", "GPU 1"):
        assert run(COMMANDS[name][0]).exit_code == 0
    assert pictures(fedgfe) == {NAMED: named(ALL - {("server", 1)})}
    result = run(COMMANDS["all of a folder"][0])
    assert "1 image rendered" in result.output
    assert ("1 file, " in result.output) == (layout == "files")
    assert pictures(fedgfe) == {NAMED: named(ALL)}


def test_rounds_in_a_loop(fedgfe):
    rounds = (1, 5, 10, 15, 20)
    _, outputs = run_by_word(ROUNDS, fedgfe)
    assert len(outputs) == len(rounds)
    assert pictures(fedgfe) == {f"output_images/round_{r}": named({("0", r)}) for r in rounds}


def test_the_slurm_script(fedgfe, tmp_path):
    """With a conda that does nothing, and the guide's folder under $HOME."""
    conda = tmp_path / "conda" / "etc" / "profile.d" / "conda.sh"
    conda.parent.mkdir(parents=True)
    conda.write_text('conda() { test "$*" = "activate flvit"; }\n')
    program = folder_of_programs(tmp_path) / "conda"
    program.write_text(f'#!/bin/sh\necho "{tmp_path / "conda"}"\n')
    program.chmod(0o755)
    printed, (output,) = run_by_word(SBATCH, fedgfe, HOME=str(tmp_path))
    assert printed.endswith("Generation complete!\n")
    assert "1 batch of 2" in output
    assert pictures(fedgfe) == {"output_images/final": named(SLURM)}


@pytest.mark.parametrize("layout", ["store"], indirect=True)
def test_an_array_that_counts_checkpoints_is_no_split_of_the_work(fedgfe, monkeypatch):
    for name, value in {"ID": "5", "MIN": "0", "MAX": "9", "COUNT": "10", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert run(COMMANDS["one checkpoint"][0]).exit_code == 0
    assert pictures(fedgfe) == {NAMED: named({("0", 5)})}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["files"], indirect=True)
def test_verbose_output_into_a_log(fedgfe):
    done = in_bash(VERBOSE, fedgfe)
    assert done.returncode == 0, done.stderr
    log = (fedgfe / "generation.log").read_text()
    assert log == done.stdout
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO checkpoint\.pt: node 3, round 7: "
                     r"1 new records", log, re.MULTILINE)  # fmt: skip
    assert "1 image rendered" in log
    assert pictures(fedgfe) == {NAMED: named({("3", 7)})}


@pytest.mark.parametrize("layout", ["store"], indirect=True)
def test_a_name_that_tells_no_node_needs_its_file(fedgfe):
    write_store(fedgfe, {("3", 7)})
    result = CliRunner().invoke(group, ["generate", "--checkpoint", "checkpoint.pt", "--verbose"])
    assert result.exit_code == 1
    assert result.output == (
        "error: checkpoint.pt: no such file, and no record of it in embeddings.zarr\n"
    )


def test_stable_diffusion(tmp_path, monkeypatch):
    """From the guide's own layout, whose CLIP [77, 768] is what Stable Diffusion takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDGFE_MODEL", str(save_random_sd(tmp_path / "sd", width=768)))
    legacy.guide_file(tmp_path / CHECKPOINTS)
    result = run(STABLE_DIFFUSION)
    assert result.exit_code == 0, result.output
    assert pictures(tmp_path) == {
        "output_images/vegas": {f"node_0_train_dog_{index}_r5.png" for index in range(2)}
    }


@pytest.mark.parametrize("layout", ["files"], indirect=True)
def test_the_guides_own_layout_from_import_to_pictures(tmp_path, fedgfe):
    path, _, _ = legacy.guide_file(tmp_path / "guide")
    command = ["generate", "--round", "5", "--output-dir", "out"]
    assert CliRunner().invoke(group, ["import", str(path)]).exit_code == 0
    result = CliRunner().invoke(group, command)
    assert result.exit_code == 0, result.output
    assert "pool last" in result.output
    names = EmbeddingStore.open("embeddings.zarr").select().records["image_filename"]
    assert {file.name for file in Path("out").glob("*.png")} == set(names)
    assert len(names) == 2
