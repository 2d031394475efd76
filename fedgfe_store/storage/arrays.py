"""What a ``zarr.json`` says of a store's arrays: checked, and as text for its checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedgfe_store.common.words import shown
from fedgfe_store.schema import Schema
from fedgfe_store.storage.layout import array_metadata
from fedgfe_store.storage.places import LocalFolder
from fedgfe_store.storage.shard_files import TensorFiles

Metadata = Mapping[str, Mapping[str, Any]]
"""Zarr metadata by the name of an array."""
_NO_PLACE = LocalFolder(Path())


@dataclass(frozen=True)
class Arrays:
    """Metadata of a store's arrays, and what checksums cover of it: all but how long they are."""

    metadata: Metadata
    text: str


@lru_cache(maxsize=32)
def usual_arrays(schema: Schema, version: int) -> Arrays:
    """Return the arrays of stores of a schema, still empty, unless another tool wrote them.

    To check them one by one, and to write this text, took half of the time of opening a store.
    """
    metadata = array_metadata(schema, version)
    return Arrays(metadata, _without_lengths(metadata))


def canonical(data: Any) -> str:
    """Return `data` as the one JSON text of it that checksums are of."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical_arrays(schema: Schema, version: int, metadata: Metadata) -> str:
    """Return what checksums cover of a store's arrays."""
    usual = usual_arrays(schema, version)
    return usual.text if _are_usual(metadata, usual) else _without_lengths(metadata)


def checked_arrays(schema: Schema, version: int, found: Mapping[str, Any]) -> Arrays:
    """Return a store's arrays, all of whose metadata is as a writer can have left it.

    Parameters
    ----------
    schema : Schema
        The store's.
    version : int
        Its format version.
    found : mapping
        The consolidated metadata as it stands in ``zarr.json``, that of other arrays too.

    Raises
    ------
    ValueError, TypeError, KeyError or IndexError
        If something is missing, or a type or a range is wrong.
    """
    usual = usual_arrays(schema, version)
    metadata = {name: found[name] for name in usual.metadata}
    is_usual = _are_usual(metadata, usual)
    if not is_usual:
        for name, wanted in usual.metadata.items():
            _check_array(name, metadata[name], wanted)
    for column in schema.tensors:
        files = TensorFiles.of(_NO_PLACE, column.name, metadata[column.name])
        if (files.granule, files.shape) != (schema.granule, column.shape):
            raise ValueError(
                f"{column.name}: expected {schema.granule} records of {list(column.shape)} a file, "
                f"got {files.granule} of {list(files.shape)}"
            )
    return Arrays(metadata, usual.text if is_usual else _without_lengths(metadata))


def _are_usual(metadata: Metadata, usual: Arrays) -> bool:
    return all(is_alike(metadata[name], wanted) for name, wanted in usual.metadata.items())


def is_alike(found: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether metadata of an array is as `wanted`, however long the array is."""
    shape = found.get("shape") if isinstance(found, dict) else None
    if not (isinstance(shape, list) and shape and type(shape[0]) is int):
        return False
    return {**found, "shape": [wanted["shape"][0], *shape[1:]]} == wanted


def _without_lengths(metadata: Metadata) -> str:
    return canonical({n: {**each, "shape": each["shape"][1:]} for n, each in metadata.items()})


def _check_array(name: str, found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected an object, got {shown(found)}")
    shape = found["shape"]
    if not (isinstance(shape, list) and shape and type(shape[0]) is int):
        raise ValueError(f"{name}: expected a shape, got {shown(shape)}")
    for key, got, due in (
        ("shape", shape[1:], wanted["shape"][1:]),
        ("data type", found["data_type"], wanted["data_type"]),
        ("axes", found["dimension_names"], wanted["dimension_names"]),
    ):
        if got != due:
            raise ValueError(f"{name}: expected the {key} {shown(due)}, got {shown(got)}")
