"""The bytes of a store behind one small interface, whether a folder or a server has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

Range = tuple[int, int]
"""Where a piece of a file begins, and its bytes."""


class RemoteError(ConnectionError):
    """A server that does not answer, or refuses: says which object was asked for."""


class PartFile(Protocol):
    """A file of a store that is read in parts.

    Attributes
    ----------
    size : int
        Its bytes.
    """

    size: int

    def fetch(self, ranges: Sequence[Range]) -> None:
        """Bring what will be read next, where each read would ask a server."""

    def read(self, nbytes: int, offset: int) -> bytes | memoryview:
        """Return `nbytes` from `offset` on; raise UnreadableError where it ends before."""

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Fill pieces of `memory` with what lies from `offset` on; raises as `read` does."""

    def close(self) -> None:
        """Give back what it holds."""


class Place(Protocol):
    """Where the files of a store are; names are relative to it, with slashes.

    Attributes
    ----------
    distant : bool
        Whether each read asks a server, so that many should be under way at a time.
    """

    distant: bool

    @property
    def folder(self) -> Path:
        """The folder, for one who writes; SchemaMismatchError where it is not on this machine."""

    def read(self, name: str, most: int) -> bytes:
        """Return a file of at most `most` bytes; FileNotFoundError, UnreadableError or OSError."""

    def open(self, name: str, end: int) -> PartFile:
        """Open a file of which the last `end` bytes are read first; raises as `read` does."""

    def waits(self, name: str) -> bool:
        """Whether to read a file is to wait, and processors would be idle meanwhile."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def sizes(self, folder: str = "") -> dict[str, int] | None:
        """Return names and bytes of the files below `folder`; None where no server tells."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Make a file that is not there, whole or not at all; False where there is one."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def ages(self, folder: str) -> dict[str, float]:
        """Return names and seconds since the last change of the files below `folder`.

        By the place's own clock: no other one need be right.
        """
