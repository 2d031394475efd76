"""How many threads torch has: one in tests and all that they start, what is paid for elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from processes import finished

from fedgfe_store.cli.threads import share_processors

# The command line as it is started, then what torch makes of what it left in the environment.
AFTER_A_COMMAND = """
import json, os, sys
from fedgfe_store.cli.main import main
sys.argv = ["fedgfe-store", "--version"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules
import torch
print(json.dumps([torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"]]))
"""


def after_a_command(leave_out: Sequence[str] = (), **environ: str) -> list[object]:
    """Return the threads that torch has after a command in a process of its own, how they wait."""
    given = {name: value for name, value in os.environ.items() if name not in leave_out}
    command = [sys.executable, "-c", AFTER_A_COMMAND]
    done = finished(command, env=given | environ)
    threads: list[object] = json.loads(done.stdout.splitlines()[-1])
    return threads


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning")  # once benchmarks ran
def test_torch_has_one_thread_in_tests_and_their_children(method):
    assert torch.get_num_threads() == 1
    with get_context(method).Pool(1) as pool:
        assert pool.apply_async(torch.get_num_threads).get(120) == 1


@pytest.mark.slow
def test_torch_has_one_thread_in_programs_that_tests_start():
    assert after_a_command() == [1, "passive"]


@pytest.mark.slow
def test_a_commands_threads_sleep_while_they_wait_and_are_as_many_as_slurm_gave():
    chosen = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
    assert after_a_command(leave_out=chosen, SLURM_CPUS_PER_TASK="1") == [1, "passive"]


def settled(tmp_path: Path, **environ: str) -> dict[str, str]:
    share_processors(environ, own=tmp_path / "cgroup", mounted=tmp_path / "mounted")
    return environ


def confine(tmp_path: Path, group: str, **quotas: str) -> None:
    """Make a control group of this process whose parents, and itself, have some quotas."""
    (tmp_path / "cgroup").write_text(f"1:cpu:/elsewhere\n0::{group}\n")
    folder = tmp_path / "mounted"
    (folder / group.lstrip("/")).mkdir(parents=True)
    for name, quota in quotas.items():
        (folder / name.replace("_", "/") / "cpu.max").write_text(f"{quota} 100000\n")


@pytest.mark.parametrize(
    ("quotas", "threads"),
    [
        ({}, None),
        ({"job_step": "max"}, None),
        ({"job_step": "300000"}, "3"),
        ({"job_step": "250000"}, "3"),
        ({"job_step": "1000"}, "1"),
        ({"job": "200000", "job_step": "max"}, "2"),
        ({"job": "200000", "job_step": "700000"}, "2"),
    ],
)
def test_threads_are_no_more_than_a_control_group_pays_for(tmp_path, quotas, threads):
    confine(tmp_path, "/job/step", **quotas)
    assert settled(tmp_path).get("OMP_NUM_THREADS") == threads


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    confine(tmp_path, "/")
    (tmp_path / "mounted" / "cpu.max").write_text("200000 100000\n")
    assert settled(tmp_path)["OMP_NUM_THREADS"] == "2"
    (tmp_path / "cgroup").write_text("0::/system/not/mounted/here\n")
    assert settled(tmp_path)["OMP_NUM_THREADS"] == "2"


def test_the_least_of_all_limits_counts(tmp_path):
    confine(tmp_path, "/job", job="400000")
    assert settled(tmp_path, SLURM_CPUS_PER_TASK="3")["OMP_NUM_THREADS"] == "3"
    assert settled(tmp_path, SLURM_CPUS_PER_TASK="16")["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_says_counts(tmp_path, name):
    confine(tmp_path, "/job", job="100000")
    given = {name: "7", "OMP_WAIT_POLICY": "ACTIVE"}
    assert settled(tmp_path, **given) == given


@pytest.mark.parametrize("asked", ["", "0", "4(x2)", "-1"])
def test_where_nothing_is_known_torch_decides(tmp_path, asked):
    environ = settled(tmp_path, SLURM_CPUS_PER_TASK=asked)
    assert "OMP_NUM_THREADS" not in environ
