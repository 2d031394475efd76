"""Claims without locks: files that one process makes exclusively and renews while it lives."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import uuid
from pathlib import Path

from fedgfe_store.images.png import writer_is_gone, writer_token

RENEWED_EVERY = 10.0
"""Seconds after which a living process renews its claims."""

EXPIRES_AFTER = 60.0
"""Seconds without renewal after which a claim is a dead process's."""

_MARK_BYTES = 100
_NAME = re.compile(r"\.fedgfe-claim-(.+)-([0-9]+)", re.DOTALL)


class ClaimFiles:
    """Exclusive claims on names by files; not for threads, see `Claims`.

    A claim is a file ``.fedgfe-claim-NAME-0`` that was made exclusively. Who finds that its owner
    is dead makes ``-1`` exclusively, and so on: of several who find it at once one succeeds, and
    a lower number is never free while a higher one is held. The age of a claim is that of its
    last renewal, by the clock of the file system: hosts' clocks differ.

    Parameters
    ----------
    folder : Path
        An existing folder.
    clock : Path
        A file in it that is touched to learn what the file system's clock says.
    """

    def __init__(self, folder: Path, clock: Path) -> None:
        self._folder, self._clock = folder, clock
        # Another process may take over from this one, if it sleeps for long enough.
        self._mark = f"{writer_token()} {os.getpid()} {uuid.uuid4().hex}".encode("ascii")
        self._held: dict[str, int] = {}
        self._asked = 0.0
        self._silent: set[str] = set()
        self._closed = threading.Event()
        self._renewing: threading.Thread | None = None
        self._remove_dead()

    def take(self, name: str) -> bool:
        """Claim a name, unless a living process has it."""
        self._silent.discard(name)
        generation = 0
        while not self._make(self._path(name, generation)):
            state = self._owner(self._path(name, generation))
            if state == "dead":
                generation += 1
            elif state != "gone":
                if state == "silent":
                    self._silent.add(name)
                return False
        self._held[name] = generation
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="fedgfe-claims", daemon=True)
            self._renewing.start()
        return True

    def release(self, name: str) -> None:
        """Give a name back, unless another process has taken it over."""
        generation = self._held.pop(name)
        above, own = self._path(name, generation + 1), self._path(name, generation)
        if above.exists() or _read(own) != self._mark:
            return
        for number in range(generation, -1, -1):
            self._path(name, number).unlink(missing_ok=True)

    def ask(self) -> None:
        """Count renewals from now on as signs of life."""
        self._asked = self._now()

    def is_silent(self, name: str) -> bool:
        """Whether a name could not be taken, and its owner has shown no sign of life since."""
        return name in self._silent

    def close(self) -> None:
        """Give all names back."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join()
        for name in list(self._held):
            self.release(name)

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f".fedgfe-claim-{name}-{generation}"

    def _make(self, path: Path) -> bool:
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(file, self._mark)
        except OSError as error:
            path.unlink(missing_ok=True)
            error.filename = str(path)
            raise
        finally:
            os.close(file)
        return True

    def _owner(self, path: Path) -> str:
        """Tell whether a claim's owner is alive, silent so far or dead, or the claim gone."""
        try:
            # Opening asks a network disk for the file's true state; a stat alone may be old.
            with path.open("rb") as file:
                words = file.read(_MARK_BYTES).split()
                renewed = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return "gone"
        if len(words) > 1 and words[1].isdigit():
            token = words[0].decode("ascii", "replace")
            if writer_is_gone(token, int(words[1])):
                return "dead"
        if self._now() - renewed > EXPIRES_AFTER:
            return "dead"
        return "alive" if renewed > self._asked > 0 else "silent"

    def _now(self) -> float:
        os.utime(self._clock)
        return self._clock.stat().st_mtime

    def _renew(self) -> None:
        while not self._closed.wait(RENEWED_EVERY):
            for name, generation in self._held.copy().items():
                # Released meanwhile; or the disk fails, and the next renewal tries again.
                with contextlib.suppress(OSError):
                    os.utime(self._path(name, generation))

    def _remove_dead(self) -> None:
        """Remove what killed processes left, in the one way that is safe beside others."""
        found = map(_NAME.fullmatch, sorted(os.listdir(self._folder)))
        for name, _ in itertools.groupby(match[1] for match in found if match):
            if self.take(name):
                self.release(name)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MARK_BYTES)
    except FileNotFoundError:
        return b""
