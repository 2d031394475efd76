"""What a store of an older format version lacks, found in what it has."""

from __future__ import annotations

import json

import numpy as np


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
