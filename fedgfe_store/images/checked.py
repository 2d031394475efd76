"""Which files of a folder were read and found right, so that planning does not read them again."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterable, Mapping
from functools import partial
from pathlib import Path

from fedgfe_store.images.folder import side_by_side
from fedgfe_store.images.png import Stamp, stamp_of
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.files import read_regular, write_file

CHECKED_NAME = ".fedgfe-checked"

ENOUGH = 1000
"""New notes that are worth writing the file: to read fewer images again takes no longer."""

_FIRST_LINE = "fedgfe checked 1"
# A hundred bytes an image: of more than ten million nothing is kept.
_MOST_BYTES = 2**30
SETTLED_NS = 2 * 10**9
"""A file that is changed again within a tick of the disk's clock keeps its time: FAT's is 2 s."""

# Threads hand over to one another at each system call: one of them for some, not for each.
_FILES_A_CALL = 512


def note(stamp: Stamp, mark: str) -> str:
    """Say in one word what a file was, and what it was found to be.

    Parameters
    ----------
    stamp : tuple of int
        Which state of the file, see `file_stamp`.
    mark : str
        What it should be, and is; see `Comparer.mark`.
    """
    return f"{stamp[0]}:{stamp[1]}:{stamp[2]}:{mark}"


def still_right(folder: Path, marks: Iterable[tuple[str, str]]) -> dict[str, Stamp]:
    """Tell which files have been found to be what they should be, and have not changed since.

    Nothing is read of them: a file with another number, size or time is not among them, nor one
    that should be something else now. Whether a disk has changed what it holds by itself, only
    reading would tell.

    Parameters
    ----------
    folder : Path
        The folder; it need not exist.
    marks : iterable of (str, str)
        Names of files that are there, and what each should be.

    Returns
    -------
    dict
        Their present stamps, by name.
    """
    # Looked up as they stand: to take each line apart costs more than all else.
    notes = frozenset(_lines(folder))
    if not notes:  # the marks are not asked for
        return {}
    wanted = list(marks)
    calls = [wanted[n : n + _FILES_A_CALL] for n in range(0, len(wanted), _FILES_A_CALL)]
    right: dict[str, Stamp] = {}
    for found in side_by_side(partial(_noted, folder, notes), calls):
        right |= found
    return right


def keep_notes(folder: Path, notes: Mapping[str, tuple[Stamp, str]]) -> None:
    """Add to what is known of a folder's files, if it is much.

    What two processes add at the same moment may be lost in part: those files are read again.

    Parameters
    ----------
    folder : Path
        An existing folder.
    notes : mapping
        Stamp and mark of each file that is what it should be, by its name.

    Raises
    ------
    OSError
        If the disk refuses.
    """
    if len(notes) < ENOUGH:
        return
    latest, known = time.time_ns() - SETTLED_NS, _read(folder)
    settled = ((n, note(s, m)) for n, (s, m) in notes.items() if s[2] < latest)
    # Names of ours have no spaces; what an older version named may have.
    fresh = {n: text for n, text in settled if known.get(n) != text and not set(n) & {" ", "\n"}}
    if len(fresh) >= ENOUGH:
        lines = [_FIRST_LINE, *(_line(name, text) for name, text in {**known, **fresh}.items())]
        text = "\n".join(lines) + "\n"
        write_file(folder / CHECKED_NAME, text.encode("utf-8", "surrogateescape"))


def _line(name: str, text: str) -> str:
    return f"{text} {name}"


def _read(folder: Path) -> dict[str, str]:
    """Read the notes by name."""
    pairs = (line.split(" ", 1) for line in _lines(folder))
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _lines(folder: Path) -> list[str]:
    """Read the notes; without any, as where they cannot be read, all files are looked at.

    A line that is damaged names no file, or fits none: so it is as if it were not there.
    """
    try:
        data = read_regular(folder / CHECKED_NAME, _MOST_BYTES)
    except (OSError, UnreadableError):
        return []
    first, *lines = data.decode("utf-8", "surrogateescape").split("\n")
    return lines if first == _FIRST_LINE else []


def _noted(
    folder: Path, notes: Container[str], files: Iterable[tuple[str, str]]
) -> dict[str, Stamp]:
    """Give the present stamps of those of some files of which it is noted what they should be."""
    found: dict[str, Stamp] = {}
    for name, mark in files:
        try:
            stamp = stamp_of(os.stat(f"{folder}{os.sep}{name}"))
        except OSError:  # gone, or out of reach: who looks at it says why
            continue
        if _line(name, note(stamp, mark)) in notes:
            found[name] = stamp
    return found
