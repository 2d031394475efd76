"""Which columns a reader gives, where it is asked for some or for none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedgfe_store.errors import SchemaMismatchError

if TYPE_CHECKING:
    from fedgfe_store.schema import Schema


def batch_columns(schema: Schema, asked: Sequence[str] | None) -> list[str]:
    """Return the columns of a batch: those asked for, and the lengths of those that are ragged.

    By default all that every record has.

    Raises
    ------
    SchemaMismatchError
        If there is no such column, or no list of them is given.
    """
    if isinstance(asked, str):
        raise SchemaMismatchError(f"columns: expected a list of names, got {asked!r}")
    names = [t.name for t in schema.tensors if not t.optional] if asked is None else list(asked)
    marks = set(schema.marks) - schema.columns.keys()
    ragged = [f"length_{t.name}" for t in schema.tensors if t.ragged and t.name in names]
    for name in names:
        if name not in marks:
            schema.column(name)
    return list(dict.fromkeys([*names, *ragged]))
