"""The right to make a store's next commit, safe where a lock is granted to everyone.

Whoever is to make commit n makes a file ``claim.n.0`` that no one else can make. Its owner touches
it while it lives; one that has not been touched for a minute, by the clock of its file system, is
taken over by making ``claim.n.1``, and so on. Before an owner puts files in place it makes the
next one itself (`Claim.fence`): a late owner finds that it exists, and stops.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from fedgfe_store.common import threads
from fedgfe_store.errors import BusyError, ConflictError, NotFoundError
from fedgfe_store.storage import claim_files
from fedgfe_store.storage.claim_files import Owner, held
from fedgfe_store.storage.files import (
    TEMPORARY,
    flushed,
    linked,
    sync_folder,
)
from fedgfe_store.storage.metadata import GROUP_FILE, Group

# A small commit takes about 10 ms; to list a network folder twice a second bothers nobody.
_SHORTEST_WAIT, _LONGEST_WAIT = 0.01, 0.5
"""Seconds between two looks at what another writer holds; each is twice the one before."""
_LOOK_SECONDS = 1.0
"""How often a waiting writer asks whether the owner lives, which makes a file."""
_NAME = re.compile(r"claim\.(\d+)\.(\d+)")

_log = logging.getLogger("fedgfe_store")


class Claim:
    """The right to make commit `number` of the store at `path`; made by `Claim.take`.

    Attributes
    ----------
    token : str
        Tells this claim's files from those of any other.
    number : int
        The commit that may be made.
    after_others : bool
        Whether another writer had begun this commit and did not publish it.
    alone : bool
        Whether it is certain that no such writer is still at work.
    """

    def __init__(self, path: Path, number: int, owner: Owner) -> None:
        self._path, self._owner = path, owner
        self.token, self.number = owner.token, number
        self.after_others, self.alone = False, True
        self._made: list[Path] = []
        # No `threading.Event`: an interruption within its lock would let `release` wait for ever.
        self._stop: SimpleQueue[None] = SimpleQueue()
        self._abandoned = False

    @classmethod
    def take(
        cls,
        path: Path,
        *,
        timeout: float,
        since: float,
        published: Callable[[], int],
        clear: Callable[[], None],
    ) -> Claim:
        """Wait until no living writer holds the next commit, and claim it.

        Parameters
        ----------
        path : Path
            The store's folder.
        timeout, since : float
            Seconds to wait, from this moment of the monotonic clock on.
        published : callable
            Returns the number of the latest commit, read anew.
        clear : callable
            Removes what other writers have not put in place; called after a take-over.

        Raises
        ------
        BusyError
            If another writer holds it until then; says which one.
        """
        waiting = _Waiting(path, timeout, since)
        while True:
            # Anew each time: whoever was waited for may have published, and more than once.
            number = published() + 1
            rivals = claims(path).get(number, {})
            dead = _all_dead(rivals) if rivals else True
            if rivals and not dead and not waiting.is_silent(rivals[max(rivals)]):
                waiting.wait(rivals[max(rivals)])
                continue
            claim = cls(path, number, Owner.this())
            try:
                # Behind all that lie there: of several who take over at once, one makes this one.
                if not claim._make(max(rivals, default=-1) + 1):
                    continue
                claim.after_others, claim.alone = bool(rivals), dead
                if claim._is_next(published) and (not rivals or claim._cleared(clear, published)):
                    return claim
            except BaseException:
                claim.release()
                raise
            # Somebody has made this commit: all claims on it have had their time, this one too.
            claim.release(published=True)

    def _is_next(self, published: Callable[[], int]) -> bool:
        """Whether the commit has not been published meanwhile, before its claims were removed."""
        return published() + 1 == self.number

    def _cleared(self, clear: Callable[[], None], published: Callable[[], int]) -> bool:
        """Take from a late owner what it could still put in place, then look whether it has."""
        clear()
        return self._is_next(published)

    def _make(self, epoch: int) -> bool:
        """Make the claim's next file; False where another writer has made it."""
        target = self._path / f"claim.{self.number}.{epoch}"
        made = self._link(target) if self._made else self._begin(target)
        if made:
            self._made.append(target)
        return made

    def _begin(self, target: Path) -> bool:
        # Under another name first, as a claim must not be seen that does not say whose it is.
        data = json.dumps(asdict(self._owner)).encode()
        temporary = self._path / f"claim.{self.token}{TEMPORARY}"
        try:
            with flushed(temporary, name=target) as file:
                file.write(data)
            made = _exclusive_link(temporary, target, self.token)
        except FileNotFoundError:
            # Who took over another writer's claim has just cleared what lay here.
            made = False
        finally:
            temporary.unlink(missing_ok=True)
        if made:
            sync_folder(self._path)
            held.add(self.token)
            # Not holding the claim: one that an interruption lost is abandoned, see `__del__`.
            renew = partial(claim_files.renew, self._stop, partial(_last, self._made))
            # No thread can begin while the interpreter ends; `fence` sees what comes of that.
            with contextlib.suppress(RuntimeError):
                threads.Thread(renew, "fedgfe-store-claim").start()
        return made

    def _link(self, target: Path) -> bool:
        try:
            # One file with many names: to touch the last renews all, and none is flushed again.
            return _exclusive_link(self._made[-1], target, self.token)
        except FileNotFoundError:
            return False

    def fence(self) -> None:
        """Make sure that no one has taken this claim over: from now on that takes a minute again.

        Raises
        ------
        ConflictError
            If someone has.
        """
        # Made, not looked for: between a look and what follows it, someone could take over.
        epoch = int(self._made[-1].name.split(".")[2])
        if not self._make(epoch + 1) or not self._touch():
            raise ConflictError(
                f"{self._path}: another writer came in between while commit {self.number} was "
                f"written: it took this one for dead, which had not been heard of for "
                f"{claim_files.TAKEOVER_SECONDS:g} s; nothing of it was published"
            )

    def make_sure(self, group: Group) -> None:
        """Make sure that this claim on the commit after `group` holds, and no one made that commit.

        Raises
        ------
        ConflictError
            If another writer came in between, also one that knows no claims.
        NotFoundError
            If the store has been removed.
        """
        published = self._path / GROUP_FILE
        # Asked for apart: where the folder is gone, the fence would say that somebody came between.
        if not published.exists():
            raise NotFoundError(
                f"{self._path}: the store is gone, while commit {self.number} was written"
            )
        self.fence()
        # Releases before format version 2 know no claims.
        if published.read_bytes() != group.raw:
            raise ConflictError(
                f"{self._path}: another writer came in between while commit {self.number} was "
                f"written; nothing of it was published"
            )

    def _touch(self) -> bool:
        """Renew the claim; False where it is gone, as once another writer has published."""
        try:
            os.utime(self._made[-1])
        except FileNotFoundError:
            return False
        return True

    def forget_others(self) -> None:
        """Remove the claims of other writers on this commit, where none of them is at work."""
        if self.after_others and self.alone:
            for file in claims(self._path).get(self.number, {}).values():
                if file not in self._made:
                    file.unlink(missing_ok=True)
            self.after_others = False

    def release(self, *, published: bool = False) -> None:
        """Give the claim back; once its commit is `published`, all claims up to it are removed.

        One that was taken over from a writer that may still be at work stays, for anyone to take
        over at once: without it that writer would find its next fence free.
        """
        self.abandon()
        if self.after_others and not published:
            for file in self._made:
                # A time of long ago lets the next writer take over without waiting a minute.
                with contextlib.suppress(FileNotFoundError):
                    os.utime(file, times=(0, 0))
            return
        spent = set(self._made)
        if published:
            for number, files in claims(self._path).items():
                spent.update(files.values() if number <= self.number else ())
        for file in sorted(spent):
            file.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Hold the claim no longer; what is left of it is one of a writer that died."""
        self._stop.put(None)
        held.discard(self.token)
        self._abandoned = True

    def __del__(self) -> None:
        # A forked child has a copy, and no thread that renews it: the claim is its parent's.
        if not self._abandoned and self._owner.pid == os.getpid():
            self.abandon()


class _Waiting:
    """A writer that waits for another one, up to a limit."""

    def __init__(self, path: Path, timeout: float, since: float) -> None:
        self._path, self._timeout = path, timeout
        self._end = since + timeout
        self._pause = _SHORTEST_WAIT
        self._next_look = 0.0
        self._told = False

    def is_silent(self, claim: Path) -> bool:
        """Whether the owner of `claim` has not touched it for so long that it may be taken over."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_SECONDS
        return claim_files.may_be_taken_over(age(claim))

    def wait(self, claim: Path) -> None:
        owner = Owner.of(claim) or "another writer"
        left = self._end - time.monotonic()
        if left <= 0:
            raise BusyError(
                f"{self._path} is being written by {owner}: gave up after {self._timeout:g} s"
            )
        if not self._told and self._pause >= _LONGEST_WAIT:
            _log.warning(
                "%s: waiting up to %g s for %s; if it died, until %g s after it was last heard of",
                self._path,
                self._timeout,
                owner,
                claim_files.TAKEOVER_SECONDS,
            )
            self._told = True
        time.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, _LONGEST_WAIT)


def claims(path: Path) -> dict[int, dict[int, Path]]:
    """Return the claims that lie in the store at `path`: files by commit number and epoch."""
    found: dict[int, dict[int, Path]] = {}
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: the store's folder is gone") from None
    for name in names:
        if match := _NAME.fullmatch(name):
            number, epoch = map(int, match.groups())
            found.setdefault(number, {})[epoch] = path / name
    return found


def is_claim_name(name: str) -> bool:
    """Whether a file of a store's folder that is called `name` is a claim."""
    return _NAME.fullmatch(name) is not None


def is_claim(path: Path, entry: Path) -> bool:
    """Whether `entry` is a claim, or was to become one, on a commit of the store at `path`."""
    return entry.parent == path and entry.name.startswith("claim.")


def age(file: Path) -> float:
    """Return the seconds since `file` was touched, by the clock of its file system.

    A file that is gone was touched just now: its owner has published, or given up.
    """
    probe = file.with_name(f"clock.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(probe, "xb"):
            return claim_files.now(probe) - claim_files.touched(file)
    except FileNotFoundError:  # the probe, too: whoever has the next commit removes what is there
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _last(made: list[Path]) -> list[Path]:
    return made[-1:]


def _all_dead(files: dict[int, Path]) -> bool:
    owners = [Owner.of(file) for file in files.values()]
    return all(owner is not None and owner.dead for owner in owners)


def _exclusive_link(source: Path, target: Path, token: str) -> bool:
    """Give the file `source` the name `target` too, which must be free; tell whether it was."""
    try:
        return linked(source, target) or claim_files.make(target, source.read_bytes())
    except FileExistsError:
        # A network disk may repeat a call whose answer was lost, and find its own work done.
        owner = Owner.of(target)
        return owner is not None and owner.token == token
