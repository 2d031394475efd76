"""Libraries that only some functions need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedgfe_store.errors import NotFoundError


def extra(module: str, what: str, name: str = "analysis") -> Any:
    """Return `module`, which `what` needs and the extra `name` of this package brings.

    Raises
    ------
    NotFoundError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise NotFoundError(
            f"{what} needs {module.partition('.')[0]}: pip install 'fedgfe-store[{name}]'"
        ) from error
