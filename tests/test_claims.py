"""Claims on images: exclusive between processes and threads, and never stale."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedgfe_store.errors import ConflictError
from fedgfe_store.generation import claims as claims_module
from fedgfe_store.generation.claims import Claims

TAKER = """
import sys
from pathlib import Path
from fedgfe_store.generation.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    for command in map(str.split, sys.stdin):
        if command[0] == "take":
            print(claims.take(command[1]), flush=True)
        else:
            claims.release(command[1])
            print("released", flush=True)
"""
RACER = """
import sys
from pathlib import Path
from fedgfe_store.generation.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    print("ready", flush=True)
    sys.stdin.readline()
    print(*(name for name in (f"{i}.png" for i in range(300)) if claims.take(name)), flush=True)
    sys.stdin.readline()
"""


class Other:
    """Another process that takes and releases what it is told to."""

    def __init__(self, folder: Path, code: str = TAKER) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> str:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_name_is_taken_by_one_process_only(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims, Other(tmp_path) as other:
        assert claims.supported
        assert claims.take("a.png")
        assert other.ask("take a.png") == "False"
        assert other.ask("take b.png") == "True"
        assert not claims.take("b.png")
        claims.release("a.png")
        assert other.ask("take a.png") == "True"
        assert other.ask("release b.png") == "released"
        assert claims.take("b.png")
        assert not claims.take("a.png")


def test_a_killed_process_leaves_nothing_taken(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims, Other(tmp_path) as other:
        assert other.ask("take a.png") == "True"
        assert not claims.take("a.png")
        other.process.kill()
        other.process.wait()
        assert claims.take("a.png")
    assert [path.name for path in tmp_path.iterdir()] == [".fedgfe-claims"]
    assert (tmp_path / ".fedgfe-claims").stat().st_size == 0


def test_racing_processes_share_all_names_out(tmp_path: Path) -> None:
    others = [Other(tmp_path, RACER) for _ in range(3)]
    try:
        for other in others:
            assert other.process.stdout.readline() == "ready\n"
        for other in others:
            other.process.stdin.write("go\n")
            other.process.stdin.flush()
        taken = Counter(n for o in others for n in o.process.stdout.readline().split())
    finally:
        for other in others:
            other.__exit__()
    assert taken == Counter(f"{i}.png" for i in range(300))


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    names = [f"{i % 100}.png" for i in range(800)]
    with Claims(tmp_path) as claims, ThreadPoolExecutor(8) as pool:
        taken = Counter(n for n, ok in zip(names, pool.map(claims.take, names), strict=True) if ok)
    assert taken == Counter(set(names))


def test_names_that_share_a_byte_are_released_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte = claims_module._offset("x.png")
    monkeypatch.setattr(claims_module, "_offset", lambda name: byte)
    with Claims(tmp_path) as claims, Other(tmp_path) as other:
        assert claims.take("x.png")
        assert claims.take("y.png")
        claims.release("x.png")
        assert other.ask("take x.png") == "False"
        assert claims.take("x.png")
        claims.release("x.png")
        claims.release("y.png")
        assert other.ask("take x.png") == "True"
        assert not claims.take("y.png")


def test_only_what_is_taken_can_be_released(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims, pytest.raises(KeyError, match=r"a\.png"):
        claims.release("a.png")


def test_a_process_opens_a_folders_claims_once(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims, Other(tmp_path) as other:
        assert claims.take("a.png")
        link = tmp_path.parent / "link"
        link.symlink_to(tmp_path)
        for same in (tmp_path, link):
            with pytest.raises(ConflictError, match="claims are open in this process already"):
                Claims(same)
        assert other.ask("take a.png") == "False"
    with Claims(tmp_path) as again:
        assert again.take("a.png")


def test_closing_gives_all_names_back(tmp_path: Path) -> None:
    with Other(tmp_path) as other:
        with Claims(tmp_path) as claims:
            assert claims.take("a.png")
        assert other.ask("take a.png") == "True"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_everything_may_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    with Other(tmp_path) as other:
        assert other.ask("take a.png") == "True"
        monkeypatch.setattr(claims_module.fcntl, "lockf", refuse)
        with Claims(tmp_path) as claims:
            assert not claims.supported
            assert claims.take("a.png")
            assert not claims.take("a.png")
            claims.release("a.png")
            assert claims.take("a.png")


def test_an_operating_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "fcntl", None)
    with Claims(tmp_path) as claims:
        assert not claims.supported
        assert claims.take("a.png")
        claims.release("a.png")


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "broken")

    with Claims(tmp_path) as claims:
        monkeypatch.setattr(claims_module.fcntl, "lockf", fail)
        with pytest.raises(OSError, match="broken"):
            claims.take("a.png")
        assert claims.supported
