"""Clearing what a writer left that died, or gave up, beyond a store's commit point."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fedgfe_store.storage import files, key_files
from fedgfe_store.storage.claim import Claim
from fedgfe_store.storage.layout import array_metadata
from fedgfe_store.storage.metadata import GROUP_FILE, Group
from fedgfe_store.storage.shard_files import granule_of
from fedgfe_store.storage.snapshot import Snapshot
from fedgfe_store.storage.staging import Staging
from fedgfe_store.storage.version_1 import PENDING


def recover(path: Path, group: Group, claim: Claim) -> int:
    """Clear what another writer has left beyond the commit point of the store at `path`.

    Returns
    -------
    int
        The row from which on the holder of `claim` may write records.
    """
    beyond = list(_tensor_files_beyond(path, group))
    first = group.point.records
    if not claim.alone and beyond:
        # Who was to clear these files may still unlink one: the same name must not be used again.
        first = (max(number for _, number in beyond) + 1) * group.schema.granule
    remove_temporary(path, group)
    clear(path, group, claim)
    # Only now: until all is cleared, a claim that lies there tells who comes next to clear it.
    claim.forget_others()
    files.sync_folder(path)
    return first


def clear(path: Path, group: Group, claim: Claim) -> None:
    """Clear what lies beyond the commit point of the store at `path`."""
    # Files of whoever may still be at work stay until `compact`: a late writer that unlinks them,
    # too, must not meet others of the same names, and their being there says which those are.
    beyond = [file for file, _ in _tensor_files_beyond(path, group)] if claim.alone else []
    # Only then: whoever takes over from now on writes behind what was found here.
    claim.make_sure(group)
    for file in beyond:
        file.unlink(missing_ok=True)
    # Key chunks beyond the committed rows stay: whoever gets as far writes them whole.
    staging = Staging(claim.token)
    try:
        staging.write(group.shape_files(path) | _unmarked(path, group))
        # A file for each array: this flushes the folders in which files were unlinked, too.
        staging.place(lambda: claim.make_sure(group))
    finally:
        staging.discard()
    (path / PENDING).unlink(missing_ok=True)


def something_else(
    path: Path, arrays: Collection[str], *, allowed: Callable[[Path], bool]
) -> Path | None:
    """Return what lies in the folder `path` that no killed maker of `arrays` there has left.

    Folders and metadata of the arrays and half-written files may be there in any case, and what
    else is `allowed`.
    """
    expected = {path / name for name in arrays}
    expected |= {folder / GROUP_FILE for folder in expected}
    others = (entry for entry in path.rglob("*") if entry not in expected and not allowed(entry))
    return next((entry for entry in others if not files.is_temporary(entry)), None)


def remove_temporary(path: Path, group: Group) -> None:
    """Remove what any writer of the store at `path` has not put in place."""
    # Those of an upgrade that was broken off lie in folders of the newer version.
    for folder in (path, *(path / name for name in array_metadata(group.schema))):
        if folder.is_dir():
            files.remove_temporary(folder)


def _tensor_files_beyond(path: Path, group: Group) -> Iterator[tuple[Path, int]]:
    first = group.point.records // group.schema.granule
    for name in group.schema.columns:
        for entry in os.scandir(path / name):
            number = granule_of(entry.name)
            if number >= first:
                yield Path(entry.path), number


def _unmarked(path: Path, group: Group) -> dict[Path, bytes]:
    """Return the files of ``deleted_in`` that hold marks beyond the commit point, without them."""
    snapshot = Snapshot(path, group)
    chunks = key_files.cut(snapshot.column("deleted_in"))
    column = group.key_columns["deleted_in"]
    return {
        key_files.key_file(path, name, number): key_files.encode(column, chunks[number]).contents
        for name, number in snapshot.chunks.stale
    }
