"""Tensor files read whole: every checksum that is in one, and the digest of every live record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedgfe_store.storage.checksums import UnreadableError, digest
from fedgfe_store.storage.gather import portions
from fedgfe_store.storage.shard_files import OpenFile, TensorFiles, bytes_of


@dataclass(frozen=True)
class Expected:
    """What a tensor file must hold.

    Parameters
    ----------
    files : TensorFiles
        The column's files.
    granule : int
        Which of them.
    rows : ndarray of int64, shape [n]
        Rows of the live records that have a value in it, ascending.
    digests : ndarray of uint64, shape [n]
        Their digests.
    lengths : ndarray of int32, shape [n]
        How long each is, in a ragged column.
    """

    files: TensorFiles
    granule: int
    rows: np.ndarray
    digests: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Found:
    """What is wrong with a tensor file.

    Parameters
    ----------
    lost : list of int
        Rows of which it does not hold what it must.
    damage : str
        What is damaged in it, wherever that is; else empty.
    """

    lost: list[int]
    damage: str


def looked_at(expected: Expected) -> Found:
    """Read a file once, chunk by chunk in the memory of one; what is not there is not damaged."""
    files = expected.files
    within = (expected.rows % files.granule).tolist()
    digests, lengths = expected.digests.tolist(), expected.lengths.tolist()
    at = np.searchsorted(within, np.arange(0, files.granule + 1, files.chunk)).tolist()
    lost: list[int] = []
    damage = ""
    decoded = np.empty((files.chunk, *files.shape), files.dtype)
    for chunk, error in _chunks(expected, decoded):
        here = range(at[chunk], at[chunk + 1])
        if error is None:
            lost += [
                number
                for number in here
                if digest(decoded[within[number] % files.chunk], lengths[number]) != digests[number]
            ]
        else:
            lost += here
        if isinstance(error, UnreadableError) and not damage:
            damage = f"{files.file(expected.granule)} is damaged: {error}"
    return Found(expected.rows[lost].tolist(), damage)


def _chunks(
    expected: Expected, decoded: np.ndarray
) -> Iterator[tuple[int, UnreadableError | FileNotFoundError | None]]:
    """Decode every chunk of a file, and yield its number, and why it cannot be read."""
    files = expected.files
    every = range(files.chunks)
    try:
        file = OpenFile(files, expected.granule)
    except (UnreadableError, FileNotFoundError) as error:
        yield from ((chunk, error) for chunk in every)
        return
    with file:
        for part in portions(files, every):
            try:
                file.fetch(part)
            except (UnreadableError, FileNotFoundError) as error:
                yield from ((chunk, error) for chunk in part)
                continue
            for chunk in part:
                yield chunk, _read(file, chunk, decoded)


def _read(file: OpenFile, chunk: int, decoded: np.ndarray) -> UnreadableError | None:
    try:
        file.read(chunk, bytes_of(decoded), sealed=True)
    except UnreadableError as error:
        return error
    return None
