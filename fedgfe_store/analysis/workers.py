"""A function over batches of records: here, or on the workers of a dask client."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.selection import Selection

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")

# Results wait for those before them: of so many at least none of the workers has to wait, and no
# more are in their memory however slow the one is that comes first.
_AHEAD, _AHEAD_PER_THREAD = 64, 4


@dataclass(frozen=True, eq=False)
class Batch:
    """Records that are read at once, and what the function is told of them.

    Parameters
    ----------
    scan : object
        Whose batch it is, for the caller.
    selection : Selection
        Records, of which the batch has those at `positions`.
    positions : slice
        Which.
    arguments : tuple
        Further arguments of the function.
    """

    scan: Any
    selection: Selection
    positions: slice
    arguments: tuple[Any, ...]

    def part(self) -> Selection:
        """Return the records; another process gets the store's path and their row numbers."""
        return self.selection.take(self.positions)


def results(
    function: Callable[..., T], batches: Iterable[Batch], client: Client | None
) -> Iterator[tuple[Batch, T]]:
    """Yield each batch with what `function` returns for its records and arguments, in order.

    Parameters
    ----------
    function : callable
        Of a module, since workers import it.
    batches : iterable of Batch
        Taken as they are needed, or somewhat ahead of that where there are workers.
    client : dask.distributed.Client or None
        Whose workers call it; a worker that dies has its batches called again on another.

    Raises
    ------
    SchemaMismatchError
        If `client` is something else, or an asynchronous one.
    """
    check_client(client)
    if client is None:
        return ((each, function(each.part(), *each.arguments)) for each in batches)
    return _from_workers(function, batches, client)


def check_client(client: Any) -> None:
    """Refuse what cannot be waited for: all but a client of ``dask.distributed``, or None.

    Raises
    ------
    SchemaMismatchError
        If it is something else, or asynchronous.
    """
    if client is None:
        return
    # Whoever has such a client has it installed.
    if not all(hasattr(client, name) for name in ("submit", "nthreads", "asynchronous")):
        raise SchemaMismatchError(
            f"client: expected a dask.distributed.Client, got {type(client).__name__}"
        )
    if client.asynchronous:
        raise SchemaMismatchError("client: expected one that is not asynchronous")


def _from_workers(
    function: Callable[..., T], batches: Iterable[Batch], client: Client
) -> Iterator[tuple[Batch, T]]:
    ahead = max(_AHEAD, _AHEAD_PER_THREAD * sum(client.nthreads().values()))
    waiting: deque[tuple[Batch, Future[Any]]] = deque()
    try:
        for batch in batches:
            call = (function, batch.part(), *batch.arguments)
            waiting.append((batch, client.submit(*call, pure=False)))
            if len(waiting) >= ahead:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    finally:
        # Whoever stops half-way, as at a damaged record, leaves no work behind.
        client.cancel([future for _, future in waiting])


def _first(waiting: deque[tuple[Batch, Future[Any]]]) -> tuple[Batch, Any]:
    batch, future = waiting.popleft()
    try:
        return batch, future.result()
    finally:
        future.release()
