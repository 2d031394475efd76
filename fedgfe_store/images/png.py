"""Image files: how they are written, and what they say about themselves."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from fedgfe_store.common.igzip import isal_zlib
from fedgfe_store.storage.claim_files import is_gone
from fedgfe_store.storage.files import flushed, placing

FileState = Literal["ours", "foreign", "damaged"]

Stamp: TypeAlias = tuple[int, int, int]
"""Number, size and time of a file, see `stamp_of`."""

TEXT_KEY = "fedgfe_store"
"""Keyword of the PNG text chunk that holds the provenance."""

UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no sound image; an `OSError` may be the disk's, too."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bits a sample, truecolour, and the only methods there are (PNG specification, 11.2.2).
_RGB8 = bytes([8, 2, 0, 0, 0])
# Each row as its difference from the one above (9.2).
_UP = 2
# The chunk that every PNG ends with (PNG specification, 11.2.5): Pillow does not miss it.
_END_CHUNK = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_TEMP = re.compile(r"\.fedgfe-([0-9a-f]{8})-([0-9]+)-[0-9]+\.tmp")
# Longer than any image takes to write, also on a disk that hangs for a night.
_STALE_TEMP_SECONDS = 24 * 3600
_counter = itertools.count()


def png_names(folder: Path) -> list[str]:
    """Name the PNG files of a folder, sorted; without a folder there are none.

    Hidden ones are none of ours: macOS keeps what else it knows of ``x.png`` in ``._x.png``.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted([e.name for e in entries if _is_shown(e.name) and e.is_file()])
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_shown(name: str) -> bool:
    return name.endswith(".png") and name[0] != "."


def stamp_of(found: os.stat_result) -> Stamp:
    """Tell one state of a file from another by number, size and time of change."""
    # The number too: an image that is replaced within a tick of the disk's clock may have the same
    # size and time, but it is renamed into place and so another file.
    return found.st_ino, found.st_size, found.st_mtime_ns


def write_png(path: Path, pixels: NDArray[np.uint8], text: Mapping[str, Any]) -> Stamp:
    """Write an image under its name at once: it is there whole, or not at all.

    Parameters
    ----------
    path : Path
        The file; an existing one is replaced.
    pixels : ndarray
        ``[height, width, 3]``, uint8.
    text : mapping
        Provenance, kept as JSON in the text chunk ``fedgfe_store``.

    Returns
    -------
    Stamp
        Which state of the file it is: what `stamp_of` says of it from then on.

    Raises
    ------
    OSError
        If the file cannot be written, for instance on a full disk; no partial file is left.
    """
    temp = path.parent / f".fedgfe-{writer_token()}-{os.getpid()}-{next(_counter)}.tmp"
    with placing(path, temp), flushed(temp, name=path) as file:
        file.write(png_bytes(pixels, text))
        file.flush()
        return stamp_of(os.fstat(file.fileno()))


def png_bytes(pixels: NDArray[np.uint8], text: Mapping[str, Any]) -> bytes:
    """Encode a picture as `write_png` writes it.

    Pillow tries four filters on every row, in which most of its time goes: that one of them fits
    nearly as well on average, and a compressor that is made for speed, keep up with a model that
    takes 20 ms an image.

    Parameters
    ----------
    pixels : ndarray
        ``[height, width, 3]``, uint8.
    text : mapping
        Provenance.
    """
    height, width, _ = pixels.shape
    values = pixels.reshape(height, -1)
    rows = np.empty((height, 1 + values.shape[1]), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + _RGB8
    said = TEXT_KEY.encode("ascii") + b"\0" + json.dumps(text).encode("ascii")
    chunks = (b"IHDR", header), (b"tEXt", said), (b"IDAT", deflated(rows))
    # Joined once: megabytes are copied each time.
    parts = [part for name, data in chunks for part in _chunk(name, data)]
    return b"".join([_SIGNATURE, *parts, _END_CHUNK])


def deflated(rows: NDArray[np.uint8]) -> bytes:
    """Compress the rows of a picture, as fast as it can be done here."""
    if isal_zlib is not None:
        data: bytes = isal_zlib.compress(rows, 1)
        return data
    # Repeats of one byte are all that zlib finds at that speed; in differences most are.
    compressor = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return compressor.compress(rows.data) + compressor.flush()


def _chunk(name: bytes, data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Give the parts of a chunk: length, name, data and checksum."""
    crc32: Callable[[bytes, int], int] = (isal_zlib or zlib).crc32
    checksum = crc32(data, crc32(name, 0))
    return len(data).to_bytes(4, "big"), name, data, checksum.to_bytes(4, "big")


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Read what an image says about itself, if the whole file is sound.

    Parameters
    ----------
    path : Path
        A file that should be a PNG.

    Returns
    -------
    dict or None
        The provenance; None unless `inspect_image` finds the file to be ours.
    """
    return inspect_image(path)[1]


def inspect_image(path: Path) -> tuple[FileState, dict[str, Any] | None]:
    """Tell whether a file is one of our images, and what it says about itself.

    Every chunk's checksum is verified up to the end mark, and the image has to have the size
    that its own settings name.

    Returns
    -------
    state : {"ours", "foreign", "damaged"}
        ``"foreign"`` is a sound image that this package did not write.
    provenance : dict or None
        None unless the image is ours.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        return "damaged", None
    try:
        with path.open("rb") as file, Image.open(file, formats=["PNG"]) as image:
            size, text = image.size, image.info.get(TEXT_KEY)
            image.verify()
            file.seek(-len(_END_CHUNK), os.SEEK_END)
            ended = file.read() == _END_CHUNK
    except (*UNREADABLE, ValueError):
        return "damaged", None
    if not ended:
        return "damaged", None
    if text is None:
        return "foreign", None
    try:
        provenance = json.loads(text)
        expected = provenance["settings"]["width"], provenance["settings"]["height"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "damaged", None
    return ("ours", provenance) if size == expected else ("damaged", None)


def remove_stale_temps(folder: Path) -> int:
    """Remove temporary files whose writers are gone.

    A temp file of this machine goes when its process no longer runs, any other one when it is
    a day old, so that the files of live writers, here or on another machine, are left alone.

    Returns
    -------
    int
        Files removed.
    """
    removed = 0
    for path in folder.glob(".fedgfe-*.tmp"):
        match = _TEMP.fullmatch(path.name)
        if match and (writer_is_gone(match[1], int(match[2])) or _is_old(path)):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _STALE_TEMP_SECONDS
    except FileNotFoundError:
        return False


def writer_is_gone(token: str, pid: int) -> bool:
    """Whether a process is known to run no more: one of this machine, by its `writer_token`."""
    return token == writer_token() and os.name == "posix" and is_gone(pid)


@cache
def writer_token() -> str:
    """Identify the machine and, where there are such, the process namespace."""
    namespace = Path("/proc/self/ns/pid")
    place = os.readlink(namespace) if namespace.is_symlink() else ""
    return xxhash.xxh32_hexdigest(f"{socket.gethostname()}|{place}".encode())
