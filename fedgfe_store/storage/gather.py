"""Rows of a tensor column, gathered from its files by several threads into one array."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.storage import checksums
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.shard_files import BROKEN, NOWHERE, OpenFile, TensorFiles

_SMALLEST_PIECE, _LARGEST_PIECE = 2**18, 2**23
"""Bytes of values between which a thread reads on before it takes the next piece."""
_PIECES = 2
"""Pieces for each thread, so that none is left waiting for the last one."""
_RUN_BYTES, _RUN_RECORDS = 2**21, 400
"""Most that one call reads of a file that is not compressed: records are digested while they are
in the processor's cache, and a system takes 1,024 pieces of memory."""
_FETCHED = 2**25
"""Bytes of values that a thread brings of one file at a time from where each read asks a server."""

_own = threading.local()
T = TypeVar("T")

Check = Callable[[list[int], Exception | None], None]


class _Span(NamedTuple):
    """One inner chunk, and where the rows that are wanted of it stand among the sorted rows."""

    file: int
    chunk: int
    begin: int
    end: int
    straight: bool
    """Whether it is wanted whole, in the order in which it lies."""


@dataclass(frozen=True)
class _Request:
    """Sorted rows, where each goes in `out`, and whom to tell that it is there."""

    files: TensorFiles
    rows: np.ndarray
    places: list[int]
    out: np.ndarray
    check: Check
    by_record: bool
    """Whether records are read one by one, and not the chunks that they are in."""


def gather(
    files: TensorFiles, rows: np.ndarray, out: np.ndarray, check: Check, *, sealed: bool = False
) -> None:
    r"""Decode the records at `rows` into `out`.

    Parameters
    ----------
    files : TensorFiles
        Where they lie.
    rows : ndarray of int64, shape [n]
        Row numbers, in any order, repeats allowed.
    out : ndarray, shape [n, \*shape]
        Where to; contiguous. NaN, or 0 in columns of whole numbers, where a file holds no value.
    check : callable
        Called in a thread with places in `out` that have just been decoded, and None, or with the
        error for which they have no value.
    sealed : bool
        Also ask the chunks' checksums where the records' digests cover the same bytes.
    """
    order = np.argsort(rows, kind="stable")
    by_record = files.codec is None and not (sealed or files.place.distant)
    request = _Request(files, rows[order], order.tolist(), out, check, by_record)
    spans = _spans(files, request.rows, order)
    if files.place.distant:  # a file's index is asked for once
        whole = ((request, list(group)) for _, group in groupby(spans, lambda span: span.file))
        threads.run(threads.fetchers(), _read_piece, whole)
        return
    share = len(spans) * files.chunk_nbytes // (_PIECES * threads.count())
    step = max(1, min(max(share, _SMALLEST_PIECE), _LARGEST_PIECE) // files.chunk_nbytes)
    pieces = ((request, spans[start : start + step]) for start in range(0, len(spans), step))
    threads.run(threads.readers(), _read_piece, pieces)


def _spans(files: TensorFiles, rows: np.ndarray, places: np.ndarray) -> list[_Span]:
    if not len(rows):
        return []
    chunks = rows // files.chunk
    begins = np.flatnonzero(np.diff(chunks, prepend=-1))
    ends = np.append(begins[1:], len(rows))
    # Counts, up to each row, those that do not follow the one before: in the files, or in `out`.
    breaks = np.cumsum((np.diff(rows, prepend=-2) != 1) | (np.diff(places, prepend=-2) != 1))
    straight = (ends - begins == files.chunk) & (breaks[begins] == breaks[ends - 1])
    numbers, within = np.divmod(chunks[begins], files.granule // files.chunk)
    columns = (numbers, within, begins, ends, straight)
    return [_Span(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _read_piece(request: _Request, spans: list[_Span]) -> None:
    for number, group in groupby(spans, lambda span: span.file):
        _read_file(request, number, list(group))


def _read_file(request: _Request, number: int, spans: list[_Span]) -> None:
    try:
        file = OpenFile(request.files, number)
    except (UnreadableError, FileNotFoundError) as error:
        _miss(request, request.places[spans[0].begin : spans[-1].end], error)
        return
    with file:
        if request.by_record:
            _read_records(request, file, slice(spans[0].begin, spans[-1].end))
            return
        parts = portions(request.files, spans) if request.files.place.distant else [spans]
        for part in parts:
            if not request.files.place.distant or _fetched(request, file, part):
                for span in part:
                    _read_span(request, file, span)


def _fetched(request: _Request, file: OpenFile, spans: Sequence[_Span]) -> bool:
    try:
        file.fetch([span.chunk for span in spans])
    except (UnreadableError, FileNotFoundError) as error:
        _miss(request, request.places[spans[0].begin : spans[-1].end], error)
        return False
    return True


def portions(files: TensorFiles, chunks: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut the `chunks` that are wanted of a file into what is brought at a time."""
    step = max(1, _FETCHED // files.chunk_nbytes) if files.place.distant else len(chunks)
    return (chunks[start : start + step] for start in range(0, len(chunks), step))


def _read_span(request: _Request, file: OpenFile, span: _Span) -> None:
    files, out = request.files, request.out
    places = request.places[span.begin : span.end]
    try:
        if span.straight:
            file.read(span.chunk, out[places[0] : places[0] + files.chunk])
        else:
            decoded = _scratch(files)
            file.read(span.chunk, decoded)
            out[places] = decoded[request.rows[span.begin : span.end] % files.chunk]
    except UnreadableError as error:
        _miss(request, places, error)
    else:
        request.check(places, None)


def _read_records(request: _Request, file: OpenFile, here: slice) -> None:
    """Copy rows of one file that is not compressed from the system's cache to where they stay.

    Their chunks' checksums are not asked: whoever is told compares each record's digest, which
    covers the same bytes.
    """
    files, rows = request.files, request.rows[here]
    places = request.places[here]
    offsets = file.locate(rows % files.granule)
    memory = request.out.reshape(len(request.out), -1).view(np.uint8)
    for run in _runs(offsets, np.array(places), files.record_nbytes):
        wanted, offset = places[run], int(offsets[run.start])
        try:
            if offset == BROKEN:
                raise UnreadableError("its index points beyond it, or to a chunk of another size")
            if offset == NOWHERE:
                request.out[wanted] = files.fill
            else:
                values = memory[wanted[0] : wanted[0] + len(wanted)].reshape(-1).data
                file.read_into(_pieces(values, offsets[run], files.record_nbytes), offset)
        except UnreadableError as error:
            _miss(request, wanted, error)
        else:
            request.check(wanted, None)


def _runs(offsets: np.ndarray, places: np.ndarray, nbytes: int) -> Iterator[slice]:
    """Cut records of `nbytes` into runs that follow one another, in the file and where they go.

    Between two of them there may be the checksum of a chunk.
    """
    most = max(1, min(_RUN_BYTES // nbytes, _RUN_RECORDS))
    steps = np.diff(offsets) - nbytes
    follows = (steps == 0) | (steps == checksums.SIZE)
    follows &= (offsets[:-1] >= 0) & (np.diff(places) == 1)
    ends = [*(np.flatnonzero(~follows) + 1).tolist(), len(offsets)]
    for begin, end in pairwise([0, *ends]):
        for start in range(begin, end, most):
            yield slice(start, min(start + most, end))


def _pieces(values: memoryview, offsets: np.ndarray, nbytes: int) -> list[memoryview]:
    """Cut the memory of a run where the file has a checksum between two records."""
    behind = memoryview(bytearray(checksums.SIZE))
    cuts = (np.flatnonzero(np.diff(offsets) != nbytes) + 1) * nbytes
    pieces = []
    for begin, end in pairwise([0, *cuts.tolist(), len(values)]):
        pieces += [values[begin:end], behind]
    return pieces[:-1]


def _miss(request: _Request, places: list[int], error: Exception) -> None:
    request.out[places] = request.files.fill
    request.check(places, error)


def _scratch(files: TensorFiles) -> np.ndarray:
    """Return memory of this thread for one chunk; new memory would cost as much as decoding."""
    kept: np.ndarray | None = getattr(_own, "scratch", None)
    shape = (files.chunk, *files.shape)
    if kept is None or (kept.shape, kept.dtype) != (shape, files.dtype):
        kept = _own.scratch = np.empty(shape, files.dtype)
    return kept
