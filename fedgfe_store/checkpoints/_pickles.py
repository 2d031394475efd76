"""Loading `.pt` files without running anything that they contain."""

from __future__ import annotations

import pickle
import re
import threading
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgfe_store.errors import (
    DamagedDataError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)

_BLOCK = 1 << 20
_LOCK = threading.Lock()  # torch's allow-list and the warning filters are process-wide
_NUMPY_DTYPES = (
    ["bool", "float16", "float32", "float64", "U1", "S1"]
    + [f"int{bits}" for bits in (8, 16, 32, 64)]
    + [f"uint{bits}" for bits in (8, 16, 32, 64)]
)
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_HEADS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "an HTML or XML page, not a checkpoint: download the file again"),
    (b"{", "a JSON text, not a checkpoint"),
)


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


def inspect(path: Path) -> Source:
    """Look at a file's head, end and size without unpickling it.

    Raises
    ------
    NotFoundError
        There is no such file.
    DamagedDataError
        The file cannot be read or is empty, cut short, an HTML page or a Git LFS pointer.
    """
    try:
        stamp = _stamp(path)
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such checkpoint file") from None
    except OSError as error:
        raise DamagedDataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise DamagedDataError(f"{path}: empty file")
    zipped = head.startswith(b"PK")
    if not zipped:
        _check_head(path, head)
    return Source(path, stamp, zipped, zipped and _nothing_compressed(path))


def load(source: Source) -> Any:
    """Unpickle a file on the CPU: tensors, containers, plain values and numpy values only.

    Tensors of a mapped file take no memory until they are read.

    Raises
    ------
    SchemaMismatchError
        The file names a class or function outside the allow-list. Nothing was run.
    DamagedDataError
        The file is cut short or damaged, or changed since `inspect`.
    """
    try:
        if _stamp(source.path) != source.stamp:
            raise DamagedDataError(f"{source.path}: changed while it was being read")
        allowed = torch.serialization.safe_globals(_numpy_globals())
        with _LOCK, warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")
            return torch.load(
                source.path, map_location="cpu", weights_only=True, mmap=source.mapped
            )
    except (FedgfeStoreError, MemoryError):
        raise
    except Exception as error:  # damaged pickles raise anything; each becomes one clear error
        raise _explained(source, error) from error


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
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DamagedDataError(f"{source.path}: damaged ({error})") from error


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_head(path: Path, head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, reason in _HEADS:
        if text.startswith(start):
            raise DamagedDataError(f"{path}: {reason}")
    if not head.startswith(b"\x80"):
        raise DamagedDataError(f"{path}: not a file written by torch.save")


def _nothing_compressed(path: Path) -> bool:
    # torch maps a compressed member as if its bytes were the values
    try:
        with zipfile.ZipFile(path) as archive:
            return all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedDataError(f"{path}: cut short or damaged ({error})") from error


@cache
def _numpy_globals() -> list[Any]:
    """Allow scalars, arrays and plain dtypes of numpy, by the names of numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    array = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [(np.dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    for kind in {type(np.dtype(name)) for name in _NUMPY_DTYPES}:
        allowed.append((kind, f"{kind.__module__}.{kind.__qualname__}"))
    return allowed


def _explained(source: Source, error: Exception) -> FedgfeStoreError:
    names = _refused_globals(source, error)
    text = str(error)
    if names:
        listed = ", ".join(f"`{name}`" for name in names)
        return SchemaMismatchError(f"{source.path}: contains {listed}: not loaded, nothing was run")
    if "TorchScript" in text:
        return SchemaMismatchError(f"{source.path}: a TorchScript model, not a FedGFE checkpoint")
    if isinstance(error, pickle.UnpicklingError) and "WeightsUnpickler error: " in text:
        detail = text.split("WeightsUnpickler error: ")[1].strip().splitlines()[0]
        return SchemaMismatchError(
            f"{source.path}: refused by the safe loader ({detail}): not loaded, nothing was run;"
            " expected torch.save with its default pickle protocol"
        )
    detail = (text.strip().splitlines() or [type(error).__name__])[0][:160]
    return DamagedDataError(f"{source.path}: cut short or damaged ({detail})")


def _refused_globals(source: Source, error: Exception) -> list[str]:
    found = _REFUSED_GLOBAL.findall(str(error))
    if not found:
        return []
    if not source.zipped:
        return sorted(set(found))
    with _LOCK, torch.serialization.safe_globals(_numpy_globals()):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source.path))
        except (pickle.UnpicklingError, ValueError, EOFError):  # what follows is no plain pickle
            return sorted(set(found))
