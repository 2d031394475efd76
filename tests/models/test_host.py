"""The memory of the host that a process may take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.full_size import save
from fedgfe_store.generation.launchers import processes_here
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.host import free_host_bytes, pinned_bytes

GIB = 2**30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def free(root: Path, line: str, processes: int = 1) -> int:
    (root / "own").write_text(line + "\n")
    return free_host_bytes(processes, own=root / "own", mounted=root / "mounted")


def test_a_control_group_and_those_around_it_limit_memory(tmp_path: Path) -> None:
    job = tmp_path / "mounted" / "slurm" / "job_1"
    write(job, memory__max=16 * GIB, memory__current=5 * GIB)
    write(job, memory__stat=f"anon 1\ninactive_file {3 * GIB}")
    write(job / "step", memory__max="max", memory__current=GIB)
    assert free(tmp_path, "0::/slurm/job_1/step") == 14 * GIB, "3 GiB are pages of idle files"
    write(job / "step", memory__max=8 * GIB)
    assert free(tmp_path, "0::/slurm/job_1/step") == 7 * GIB
    assert free(tmp_path, "0::/slurm/job_1/step", processes=4) == 7 * GIB // 4


def test_control_groups_of_version_1_and_a_container_count(tmp_path: Path) -> None:
    root = tmp_path / "mounted" / "memory"
    write(root, **{"memory__limit_in_bytes": 8 * GIB, "memory__usage_in_bytes": 2 * GIB})
    line = "5:cpu,cpuacct:/a\n4:memory:/docker/not/shown/here"
    assert free(tmp_path, line) == 6 * GIB


def test_where_nothing_limits_it_the_machine_does(tmp_path: Path) -> None:
    assert free(tmp_path, "0::/") == 64 * GIB
    assert free_host_bytes(2, own=tmp_path / "none", mounted=tmp_path) == 32 * GIB


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "1"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        ({"SLURM_TASKS_PER_NODE": "8"}, 1),
    ],
)
def test_launchers_say_how_many_processes_share_a_machine(
    environ: dict[str, str], expected: int
) -> None:
    assert processes_here(environ) == expected


def test_pinned_flux_takes_what_the_allocator_makes_of_it(tmp_path: Path) -> None:
    model = resolve_model(str(save("flux-dev", tmp_path / "flux-dev")))
    sizes = [2 * numbers for numbers, _ in model.weights("transformer").tensors().values()]
    # As found in torch's allocator with FLUX.1-dev: sizes rounded up to powers of two, or not.
    assert pinned_bytes(sizes, exact=False) / GIB == pytest.approx(34.65, abs=0.2)
    assert pinned_bytes(sizes, exact=True) / GIB == pytest.approx(22.2, abs=0.1)
    assert pinned_bytes([], exact=True) == pinned_bytes([0], exact=False) == 0
