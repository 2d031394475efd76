"""Loading `.pt` files without running anything that they contain."""

from __future__ import annotations

import io
import lzma
import mmap
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fedgfe_store.checkpoints.builders import Refused, Storage, storage_type
from fedgfe_store.checkpoints.unpickler import Unpickler
from fedgfe_store.errors import (
    DamagedDataError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)

_BLOCK = 1 << 20
_LARGEST_PICKLE = 1 << 30
"""Bytes of a pickle, tensors apart, that are read: 176,000 entries take some 100 MB."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""How the older format begins: ``MAGIC_NUMBER`` and ``PROTOCOL_VERSION`` of torch.serialization."""
_LOCAL_HEADER = 30
"""Bytes before a zip member's name; the last four are the lengths of the name and what follows."""
# zipfile trusts what it reads: numbers that make no sense end in any of these when they are used.
_BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
)
# Files found under the name of a checkpoint, by their first bytes (`file`'s magic numbers).
_HEADS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get`"),
    (b"<", "an HTML or XML page, not a checkpoint: download the file again"),
    (b"{", "a JSON text, not a checkpoint"),
    (b"\x93NUMPY", "a NumPy .npy file, not a checkpoint"),
    (b"\x89HDF", "an HDF5 file, not a checkpoint"),
    (b"\x1f\x8b", "packed with gzip: unpack it first"),
    (b"BZh", "packed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "packed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd: unpack it first"),
)
_SAVE = "load it where it was written and `torch.save` a dict of plain values and tensors"


@dataclass(frozen=True)
class Source:
    """A `.pt` file that looks loadable.

    Parameters
    ----------
    path : Path
        The file.
    stamp : tuple of int
        Inode, size in bytes and modification time in ns, to notice a file that changes.
    zipped : bool
        Written in the zip format of torch 1.6 and newer.
    mapped : bool
        Its tensors can be mapped instead of read: zip format, nothing compressed.
    """

    path: Path
    stamp: tuple[int, int, int]
    zipped: bool
    mapped: bool


@dataclass(frozen=True)
class Loaded:
    """What a file holds.

    Parameters
    ----------
    content : object
        Tensors, containers and plain values; a `Placeholder` for everything else.
    unknown : mapping of str to int
        How many objects are placeholders, by the name of what would have made them.
    """

    content: Any
    unknown: Mapping[str, int]


def inspect(path: Path) -> Source:
    """Look at a file's head, end and size without unpickling it.

    Raises
    ------
    NotFoundError
        There is no such file.
    DamagedDataError
        The file cannot be read or is empty, cut short, or something else than a checkpoint.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedDataError(f"{path}: expected a regular file, got {_kind(status.st_mode)}")
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        what = (
            "a link to a file that is not there" if path.is_symlink() else "no such checkpoint file"
        )
        raise NotFoundError(f"{path}: {what}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedDataError(f"{path}: cannot be read: {reason}") from error
    if not head:
        raise DamagedDataError(f"{path}: empty file")
    stamp = status.st_ino, status.st_size, status.st_mtime_ns
    # A zip file's first member begins so, and torch writes nothing before it.
    if not head.startswith(b"PK"):
        _check_head(path, head)
        return Source(path, stamp, zipped=False, mapped=False)
    return Source(path, stamp, zipped=True, mapped=_check_zip(path))


def members(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and checksum of each member of a zip file.

    Raises
    ------
    DamagedDataError
        Its directory cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
    except _BAD_ZIP as error:
        raise _cut_short(path, error) from error


def load(source: Source) -> Loaded:
    """Unpickle a file on the CPU, running nothing in it.

    Tensors of a mapped file take no memory until they are read.

    Raises
    ------
    SchemaMismatchError
        The file asks for what the safe reader does not do. Nothing was run.
    DamagedDataError
        The file is cut short or damaged, or changed since `inspect`.
    """
    path = source.path
    try:
        with path.open("rb") as file:
            if _stamp(path) != source.stamp:
                raise DamagedDataError(f"{path}: changed while it was being read")
            # torch takes writable memory only; a copy on write leaves the file alone.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return _Zip(file, mapped).load() if source.zipped else _load_older(mapped)
    except FedgfeStoreError:
        raise
    except Refused as reason:
        raise SchemaMismatchError(
            f"{path}: refused by the safe loader ({reason}): not loaded, nothing was run; {_SAVE}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise anything; each becomes one clear error
        raise _cut_short(path, error) from error


def verify(source: Source) -> None:
    """Compare the bytes of every member of a zip file with its checksum, in little memory.

    torch writes these checksums (unless told not to: 0) but does not look at them.

    Raises
    ------
    DamagedDataError
        Bytes differ from what was saved.
    """
    if not source.zipped:
        return
    try:
        with zipfile.ZipFile(source.path) as archive:
            for item in archive.infolist():
                if item.CRC:
                    with archive.open(item) as member:
                        while member.read(_BLOCK):
                            pass
    except _BAD_ZIP as error:
        raise DamagedDataError(f"{source.path}: damaged ({error})") from error


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _check_head(path: Path, head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, reason in _HEADS:
        if text.startswith(start):
            raise DamagedDataError(f"{path}: {reason}")
    # safetensors: the length of a header in eight bytes, then the header, which is JSON.
    if head[8:10] == b'{"':
        raise DamagedDataError(f"{path}: a safetensors file, not a checkpoint")
    # The opcode PROTO, with which every pickle of protocol 2 and later begins; torch writes 2.
    if not head.startswith(b"\x80"):
        raise DamagedDataError(f"{path}: not a file written by torch.save")


def _check_zip(path: Path) -> bool:
    """Refuse an archive of something else; return whether its members can be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
    except _BAD_ZIP as error:
        raise _cut_short(path, error) from error
    names = [item.filename for item in items]
    # torch puts all into one folder, called after the file that was saved.
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" not in inner:
        raise SchemaMismatchError(f"{path}: {_what_zip(names)}")
    # By which torch tells them, too (torch.serialization._is_torchscript_zip).
    if "constants.pkl" in inner:
        raise SchemaMismatchError(f"{path}: a TorchScript model, not a FedGFE checkpoint")
    return all(item.compress_type == zipfile.ZIP_STORED for item in items)


def _what_zip(names: list[str]) -> str:
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy .npz archive, not a checkpoint"
    packed = [name for name in names if name.lower().endswith((".pt", ".pth"))]
    if packed:
        return f"a zip archive with {packed[0]!a} in it: unzip it, and import what is in it"
    return "a zip archive that torch.save did not write: it has no data.pkl"


def _cut_short(path: Path, error: Exception) -> DamagedDataError:
    detail = (str(error).strip().splitlines() or [""])[0][:160]
    if " " not in detail:  # such as a KeyError's, of an instruction that there is none of
        detail = f"{type(error).__name__} {detail}".rstrip()
    return DamagedDataError(f"{path}: cut short or damaged ({detail})")


class _Zip:
    """A checkpoint in torch's zip format: a pickle, and a member for each storage.

    As `torch.serialization._save` writes it: ``data.pkl``, ``byteorder`` and ``data/<key>``, where
    the pickle's persistent ids name the key.
    """

    def __init__(self, file: BinaryIO, mapped: mmap.mmap) -> None:
        self._archive, self._mapped = zipfile.ZipFile(file), mapped
        self._items = {item.filename: item for item in self._archive.infolist()}
        inner = (name for name in self._items if name.partition("/")[2] == "data.pkl")
        self._root = next(inner).removesuffix("data.pkl")
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._swapped = self._read("byteorder", 16) == b"big"
        self._whole = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()

    def load(self) -> Loaded:
        reader = Unpickler(io.BytesIO(self._read("data.pkl", _LARGEST_PICKLE)), self._storage)
        return Loaded(reader.load(), dict(reader.unknown))

    def _read(self, name: str, most: int) -> bytes:
        item = self._items.get(self._root + name)
        if item is not None and item.file_size > most:
            raise Refused(f"{name} of {item.file_size} bytes")
        return b"" if item is None else self._archive.read(item)

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
        if item.compress_type != zipfile.ZIP_STORED or self._swapped:
            values = np.frombuffer(bytearray(self._archive.read(item)), np.uint8)
            if self._swapped:
                values = values.view(f"u{dtype.itemsize}").byteswap().view(np.uint8)
            return torch.from_numpy(values).untyped_storage()
        # Not those of the directory at the file's end: torch pads the local header of a member, so
        # that its values are aligned.
        lengths = struct.unpack_from("<HH", self._mapped, item.header_offset + _LOCAL_HEADER - 4)
        start = item.header_offset + _LOCAL_HEADER + sum(lengths)
        if start + item.file_size > len(self._mapped):
            raise EOFError("a storage goes beyond the end of the file")
        part: torch.UntypedStorage = self._whole[start : start + item.file_size]
        return part


def _empty_storage(nbytes: int) -> torch.UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()


def _load_older(file: mmap.mmap) -> Loaded:
    """Load what torch before 1.6 wrote: pickles, then the storages, one after the other.

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
    return Loaded(content, dict(reader.unknown))


def _parsed_id(pid: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Return type, key and number of values of the storage that a persistent id names."""
    if not (isinstance(pid, tuple) and len(pid) == length and pid[0] == "storage"):
        raise Refused("a persistent id that torch.save did not write")
    # ("storage", its class, key, device, number of values), and in the older format a view's place.
    key, numel = pid[2], pid[4]
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**60:
        raise Refused("a storage without name or size")
    return storage_type(pid[1]), key, numel
