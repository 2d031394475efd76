"""A store's files in an object store or behind a web server, read through the library obstore."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedgfe_store.common.location import Address, own_folder
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.place import Range, RemoteError

try:
    import obstore
    from obstore import exceptions, store
except ImportError:
    raise SchemaMismatchError(
        "a store behind a URL needs the extra cloud: pip install 'fedgfe-store[cloud]'"
    ) from None

# The client's own retries: of a lost connection, an answer that ends too early, 5xx and 429, for
# about 15 seconds, until which S3's "slow down" and a server that starts anew have passed.
RETRIES: dict[str, Any] = {
    "max_retries": 8,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=4),
        "base": 2,
    },
}
_END = 2**16
"""Bytes of a file's end that are read with its index: a small file is there with one request."""
_LARGEST_REQUEST = 2**23
"""Bytes of one request; the client's default of 30 s is enough for 16 at a time at 5 MB/s."""
_KNOWN_FILES = 4096
"""Files whose index is kept; each takes a few hundred bytes."""


class ObjectStore:
    """The objects below a URL.

    Parameters
    ----------
    address : Address
        Where; credentials and endpoints come from the environment, as obstore reads it.

    Raises
    ------
    SchemaMismatchError
        If obstore does not take it, such as one of Azure without an account.
    """

    distant = True

    def __init__(self, address: Address) -> None:
        self.address = address
        self._process = os.getpid()
        options: dict[str, Any] = {"retry_config": RETRIES}
        if address.url.startswith("http://"):
            options["client_options"] = {"allow_http": True}
        try:
            self._client = store.from_url(address.url, **options)
        except exceptions.BaseError as error:
            raise SchemaMismatchError(f"{address} cannot be opened: {_told(error)}") from None
        self._has_ends = True
        self._ends: OrderedDict[str, tuple[int, memoryview]] = OrderedDict()

    def __str__(self) -> str:
        return self.address.url

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[Address]]:
        return ObjectStore, (self.address,)

    @property
    def folder(self) -> Path:
        """Refuse: nothing is written here."""
        return own_folder(self.address)

    def ask(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of obstore on the object `name`, with our errors."""
        if os.getpid() != self._process:
            # Its threads stayed in the parent, and it would stop the child with a panic.
            raise RemoteError(
                f"{self} was opened before this process was forked: start it by 'spawn', such as "
                f"DataLoader(..., multiprocessing_context='spawn')"
            )
        try:
            return function(self._client, *arguments, **options)
        except (FileNotFoundError, exceptions.NotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self}/{name}") from None
        except (exceptions.NotSupportedError, exceptions.AlreadyExistsError):
            raise
        except exceptions.BaseError as error:
            raise RemoteError(f"{self}/{name} cannot be read or written: {_told(error)}") from None

    def read(self, name: str, most: int) -> bytes:
        """Return the contents of an object."""
        found = self.ask(name, obstore.get, name)
        if found.meta["size"] > most:
            raise UnreadableError(f"expected at most {most:,} bytes, got {found.meta['size']:,}")
        return bytes(self.ask(name, lambda client: found.bytes()))

    def ranges(self, name: str, wanted: Sequence[Range]) -> list[memoryview]:
        """Return pieces of an object, which are asked for at the same time."""
        starts, lengths = [start for start, _ in wanted], [nbytes for _, nbytes in wanted]
        options = {"starts": starts, "lengths": lengths, "coalesce": 0}
        pieces = self.ask(name, obstore.get_ranges, name, **options)
        found = [memoryview(piece) for piece in pieces]
        if [len(piece) for piece in found] != lengths:
            raise UnreadableError("it is too short")
        return found

    def open(self, name: str, end: int) -> RemoteFile:
        """Open an object by reading its end, unless that is known: its index never changes."""
        known = self._ends.get(name)
        if known is not None:
            return RemoteFile(self, name, *known)
        size, read = self._end(name, end + _END)
        self._ends[name] = size, memoryview(bytes(read[-end:]))
        while len(self._ends) > _KNOWN_FILES:
            self._ends.popitem(last=False)
        return RemoteFile(self, name, size, read)

    def _end(self, name: str, nbytes: int) -> tuple[int, memoryview]:
        """Return the size of an object and its last `nbytes`, or all that there are."""
        if self._has_ends:
            try:
                found = self.ask(name, obstore.get, name, options={"range": {"suffix": nbytes}})
                return found.meta["size"], memoryview(self.ask(name, lambda client: found.bytes()))
            except exceptions.NotSupportedError:  # Azure has no ranges that count from the end
                self._has_ends = False
        size = self._size(name)
        start = max(0, size - nbytes)
        return size, self.ranges(name, [(start, size - start)])[0]

    def _size(self, name: str) -> int:
        size: int = self.ask(name, obstore.head, name)["size"]
        return size

    def waits(self, name: str) -> bool:
        """Say yes: a server is always asked."""
        return True

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            self._size(name)
        except FileNotFoundError:
            return False
        return True

    def sizes(self, folder: str = "") -> dict[str, int] | None:
        """Return names and bytes of the objects below `folder`; None of a web server."""
        if self.address.url.startswith("http"):  # HTTP has no lists, and few servers WebDAV's
            return None
        found = self.ask(folder, lambda client: obstore.list(client, folder or None).collect())
        cut = len(folder) + 1 if folder else 0
        return {each["path"][cut:]: each["size"] for each in found}

    def put_new(self, name: str, data: bytes) -> bool:
        """Make an object that is not there; False where there is one."""
        try:
            self.ask(name, obstore.put, name, data, mode="create", use_multipart=False)
        except exceptions.AlreadyExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.ask(name, obstore.delete, name)

    def ages(self, folder: str) -> dict[str, float]:
        """Return names and seconds since the last change of the objects below `folder`."""
        clock = f"clock/{uuid.uuid4().hex}"
        self.put_new(clock, b"")
        now = self.ask(clock, obstore.head, clock)["last_modified"]
        self.remove(clock)
        found = self.ask(folder, lambda client: obstore.list(client, folder).collect())
        return {
            each["path"][len(folder) + 1 :]: (now - each["last_modified"]).total_seconds()
            for each in found
        }


class RemoteFile:
    """An object of which parts have been brought."""

    def __init__(self, place: ObjectStore, name: str, size: int, end: memoryview) -> None:
        self._place, self._name, self.size = place, name, size
        self._end = (size - len(end), end)
        self._held = [self._end]

    def fetch(self, ranges: Sequence[Range]) -> None:
        """Bring `ranges` in few requests, in place of those that were brought before."""
        missing = [(start, nbytes) for start, nbytes in sorted(ranges) if start < self._end[0]]
        joined = _joined(missing)
        brought = self._place.ranges(self._name, joined) if joined else []
        starts = [start for start, _ in joined]
        self._held = [self._end, *zip(starts, brought, strict=True)]

    def read(self, nbytes: int, offset: int) -> memoryview:
        """Return `nbytes` from `offset` on."""
        for start, data in self._held:
            if start <= offset and offset + nbytes <= start + len(data):
                return data[offset - start : offset - start + nbytes]
        return self._place.ranges(self._name, [(offset, nbytes)])[0]

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Fill pieces of `memory` with what lies from `offset` on."""
        for piece in memory:
            piece[:] = self.read(len(piece), offset)
            offset += len(piece)

    def close(self) -> None:
        """Forget what was brought."""
        self._held = []


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Join ascending ranges that touch, up to the size of a request."""
    joined: list[Range] = []
    for start, nbytes in ranges:
        if joined and sum(joined[-1]) == start and joined[-1][1] + nbytes <= _LARGEST_REQUEST:
            joined[-1] = (joined[-1][0], joined[-1][1] + nbytes)
        else:
            joined.append((start, nbytes))
    return joined


def _told(error: Exception) -> str:
    """Return in one line what obstore says, and of a server's XML the code."""
    said, _, answer = str(error).partition("\n\nDebug source")[0].partition("<?xml")
    code = re.search("<Code>([A-Za-z]+)</Code>", answer)
    line = " ".join(said.split()).rstrip(": ")
    return f"{line} ({code[1]})" if code else line
