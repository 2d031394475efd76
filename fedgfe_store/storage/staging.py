"""The files of a commit: written and flushed under names of their own, then put in place at once.

Nothing that lies in a store is opened for writing, and a link that lies where a file will be is
replaced, not followed. A writer that was taken for dead cannot hurt who took over: its files are
unlinked before they have their names, and a file that is gone cannot be renamed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from fedgfe_store.common import threads
from fedgfe_store.errors import ConflictError
from fedgfe_store.storage import files


class Staging:
    """Files on their way into a store; `token` tells them from those of other writers."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._waiting: dict[Path, Path] = {}
        self.placed = False
        """Whether a file may have taken its place."""

    def open(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """Open a file that will take the place of `path`; it is on the disk when the block ends."""
        temporary = path.with_name(f"{path.name}.{self._token}{files.TEMPORARY}")
        self._waiting[path] = temporary
        return files.flushed(temporary, name=path)

    def write(self, contents: Mapping[Path, bytes]) -> None:
        """Write several files; the disk gathers the flushes of all of them."""
        threads.run(threads.writers(), self._write, contents.items())

    def _write(self, path: Path, data: bytes) -> None:
        with self.open(path) as file:
            file.write(data)

    def place(self) -> None:
        """Rename what was written to where it belongs, and flush the folders.

        Raises
        ------
        ConflictError
            If another writer took this one for dead.
        """
        # Before the first rename: one that is interrupted may have taken place.
        self.placed = self.placed or bool(self._waiting)
        folders = list(self._waiting)
        for path, temporary in list(self._waiting.items()):
            try:
                os.replace(temporary, path)
            except FileNotFoundError:
                raise ConflictError(
                    f"{path}: another writer came in between, which took this one for dead"
                ) from None
            # What has its place is no longer this one's to remove: `recovery.clear` undoes it.
            del self._waiting[path]
        files.sync_folders(folders)

    def discard(self) -> None:
        """Remove what was written and has not taken its place."""
        for temporary in self._waiting.values():
            temporary.unlink(missing_ok=True)
        self._waiting.clear()
