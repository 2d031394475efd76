"""Making a derived record from its key: what images keep of it."""

from __future__ import annotations

from typing import Any, Protocol

from fedgfe_store.derived.mean import Means
from fedgfe_store.derived.walk import Walk, walk
from fedgfe_store.derived_keys import DerivedKey, MeanKey
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, RecordKey
from fedgfe_store.rows import Rows


class Store(Protocol):
    """What gives records: a selection, or derived records, by its `others`."""

    def others(self, *, per_class: int | None = None, **filters: Any) -> Rows:
        """Return the records of its store and commit that meet the filters."""
        ...


def derive(store: Store, key: DerivedKey) -> Means | Walk:
    """Return the one derived record of a key, made of the records as a store has them now.

    Parameters
    ----------
    store : Selection or Derived
        Gives the records by its `others`.
    key : MeanKey or WalkKey
        What it is.

    Raises
    ------
    NotFoundError
        If there are no records for it.
    SchemaMismatchError
        If its records were taken by position, so that the key does not tell which they are.
    """
    if isinstance(key, MeanKey):
        return _mean(store, key)
    start, end = (_end(store, each) for each in (key.start, key.end))
    return walk(start, end, key.frames, mode=key.mode).take([key.frame])


def _end(store: Store, key: RecordKey | MeanKey) -> Rows | Means:
    if isinstance(key, MeanKey):
        return _mean(store, key)
    named: dict[str, Any] = {name: key.value(name) for name in KEY_COLUMNS}
    found = store.others(**named)
    if not len(found):
        raise NotFoundError(f"{found.location}: expected a record {key}, got none")
    return found


def _mean(store: Store, key: MeanKey) -> Means:
    filters = key.filters
    if filters is None:
        raise SchemaMismatchError(
            f"{key}: expected filters that choose its records, which were taken by position"
        )
    rows = store.others(**filters)
    if not len(rows):
        raise NotFoundError(f"{rows.location}: expected records for the {key}, got none")
    return Means.of_one(rows, key)
