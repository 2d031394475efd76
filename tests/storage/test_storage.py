"""Nothing wrong, nothing lost: the short form of ``make soak``, piece by piece."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from processes import finished

COPIES = ("live-copies", "backups")
SOAK = Path(__file__).parents[2] / "tools" / "soak.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.kill,
    pytest.mark.skipif(
        not Path("/proc/self/fd").is_dir(), reason="the harness asks /proc which file a handle is"
    ),
]


@cache
def soaked(*pieces: str) -> dict[str, Any]:
    """Run pieces in a process of their own, as they fork, and return their figures."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(SOAK), "--short", "--json"]
    done = finished([*command, *pieces], check=False)
    assert done.stdout, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def crashes(piece: str) -> dict[str, Any]:
    """Return the figures of one of the pieces that share what they begin with."""
    figures: dict[str, Any] = soaked("power-cuts", "without-flushes", "kills", "refusals")[piece]
    return figures


def writers(piece: str) -> dict[str, Any]:
    figures: dict[str, Any] = soaked(
        "kills-at-random",
        "granted-locks",
        "stopped-writers",
        "locks-not-offered",
        "shared-stores",
        *COPIES,
    )[piece]
    return figures


def test_a_power_cut_leaves_the_state_before_or_after():
    found = crashes("power-cuts")
    assert found["faults"] == []
    assert found["counts"]["before"] > 10
    assert found["counts"]["after"] > 20


def test_a_power_cut_does_damage_where_flushes_are_left_out():
    found = crashes("without-flushes")
    assert found["faults"] == []
    assert found["counts"]["faults with no flush of a file"] > 0
    assert found["counts"]["faults with no flush of a folder"] > 0


def test_a_kill_leaves_the_state_before_or_after():
    found = crashes("kills")
    assert found["faults"] == []
    assert found["counts"]["tried"] == found["counts"]["before"] + found["counts"]["after"] > 10


def test_a_call_that_the_system_refuses_is_one_clear_error_and_loses_nothing():
    found = crashes("refusals")
    assert found["faults"] == []
    assert found["counts"]["refused, before"] > 5


def test_kills_at_random_moments_lose_nothing():
    found = writers("kills-at-random")
    assert found["faults"] == []
    assert found["counts"]["operations"] > 0


def test_writers_that_are_each_granted_every_lock_lose_nothing():
    found = writers("granted-locks")
    assert found["faults"] == []
    assert found["counts"]["acknowledged"] > 0


def test_a_writer_that_was_taken_for_dead_notices():
    assert writers("stopped-writers")["faults"] == []


def test_writers_go_on_where_no_locks_are_offered():
    found = writers("locks-not-offered")
    assert found["faults"] == []
    assert found["counts"]["acknowledged"] >= 9


def test_writers_of_a_shared_store_that_race_and_are_killed_lose_nothing():
    found = writers("shared-stores")
    assert found["faults"] == []
    assert found["counts"]["whole"] == found["counts"]["tried"] == 1
    assert found["counts"]["acknowledged"] >= 14  # twelve, and one of each that was killed


def test_a_copy_of_a_busy_store_is_sound_or_refused_and_not_damaged_later():
    found = writers("live-copies")
    assert found["faults"] == []
    assert found["counts"]["sound"] > 0


def test_a_backup_of_a_busy_store_is_sound():
    assert writers("backups") == {"faults": [], "counts": {"tried": 2, "sound": 2}}


@pytest.mark.long
def test_what_a_server_with_faults_gives_is_what_the_folder_has():
    found = soaked("faulty-servers")["faulty-servers"]
    assert found["faults"] == []
    assert found["counts"]["read"] == found["counts"]["tried"] == 4
    for what in ("busy", "cut", "lost"):
        assert found["counts"][f"moto: {what}"] > 0
