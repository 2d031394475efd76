"""Names of tensor columns and of their axes: a column's name is that of a folder in the store."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from fedgfe_store.common.words import shown
from fedgfe_store.errors import SchemaMismatchError

ARRAYS = frozenset(
    {"node", "round", "split", "class_name", "index", "sample_id", "file_id", "image_filename"}
    | {"audio_path", "timestamp", "extra", "row_digest", "created_in", "deleted_in", "recorded_in"}
    | {"commit_time", "commit_kind", "commit_source"}
)
"""Other arrays of a store, those of later formats too."""
_AXES = ("record", "commit")

_UNSAFE = re.compile(r"[/\\:\0-\x1f\x7f]|^\.|^zarr\.json$|^pending(\.|$)|^claim\.|^$")
"""What leads out of the store's folder, or is no folder's name, or is that of a file of ours."""
_PLAIN = re.compile(r"\w([\w .+-]*\w)?")
_OURS = re.compile(r"(has|length)_.*|.*_digest|commit_.*|record|commit", re.IGNORECASE)
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 100
"""Bytes of UTF-8: with what is put before and behind it, a name fits any file system."""


def check_columns(names: Sequence[str], ragged: Collection[str] = ()) -> None:
    """Refuse `names` of tensor columns, some of them `ragged`, with which a store cannot be read.

    Raises
    ------
    SchemaMismatchError
        If one leads out of the store's folder, or is the name of something else in it.
    """
    for name in names:
        if not isinstance(name, str) or _UNSAFE.search(name) or not _fits(name):
            raise _unfit("the name of a folder", name)
        if name in ARRAYS:
            raise _unfit("a name of its own", name)
    for name, count in Counter(names).items():
        if count > 1:
            raise _unfit(f"each name once, got {count} times", name)
        lengths = {f"length_{name}"} if name in ragged else set()
        taken = {f"has_{name}", f"{name}_digest", *lengths} & set(names)
        if taken:
            raise _unfit(f"a name that {name} leaves free", min(taken))


def check_new_columns(names: Sequence[str]) -> None:
    """Refuse `names` of tensor columns that are not distinct, plain names on every file system.

    Raises
    ------
    SchemaMismatchError
        If one is not; old stores that have such a name are read as ever.
    """
    for name in names:
        if not _PLAIN.fullmatch(name) or _DEVICES.fullmatch(name) or _OURS.fullmatch(name):
            raise _unfit(
                "letters, digits and underscores, and not has_..., length_..., ..._digest, "
                "commit_..., record or the name of a device",
                name,
            )
    alike = {name: name for name in ARRAYS}
    for name in names:
        other = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise _unfit(f"names that differ in more than case from {other}", name)


def check_axes(axes: Mapping[str, Sequence[tuple[str, int]]]) -> None:
    """Refuse names of axes, by column with their lengths, that no labelled dataset can have.

    Raises
    ------
    SchemaMismatchError
        If an axis has no name, or that of another or of a column, or another length elsewhere.
    """
    lengths: dict[str, tuple[str, int]] = {}
    for column, sizes in axes.items():
        names = [axis for axis, _ in sizes]
        taken = [axis for axis in names if not axis or axis in ARRAYS or axis in (*_AXES, *axes)]
        if taken or len(set(names)) < len(names):
            raise SchemaMismatchError(
                f"{column}: expected axes with names of their own, got {shown(names)}"
            )
        for axis, length in sizes:
            other, known = lengths.setdefault(axis, (column, length))
            if known != length:
                raise SchemaMismatchError(
                    f"{column}: expected the axis {shown(axis)} to be {known} long, as in {other}, "
                    f"got {length}; give it a name of its own"
                )


def _fits(name: str) -> bool:
    try:
        return len(name.encode()) <= _LONGEST
    except UnicodeEncodeError:
        return False


def _unfit(wanted: str, name: object) -> SchemaMismatchError:
    return SchemaMismatchError(f"tensor column: expected {wanted}, got {shown(name)}")
