"""A copy of a store that is sound at any moment, and brought up to date by repeating."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedgfe_store.errors import ConflictError, DamagedDataError, NotFoundError
from fedgfe_store.storage import files
from fedgfe_store.storage.commit import Transaction
from fedgfe_store.storage.engine import Advance, Backup
from fedgfe_store.storage.layout import KEY_CHUNK
from fedgfe_store.storage.lock import WriterLock
from fedgfe_store.storage.metadata import GROUP_FILE, Group
from fedgfe_store.storage.recovery import something_else
from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.snapshot import Snapshot


def back_up(known: Snapshot, target: Path, *, timeout: float, progress: Advance) -> Backup:
    """Bring the store that `known` shows to `target`; see `EmbeddingStore.backup`."""
    source = known.root.resolve()
    _check_place(source, target)
    files.make_folders(target.resolve().parent)
    lock = WriterLock(target, timeout)
    try:
        _check_earlier(known, target)
        files.check_own_folders(target, {*known.group.arrays, *known.group.known_columns})
        copying = _Copying(source, target, progress)
        copying.folders(known.group)
        # Committed tensor files never change: training goes on while they are brought.
        copying.tensor_files(known.group)
        with Transaction(known, timeout=timeout) as transaction:
            group = transaction.snapshot.group
            _check_earlier(transaction.snapshot, target)
            copying.folders(group)
            copying.tensor_files(group)
            copying.small_files(group)
            # Had it been taken over, files that were to be brought may be compacted away.
            transaction.make_sure()
            copying.publish(group)
            removed = copying.remove_others(group)
    finally:
        lock.release()
    point = group.point
    done = copying.done
    return Backup(point.commit, point.live, done.copied, done.linked, removed, done.nbytes)


def _check_place(source: Path, target: Path) -> None:
    real = target.resolve()
    if real == source or source in real.parents or real in source.parents:
        raise ConflictError(f"a backup of {source} cannot lie at {target}: one is in the other")


def _check_earlier(snapshot: Snapshot, target: Path) -> None:
    """Refuse a `target` that holds anything but an earlier state of the store, or part of it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConflictError(f"cannot back up to {target}: a file is there")
    try:
        there = _latest(target)
    except NotFoundError:
        other = something_else(
            target, snapshot.group.arrays, allowed=lambda entry: _is_chunk(target, entry)
        )
        if other:
            raise ConflictError(
                f"cannot back up to {target}: it holds something else ({other})"
            ) from None
        return
    if there.group.id not in (None, snapshot.group.id):
        raise ConflictError(f"{target} is another store than {snapshot.path}: give another folder")
    commits = there.commit
    same = commits <= snapshot.commit and all(
        there.column(name).tolist() == snapshot.column(name)[:commits].tolist()
        for name in ("commit_time", "commit_kind")
    )
    if not same:
        raise ConflictError(
            f"{target} is no earlier state of {snapshot.path}: it has commits of its own, which a "
            f"backup would take away; give another folder"
        )


def _latest(target: Path) -> Snapshot:
    return Snapshot(target, Group.read(target))


def _is_chunk(target: Path, entry: Path) -> bool:
    return entry.parent.parent == target and entry.name.startswith("c.")


@dataclass
class _Done:
    copied: int = 0
    linked: int = 0
    nbytes: int = 0


class _Copying:
    """Files of a store on their way to where its copy lies."""

    def __init__(self, source: Path, target: Path, progress: Advance) -> None:
        self._source, self._target, self._progress = source, target, progress
        self.done = _Done()

    def folders(self, group: Group) -> None:
        """Make the folders of all arrays."""
        for name in group.arrays:
            files.make_folders(self._target / name)

    def tensor_files(self, group: Group) -> None:
        """Bring the tensor files of all committed rows that are not there yet."""
        for name in group.schema.columns:
            folder = self._source / name
            for file in _committed(folder, group.point.records // group.schema.granule):
                # A compaction removes files without a word while no lock is held.
                if file.exists():
                    self._bring(file, may_link=True)
            files.sync_folder(self._target / name)

    def small_files(self, group: Group) -> None:
        """Bring key columns and the arrays' own metadata."""
        for name in group.arrays:
            if name not in group.schema.columns:
                for file in _committed(self._source / name, -(-group.rows(name) // KEY_CHUNK)):
                    self._bring(file, may_link=False)
            self._bring(self._source / name / GROUP_FILE, may_link=False)
            files.sync_folder(self._target / name)

    def publish(self, group: Group) -> None:
        """Let the copy show what `group` shows, once all that it refers to is there."""
        files.write_file(self._target / GROUP_FILE, group.raw)

    def remove_others(self, group: Group) -> int:
        """Remove chunk files that the store does not have; return how many."""
        removed = 0
        for name in group.arrays:
            files.remove_temporary(self._target / name)
            for file in sorted((self._target / name).glob("c.*")):
                if not (self._source / name / file.name).exists():
                    file.unlink()
                    removed += 1
        files.remove_temporary(self._target)
        return removed

    def _bring(self, file: Path, *, may_link: bool) -> None:
        place = self._target / file.relative_to(self._source)
        if file.exists() and not file.is_file():  # a pipe would keep us waiting for ever
            raise DamagedDataError(f"{file} is damaged: it is no ordinary file")
        try:
            if _is_same(file, place, by_contents=not may_link):
                return
            with files.placing(place) as temporary:
                if may_link and files.linked(file, temporary):
                    self.done.linked += 1
                else:
                    self._copy(file, temporary)
        except FileNotFoundError:
            if may_link and not file.exists():
                return
            raise

    def _copy(self, file: Path, temporary: Path) -> None:
        with open(file, "rb") as source, files.flushed(temporary, name=temporary) as out:
            shutil.copyfileobj(source, out, 2**20)
            size = out.tell()
        shutil.copystat(file, temporary)
        self.done.copied += 1
        self.done.nbytes += size
        self._progress(size)


def _committed(folder: Path, count: int) -> Iterator[Path]:
    """Yield the chunk files in `folder` whose number is below `count`."""
    for entry in sorted(os.listdir(folder)):
        if 0 <= granule_of(entry) < count:
            yield folder / entry


def _is_same(file: Path, place: Path, *, by_contents: bool) -> bool:
    """Whether `place` holds a copy of `file`.

    Tensor files of one number are written once, so that size and time tell. Key files are written
    anew by each commit, which may be faster than the times of some file systems.
    """
    try:
        there = place.stat()
    except FileNotFoundError:
        return False
    here = file.stat()
    if here.st_size != there.st_size:
        return False
    return filecmp.cmp(file, place, shallow=False) if by_contents else _same_time(here, there)


def _same_time(here: os.stat_result, there: os.stat_result) -> bool:
    # Where a copy lies on a file system that keeps times to two seconds.
    return abs(here.st_mtime_ns - there.st_mtime_ns) <= 2 * 10**9
