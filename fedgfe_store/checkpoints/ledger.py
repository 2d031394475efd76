"""Which checkpoint files a store has taken in: a ledger beside it, so that none is read again."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from fedgfe_store.checkpoints.torch_files import Source, inspect
from fedgfe_store.common.location import Location
from fedgfe_store.errors import BusyError, FedgfeStoreError, NotFoundError
from fedgfe_store.storage import files
from fedgfe_store.storage.engines import latest

_BLOCK = 1 << 20
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_log = logging.getLogger("fedgfe_store")


@dataclass(frozen=True)
class Imported:
    """A file that a store has taken in.

    Parameters
    ----------
    file : str
        The file, as a path from the store's folder on.
    content : str
        What `content_digest` gave for it.
    node : str
        Node of its records.
    round : int
        Their round.
    commit : int
        The store's latest commit then.
    time : int
        Time of that commit, in milliseconds since 1970 UTC.
    """

    file: str
    content: str
    node: str
    round: int
    commit: int
    time: int


class Ledger:
    """The files that a store has taken in, one JSON line each, in a hidden file beside it.

    Only files that are read need to be read once more where it is lost. A line counts only as
    long as the store has the commit that it names, so one of a store that was made anew does not.

    Parameters
    ----------
    store_path : Path or Address
        The store, which need not be there. One behind a URL has no ledger: its files are read
        again each time, and what it has is left out by its keys.
    """

    def __init__(self, store_path: Location) -> None:
        self._is_kept = isinstance(store_path, Path)
        real = store_path.resolve() if isinstance(store_path, Path) else Path(store_path.name)
        self._store = store_path
        self._home = real.parent
        self._path = real.with_name(f".{real.name}.imported")
        self._turns = FileLock(real.with_name(f".{real.name}.importing"))
        self._lines: Mapping[str, Imported] = {}
        self._stamp: tuple[int, int] | None = None

    def lines(self) -> Mapping[str, Imported]:
        """Return the last line of each file, of those lines that count, by `Imported.file`."""
        if not self._is_kept:
            return {}
        try:
            status = self._path.stat()
            if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe that nobody writes to
                return {}
            stamp = status.st_size, status.st_mtime_ns
            if stamp != self._stamp:
                self._lines, self._stamp = self._read(), stamp
        except FileNotFoundError:
            self._lines, self._stamp = {}, None
        return self._lines

    def _read(self) -> dict[str, Imported]:
        try:
            times = latest(self._store).commit_times()
        except NotFoundError:
            return {}
        found = map(_parsed, self._path.read_bytes().splitlines())
        return {line.file: line for line in found if line and line.time == times.get(line.commit)}

    def line_of(self, path: Path) -> Imported | None:
        """Return the line of the file `path`, whatever the file holds now."""
        return self.lines().get(self._name(path))

    def knows(self, path: Path) -> bool:
        """Whether the store has taken in the file `path` as it is now; reads no tensor of it."""
        line = self.line_of(path)
        try:
            return line is not None and line.content == content_digest(inspect(path))
        except FedgfeStoreError:  # the import says what is wrong with it
            return False

    def add(self, path: Path, content: str, *, node: str, round: int) -> None:
        """Note that the store, as it is now, has taken in the file `path`."""
        if not self._is_kept:
            return
        times = latest(self._store).commit_times()
        if not times:  # nothing of the file could be taken in, and nothing else is there
            return
        commit = max(times)
        line = Imported(self._name(path), content, node, round, commit, times[commit])
        try:
            with self._path.open("ab+") as file:
                files.end_torn_line(file.fileno())
                files.append_line(file.fileno(), asdict(line), self._path.name)
        except OSError as error:
            _log.warning("%s will be read again next time: %s", path, error)

    def path_of(self, line: Imported) -> Path:
        """Return the absolute path of a line's file, which may be gone."""
        return Path(os.path.normpath(self._home / line.file))

    def _name(self, path: Path) -> str:
        return os.path.relpath(path.parent.resolve() / path.name, self._home)

    @contextmanager
    def turn(self, timeout: float) -> Iterator[None]:
        """Keep other processes from importing the same files at the same time.

        Raises
        ------
        BusyError
            If others take longer than `timeout` seconds.
        OSError
            If nothing can be written beside the store.
        """
        if not self._is_kept:
            yield
            return
        try:
            files.make_folders(self._home)
            self._turns.acquire(timeout=timeout)
        except Timeout:
            raise BusyError(
                f"others are importing into {self._store}: gave up after {timeout:g} s"
            ) from None
        except OSError as error:
            if error.errno in _NOT_WRITABLE:
                error.add_note(
                    f"checkpoints that {self._store} does not have cannot be imported there: "
                    f"name a store in another folder with --store"
                )
            raise
        try:
            yield
        finally:
            self._turns.release()


def content_digest(source: Source) -> str:
    """Return what tells whether a checkpoint holds the same as before.

    Parameters
    ----------
    source : Source
        A `.pt` file.

    Returns
    -------
    str
        Of a file in torch's zip format, a digest over the names, sizes and checksums of its
        members, which stand at its end: no tensor is read. Of one in the older format, or
        without checksums, a digest over all its bytes.
    """
    members = [(m.filename, m.file_size, m.CRC) for m in source.members]
    if source.zipped and all(crc for _, size, crc in members if size):
        text = json.dumps(members).encode("ascii")
        return f"members {xxhash.xxh3_128_hexdigest(text)}"
    whole = xxhash.xxh3_128()
    with source.path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
    return f"bytes {whole.hexdigest()}"


def _parsed(line: bytes) -> Imported | None:
    """Return a line, None for one that was torn or that this release does not know."""
    try:
        found = Imported(**(files.parsed_line(line) or {}))
    except TypeError:  # names are missing, or there are others
        return None
    texts = found.file, found.content, found.node
    numbers = found.commit, found.round, found.time
    known = all(isinstance(text, str) for text in texts)
    return found if known and all(type(number) is int for number in numbers) else None
