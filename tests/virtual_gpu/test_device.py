"""The instrument itself: what a card refuses, the simulated one refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from virtual_gpu.device import MIB, Cards


def test_tensors_of_different_devices_do_not_mix() -> None:
    ones = [torch.ones(3, device=device) for device in ("cpu", "cuda:0", "cuda:1")]
    for one in ones:
        for other in ones:
            if one is other:
                assert (one + other).sum().item() == 6
            else:
                with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
                    one + other
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        torch.nn.Linear(3, 2).to("cuda:1")(ones[1])


def test_memory_ends_where_the_limit_is(cards: Cards) -> None:
    cards.limit(1, 40)
    kept = torch.zeros(30 * MIB, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(12 * MIB, dtype=torch.uint8, device="cuda:1")
    assert torch.zeros(12 * MIB, dtype=torch.uint8, device="cuda:0").sum().item() == 0
    assert torch.cuda.mem_get_info(1) == (10 * MIB, 40 * MIB)
    del kept
    torch.zeros(12 * MIB, dtype=torch.uint8, device="cuda:1")


def test_memory_that_nobody_has_written_to_holds_nan() -> None:
    for _ in range(2):
        values = torch.empty(1000, device="cuda")
        assert values.isnan().all()
        values.zero_()


def test_a_card_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:2")
    with pytest.raises(ValueError, match="Expected a torch.device with a specified index"):
        torch.cuda.set_device(torch.device("cuda"))


@pytest.mark.long
def test_without_a_compiler_the_tests_are_skipped_and_where_they_have_to_run_fail(
    tmp_path: Path,
) -> None:
    def tests(**more: str) -> subprocess.CompletedProcess[str]:
        # Some of them, by a user who has no compiler.
        environ = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        environ |= {"PATH": str(tmp_path), **more}
        options = ("-n0", "-rs", "-p", "no:cacheprovider", "-k", "mix or compiler")
        command = [sys.executable, "-m", "pytest", *options, __file__]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

    run = tests()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no simulated GPU: there is no C++ compiler" in run.stdout
    assert "2 skipped" in run.stdout
    run = tests(FEDGFE_REQUIRE_SIMULATED_GPU="1")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: no simulated GPU: there is no C++ compiler" in run.stderr
