"""Rows of a tensor column, gathered from its files by several threads into one array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedgfe_store import _workers
from fedgfe_store._tensor_files import OpenFile, TensorFiles, UnreadableError

_SMALLEST_PIECE, _LARGEST_PIECE = 2**18, 2**23
"""Bytes of float32 values between which a thread reads on before it takes the next piece."""
_PIECES = 4
"""Pieces for each thread, so that none is left waiting for the last one."""

Span = tuple[int, int]
"""Where the rows of one inner chunk begin and end among the sorted rows."""
Check = Callable[[np.ndarray, Exception | None], None]


@dataclass(frozen=True)
class _Request:
    """Sorted rows, where each goes in `out`, and whom to tell that it is there."""

    files: TensorFiles
    rows: np.ndarray
    places: np.ndarray
    out: np.ndarray
    check: Check


def gather(files: TensorFiles, rows: np.ndarray, out: np.ndarray, check: Check) -> None:
    r"""Decode the records at `rows` into `out`.

    Parameters
    ----------
    files : TensorFiles
        Where they lie.
    rows : ndarray of int64, shape [n]
        Row numbers, in any order, repeats allowed.
    out : ndarray of float32, shape [n, \*shape]
        Where to; contiguous. NaN where a file holds no value.
    check : callable
        Called in a thread with places in `out` that have just been decoded, and None, or with the
        error for which they are NaN.
    """
    order = np.argsort(rows, kind="stable")
    request = _Request(files, rows[order], order, out, check)
    pieces = ((request, *piece) for piece in _pieces(files, request.rows))
    _workers.run(_workers.readers(), _read_piece, pieces)


def _pieces(files: TensorFiles, rows: np.ndarray) -> Iterator[tuple[int, list[Span]]]:
    """Yield what a thread reads at a time: the number of a file, and some of its chunks' spans."""
    chunks = rows // files.chunk
    begins = np.flatnonzero(np.diff(chunks, prepend=-1))
    spans = list(pairwise([*begins.tolist(), len(rows)]))
    numbers = (rows[begins] // files.granule).tolist()
    share = len(spans) * files.chunk_nbytes // (_PIECES * _workers.count())
    most = max(1, min(max(share, _SMALLEST_PIECE), _LARGEST_PIECE) // files.chunk_nbytes)
    first = 0
    for last in range(1, len(spans) + 1):
        if last == len(spans) or last - first == most or numbers[last] != numbers[first]:
            yield numbers[first], spans[first:last]
            first = last


def _read_piece(request: _Request, number: int, spans: list[Span]) -> None:
    try:
        with request.files.opened(number) as file:
            for span in spans:
                _read_span(request, file, slice(*span))
    except (UnreadableError, FileNotFoundError) as error:  # of the file as a whole
        places = request.places[spans[0][0] : spans[-1][1]]
        request.out[places] = np.nan
        request.check(places, error)


def _read_span(request: _Request, file: OpenFile, span: slice) -> None:
    files, out = request.files, request.out
    rows, places = request.rows[span], request.places[span]
    chunk = int(rows[0]) % files.granule // files.chunk
    within = rows % files.chunk
    error = None
    try:
        if _is_run(within, files.chunk) and _is_run(places - places[0], files.chunk):
            file.read(chunk, out[places[0] : places[0] + files.chunk])
        else:
            decoded = np.empty((files.chunk, *files.shape), np.float32)
            file.read(chunk, decoded)
            out[places] = decoded[within]
    except UnreadableError as damage:
        error = damage
        out[places] = np.nan
    request.check(places, error)


def _is_run(values: np.ndarray, length: int) -> bool:
    return len(values) == length and bool((values == np.arange(length)).all())
