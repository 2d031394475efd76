"""Which engine keeps a store: chosen where one is made, and by its ``zarr.json`` afterwards."""

from __future__ import annotations

from typing import cast

from fedgfe_store.common.location import Location
from fedgfe_store.schema import Schema
from fedgfe_store.storage.engine import Engine
from fedgfe_store.storage.local import LocalEngine
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.places import place_of
from fedgfe_store.storage.state import State


def engine_of(state: State) -> Engine:
    """Return the engine that keeps the store that `state` shows."""
    return cast("Engine", {"local": LocalEngine}[state.engine]())


def create(location: Location, schema: Schema, *, timeout: float) -> None:
    """Make an empty store at `location`."""
    LocalEngine().create(location, schema, timeout=timeout)


def latest(location: Location, as_of: int | None = None) -> State:
    """Return the latest state of the store at `location`, seen at commit `as_of`."""
    place = place_of(location)
    return LocalEngine().latest(location, place, Group.read(place), as_of)
