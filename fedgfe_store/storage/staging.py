"""The files of a commit: written under names of their own, flushed, then put in place at once.

Nothing that lies in a store is opened for writing, and a link that lies where a file will be is
replaced, not followed. A writer that was taken for dead cannot hurt who took over: its files are
unlinked before they have their names, and a file that is gone cannot be renamed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedgfe_store.common import threads
from fedgfe_store.errors import ConflictError
from fedgfe_store.storage import files

_MOST_OPEN, _MOST_BYTES = 32, 2**28
"""Files that wait for their flush, of 1,024 that a process may usually have open, and their bytes,
which the system keeps in memory."""


class Staging:
    """Files on their way into a store; `token` tells them from those of other writers.

    What a commit needs is flushed late: the disk begins with a file when it is written, and has
    done most by the time that somebody waits for it. In a file system with a journal the first
    flush also brings the names of all others.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._waiting: dict[Path, Path] = {}
        self._unflushed: deque[tuple[Path, BinaryIO, int]] = deque()
        self.placed = False
        """Whether a file may have taken its place."""

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file that will take the place of `path`; `place` flushes it."""
        with files.naming(path):
            file = open(self._temporary(path), "xb")  # noqa: SIM115 - closed once it is flushed
            try:
                yield file
                file.flush()
                files.begin_writing(file)
            except BaseException:
                file.close()
                raise
        self._unflushed.append((path, file, file.tell()))
        nbytes = sum(size for *_, size in tuple(self._unflushed))
        if len(self._unflushed) > _MOST_OPEN or nbytes > _MOST_BYTES:
            self._flush_first()

    def write(self, contents: Mapping[Path, bytes]) -> None:
        """Write several files, as `write_file` does."""
        threads.run(threads.writers(), self.write_file, contents.items())

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a file that will take the place of `path`; `place` flushes it."""
        with self.open(path) as file:
            file.write(data)

    def _flush(self) -> None:
        """Wait until the disk has all that was written, but for hints."""
        threads.run(threads.writers(), self._flush_first, [()] * len(self._unflushed))

    def _flush_first(self) -> None:
        try:
            path, file, _ = self._unflushed.popleft()
        except IndexError:  # another thread has flushed it
            return
        with files.naming(path), file:
            os.fsync(file.fileno())

    def hint(self, path: Path, data: bytes) -> None:
        """Write such a file that may be lost, cut or zeros after a power cut: it is not flushed.

        It is there for other programs, which find it whole unless the power was cut. Each flush
        costs a commit as much as one of a file that a record is in.
        """
        temporary = self._temporary(path)
        with files.naming(path), open(temporary, "xb") as file:
            file.write(data)

    def _temporary(self, path: Path) -> Path:
        """Return under which name the file that takes the place of `path` is made."""
        temporary = Path(f"{path}.{self._token}{files.TEMPORARY}")
        self._waiting[path] = temporary
        return temporary

    def place(self, fence: Callable[[], object]) -> None:
        """Flush what was written, rename it to where it belongs, and flush the folders.

        Parameters
        ----------
        fence : callable
            Makes sure, once all is flushed, that nobody has taken this writer for dead meanwhile.

        Raises
        ------
        ConflictError
            If another writer took this one for dead.
        """
        self._flush()
        fence()
        # Before the first rename: one that is interrupted may have taken place.
        self.placed = self.placed or bool(self._waiting)
        by_folder: dict[Path, list[Path]] = {}
        for path in self._waiting:
            by_folder.setdefault(path.parent, []).append(path)
        # Several at once: a disk may take its time to free what lay there. All of them before the
        # first flush, which in a file system with a journal brings the others with it.
        threads.run(threads.writers(), self._rename, ((paths,) for paths in by_folder.values()))
        threads.run(threads.writers(), files.sync_folder, ((folder,) for folder in by_folder))

    def _rename(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                os.replace(self._waiting[path], path)
            except FileNotFoundError:
                raise ConflictError(
                    f"{path}: another writer came in between, which took this one for dead"
                ) from None
            # What has its place is no longer this one's to remove: `recovery.clear` undoes it.
            del self._waiting[path]

    def discard(self) -> None:
        """Remove what was written and has not taken its place."""
        while self._unflushed:
            self._unflushed.popleft()[1].close()
        for temporary in self._waiting.values():
            temporary.unlink(missing_ok=True)
        self._waiting.clear()
