"""Claims on images: exclusive between processes and threads, and never stale."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from processes import Process, started

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
WITHOUT_LOCKS = """
import errno, os
from fedgfe_store.generation import claims as module
def refuse(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
module.fcntl.lockf = refuse
"""


class Other:
    """Another process that takes and releases what it is told to."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def ask(self, line: str) -> str:
        self.process.tell(line)
        return self.process.line()


@contextmanager
def another(folder: Path, code: str = TAKER) -> Iterator[Other]:
    with started([sys.executable, "-c", code, folder]) as process:
        yield Other(process)


def claim_files(folder: Path) -> list[str]:
    """Names of the files that claim where locks do not."""
    return sorted(path.name for path in folder.glob(".fedgfe-claim-*"))


def test_a_name_is_taken_by_one_process_only(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims, another(tmp_path) as other:
        assert claims.take("a.png")
        assert not claim_files(tmp_path)
        assert other.ask("take a.png") == "False"
        assert other.ask("take b.png") == "True"
        assert not claims.take("b.png")
        claims.release("a.png")
        assert other.ask("take a.png") == "True"
        assert other.ask("release b.png") == "released"
        assert claims.take("b.png")
        assert not claims.take("a.png")


@pytest.mark.kill
def test_a_killed_process_leaves_nothing_taken(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims, another(tmp_path) as other:
        assert other.ask("take a.png") == "True"
        assert not claims.take("a.png")
        other.process.kill()
        other.process.wait()
        assert claims.take("a.png")
    assert [path.name for path in tmp_path.iterdir()] == [".fedgfe-claims"]
    assert (tmp_path / ".fedgfe-claims").stat().st_size == 0


def test_racing_processes_share_all_names_out(tmp_path: Path) -> None:
    check_racing(tmp_path, RACER)


def check_racing(tmp_path: Path, racer: str, names: int = 300) -> None:
    command = [sys.executable, "-c", racer, str(tmp_path)]
    with ExitStack() as stack:
        racers = [stack.enter_context(started(command)) for _ in range(3)]
        assert [process.line() for process in racers] == ["ready"] * 3
        for process in racers:
            process.tell("go")
        taken = Counter(name for process in racers for name in process.line().split())
    assert taken == Counter(f"{i}.png" for i in range(names))


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
    with Claims(tmp_path) as claims, another(tmp_path) as other:
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
    with Claims(tmp_path) as claims, another(tmp_path) as other:
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
    with another(tmp_path) as other:
        with Claims(tmp_path) as claims:
            assert claims.take("a.png")
        assert other.ask("take a.png") == "True"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A file system that refuses locks."""
    code = getattr(request, "param", errno.ENOLCK)

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize("no_locks", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], indirect=True)
@pytest.mark.usefixtures("no_locks")
def test_without_locks_files_claim_and_one_remark_says_so(tmp_path: Path) -> None:
    remarks: list[str] = []
    with (
        Claims(tmp_path, report=remarks.append) as claims,
        another(tmp_path, WITHOUT_LOCKS + TAKER) as other,
    ):
        assert other.ask("take a.png") == "True"
        assert claim_files(tmp_path) == [".fedgfe-claim-a.png-0"]
        assert not claims.take("a.png")
        assert claims.take("b.png")
        assert not claims.take("b.png")
        assert other.ask("take b.png") == "False"
        claims.release("b.png")
        assert other.ask("take b.png") == "True"
        assert other.ask("release a.png") == "released"
        assert claims.take("a.png")
    assert len(remarks) == 1
    assert f"no file locks in {tmp_path}" in remarks[0]


def test_an_operating_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "fcntl", None)
    with Claims(tmp_path) as claims, another(tmp_path, WITHOUT_LOCKS + TAKER) as other:
        assert claims.take("a.png")
        assert claim_files(tmp_path) == [".fedgfe-claim-a.png-0"]
        assert other.ask("take a.png") == "False"
        claims.release("a.png")
        assert other.ask("take a.png") == "True"


def test_locks_that_are_refused_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    remarks: list[str] = []
    with Claims(tmp_path, report=remarks.append) as claims:
        assert claims.take("a.png")
        monkeypatch.setattr(fcntl, "lockf", refuse)
        assert claims.take("b.png")
        assert claims.take("c.png")
        assert not claims.take("a.png")
        for name in ("a.png", "b.png", "c.png"):
            claims.release(name)
            assert claims.take(name)
    assert len(remarks) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".fedgfe-claims"]


@pytest.mark.kill
@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_killed_process_of_this_machine_leaves_nothing_taken(
    tmp_path: Path,
) -> None:
    with Claims(tmp_path) as claims, another(tmp_path, WITHOUT_LOCKS + TAKER) as other:
        for name in ("a.png", "b.png"):
            assert other.ask(f"take {name}") == "True"
            assert not claims.take(name)
        other.process.kill()
        other.process.wait()
        assert claims.take("a.png")
    # What nobody asks for any more goes as well.
    with Claims(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".fedgfe-claims"]


def of_another_machine(folder: Path, name: str, *, age: float) -> Path:
    """A claim of a process that nobody here can see, renewed `age` seconds ago."""
    path = folder / f".fedgfe-claim-{name}-0"
    path.write_text("00000000 1")
    renewed = path.stat().st_mtime - age
    os.utime(path, (renewed, renewed))
    return path


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_claim_that_nobody_renews_expires(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        of_another_machine(tmp_path, "young.png", age=20)
        old = of_another_machine(tmp_path, "old.png", age=61)
        assert not claims.take("young.png")
        assert claims.take("old.png")
        assert not claims.take("old.png")
        claims.release("old.png")
        assert not old.exists()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_age_is_measured_by_the_file_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another_machine(tmp_path, "a.png", age=20)
    for error in (-3600.0, 3600.0):
        now = time.time() + error
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with Claims(tmp_path) as claims:
            assert not claims.take("a.png")


@pytest.mark.usefixtures("no_locks")
def test_without_locks_waiting_tells_the_living_from_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "_LOOKS_EVERY", 0.01)
    remarks: list[str] = []
    often = "from fedgfe_store.storage import claim_files\nclaim_files.RENEWAL_SECONDS = 0.05\n"
    code = WITHOUT_LOCKS + often + TAKER

    def grows_old(seconds: float) -> None:
        of_another_machine(tmp_path, "dead.png", age=61)

    with another(tmp_path, code) as other, Claims(tmp_path, report=remarks.append) as claims:
        assert other.ask("take living.png") == "True"
        of_another_machine(tmp_path, "dead.png", age=0)
        assert not claims.take("dead.png")
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", grows_old)
            assert claims.take("dead.png", wait=True)
        assert not claims.take("living.png", wait=True)
    assert ["waiting up to 60 s" in line for line in remarks] == [False, True]
    of_another_machine(tmp_path, "a.png", age=0)
    with Claims(tmp_path, ended=lambda: True) as claims:
        assert not claims.take("a.png", wait=True)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_who_slept_too_long_does_not_free_what_another_took_over(
    tmp_path: Path,
) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take("a.png")
        old = tmp_path / ".fedgfe-claim-a.png-0"
        old.write_text("00000000 1")
        os.utime(old, (1, 1))
        with another(tmp_path, WITHOUT_LOCKS + TAKER) as other:
            assert other.ask("take a.png") == "True"
            claims.release("a.png")
            assert not claims.take("a.png")


@pytest.mark.parametrize("left_over", [False, True])
def test_without_locks_racing_processes_share_all_names_out(
    tmp_path: Path, left_over: bool
) -> None:
    if left_over:
        for i in range(300):
            of_another_machine(tmp_path, f"{i}.png", age=1000)
    # What is dead at the start is removed: here it has to be taken over.
    left = "module.ClaimFiles._remove_dead = lambda files: None\nwith Claims"
    check_racing(tmp_path, WITHOUT_LOCKS + RACER.replace("with Claims", left))


MAKER = """
import os, sys
from pathlib import Path
from fedgfe_store.generation.claims import Claims
folder = Path(sys.argv[1])
names = [f"{i}.png" for i in range(60)]
made = []
with Claims(folder) as claims:
    print("ready", flush=True)
    sys.stdin.readline()
    for name in names:
        if claims.take(name):
            if not (folder / name).exists():
                (folder / name).touch()
                made.append(name)
            claims.release(name)
    print(*made, flush=True)
"""


def test_without_locks_several_processes_make_every_image_once(tmp_path: Path) -> None:
    check_racing(tmp_path, WITHOUT_LOCKS + MAKER, 60)
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".png"}
    assert left == {".fedgfe-claims"}


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "broken")

    with Claims(tmp_path) as claims:
        monkeypatch.setattr(fcntl, "lockf", fail)
        with pytest.raises(OSError, match="broken"):
            claims.take("a.png")
        assert not claim_files(tmp_path)
