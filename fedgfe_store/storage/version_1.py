"""Stores of format version 1: what they have besides, and what they lack."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from fedgfe_store.storage.files import sync_folder

PENDING = "pending"
"""Name of a file that says that a commit is being written, which older releases write too."""


def pending_note(*, token: str, commit: int) -> bytes:
    """Return what a store's `PENDING` says: that `commit` is being written, and by whom."""
    # Older releases look for it before they write, and clear what lies beyond the commit point.
    note = {
        "token": token,
        "commit": commit,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(note).encode()


def remove_pending(path: Path) -> None:
    """Say no longer in the store at `path` that a commit is being written."""
    # Gone where a late writer had still to remove its own.
    (path / PENDING).unlink(missing_ok=True)
    sync_folder(path)


def identities(extra: np.ndarray) -> np.ndarray:
    """Return the ``file_id`` that each record's other metadata names, empty where it names none.

    Before format version 2 it was kept there, among anything else.
    """
    found = [_identity(text) if '"file_id"' in text else "" for text in extra.tolist()]
    return np.array(found, np.dtypes.StringDType())


def _identity(text: str) -> str:
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):  # a note that a reader of it could not take either
        return ""
    value = known.get("file_id") if isinstance(known, dict) else None
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    name = str(value) if is_name else ""
    return "" if "\0" in name or name == "\ufffd" else name
