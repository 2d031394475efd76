"""Loading `.pt` files without running anything that they contain."""

from __future__ import annotations

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgfe_store.checkpoints.builders import Refused
from fedgfe_store.checkpoints.torch_formats import Zipped, read_older
from fedgfe_store.checkpoints.zip_members import Mapped, check, is_plain
from fedgfe_store.errors import (
    DamagedDataError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)

_BLOCK = 1 << 20
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
    members : tuple of ZipInfo
        What is in it, in the zip format.
    """

    path: Path
    stamp: tuple[int, int, int]
    zipped: bool
    members: tuple[zipfile.ZipInfo, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Loaded:
    """What a file holds.

    Parameters
    ----------
    content : object
        Tensors, containers and plain values; a `Placeholder` for everything else. Tensors lie in
        the mapped file, where it is in the zip format and nothing of it is compressed.
    unknown : mapping of str to int
        How many objects are placeholders, by the name of what would have made them.
    source : Source
        The file.
    mapped : Mapped
        Its mapping.
    """

    content: Any
    unknown: Mapping[str, int]
    source: Source
    mapped: Mapped

    def verify(self) -> None:
        """Compare the file's bytes with their checksums, as the function `verify` does."""
        _verify(self.source, self.mapped)

    def make_sure(self) -> None:
        """Raise `DamagedDataError` if somebody wrote into the file since `inspect`.

        One that was removed, or that another took the place of, is still there as it was.
        """
        found = self._found()
        if found is not None and found[0] == self.source.stamp[0] and found != self.source.stamp:
            raise _changed(self.source.path)

    def is_current(self) -> bool:
        """Whether the file that has this name is still the one that was loaded."""
        return self._found() == self.source.stamp

    def _found(self) -> tuple[int, int, int] | None:
        try:
            return _stamp(self.source.path.stat())
        except FileNotFoundError:
            return None


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
    stamp = _stamp(status)
    # A zip file's first member begins so, and torch writes nothing before it.
    if not head.startswith(b"PK"):
        _check_head(path, head)
        return Source(path, stamp, zipped=False)
    return Source(path, stamp, zipped=True, members=_members(path))


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
            if _stamp(os.fstat(file.fileno())) != source.stamp:
                raise _changed(path)
            mapped = Mapped(file)
        if source.zipped:
            return Loaded(*Zipped(path, source.members, mapped).read(), source, mapped)
        return Loaded(*read_older(mapped.memory), source, mapped)
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
    try:
        with source.path.open("rb") as file:
            mapped = Mapped(file)
    except (OSError, ValueError) as error:  # ValueError: there is nothing in it any more
        raise _cut_short(source.path, error) from error
    _verify(source, mapped)


def _verify(source: Source, mapped: Mapped) -> None:
    packed = [item for item in source.members if item.CRC and not is_plain(item)]
    try:
        for item in filter(is_plain, source.members):
            check(mapped, item)
        if packed:
            _check_packed(source.path, packed)
    except _BAD_ZIP as error:
        raise DamagedDataError(f"{source.path}: damaged ({error})") from error


def _check_packed(path: Path, items: Iterable[zipfile.ZipInfo]) -> None:
    with zipfile.ZipFile(path) as archive:
        for item in items:
            with archive.open(item) as member:
                while member.read(_BLOCK):
                    pass


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> DamagedDataError:
    return DamagedDataError(f"{path}: changed while it was being read")


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


def _members(path: Path) -> tuple[zipfile.ZipInfo, ...]:
    """Return the members of an archive; refuse one of something else."""
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
    return tuple(items)


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
