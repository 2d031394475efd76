"""Rows of a tensor column, gathered from its files by several threads into one array."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgfe_store.common import threads
from fedgfe_store.storage import checksums
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.shard_files import OpenFile, TensorFiles, bytes_of, scratch

_SMALLEST_PIECE, _LARGEST_PIECE = 2**18, 2**23
"""Bytes of values between which a thread reads on before it takes the next piece."""
_ALONE = 2**21
"""Bytes of values that are read before other threads have woken up and told of their end."""
_PIECES = 2
"""Pieces for each thread, so that none is left waiting for the last one."""
_WAITED = 2**20
"""Most bytes of a chunk for which more threads than processors wait for a disk: each keeps memory
for one, and a few large ones give a disk enough to do."""
_RUN_BYTES, _RUN_RECORDS = 2**21, 400
"""Most that one call reads of a file that is not compressed: records are digested while they are
in the processor's cache, and a system takes 1,024 pieces of memory."""
_FETCHED = 2**25
"""Bytes of values that a thread brings of one file at a time from where each read asks a server."""
_BEHIND = memoryview(bytearray(checksums.SIZE))
"""Where checksums go that nobody asks."""

Check = Callable[[Sequence[int], Exception | None], None]


@dataclass(frozen=True)
class _Request:
    """Sorted rows, where each goes, and whom to tell that it is there.

    Those of inner chunk ``chunks[i]`` are from ``begins[i]`` to ``begins[i + 1]``.
    """

    files: TensorFiles
    rows: list[int]
    places: list[int]
    chunks: list[int]
    begins: list[int]
    straight: list[bool]
    """Whether a chunk is wanted whole, in the order in which it lies."""
    memory: memoryview
    check: Check
    sealed: bool

    def places_of(self, spans: range) -> list[int]:
        """Return where the rows of some chunks go."""
        return self.places[self.begins[spans.start] : self.begins[spans.stop]]


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
        Called in a thread, or in this one, with places in `out` that have just been decoded, and
        None, or with the error for which they have no value.
    sealed : bool
        Also ask the chunks' checksums, where the records' digests cover the same bytes.
    """
    if not len(rows):
        return
    request = _request(files, rows, bytes_of(out), check, sealed)
    n = len(request.chunks)
    if files.place.distant:  # a file's index is asked for once
        whole = ((request, spans) for _, spans in _by_file(request, range(n)))
        threads.run(threads.fetchers(), _read_piece, whole)
        return
    first, last = request.chunks[0] // files.chunks, request.chunks[-1] // files.chunks
    is_small = n * files.chunk_nbytes <= _ALONE
    # A few kilobytes of many files take as long as many megabytes where each has to be waited for.
    waits = (
        files.chunk_nbytes <= _WAITED
        and not (is_small and first == last)
        and files.place.waits(files.file_name(first))
    )
    if is_small and not waits:
        _read_piece(request, range(n))
        return
    pool = threads.fetchers() if waits else threads.readers()
    share = 0 if waits else n * files.chunk_nbytes // (_PIECES * threads.count())
    step = max(1, min(max(share, _SMALLEST_PIECE), _LARGEST_PIECE) // files.chunk_nbytes)
    pieces = ((request, range(start, min(start + step, n))) for start in range(0, n, step))
    threads.run(pool, _read_piece, pieces)


def _request(
    files: TensorFiles, rows: np.ndarray, memory: memoryview, check: Check, sealed: bool
) -> _Request:
    places = np.arange(len(rows))
    if (rows[1:] < rows[:-1]).any():  # those of a selection ascend
        places = np.argsort(rows, kind="stable")
        rows = rows[places]
    chunks = rows // files.chunk
    begins = [0, *(np.flatnonzero(chunks[1:] != chunks[:-1]) + 1).tolist()]
    ends = [*begins[1:], len(rows)]
    straight = [end - begin == files.chunk for begin, end in zip(begins, ends, strict=True)]
    if files.chunk > 1 and any(straight):
        # Up to each row, those that do not follow the one before: in the files, or in `out`.
        follows = (rows[1:] - rows[:-1] == 1) & (places[1:] - places[:-1] == 1)
        breaks = np.cumsum(np.append(0, ~follows))
        last = np.array(ends) - 1
        straight = (straight & (breaks[begins] == breaks[last])).tolist()
    return _Request(
        files=files,
        rows=rows.tolist(),
        places=places.tolist(),
        chunks=chunks[begins].tolist(),
        begins=[*begins, len(rows)],
        straight=straight,
        memory=memory,
        check=check,
        sealed=sealed,
    )


def _by_file(request: _Request, spans: range) -> Iterator[tuple[int, range]]:
    """Yield numbers of files, and which of the chunks each holds."""
    each = request.files.chunks
    start = spans.start
    while start < spans.stop:
        number = request.chunks[start] // each
        stop = bisect_left(request.chunks, (number + 1) * each, start, spans.stop)
        yield number, range(start, stop)
        start = stop


def _read_piece(request: _Request, spans: range) -> None:
    for number, here in _by_file(request, spans):
        try:
            file = OpenFile(request.files, number)
        except (UnreadableError, FileNotFoundError) as error:
            _miss(request, request.places_of(here), error)
            continue
        with file:
            _read_file(request, file, number, here)


def _read_file(request: _Request, file: OpenFile, number: int, spans: range) -> None:
    files = request.files
    first = number * files.chunks
    if files.codec is None and not (request.sealed or files.place.distant):
        _read_records(request, file, first, spans)
        return
    for part in portions(files, spans):
        if not files.place.distant or _fetched(request, file, first, part):
            for span in part:
                _read_chunk(request, file, request.chunks[span] - first, span)


def _fetched(request: _Request, file: OpenFile, first: int, spans: range) -> bool:
    try:
        file.fetch([request.chunks[span] - first for span in spans])
    except (UnreadableError, FileNotFoundError) as error:
        _miss(request, request.places_of(spans), error)
        return False
    return True


def portions(files: TensorFiles, chunks: range) -> Iterator[range]:
    """Cut the `chunks` that are wanted of a file into what is brought at a time."""
    step = max(1, _FETCHED // files.chunk_nbytes) if files.place.distant else len(chunks)
    return (chunks[start : start + step] for start in range(0, len(chunks), step))


def _read_chunk(request: _Request, file: OpenFile, chunk: int, span: int) -> None:
    files, begin, end = request.files, request.begins[span], request.begins[span + 1]
    places, memory, nbytes = request.places[begin:end], request.memory, files.record_nbytes
    try:
        if request.straight[span]:
            start = places[0] * nbytes
            file.read(chunk, memory[start : start + files.chunk_nbytes], sealed=request.sealed)
        else:
            decoded = scratch("decoded", files.chunk_nbytes)
            file.read(chunk, decoded, sealed=request.sealed)
            for row, place in zip(request.rows[begin:end], places, strict=True):
                at = row % files.chunk * nbytes
                memory[place * nbytes : (place + 1) * nbytes] = decoded[at : at + nbytes]
    except UnreadableError as error:
        _miss(request, places, error)
    else:
        request.check(places, None)


def _read_records(request: _Request, file: OpenFile, first: int, spans: range) -> None:
    """Copy rows of one file that is not compressed from the system's cache to where they stay.

    Their chunks' checksums are not asked: whoever is told compares each record's digest, which
    covers the same bytes.
    """
    files, run = request.files, _Run(request, file)
    for span in spans:
        begin, end = request.begins[span], request.begins[span + 1]
        places = request.places[begin:end]
        try:
            found = file.find(request.chunks[span] - first)
        except UnreadableError as error:
            _miss(request, places, error)
            continue
        if found is None:
            _fill(request, places)
            request.check(places, None)
            continue
        for row, place in zip(request.rows[begin:end], places, strict=True):
            run.add(found[0] + row % files.chunk * files.record_nbytes, place)
    run.read()


class _Run:
    """Records that follow one another in a file, which one call reads."""

    def __init__(self, request: _Request, file: OpenFile) -> None:
        self._request, self._file = request, file
        self._nbytes = request.files.record_nbytes
        self._most = max(1, min(_RUN_BYTES // self._nbytes, _RUN_RECORDS))
        self._pieces: list[memoryview] = []
        self._places: list[int] = []
        self._begin = self._end = 0

    def add(self, offset: int, place: int) -> None:
        """Add the record at `offset`; those before it are read if it does not follow them."""
        between = offset - self._end
        if between not in (0, checksums.SIZE) or not 0 < len(self._places) < self._most:
            self.read()
            self._begin = offset
        elif between:
            self._pieces.append(_BEHIND)
        start, self._end = place * self._nbytes, offset + self._nbytes
        self._pieces.append(self._request.memory[start : start + self._nbytes])
        self._places.append(place)

    def read(self) -> None:
        """Read what was added."""
        places, self._places = self._places, []
        pieces, self._pieces = self._pieces, []
        if not places:
            return
        try:
            self._file.read_into(pieces, self._begin)
        except UnreadableError as error:
            _miss(self._request, places, error)
        else:
            self._request.check(places, None)


def _miss(request: _Request, places: Sequence[int], error: Exception) -> None:
    _fill(request, places)
    request.check(places, error)


def _fill(request: _Request, places: Sequence[int]) -> None:
    nbytes = request.files.record_nbytes
    for place in places:
        memory = request.memory[place * nbytes : (place + 1) * nbytes]
        np.frombuffer(memory, request.files.dtype)[:] = request.files.fill
