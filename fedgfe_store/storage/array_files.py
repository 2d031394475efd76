"""Key columns and shapes of arrays on their way into a commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage import key_files
from fedgfe_store.storage.key_chunks import KeyChunks
from fedgfe_store.storage.key_files import EncodedChunk
from fedgfe_store.storage.layout import DIGEST_DIGITS
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.staging import Staging

Chunks = Mapping[tuple[str, int], np.ndarray]
"""Values of chunks of key columns, by name and number."""
Written = Mapping[tuple[str, int], EncodedChunk]
"""What is in their files."""


def write(staging: Staging, path: Path, group: Group, chunks: Chunks, before: KeyChunks) -> Written:
    """Write the shapes of all arrays, and `chunks`, as `group` will publish them.

    Parameters
    ----------
    staging : Staging
        The files of the commit.
    path : Path
        The store.
    group : Group
        What will be published.
    chunks : mapping
        The chunks that changed, whole.
    before : KeyChunks
        The state that the commit follows.

    Raises
    ------
    DamagedDataError
        If no reader would take a value.
    """
    for file, shape in group.shape_files(path).items():
        staging.hint(file, shape)

    def write_chunk(name: str, number: int) -> EncodedChunk:
        column, values = group.key_columns[name], chunks[name, number]
        has = chunks[column.digest, number] != 0 if column.data_type == "bool" else None
        # What is about to be published is asked what its readers will ask.
        if wrong := key_files.gap(column, values, has):
            raise DamagedDataError(
                f"{path}: {name} cannot be published, no reader would take it: {wrong}"
            )
        encoded = key_files.encode(column, values, before.packed(name, number))
        staging.write_file(key_files.key_file(path, name, number), encoded.contents)
        return encoded

    # Several at once: one is packed while the disk has others.
    found = threads.run(threads.writers(), write_chunk, chunks)
    return dict(zip(chunks, found, strict=True))


def digests(group: Group, written: Written) -> dict[str, str]:
    """Return the digests of all key chunks of `group`, of which some are `written` anew."""
    if group.version == 1:
        return {}
    known = {name: group.digests.get(name, "") for name in group.key_columns}
    for (name, number), encoded in written.items():
        start, text = number * DIGEST_DIGITS, known[name]
        known[name] = text[:start] + encoded.digest + text[start + DIGEST_DIGITS :]
    return known
