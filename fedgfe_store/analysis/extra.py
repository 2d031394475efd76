"""Libraries that only some functions need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedgfe_store.errors import NotFoundError


def extra(module: str, what: str) -> Any:
    """Return `module`, which `what` needs.

    Raises
    ------
    NotFoundError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise NotFoundError(
            f"{what} needs {module.partition('.')[0]}: pip install 'fedgfe-store[analysis]'"
        ) from error
