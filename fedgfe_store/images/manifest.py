"""The lists of the images in a folder: JSON lines, in one file for each part."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from math import inf, isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import ConflictError
from fedgfe_store.images.png import png_names, read_provenance
from fedgfe_store.names import key_json
from fedgfe_store.storage.files import (
    NOT_THROUGH_LINKS,
    append_line,
    end_torn_line,
    parsed_line,
    write_file,
)

MANIFEST_NAME = "manifest.jsonl"
_PART_NAME = re.compile(r"manifest-([0-9]+)-of-([0-9]+)\.jsonl")
_MACHINE_NAME = re.compile(r"manifest-on-[0-9A-Za-z.-]+\.jsonl")
# A line is about 1 kB: some 250 lines, more than a rate needs, in one read.
_TAIL_BYTES = 256 * 1024
# The line of a finished image, as `Manifest.append` leaves it.
_BEGIN = b'{"file": "'
_PLAIN = rb'([ !#-\[\]-~]+)"'
_FINISHED = re.compile(_BEGIN + _PLAIN + rb', "key": .*, "created": "' + _PLAIN + rb"\}\n")
# Of these the readers take for granted what they are; a line of anybody else's may hold anything.
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("file", "error", "fingerprint", "created"), (str,)),
    **dict.fromkeys(("key", "settings", "digests"), (dict,)),
    **dict.fromkeys(("image", "seed", "bytes"), (int,)),
    "seconds": (int, float),
}
# So few that a rate follows a change of machine, so many that one slow batch does not make it.
_RATE_LINES = 100

_S = TypeVar("_S")
_T = TypeVar("_T")


class Manifest:
    """Appends lines to a folder's manifest; threads and processes may append at once.

    Each line goes out in one write in append mode, so that lines of several writers do not mix.
    Network disks do not promise that between machines, so each part has a file of its own.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    name : str
        Which file, see `manifest_name`.
    """

    def __init__(self, folder: Path, name: str = MANIFEST_NAME) -> None:
        self._name = name
        self._file = _open(folder / name)
        self._lock = threading.Lock()
        end_torn_line(self._file)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one image's line."""
        with self._lock:
            append_line(self._file, line, self._name)

    def fail(self, file: str, *, key: Key, image: int, error: str) -> None:
        """Add the line of an image that could not be made.

        Parameters
        ----------
        file : str
            Name that its file would have.
        key : RecordKey, MeanKey or WalkKey
            The record.
        image : int
            Which image of the record, from 0.
        error : str
            Why it was not made.
        """
        facts = {"file": file, "key": key_json(key), "image": image}
        self.append({**facts, "error": error, "created": timestamp()})

    def stopped(self, reason: str, *, times: int) -> None:
        """Add the line of a run that was stopped before it finished an image.

        Parameters
        ----------
        reason : str
            The signal.
        times : int
            How many runs in a row have been, see `fruitless_stops`.
        """
        self.append({"stopped": reason, "times": times, "created": timestamp()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)


def manifest_name(index: int = 0, count: int = 1) -> str:
    """Name the manifest of one part of a run: ``manifest.jsonl``, ``manifest-2-of-8.jsonl``."""
    if count == 1:
        return MANIFEST_NAME
    # Padded, so that `ls` shows the parts in their order.
    return f"manifest-{index:0{len(str(count))}}-of-{count}.jsonl"


def machine_manifest(machine: str) -> str:
    """Name the manifest of one of several machines that share a run: by its address."""
    return f"manifest-on-{re.sub(r'[^0-9A-Za-z.]', '-', machine)}.jsonl"


def timestamp(seconds: float | None = None) -> str:
    """Give a time, by default now, as manifests write it: ISO 8601, UTC, with milliseconds.

    Lines of earlier releases have whole seconds: as texts they come before later ones, too.

    Parameters
    ----------
    seconds : float, optional
        Seconds since 1970.
    """
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds")


def read_manifest(
    folder: Path, *, tail_bytes: int | None = None, name: str | None = None
) -> Iterator[dict[str, Any]]:
    """Read the lines of a folder's manifests; torn ones, and such as no run writes, are left out.

    Parameters
    ----------
    folder : Path
        Folder of the images; without a manifest there are no lines.
    tail_bytes : int, optional
        Read so many bytes at the end of each file only.
    name : str, optional
        Read this file only.

    Yields
    ------
    dict
        File by file, each from its oldest line on. A finished image has its provenance, ``file``,
        ``bytes`` and ``created``, and ``seconds`` unless the line was added later, from the
        image. One that failed has ``file``, ``key``, ``image``, ``error`` and ``created``. A run
        that was stopped before it finished an image has ``stopped``, ``times`` and ``created``.
    """
    for path in _manifests(folder, name):
        yield from _lines(path, tail_bytes)


def _read_line(text: bytes) -> dict[str, Any] | None:
    line = parsed_line(text)
    if line is None:  # a killed writer leaves half a line; its image has the same facts inside
        return None
    sound = all(isinstance(line[n], kind) for n, kind in _KINDS.items() if n in line)
    return line if sound else None


def _open(path: Path) -> int:
    """Open a manifest for appending; where a link lies in its place, put a copy there first.

    A link may lead to any file, which must not be written to.
    """
    if path.is_symlink():
        lines = path.read_bytes().splitlines() if path.is_file() else []
        kept = [text for text in lines if "file" in (_read_line(text) or {})]
        write_file(path, b"".join(text + b"\n" for text in kept))
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NOT_THROUGH_LINKS, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ConflictError(f"{path}: expected a file, got something else")
    return file


def _lines(path: Path, tail_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        if tail_bytes is not None and path.stat().st_size > tail_bytes:
            file.seek(-tail_bytes, os.SEEK_END)
            file.readline()  # most likely cut at its beginning
        for text in file:
            line = _read_line(text)
            if line is not None:
                yield line


def _manifests(folder: Path, name: str | None = None) -> list[Path]:
    if name is not None:
        own = folder / name
        return [own] if own.is_file() else []
    found = [path for path in folder.glob("manifest*.jsonl") if path.is_file()]
    kinds = (re.compile(re.escape(MANIFEST_NAME)), _PART_NAME, _MACHINE_NAME)
    return sorted(p for p in found if any(kind.fullmatch(p.name) for kind in kinds))


def latest(
    folder: Path, pick: Callable[[dict[str, Any]], _T], *, name: str | None = None
) -> dict[str, _T]:
    """Read of the last line of each image what `pick` makes of it, to hold no more than that.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    pick : callable
        Called with each line that is the last so far.
    name : str, optional
        Read the lines of this file only.

    Returns
    -------
    dict
        What `pick` returned, by file name.
    """
    lines = read_manifest(folder, name=name)
    named = ((f, _created(line), line) for line in lines if isinstance(f := line.get("file"), str))
    return _last(named, pick)


def _last(lines: Iterable[tuple[str, str, _S]], pick: Callable[[_S], _T]) -> dict[str, _T]:
    """Return by file what `pick` makes of its last line; lines are given with file and time."""
    found: dict[str, tuple[str, _T]] = {}
    for file, created, line in lines:
        # By time, not by place: parts have files of their own, which are read one after the other.
        # Of one second the later line counts, so that a second try replaces a failure.
        if file not in found or created >= found[file][0]:
            found[file] = created, pick(line)
    return {file: picked for file, (_, picked) in found.items()}


def listed_files(folder: Path, *, name: str | None = None) -> set[str]:
    """Give the names of the images of which the last line, or one file's, says: finished."""
    outcomes = (outcome for path in _manifests(folder, name) for outcome in _outcomes(path))
    return {file for file, finished in _last(outcomes, bool).items() if finished}


def _outcomes(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield file, time, and whether it was finished, of each line; most are not parsed for it."""
    with path.open("rb") as lines:
        for text in lines:
            found = _FINISHED.fullmatch(text)
            # A torn line may go on as another writer's.
            if found and b'"error": ' not in text and text.count(_BEGIN) == 1:
                yield found[1].decode("ascii"), found[2].decode("ascii"), True
            elif (line := _read_line(text)) and isinstance(line.get("file"), str):
                yield line["file"], _created(line), "error" not in line


def fruitless_stops(folder: Path, name: str) -> int:
    """Count the latest runs of a part, one after the other, that were stopped without an image.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    name : str
        Which manifest to look at the end of.

    Returns
    -------
    int
        0 where the latest run has finished an image, or was not stopped.
    """
    lines = deque(read_manifest(folder, tail_bytes=_TAIL_BYTES, name=name), maxlen=1)
    times = lines[0].get("times") if lines and "stopped" in lines[0] else 0
    return times if isinstance(times, int) else 0


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Give the settings of the first image that a folder's manifests list, else its images name.

    Parameters
    ----------
    folder : Path
        Folder of the images; it need not exist.

    Returns
    -------
    dict or None
        None where there is no image of ours.
    """
    for path in _manifests(folder):
        for line in _lines(path):
            settings = line.get("settings")
            if isinstance(settings, dict):
                return settings
    found = map(read_provenance, (folder / name for name in png_names(folder)))
    return next((provenance["settings"] for provenance in found if provenance), None)


def part_count(folder: Path) -> int | None:
    """Give the number of parts of the latest run that was split.

    Parameters
    ----------
    folder : Path
        Folder of the images.

    Returns
    -------
    int or None
        None without a manifest of a part.
    """
    # By time: a folder keeps the manifests of earlier runs, which may have had other parts.
    found = [
        (path.stat().st_mtime_ns, match)
        for path in _manifests(folder)
        if (match := _PART_NAME.fullmatch(path.name))
    ]
    return int(max(found, key=lambda each: each[0])[1][2]) if found else None


def seconds_per_image(folder: Path, fingerprint: str) -> float | None:
    """Give the mean rendering time of the latest images made with some settings.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    fingerprint : str
        The settings' fingerprint.

    Returns
    -------
    float or None
        Seconds an image; None where none was made.
    """
    # `json` reads NaN and Infinity, which no estimate can go by.
    lines = [
        line
        for line in read_manifest(folder, tail_bytes=_TAIL_BYTES)
        if line.get("fingerprint") == fingerprint and isfinite(line.get("seconds", inf))
    ]
    latest = [line["seconds"] for line in sorted(lines, key=_created)[-_RATE_LINES:]]
    return sum(latest) / len(latest) if latest else None


def _created(line: Mapping[str, Any]) -> str:
    return str(line.get("created", ""))
