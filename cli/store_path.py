"""How a store is named on the command line: by its folder, or by a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedgfe_store.common.location import Address, location
from fedgfe_store.errors import SchemaMismatchError


class StorePath(click.Path):
    """A store's folder, or its URL."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a Path or an Address."""
        if not (isinstance(value, str) and "://" in value):
            return value if isinstance(value, Address) else super().convert(value, param, ctx)
        try:
            return location(value)
        except SchemaMismatchError as error:
            return self.fail(str(error), param, ctx)
