"""Columnar embedding store and image generation for federated audio-to-image training."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fedgfe_store.derived.walk import walk
    from fedgfe_store.errors import FedgfeStoreError
    from fedgfe_store.schema import Metadata, Schema
    from fedgfe_store.selection import Selection
    from fedgfe_store.store import EmbeddingStore

__all__ = ["EmbeddingStore", "FedgfeStoreError", "Metadata", "Schema", "Selection", "walk"]

_HOMES = {
    "EmbeddingStore": "store",
    "FedgfeStoreError": "errors",
    "Metadata": "schema",
    "Schema": "schema",
    "Selection": "selection",
    "walk": "derived.walk",
}


def __getattr__(name: str) -> object:
    # zarr and pandas take a second to import; the command line's help must not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
