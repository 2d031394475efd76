"""Making a shared store: its table, then ``zarr.json``, which only one can make."""

from __future__ import annotations

import json
from dataclasses import replace

from fedgfe_store.common.location import Address, Location
from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.schema import Schema
from fedgfe_store.storage.metadata import GROUP_BYTES, GROUP_FILE, SHARED, Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.places import place_of
from fedgfe_store.storage.shared.granules import CLAIMS
from fedgfe_store.storage.shared.key_table import TABLE, record_columns, table_name
from fedgfe_store.storage.shared.log import Log, same_anywhere


def create(location: Location, schema: Schema) -> None:
    """Make an empty shared store at `location`."""
    schema.check_new()
    names = [table_name(name) for name in record_columns(schema)]
    if {TABLE, CLAIMS, "clock"} & {*schema.columns} or len({*names}) < len(names):
        raise SchemaMismatchError(
            f"expected names of tensor columns that a shared store can keep apart, got "
            f"{', '.join(schema.columns)}"
        )
    if isinstance(location, Address) and location.url.startswith("http"):
        raise SchemaMismatchError(f"cannot make a store at {location}: it is on a web server")
    place = place_of(location)
    _refuse_occupied(location, place, {TABLE, *schema.columns})
    Log.create(same_anywhere(location, place), schema)
    # To other readers of Zarr it is an empty store; older releases refuse it by the feature.
    group = replace(Group.new(schema), features=(*schema.features, SHARED))
    for name in schema.columns:
        place.put_new(f"{name}/{GROUP_FILE}", json.dumps(group.shaped()[name]).encode())
    encoded = group.encode()
    # One that is there may be this very one, whose answer was lost: it has an id.
    if not place.put_new(GROUP_FILE, encoded) and place.read(GROUP_FILE, GROUP_BYTES) != encoded:
        raise ConflictError(f"cannot make a store at {location}: a Zarr group is there already")


def _refuse_occupied(location: Location, place: Place, own: set[str]) -> None:
    """Allow a new folder, an empty one, and what a killed `create` left."""
    if not isinstance(location, Address) and location.exists() and not location.is_dir():
        raise ConflictError(f"cannot make a store at {location}: a file is there")
    names = sorted(place.sizes() or {})
    if GROUP_FILE in names:
        raise ConflictError(f"cannot make a store at {location}: a Zarr group is there already")
    other = [n for n in names if not n.startswith(f"{TABLE}/") and not n.endswith(f"/{GROUP_FILE}")]
    other = [name for name in other if not name.endswith(".tmp")]
    if not isinstance(location, Address) and location.is_dir():
        other += [e.name for e in location.iterdir() if e.is_dir() and e.name not in own]
    if other:
        raise ConflictError(
            f"cannot make a store at {location}: the folder holds something else ({other[0]})"
        )
