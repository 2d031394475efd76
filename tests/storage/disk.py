"""What a disk holds for certain, what is still in its cache, and what a power cut may leave.

The rules are those that POSIX gives, and no kinder ones: flushing a file makes its bytes durable
but not its name, flushing a folder makes its names durable. Until then bytes may be lost, be there
in part or be zeros, and of the changes of names any may be lost while later ones are kept; a
rename within a folder is kept or lost whole.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from system_calls import Call, Recording

Tree = dict[str, bytes | None]
"""Bytes of each file by its path, None for a folder, in an order in which they can be made."""
LONG_AGO = 1_600_000_000_000_000_000
"""About when the files of a state were last touched: a computer takes its time to start again."""


@dataclass
class _File:
    """Bytes that are certain, None before the first flush, and those that processes see."""

    durable: bytes | None
    cached: bytes

    def variants(self) -> list[bytes]:
        """Return what may be found after a power cut."""
        half = len(self.cached) // 2
        kept = [self.durable or b"", self.cached, self.cached[:half], bytes(len(self.cached))]
        return [*kept, self.cached[:half] + bytes(len(self.cached) - half)]


@dataclass
class _Folder:
    """Names that are certain, and those that processes see, with the number of each one's node."""

    durable: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """Names that came, went or changed at once: folder, name, and node or None, each."""

    parts: tuple[tuple[int, str, int | None], ...]

    def apply(self, folders: dict[int, dict[str, int]]) -> None:
        for folder, name, node in self.parts:
            if node is None:
                folders[folder].pop(name, None)
            else:
                folders[folder][name] = node


class Disk:
    """A disk below one folder; `waiting` are the changes of names that are not yet durable."""

    def __init__(self, recording: Recording) -> None:
        self.root = recording.folder
        self.files: dict[int, _File] = {}
        self.folders: dict[int, _Folder] = {}
        self.waiting: list[_Change] = []
        for path, (node, data) in recording.start.items():
            if data is None:
                self.folders[node] = _Folder()
            else:
                self.files[node] = _File(data, data)
            if path != self.root:
                where, name = self._place(path)
                self.folders[where].cached[name] = self.folders[where].durable[name] = node

    def _place(self, path: str) -> tuple[int, str]:
        """Return the folder in which `path` lies, and its name there."""
        *above, name = os.path.relpath(path, self.root).split("/")
        where = 0
        for folder in above:
            where = self.folders[where].cached[folder]
        return where, name

    def _node(self, path: str) -> int:
        if path == self.root:
            return 0
        where, name = self._place(path)
        return self.folders[where].cached[name]

    def apply(self, call: Call) -> None:
        """Follow a call."""
        if call.kind == "write":
            file = self.files[call.node]
            before = file.cached[: call.offset].ljust(call.offset, b"\0")
            file.cached = before + call.data + file.cached[call.offset + len(call.data) :]
        elif call.kind == "truncate":
            file = self.files[call.node]
            file.cached = file.cached[: call.offset].ljust(call.offset, b"\0")
        elif call.kind == "flush":
            self.files[call.node].durable = self.files[call.node].cached
        elif call.kind == "flush folder":
            self._flush(self._node(call.path))
        elif call.kind in ("create", "link", "mkdir"):
            if call.kind == "create":
                self.files[call.node] = _File(None, b"")
            elif call.kind == "mkdir":
                self.folders[call.node] = _Folder()
            self._change((*self._place(call.to or call.path), call.node))
        elif call.kind in ("unlink", "rmdir"):
            self._change((*self._place(call.path), None))
        elif call.kind == "rename":
            old = (*self._place(call.path), None)
            self._change(old, (*self._place(call.to), self._node(call.path)))

    def _change(self, *parts: tuple[int, str, int | None]) -> None:
        change = _Change(parts)
        change.apply({number: folder.cached for number, folder in self.folders.items()})
        self.waiting.append(change)

    def _flush(self, folder: int) -> None:
        durable = {number: each.durable for number, each in self.folders.items()}
        left = []
        for change in self.waiting:
            if any(where == folder for where, _, _ in change.parts):
                change.apply(durable)
            else:
                left.append(change)
        self.waiting = left

    def unflushed(self) -> list[int]:
        """Return the files whose bytes are not durable."""
        return [node for node, file in self.files.items() if file.durable != file.cached]

    def after_power_cut(self, kept: set[int], data: dict[int, bytes]) -> Tree:
        """Return what lies there if of `waiting` only `kept` came to the disk, and `data`."""
        names = {number: dict(folder.durable) for number, folder in self.folders.items()}
        for position, change in enumerate(self.waiting):
            if position in kept:
                change.apply(names)
        tree: Tree = {}
        ways = [(self.root, 0)]
        while ways:
            path, node = ways.pop()
            if node in self.folders:
                tree[path] = None
                ways += [(f"{path}/{name}", there) for name, there in names[node].items()]
            else:
                file = self.files[node]
                tree[path] = data.get(node, file.durable or b"")
        return tree

    def cached(self) -> Tree:
        """Return what every process sees, which is also what a killed one leaves."""
        data = {node: self.files[node].cached for node in self.unflushed()}
        return self.after_power_cut(set(range(len(self.waiting))), data)

    def states(self, rng: random.Random, *, whole: bool) -> Iterator[Tree]:
        """Yield what a power cut now may leave: the extremes, each change alone, and a sample.

        With `whole`, every subset of the waiting changes, where there are few enough.
        """
        everything, files = set(range(len(self.waiting))), self.unflushed()
        cached = {node: self.files[node].cached for node in files}
        yield self.after_power_cut(set(), {})
        yield self.cached()
        yield self.after_power_cut(everything, {})
        yield self.after_power_cut(everything, {n: bytes(len(b)) for n, b in cached.items()})
        yield self.after_power_cut({len(everything) - 1} & everything, {})
        for position in sorted(everything)[-4:]:
            yield self.after_power_cut(everything - {position}, cached)
            yield self.after_power_cut({position}, cached)
        if whole and 2 <= len(everything) <= 7:
            for size in range(1, len(everything)):
                for kept in combinations(sorted(everything), size):
                    yield self.after_power_cut(set(kept), cached)
                    yield self.after_power_cut(set(kept), self._drawn(files, rng))
        for _ in range(12 if whole else 3):
            share = rng.choice([0.1, 0.5, 0.9])
            some = {position for position in everything if rng.random() < share}
            # A file system with one journal keeps changes in order.
            first = set(range(rng.randint(0, len(everything))))
            yield self.after_power_cut(rng.choice([some, first]), self._drawn(files, rng))

    def _drawn(self, files: list[int], rng: random.Random) -> dict[int, bytes]:
        return {node: rng.choice(self.files[node].variants()) for node in files}


def fingerprint(tree: Tree) -> bytes:
    """Return what tells one state from another."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(tree):
        data = tree[path]
        found.update(path.encode() + (b"/" if data is None else hashlib.blake2b(data).digest()))
    return found.digest()


def make(tree: Tree) -> None:
    """Put the files of `tree` where they lie, in place of what was there."""
    root = Path(next(iter(tree)))
    shutil.rmtree(root, ignore_errors=True)
    for path, data in tree.items():
        if data is None:
            os.mkdir(path)
            continue
        with open(path, "wb") as file:
            file.write(data)
        # Copies keep the time of what they were made of, and other contents have another.
        moment = LONG_AGO + zlib.crc32(data)
        os.utime(path, ns=(moment, moment))


def lying(folder: Path) -> Tree:
    """Return what lies below `folder`."""
    tree: Tree = {os.path.realpath(folder): None}
    for path in sorted(Path(os.path.realpath(folder)).rglob("*")):
        tree[str(path)] = None if path.is_dir() else path.read_bytes()
    return tree
