"""Which part of a run a process has: by what is asked, and by what its launcher says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from processes import finished

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.launchers import AskedPart, detect_part, local_device
from fedgfe_store.generation.parts import Part

AUTO = AskedPart.parse("auto")


def array_task(task: int, first: int, last: int, count: int, step: int | None) -> dict[str, str]:
    facts = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in facts.items() if v is not None}


def ranks(rank: int, world: int, local: int | None = None, **more: str) -> dict[str, str]:
    own = {} if local is None else {"LOCAL_WORLD_SIZE": str(local)}
    return {"RANK": str(rank), "WORLD_SIZE": str(world), **own, **more}


def srun_task(task: int, tasks: int, nodes: int = 1) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(tasks),
    }


@pytest.mark.parametrize(
    "text",
    ["8/8", "1", "", "-1/4", "1/0", "a/b", "1/4/2", " 1/4", "²/4", "auto/0", "auto/", "Auto"],
)
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(SchemaMismatchError, match="part: expected i/n with 0 <= i < n") as caught:
        AskedPart.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({}, "0/1"),
        ({"RANK": "", "WORLD_SIZE": "", "SLURM_ARRAY_TASK_ID": ""}, "0/1"),
        (array_task(3, 0, 7, 8, 1), "3/8"),
        (array_task(5, 1, 8, 8, 1), "4/8"),
        (array_task(5, 1, 8, 8, None), "4/8"),
        (array_task(8, 0, 12, 4, 4), "2/4"),
        (array_task(3, 3, 3, 1, 0), "0/1"),
        (ranks(1, 4), "1/4"),
        (ranks(5, 8, 4), "5/8"),
        (srun_task(2, 4), "2/4"),
        # What `sbatch --ntasks=4` gives the batch script, which is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, "0/1"),
        # torchrun in the batch script.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", **ranks(1, 2, 2)}, "1/2"),
        # `srun --ntasks=2 torchrun` over two nodes: one world, or one of each node.
        ({**srun_task(1, 2, 2), **ranks(5, 8, 4)}, "5/8"),
        ({**srun_task(1, 2, 2), **ranks(1, 4, 4)}, "5/8"),
        ({**srun_task(1, 2, 1), **ranks(1, 4, 4, TORCHELASTIC_RUN_ID="x")}, "5/8"),
        # srun's own tasks, which the script numbers for torch.distributed.
        ({**srun_task(3, 4, 1), **ranks(3, 4, 4)}, "3/4"),
        # torchrun typed into a shell that srun opened.
        ({**srun_task(0, 1), **ranks(1, 2, 2, TORCHELASTIC_RUN_ID="x")}, "1/2"),
        ({**array_task(2, 0, 3, 4, 1), **srun_task(1, 2)}, "5/8"),
        ({**array_task(2, 0, 3, 4, 1), **ranks(3, 4, 4)}, "11/16"),
        ({**array_task(1, 0, 1, 2, 1), **srun_task(1, 2, 2), **ranks(1, 4, 4)}, "13/16"),
    ],
)
def test_the_environment_says_which_part(environ: dict[str, str], part: str) -> None:
    assert str(detect_part(environ, AUTO)[0]) == part


@pytest.mark.parametrize(
    "array",
    [
        array_task(3, 0, 7, 8, 1),
        array_task(4, 0, 8, 3, 1),
        {"SLURM_ARRAY_TASK_ID": "3"},
        {"SLURM_ARRAY_TASK_ID": "x"},
    ],
)
def test_an_array_leaves_nothing_out_unless_it_is_asked_to(array: dict[str, str]) -> None:
    assert detect_part(array) == (Part(0, 1), "one process")
    assert detect_part({**array, **srun_task(1, 2)})[0] == Part(1, 2)
    assert detect_part({**array, **ranks(3, 4, 4)})[0] == Part(3, 4)


def test_a_part_that_is_named_goes_before_the_environment() -> None:
    environ = {**array_task(2, 0, 3, 4, 1), **srun_task(1, 2)}
    assert detect_part(environ, AskedPart.parse("5/9"))[0] == Part(5, 9)


@pytest.mark.parametrize("queued", [range(8), (0, 3, 4, 5), (7,)])
def test_tasks_of_a_known_number_of_parts_may_be_queued_in_any_choice(queued) -> None:
    asked = AskedPart.parse("auto/8")
    for task in queued:
        environ = array_task(task, min(queued), max(queued), len(queued), 1)
        assert detect_part(environ, asked)[0] == Part(task, 8)
        assert detect_part({**environ, **srun_task(1, 2)}, asked)[0] == Part(2 * task + 1, 16)


def test_a_number_of_parts_needs_a_task_below_it() -> None:
    asked = AskedPart.parse("auto/8")
    with pytest.raises(SchemaMismatchError, match=r"expected less than 8 .* got 8; .*--array=0-7"):
        detect_part(array_task(8, 1, 8, 8, 1), asked)
    with pytest.raises(SchemaMismatchError, match="SLURM_ARRAY_TASK_ID: expected .* got nothing"):
        detect_part({}, asked)


def test_the_reason_names_the_variables() -> None:
    assert detect_part({}, AUTO)[1] == "one process"
    reason = detect_part({**array_task(2, 0, 3, 4, 1), **srun_task(1, 2)}, AUTO)[1]
    assert reason == "SLURM_ARRAY_TASK_ID 2 of 0-3, SLURM_PROCID 1 of SLURM_STEP_NUM_TASKS 2"


@pytest.mark.parametrize(("first", "step"), [(0, 1), (1, 1), (0, 3), (10, 5)])
@pytest.mark.parametrize("procs", [1, 3])
def test_the_processes_of_an_array_make_up_all_parts(first: int, step: int, procs: int) -> None:
    last = first + 4 * step
    parts = [
        detect_part({**array_task(t, first, last, 5, step), **srun_task(p, procs)}, AUTO)[0]
        for t in range(first, last + 1, step)
        for p in range(procs)
    ]
    assert parts == [Part(i, 5 * procs) for i in range(5 * procs)]


@pytest.mark.parametrize(
    "environ",
    [
        array_task(3, 0, 7, 3, 1),
        array_task(3, 0, 7, 3, 3),
        array_task(4, 0, 8, 3, 1),
        array_task(9, 0, 7, 8, 1),
        {"SLURM_ARRAY_TASK_ID": "3"},
        {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7"},
    ],
)
def test_an_array_with_gaps_needs_the_part_told(environ: dict[str, str]) -> None:
    with pytest.raises(SchemaMismatchError, match=r"--part auto/N, or \$SLURM_ARRAY_TASK_ID/N"):
        detect_part(environ, AUTO)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "1", "WORLD_SIZE": "-4"}, "WORLD_SIZE"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({**srun_task(1, 2), "SLURM_PROCID": "1.5"}, "SLURM_PROCID"),
        ({**srun_task(2, 2)}, "SLURM_PROCID"),
        ({**array_task(3, 0, 7, 8, 1), "SLURM_ARRAY_TASK_COUNT": "all"}, "SLURM_ARRAY_TASK_COUNT"),
    ],
)
def test_a_malformed_variable_is_named(environ: dict[str, str], name: str) -> None:
    with pytest.raises(SchemaMismatchError, match=f"^{name}: expected"):
        detect_part(environ, AUTO)


def test_processes_spread_over_the_devices() -> None:
    assert local_device({}, 4) is None
    assert local_device({"LOCAL_RANK": "1"}, 0) is None
    assert local_device({"LOCAL_RANK": "3", "SLURM_LOCALID": "1"}, 4) == 3
    assert local_device({"SLURM_LOCALID": "5"}, 4) == 1
    assert local_device({"LOCAL_RANK": "3"}, 1) == 0
    with pytest.raises(SchemaMismatchError, match="^LOCAL_RANK: expected a whole number, got 'x'"):
        local_device({"LOCAL_RANK": "x"}, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
         "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "--no_python"],
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_real_launchers_make_parts(launcher: list[str], tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from fedgfe_store.generation.launchers import detect_part, local_device\n"
        "part = detect_part(os.environ)[0]\n"
        "text = f'{part} on {local_device(os.environ, 2)}'\n"
        "pathlib.Path(sys.argv[1], str(part.index)).write_text(text)\n"
    )
    program = [sys.executable, "-c", code, str(tmp_path)]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD"))}
    command = [sys.executable, "-m", *launcher, *program]
    done = finished(command, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / i).read_text() for i in "01"] == ["0/2 on 0", "1/2 on 1"]
