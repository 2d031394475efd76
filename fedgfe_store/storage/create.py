"""Making a store: an empty one is published as every commit is, by renaming its ``zarr.json``."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from fedgfe_store.errors import ConflictError
from fedgfe_store.schema import Schema
from fedgfe_store.storage import files
from fedgfe_store.storage.claim import Claim, is_claim
from fedgfe_store.storage.files import make_folders
from fedgfe_store.storage.lock import WriterLock
from fedgfe_store.storage.metadata import GROUP_FILE, Group
from fedgfe_store.storage.recovery import remove_temporary, something_else
from fedgfe_store.storage.staging import Staging


def create(path: Path, schema: Schema, *, timeout: float) -> None:
    """Make an empty store at `path`, on the disk up to the folder's name."""
    started = time.monotonic()
    schema.check_new()
    make_folders(path.resolve().parent)
    # Beside the store, so that it can be held while there is none yet.
    lock = WriterLock(path, timeout)
    try:
        group = Group.new(schema)
        _refuse_occupied(path, group.arrays)
        files.check_own_folders(path, group.arrays)
        make_folders(path)
        claim = Claim.take(
            path,
            timeout=timeout,
            since=started,
            published=lambda: _before(path),
            clear=lambda: remove_temporary(path, group),
        )
        published = False
        try:
            _publish_empty(path, group, claim)
            published = True
        finally:
            claim.release(published=published)
    finally:
        lock.release()


def _before(path: Path) -> int:
    """Return the commit before the one that makes the store at `path`, which is number 0."""
    if (path / GROUP_FILE).exists():
        raise ConflictError(f"cannot make a store at {path}: a Zarr group is there already")
    return -1


def _publish_empty(path: Path, group: Group, claim: Claim) -> None:
    for name in group.arrays:
        make_folders(path / name)
    remove_temporary(path, group)
    staging = Staging(claim.token)

    def fence() -> None:
        claim.fence()
        # A maker that was taken for dead may have come to its end meanwhile, and others have
        # written to what it made.
        _before(path)

    try:
        for contents in (group.shape_files(path), {path / GROUP_FILE: group.encode()}):
            staging.write(contents)
            staging.place(fence)
    finally:
        staging.discard()


def _refuse_occupied(path: Path, arrays: Collection[str]) -> None:
    """Allow a new folder, an empty one, and what a killed `create` left."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConflictError(f"cannot make a store at {path}: a file is there")
    if (path / GROUP_FILE).exists():
        raise ConflictError(f"cannot make a store at {path}: a Zarr group is there already")
    other = something_else(path, arrays, allowed=lambda entry: is_claim(path, entry))
    if other:
        raise ConflictError(
            f"cannot make a store at {path}: the folder holds something else ({other})"
        )
