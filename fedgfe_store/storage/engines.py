"""Which engine keeps a store: chosen where one is made, and by its ``zarr.json`` afterwards."""

from __future__ import annotations

from typing import cast

from fedgfe_store.common.location import Address, Location, own_folder
from fedgfe_store.errors import NotFoundError
from fedgfe_store.schema import Schema
from fedgfe_store.storage.engine import Engine
from fedgfe_store.storage.local import LocalEngine
from fedgfe_store.storage.metadata import SHARED, Group
from fedgfe_store.storage.places import place_of
from fedgfe_store.storage.state import State


def engine(*, shared: bool) -> Engine:
    """Return the engine of stores that many may write to, or of those that one does."""
    if not shared:
        return cast("Engine", LocalEngine())
    # Not imported before: it needs libraries of the extra cloud.
    from fedgfe_store.storage.shared.engine import SharedEngine

    return cast("Engine", SharedEngine())


def engine_of(state: State) -> Engine:
    """Return the engine that keeps the store that `state` shows."""
    return engine(shared=state.engine == "shared")


def create(location: Location, schema: Schema, *, shared: bool, timeout: float) -> None:
    """Make an empty store at `location`."""
    engine(shared=shared).create(location, schema, timeout=timeout)


def check_target(location: Location) -> None:
    """Refuse a URL at which no store can be written, nor one with one writer be made.

    Raises
    ------
    SchemaMismatchError
        If it is one.
    """
    if isinstance(location, Address):
        try:
            latest(location).check_writable()
        except NotFoundError:
            own_folder(location)


def latest(location: Location, as_of: int | None = None) -> State:
    """Return the latest state of the store at `location`, seen at commit `as_of`.

    Raises
    ------
    NotFoundError
        If there is no store, or no such commit.
    SchemaMismatchError
        If it is of a newer format version, or its libraries are not installed.
    DamagedDataError
        If its ``zarr.json`` is damaged.
    """
    place = place_of(location)
    group = Group.read(place)
    return engine(shared=SHARED in group.features).latest(location, place, group, as_of)
