"""What readers see after a commit that failed, as a note on its error."""

from __future__ import annotations

from pathlib import Path

from fedgfe_store.errors import FedgfeStoreError
from fedgfe_store.storage.metadata import Group


def add_outcome(error: BaseException, path: Path, published: int | None) -> None:
    """Note on an error that does not say so itself what readers see after it."""
    if isinstance(error, FedgfeStoreError):
        return
    if published is not None:
        error.add_note(f"commit {published} of {path} was published before this failed")
        return
    try:
        commit = Group.read(path).point.commit
    except (FedgfeStoreError, OSError) as failure:  # must not hide what went wrong first
        error.add_note(f"nothing of this commit was published: {failure}")
        return
    error.add_note(f"nothing of this commit was published: {path} is at commit {commit}")
