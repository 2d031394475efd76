"""The two formats of `torch.save`: from their pickles to objects, their tensors in the file."""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgfe_store.checkpoints.builders import Refused, Storage, storage_type
from fedgfe_store.checkpoints.unpickler import Unpickler
from fedgfe_store.checkpoints.zip_members import Mapped, check, is_plain, span

_LARGEST_PICKLE = 1 << 30
"""Bytes of a pickle, tensors apart, that are read: 176,000 entries take some 100 MB."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""How the older format begins: ``MAGIC_NUMBER`` and ``PROTOCOL_VERSION`` of torch.serialization."""


class Zipped:
    """A checkpoint in torch's zip format: a pickle, and a member for each storage.

    As `torch.serialization._save` writes it: ``data.pkl``, ``byteorder`` and ``data/<key>``, where
    the pickle's persistent ids name the key.

    Parameters
    ----------
    path : Path
        The file.
    members : iterable of ZipInfo
        What is in it.
    mapped : Mapped
        Its mapping, in which its tensors will lie.
    """

    def __init__(self, path: Path, members: Iterable[zipfile.ZipInfo], mapped: Mapped) -> None:
        self._path, self._mapped = path, mapped
        self._items = {item.filename: item for item in members}
        inner = (name for name in self._items if name.partition("/")[2] == "data.pkl")
        self._root = next(inner).removesuffix("data.pkl")
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._swapped = self._text("byteorder", 16) == b"big"
        self._whole = torch.frombuffer(mapped.memory, dtype=torch.uint8).untyped_storage()

    def read(self) -> tuple[Any, dict[str, int]]:
        """Return what was saved, and the names of what is not known, with counts."""
        reader = Unpickler(io.BytesIO(self._text("data.pkl", _LARGEST_PICKLE)), self._storage)
        return reader.load(), dict(reader.unknown)

    def _text(self, name: str, most: int) -> bytes:
        item = self._items.get(self._root + name)
        if item is not None and item.file_size > most:
            raise Refused(f"{name} of {item.file_size} bytes")
        return b"" if item is None else self._content(item)

    def _content(self, item: zipfile.ZipInfo) -> bytes:
        if not is_plain(item):
            return self._archive.read(item)
        check(self._mapped, item)
        return self._mapped.memory[span(self._mapped, item)]

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        """The file for who unpacks its members; closed when it goes."""
        return zipfile.ZipFile(self._path)

    def _storage(self, pid: Any) -> Storage:
        dtype, key, numel = _parsed_id(pid, 5)
        if key not in self._storages:  # tensors may share one
            self._storages[key] = self._bytes(self._items[f"{self._root}data/{key}"], dtype)
        if numel * dtype.itemsize > self._storages[key].nbytes():
            raise EOFError("a storage is shorter than it should be")
        return Storage(self._storages[key], dtype)

    def _bytes(self, item: zipfile.ZipInfo, dtype: torch.dtype) -> torch.UntypedStorage:
        if not item.file_size:
            return _empty_storage(0)
        if self._swapped or not is_plain(item):
            values = np.frombuffer(bytearray(self._content(item)), np.uint8)
            if self._swapped:
                values = values.view(f"u{dtype.itemsize}").byteswap().view(np.uint8)
            return torch.from_numpy(values).untyped_storage()
        part: torch.UntypedStorage = self._whole[span(self._mapped, item)]
        return part


def _empty_storage(nbytes: int) -> torch.UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()


def read_older(file: mmap.mmap) -> tuple[Any, dict[str, int]]:
    """Read what torch before 1.6 wrote: pickles, then the storages, one after the other.

    As `torch.serialization._legacy_save` still does: a magic number, the protocol, facts of the
    system, the object, the keys of its storages; then of each the number of values and the values.
    """
    if Unpickler(file).load() != _MAGIC or Unpickler(file).load() != _PROTOCOL:
        raise Refused("a pickle that torch.save did not write")
    system = Unpickler(file).load()
    if isinstance(system, Mapping) and system.get("little_endian") is False:
        raise Refused("a file of the older format from a big-endian machine")
    types: dict[str, torch.dtype] = {}
    storages: dict[str, torch.UntypedStorage] = {}

    def storage(pid: Any) -> Storage:
        dtype, key, numel = _parsed_id(pid, 6)
        if key not in storages:  # made before it is read, as the tensors over it come first
            if numel * dtype.itemsize > len(file):
                raise EOFError("a storage is larger than the file")
            types[key], storages[key] = dtype, _empty_storage(numel * dtype.itemsize)
        if pid[5] is not None:
            raise Refused("a view of a storage, as torch before 0.4 wrote it")
        if numel * dtype.itemsize > storages[key].nbytes():
            raise EOFError("a storage is shorter than it should be")
        return Storage(storages[key], dtype)

    reader = Unpickler(file, storage)
    content = reader.load()
    for key in Unpickler(file).load():
        made, length = storages.pop(key), file.read(8)
        data = file.read(made.nbytes())
        if len(data) < made.nbytes() or int.from_bytes(length, "little") != (
            made.nbytes() // types[key].itemsize
        ):
            raise EOFError("a storage is cut short")
        if data:
            made.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage())
    if storages:
        raise EOFError("storages are missing")
    return content, dict(reader.unknown)


def _parsed_id(pid: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Return type, key and number of values of the storage that a persistent id names."""
    if not (isinstance(pid, tuple) and len(pid) == length and pid[0] == "storage"):
        raise Refused("a persistent id that torch.save did not write")
    # ("storage", its class, key, device, number of values), and in the older format a view's place.
    key, numel = pid[2], pid[4]
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**60:
        raise Refused("a storage without name or size")
    return storage_type(pid[1]), key, numel
