"""Claims without locks: files that one process makes exclusively and renews while it lives."""

from __future__ import annotations

import itertools
import os
import re
import uuid
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from fedgfe_store.common import threads
from fedgfe_store.images.png import writer_is_gone, writer_token
from fedgfe_store.storage import claim_files

# Eight hex digits of the machine, a process's number, and 32 hex digits.
_MARK_BYTES = 100
# Any name may stand in it, with dashes and line breaks.
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
        self._stop: SimpleQueue[None] = SimpleQueue()
        self._renewing: threads.Thread | None = None
        self._remove_dead()

    def take(self, name: str) -> bool:
        """Claim a name, unless a living process has it."""
        self._silent.discard(name)
        generation = 0
        while not claim_files.make(self._path(name, generation), self._mark):
            state = self._owner(self._path(name, generation))
            if state == "dead":
                generation += 1
            elif state != "gone":
                if state == "silent":
                    self._silent.add(name)
                return False
        self._held[name] = generation
        # With the first claim: a run that finds nothing to do makes no thread.
        if self._renewing is None:
            renew = partial(claim_files.renew, self._stop, self._paths)
            self._renewing = threads.Thread(renew, "fedgfe-claims")
            self._renewing.start()
        return True

    def release(self, name: str) -> None:
        """Give a name back, unless another process has taken it over."""
        generation = self._held.pop(name)
        above, own = self._path(name, generation + 1), self._path(name, generation)
        # What another has taken over is its own; it removes the files below, too.
        if above.exists() or _read(own) != self._mark:
            return
        for number in range(generation, -1, -1):
            self._path(name, number).unlink(missing_ok=True)

    def ask(self) -> None:
        """Count renewals from now on as signs of life."""
        self._asked = claim_files.now(self._clock)

    def is_silent(self, name: str) -> bool:
        """Whether a name could not be taken, and its owner has shown no sign of life since."""
        return name in self._silent

    def close(self) -> None:
        """Give all names back."""
        # The thread first: it would renew what others claim under the names that are given back.
        self._stop.put(None)
        if self._renewing is not None:
            self._renewing.join()
        for name in list(self._held):
            self.release(name)

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f".fedgfe-claim-{name}-{generation}"

    def _paths(self) -> list[Path]:
        return [self._path(*each) for each in self._held.copy().items()]

    def _owner(self, path: Path) -> str:
        """Tell whether a claim's owner is alive, silent so far or dead, or the claim gone."""
        try:
            words = _read(path).split()
            renewed = claim_files.touched(path)
        except FileNotFoundError:
            return "gone"
        # Cut where its owner was killed before it had written all of it: then age alone tells.
        if len(words) > 1 and words[1].isdigit():
            token = words[0].decode("ascii", "replace")
            if writer_is_gone(token, int(words[1])):
                return "dead"
        if claim_files.may_be_taken_over(claim_files.now(self._clock) - renewed):
            return "dead"
        return "alive" if renewed > self._asked > 0 else "silent"

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
