"""Which files of a folder are checkpoints, by their names, and in which order they come."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from fedgfe_store.errors import NotFoundError, SchemaMismatchError

_TEXT_CACHE = "_text_embs_dict.pt"
"""How FedGFE ends the names of its caches of text embeddings."""

_MOST_FOLDERS = 4
"""How many a hint names."""


def find_checkpoints(
    paths: str | Path | Iterable[str | Path], *, pattern: str = "*.pt"
) -> list[Path]:
    """Expand files and folders to checkpoint files.

    Parameters
    ----------
    paths : path-like or iterable of path-like
        Files, taken as they are, and folders.
    pattern : str
        Which files of a folder, not of the folders in it.

    Returns
    -------
    list of Path
        Each file once. The files of a folder come in natural order, ``r2`` before ``r10``.

    Raises
    ------
    NotFoundError
        If no file of a folder matches.
    SchemaMismatchError
        If `pattern` is none.
    """
    found: list[Path] = []
    for path in paths_of(paths):
        if not path.is_dir():
            found.append(path)
            continue
        matching = sorted(_matching(path, pattern), key=natural_order)
        if not matching:
            hint = hint_at_folders(path, pattern) + "".join(
                f"; {note}" for note in almost_matching(path, pattern)
            )
            raise NotFoundError(f"{path}: no file matches {pattern!r}{hint}")
        found += matching
    return list(dict.fromkeys(found))


def paths_of(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return what matches in a folder, but for folders; a link to nothing is reported as a file."""
    try:
        found = list(folder.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise SchemaMismatchError(
            f"pattern: expected one of file names such as node_*.pt, got {pattern!r}: {error}"
        ) from None
    return [path for path in found if not path.is_dir() and not hides(path.name, pattern)]


def almost_matching(folder: Path, pattern: str) -> list[str]:
    """Return a note where names differ from `pattern` in case only, such as ``.PT``."""
    there = {path.name for path in _matching(folder, pattern)}
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if fnmatchcase(path.name.casefold(), pattern.casefold())
        and not (path.name in there or hides(path.name, pattern) or path.is_dir())
    ]
    if not others:
        return []
    count = "1 file" if len(others) == 1 else f"{len(others)} files"
    shown = " and ".join(others[:2]) if len(others) < 3 else f"such as {others[0]}"
    return [f"{count} by a name of another case left out: {shown} (pattern {pattern!r})"]


def hint_at_folders(folder: Path, pattern: str, store_name: str | None = None) -> str:
    """Return the names of the folders up to two below `folder` that have what is not in itself."""
    # checkpoints/embeddings/experiment1: the guide's.
    inner = [
        entry
        for entry in sorted({*folder.glob("*/"), *folder.glob("*/*/")})
        if not any(part.endswith(".zarr") for part in entry.relative_to(folder).parts)
        and (any(entry.glob(pattern)) or (store_name and (entry / store_name).is_dir()))
    ]
    if not inner:
        return ""
    names = [entry.relative_to(folder).as_posix() for entry in inner[:_MOST_FOLDERS]]
    more = f" and {len(inner) - len(names)} more" if len(inner) > len(names) else ""
    return f" (but in its folders {', '.join(names)}{more}: name one)"


def hides(name: str, pattern: str) -> bool:
    """Whether a file is hidden from `pattern`, as a shell would have it: a store's lock, say."""
    return name.startswith(".") and not pattern.rpartition("/")[2].startswith(".")


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return what sorts files so that ``r2`` comes before ``r10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def is_named_as_text_cache(path: Path) -> bool:
    """Whether a file's name is that of a cache of reference text embeddings."""
    return path.name.endswith(_TEXT_CACHE)
