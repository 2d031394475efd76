"""Where a store is: a folder of this machine, or a URL of an object store or web server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedgfe_store.errors import SchemaMismatchError

SCHEMES = ("s3", "az", "gs", "https", "http")
"""What the URL of a store may begin with."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """The URL of a store's folder, without a slash at its end: what a Path is on this machine."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Last part of the URL without its suffix."""
        return Path(self.name).stem

    def resolve(self) -> Address:
        """Return the address itself: it does not depend on a working directory."""
        return self


Location = Path | Address
Given = str | os.PathLike[str] | Address
"""What a user names a store by."""


def location(given: Given) -> Location:
    """Return where `given` says that a store is.

    Raises
    ------
    SchemaMismatchError
        If it is neither a path nor the URL of a store.
    """
    if isinstance(given, Address):
        return given
    url = _URL.fullmatch(given) if isinstance(given, str) else None
    if url is not None:
        return _address(url[1].lower(), url[2], given)
    try:
        folder = Path(given)
    except TypeError:
        raise SchemaMismatchError(f"path: expected that of a folder, got {given!r}") from None
    if "\0" in str(folder):
        raise SchemaMismatchError(f"path: expected that of a folder, got {str(folder)!r}")
    return folder


def seen_from(place: Location, folder: Path) -> str:
    """Name a place as seen from a folder, so that both can be moved together.

    Parameters
    ----------
    place : Path or Address
        A file or folder; a URL, in which no credentials are, stays as it is.
    folder : Path
        Folder of what will name it.

    Returns
    -------
    str
        A relative path with forward slashes, which `found_from` finds again.
    """
    if isinstance(place, Address):
        return place.url
    try:
        return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive of Windows: no path leads there
        return place.name


def found_from(named: str, folder: Path) -> Location:
    """Return the place that `named` is as seen from a folder; an absolute path is itself.

    Raises
    ------
    SchemaMismatchError
        If it is neither a path nor the URL of a store.
    """
    place = location(named)
    if isinstance(place, Address):
        return place
    return Path(os.path.normpath(folder.resolve() / place))


def retold(text: str, folder: Path, places: Iterable[Location]) -> str:
    """Return a text with absolute paths of some places as they are seen from a folder."""
    known = {str(p): p for place in places for p in (place, place.resolve())}
    for name in sorted(known, key=len, reverse=True):
        if os.path.isabs(name):
            text = text.replace(name, seen_from(known[name], folder))
    return text


def _address(scheme: str, rest: str, given: object) -> Address:
    if scheme not in SCHEMES:
        raise SchemaMismatchError(
            f"path: expected a folder or a URL that begins with "
            f"{', '.join(f'{known}://' for known in SCHEMES)}, got {given!r}"
        )
    host = rest.partition("/")[0]
    # It is shown, and kept in every image: no place for a password or a signature.
    if "?" in rest or "#" in rest or "@" in host:
        raise SchemaMismatchError(
            f"path: expected a URL without user, '?' and '#' (credentials come from the "
            f"environment), got one with such a part of {scheme}://{host.rpartition('@')[2]}"
        )
    if not host or not rest.isprintable():
        raise SchemaMismatchError(f"path: expected {scheme}://HOST/FOLDER, got {given!r}")
    return Address(f"{scheme}://{rest.rstrip('/')}")


def own_folder(place: Location) -> Path:
    """Return the folder at `place`, for one who writes.

    Raises
    ------
    SchemaMismatchError
        If it is no folder of this machine.
    """
    if isinstance(place, Address):
        raise SchemaMismatchError(
            f"{place} can be read only: a store that one process writes lies in a folder of this "
            f"machine; behind a URL only shared stores are written (fedgfe-store init --shared "
            f"makes one)"
        )
    return place
