"""The next file is read while the one before it is packed and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedgfe_store.checkpoints.ledger import content_digest
from fedgfe_store.checkpoints.reading import Opened
from fedgfe_store.checkpoints.torch_files import Source, inspect
from fedgfe_store.common.threads import Thread


@dataclass(frozen=True)
class Prepared:
    """A file that is open and as it was written.

    Parameters
    ----------
    content : str
        What `content_digest` gave for it, before it was read.
    file : Opened
        What is in it.
    """

    content: str
    file: Opened


class Ahead:
    """Opens one file at a time in a thread, and looks at its checksums.

    Parameters
    ----------
    opened : callable
        Opens a file that was looked at.
    """

    def __init__(self, opened: Callable[[Source], Opened]) -> None:
        self._opened = opened
        self._path: Path | None = None
        self._thread: Thread | None = None
        self._found: list[Prepared] = []

    def begin(self, path: Path) -> None:
        """Let `path` be opened; what was opened before and not taken is forgotten."""
        self.end()
        self._path, thread = path, Thread(self._prepare, "fedgfe-store-import")
        try:
            thread.start()
        except RuntimeError:  # there cannot be another thread: it is opened when its turn comes
            return
        self._thread = thread

    def take(self, path: Path) -> Prepared | None:
        """Return `path` if it was opened and is as it was then; what is wrong is not told."""
        found = self._found if path == self._path else []
        self.end()
        return found[0] if found and found[0].file.loaded.is_current() else None

    def end(self) -> None:
        """Wait for the thread, and forget what it opened."""
        if self._thread is not None:
            self._thread.join()
        self._path = self._thread = None
        self._found = []

    def _prepare(self) -> None:
        assert self._path is not None
        try:
            source = inspect(self._path)
            found = Prepared(content_digest(source), self._opened(source))
            found.file.loaded.verify()
        except Exception:  # noqa: BLE001 - raised again where the file's turn comes
            return
        self._found.append(found)
