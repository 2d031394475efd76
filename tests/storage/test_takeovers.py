"""A writer that slept is taken for dead: what it may still do, and what others do meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, fill, values
from places import DATA

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import BusyError, ConflictError, NotFoundError
from fedgfe_store.storage import append, backup, claim_files, commit, create, files
from fedgfe_store.storage import claim as claims
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.staging import Staging


class NoLock:
    """A lock that is granted to everyone."""

    def __init__(self, path: Path, timeout: float) -> None: ...

    def release(self) -> None: ...


class Hosts:
    """Writers of this process that take each other for those of other hosts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._names = iter("abcdefgh")
        for module in (commit, create):
            monkeypatch.setattr(module, "WriterLock", NoLock)
        self.next()

    def next(self) -> None:
        """Whoever claims from now on is on another host."""
        name = next(self._names)
        self._patch.setattr(claim_files, "machine", lambda: name)

    def sleep(self, path: Path) -> None:
        """Let all who hold a claim on the store at `path` be silent for two minutes."""
        for claim in path.glob("claim.*"):
            os.utime(claim, times=(time.time() - 120,) * 2)
        self.next()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store as the release before format version 2 wrote it."""
    path = tmp_path / "old.zarr"
    shutil.copytree(DATA / "federation_v1.zarr", path)
    return path


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    return Hosts(monkeypatch)


def meanwhile(monkeypatch: pytest.MonkeyPatch, what: Callable[[], object]) -> None:
    """Do `what` after files have been put in place for the first time."""
    place = Staging.place

    def placed(staging: Staging, fence: Any) -> None:
        place(staging, fence)
        monkeypatch.setattr(Staging, "place", place)
        what()

    monkeypatch.setattr(Staging, "place", placed)


def check_sound(path: Path, count: int) -> None:
    store = EmbeddingStore.open(path)
    found = store.verify()
    assert found.sound, found
    assert len(store) == count
    assert np.isfinite(store.select().read("clip")).all()


def test_a_late_owner_stops_also_when_who_took_over_gave_up(store, hosts, monkeypatch):
    fill(store, node=0, round=1)

    def take_over_and_give_up() -> None:
        hosts.sleep(store.path)
        assert EmbeddingStore.open(store.path).delete(class_name="dog", index=99) == 0

    meanwhile(monkeypatch, take_over_and_give_up)
    with pytest.raises(ConflictError, match="another writer came in between"):
        fill(store, node=0, round=2)
    check_sound(store.path, 6)
    # And no one waits for who gave up.
    fill(EmbeddingStore.open(store.path), node=0, round=2)
    check_sound(store.path, 12)


class NoClaim:
    """What a release that knows no claims has of them."""

    token, number, after_others, alone = "0", 0, False, True

    @classmethod
    def take(cls, path: Path, **options: object) -> NoClaim:
        return cls()

    def fence(self) -> None: ...

    def make_sure(self, group: object) -> None: ...

    def forget_others(self) -> None: ...

    def abandon(self) -> None: ...

    def release(self, *, published: bool = False) -> None: ...


def test_who_gives_up_clears_nothing_of_a_commit_that_came_in_between(old, hosts, monkeypatch):
    def commit_without_a_claim() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(commit, "Claim", NoClaim)
            fill(EmbeddingStore.open(old), node=0, round=8, n=4)

    before = len(EmbeddingStore.open(old))
    meanwhile(monkeypatch, commit_without_a_claim)
    with pytest.raises(ConflictError, match="another writer came in between"):
        fill(EmbeddingStore.open(old), node=0, round=9)
    check_sound(old, before + 8)
    fill(EmbeddingStore.open(old), node=0, round=9)
    check_sound(old, before + 14)


def test_an_owner_that_slept_before_it_said_that_it_writes_is_told(old, hosts, monkeypatch):
    write = Staging.write

    def written(staging: Staging, contents: Any) -> None:
        write(staging, contents)
        monkeypatch.setattr(Staging, "write", write)
        hosts.sleep(old)
        fill(EmbeddingStore.open(old), node=0, round=8)

    before = len(EmbeddingStore.open(old))
    monkeypatch.setattr(Staging, "write", written)
    with pytest.raises(ConflictError, match="another writer came in between"):
        fill(EmbeddingStore.open(old), node=0, round=9)
    check_sound(old, before + 6)


def test_a_name_that_a_late_owner_may_unlink_is_not_used_again(store, hosts, monkeypatch):
    fill(store, node=0, round=1)
    path = store.path
    # A writer dies with files in place; another one of its host sleeps before it unlinks them.
    with monkeypatch.context() as patch:
        patch.setattr(commit.Transaction, "_abort", lambda *error: None)
        meanwhile(monkeypatch, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fill(store, node=0, round=2)
    unlink = Path.unlink
    late: list[Any] = []

    def sleeping(file: Path, missing_ok: bool = False) -> None:
        if file.name.startswith("c.") and not late:
            hosts.sleep(path)
            # The next one gives up, and the one after it commits.
            late.append(file)
            assert EmbeddingStore.open(path).delete(class_name="dog", index=99) == 0
            hosts.next()
            fill(EmbeddingStore.open(path), node=0, round=2)
        unlink(file, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", sleeping)
        with pytest.raises(ConflictError, match="another writer came in between"):
            fill(EmbeddingStore.open(path), node=0, round=3)
    assert late
    check_sound(path, 12)


def test_a_disk_on_which_both_kinds_of_locks_exclude_each_other(store, monkeypatch):
    # As NFS does, which makes the same of flock and lockf, and Lustre.
    held: dict[int, tuple[int, object]] = {}

    def taken(handle: int, operation: int, kind: object) -> None:
        inode = os.fstat(handle).st_ino
        if operation & fcntl.LOCK_UN:
            held.pop(inode, None)
        elif held.setdefault(inode, (handle, kind)) != (handle, kind):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    close = os.close

    def closed(handle: int) -> None:
        for inode in [inode for inode, (keeper, _) in held.items() if keeper == handle]:
            del held[inode]
        close(handle)

    monkeypatch.setattr(fcntl, "flock", lambda handle, how: taken(handle, how, fcntl.flock))
    monkeypatch.setattr(fcntl, "lockf", lambda handle, how: taken(handle, how, fcntl.lockf))
    monkeypatch.setattr(os, "close", closed)
    for number in (1, 2):
        with store.append(node=0, round=number, timeout=0) as batch:
            batch.add(split="train", class_name="dog", index=0, **values(1))
    assert not held


def test_a_store_is_not_made_again_over_one_that_a_late_maker_has_made(
    tmp_path, hosts, monkeypatch
):
    path = tmp_path / "a.zarr"
    folders = files.make_folders
    late: list[Any] = []

    def late_maker(folder: Path) -> None:
        # All but the last rename of the other one was done, and it wakes up only now.
        if not late and folder.parent == path:
            late.append(folder)
            with monkeypatch.context() as patch:
                patch.setattr(create, "Claim", NoClaim)
                patch.setattr(commit, "Claim", NoClaim)
                fill(EmbeddingStore.create(path, SMALL), node=0, round=1)
        folders(folder)

    monkeypatch.setattr(create, "make_folders", late_maker)
    with pytest.raises(ConflictError, match="a Zarr group is there already"):
        EmbeddingStore.create(path, SMALL)
    check_sound(path, 6)


def test_a_maker_that_was_taken_for_dead_leaves_the_claims_of_who_took_over(
    tmp_path, hosts, monkeypatch
):
    path = tmp_path / "a.zarr"
    folders = files.make_folders
    made: list[Any] = []

    def taken_over(folder: Path) -> None:
        if not made and folder.parent == path:
            hosts.sleep(path)
            made.append(
                claims.Claim.take(
                    path, timeout=0, since=0, published=lambda: -1, clear=lambda: None
                )
            )
        folders(folder)

    monkeypatch.setattr(create, "make_folders", taken_over)
    with pytest.raises(ConflictError, match="another writer came in between"):
        EmbeddingStore.create(path, SMALL)
    made[0].fence()
    made[0].release()


def test_two_compactions_may_unlink_the_same_files(store, hosts, monkeypatch):
    fill(store, node=0, round=1)
    fill(store, node=0, round=2)
    store.delete(round=1)
    unlink = Path.unlink
    late: list[Any] = []

    def sleeping(file: Path, missing_ok: bool = False) -> None:
        if file.name.startswith("c.") and not late:
            late.append(file)
            hosts.sleep(store.path)
            EmbeddingStore.open(store.path).compact()
        unlink(file, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", sleeping)
    store.compact()
    assert late
    check_sound(store.path, 6)


def test_a_late_backup_does_not_publish_what_was_compacted_meanwhile(
    store, hosts, monkeypatch, tmp_path
):
    fill(store, node=0, round=1)
    target = tmp_path / "copy.zarr"
    store.backup(target)
    fill(store, node=0, round=2)
    folders, seen = backup._Copying.folders, []

    def sleeping(copying: backup._Copying, group: Group) -> None:
        seen.append(group)
        if len(seen) == 2:  # under the claim, before files are brought
            hosts.sleep(store.path)
            other = EmbeddingStore.open(store.path)
            fill(other, node=0, round=3)
            other.delete(round=[2, 3])
            other.compact()
        folders(copying, group)

    monkeypatch.setattr(backup._Copying, "folders", sleeping)
    monkeypatch.setattr(backup._Copying, "tensor_files", only_the_second(backup, seen))
    with pytest.raises(ConflictError, match="another writer came in between"):
        store.backup(target)
    check_sound(target, 6)


def only_the_second(module, seen):
    """Bring tensor files only under the claim, as where the commit came in since."""
    bring = module._Copying.tensor_files
    return lambda copying, group: bring(copying, group) if len(seen) == 2 else None


def test_a_store_that_is_removed_meanwhile_is_said_to_be_gone(store, monkeypatch):
    monkeypatch.setattr(append, "_BUFFER_BYTES", 1)
    gone = "the store is gone, while commit 1 was written"
    with pytest.raises(NotFoundError, match=gone), store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(4), **values(4))
        (store.path / "zarr.json").unlink()


def test_a_commit_whose_pending_a_late_writer_removed_is_published_without_a_word(
    old, hosts, monkeypatch
):
    store = EmbeddingStore.open(old)
    before = len(store)
    meanwhile(monkeypatch, (old / "pending").unlink)
    fill(store, node=0, round=9)
    check_sound(old, before + 6)


@pytest.fixture
def no_links(monkeypatch):
    """A file system that refuses hard links, as exFAT and some network disks do."""

    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_links")
def test_where_links_are_refused_claims_are_made_exclusively_all_the_same(store, hosts):
    fill(store, node=0, round=1)
    other = EmbeddingStore.open(store.path)
    with store.append(node=1, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        batch._write(rest=True)
        hosts.next()
        with pytest.raises(BusyError, match="is being written by process"):
            other.delete(node=0, timeout=0.05)
    other.delete(node=0)
    check_sound(store.path, 9)
    assert not list(store.path.glob("claim.*"))


def test_who_waits_bears_that_another_writer_clears_its_clock(store, hosts, monkeypatch):
    now = claim_files.now

    def cleared(probe: Path) -> float:
        files.remove_temporary(store.path)  # as each commit does before it writes
        return now(probe)

    fill(store, node=0, round=1)
    other = EmbeddingStore.open(store.path)
    with store.append(node=1, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(9), **values(9))
        batch._write(rest=True)
        hosts.next()
        with monkeypatch.context() as patch, pytest.raises(BusyError, match="is being written by"):
            patch.setattr(claim_files, "now", cleared)
            other.delete(node=0, timeout=0.05)
    check_sound(store.path, 15)


@pytest.mark.usefixtures("no_links")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up open files in /proc")
def test_half_a_claim_keeps_nobody_waiting(store, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("claim.1.0"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left.*claim\.1\.0"):
            fill(store, node=0, round=1)
    assert not list(store.path.glob("claim.*"))
    fill(store, node=0, round=1)
    check_sound(store.path, 6)


def test_a_process_of_another_user_that_the_system_hides_is_not_taken_for_dead(
    tmp_path, monkeypatch
):
    here = claim_files.Owner.this()
    other = replace(here, pid=2**30, token="other")
    assert other.dead

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)  # and nothing of that number is in /proc
    assert not other.dead
