"""How the chunks of tensor files are packed: by blosc, of which two builds are called.

python-blosc's has the instructions of newer processors (AVX2), which it looks for when it runs, and
numcodecs' has not: undoing a bit shuffle takes 0.65 of the time. What they write is the same to the
last byte, and where python-blosc is not installed numcodecs does it all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from struct import Struct
from typing import Any, cast

import numpy as np
from numcodecs import blosc as numcodecs

from fedgfe_store.storage.checksums import UnreadableError

SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
"""What blosc does to the values before they are packed, and its number."""
HEADER = 16
"""Bytes of blosc before the data, the most that it adds."""
_SIZES = Struct("<4xI4xI")
"""Within the header: the bytes of the values, and those of the chunk with its header."""
_CODERS = ("blosclz", "lz4", "lz4hc", "snappy", "zlib", "zstd")


@dataclass(frozen=True)
class Packing:
    """What blosc is told when it packs a chunk."""

    cname: str
    clevel: int
    shuffle: int
    blocksize: int
    typesize: int

    @classmethod
    def of(cls, codec: Mapping[str, Any]) -> Packing:
        """Return what a Zarr codec ``blosc`` is configured for.

        Raises
        ------
        ValueError, TypeError or KeyError
            If that is nothing that blosc takes.
        """
        bounds = {"clevel": (0, 9), "blocksize": (0, 2**31 - 1), "typesize": (1, 255)}
        for name, (least, most) in bounds.items():
            if type(codec[name]) is not int or not least <= codec[name] <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {codec[name]!r}")
        cname, shuffle = codec["cname"], codec["shuffle"]
        if cname not in _CODERS or shuffle not in [*SHUFFLES]:
            raise ValueError(f"expected a codec of blosc, got {cname!r}, {shuffle!r}")
        numbers = {name: codec[name] for name in bounds}
        return cls(cname=cname, shuffle=SHUFFLES[shuffle], **numbers)

    def __str__(self) -> str:
        shuffle = next(name for name, number in SHUFFLES.items() if number == self.shuffle)
        return shuffle if self.cname == "lz4" else f"{self.cname} with {shuffle}"

    def encode(self, values: np.ndarray) -> bytes:
        """Return contiguous `values` as a chunk."""
        library = _library()
        if library is None or self.blocksize:  # python-blosc has one for all its callers
            options = (self.cname, self.clevel, self.shuffle, self.blocksize, self.typesize)
            return cast("bytes", numcodecs.Blosc(*options).encode(values))
        packed = library.compress(values, self.typesize, self.clevel, self.shuffle, self.cname)
        return cast("bytes", packed)


def decode(chunk: bytes | memoryview, out: memoryview) -> None:
    """Unpack a chunk, whichever way it was packed, into `out`: writable bytes in one piece.

    Raises
    ------
    UnreadableError
        If it is damaged, or does not become as many bytes; what is in `out` is then undefined.
    """
    # Blosc takes the header's word for how much there is to read and to write.
    if len(chunk) < HEADER or _SIZES.unpack_from(chunk) != (len(out), len(chunk)):
        raise UnreadableError("it holds a chunk of another size")
    library = _library()
    if library is None:
        try:
            numcodecs.decompress(chunk, np.frombuffer(out, np.uint8))
        except RuntimeError as error:
            raise UnreadableError(str(error)) from error
        return
    try:
        library.decompress_ptr(chunk, addressof(c_char.from_buffer(out)))
    except library.error as error:
        raise UnreadableError(str(error)) from error


@cache
def _library() -> Any:
    """Return python-blosc's extension, which other threads do not wait for, if it is installed.

    The package around it imports its own tests when it is imported, with unittest and psutil: up to
    0.1 s of a processor. Where a program uses the package as well, its settings are one: they
    decide how many threads work on a chunk and who waits for them, not what comes of it.
    """
    package = importlib.util.find_spec("blosc")
    folders = package.submodule_search_locations if package else None
    # By its full name: under two names it would be two modules, of which one has the error's class.
    spec = PathFinder.find_spec("blosc.blosc_extension", folders) if folders else None
    if spec is None or spec.loader is None:
        return None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    if "blosc" not in sys.modules:  # when that is imported, it has to find its part itself
        sys.modules.pop(spec.name, None)
    library.init()
    library.set_nthreads(1)
    library.set_releasegil(1)
    return library
