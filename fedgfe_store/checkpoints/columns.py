"""Columns that a checkpoint has under their own names, beside T5, CLIP and audio.

An exported checkpoint declares them in its metadata. Else tensors that are called as a pipeline's
arguments are, such as ``prompt_embeds``, are columns as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedgfe_store.checkpoints.entries import Slot
from fedgfe_store.common.plain import Unusable, mapping
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import ColumnDtype, Kind, Schema, TensorColumn
from fedgfe_store.shapes import TENSOR_KEYS, Shape, any_tensor, column_of, without_batch

DECLARED = "columns"
"""Key of a checkpoint's metadata, where its columns are not T5, CLIP and audio alone."""

Columns = Mapping[str, TensorColumn | None]

_ARGUMENT = re.compile(r"([a-z0-9_]+_)?(embeds|mask|hidden_states)(_[a-z0-9_]+)?")
_DTYPES: dict[torch.dtype, ColumnDtype] = {torch.bool: "bool", torch.int32: "int32"}
_MOST_AXES = 2


def declared(schema: Schema) -> dict[str, Any]:
    """Return what the metadata of a checkpoint says of the columns of `schema`."""
    return {column.name: column.to_json() for column in schema.tensors}


def named_columns(metadata: Mapping[str, Any], entries: Sequence[Any]) -> tuple[TensorColumn, ...]:
    """Return the columns that a checkpoint declares, or that its entries name; else none.

    Raises
    ------
    SchemaMismatchError
        If one is declared that no store can have.
    """
    said = metadata.get(DECLARED)
    if isinstance(said, Mapping) and said and all(isinstance(c, Mapping) for c in said.values()):
        try:
            columns = [TensorColumn.from_json(name, column) for name, column in said.items()]
        except (TypeError, KeyError) as error:
            raise SchemaMismatchError(
                f"metadata {DECLARED}: expected shape, dims and optional of each, got {error}"
            ) from error
        for column in columns:
            column.check()
        return tuple(columns)
    return tuple(_found(list(_arguments(entries))))


def _arguments(entries: Iterable[Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each entry without T5 and CLIP that are called as arguments are."""
    for entry in map(mapping, entries):
        if entry is None or any(entry.get(key) is not None for key in TENSOR_KEYS):
            continue
        found = {}
        for key, value in entry.items():
            if isinstance(key, str) and _ARGUMENT.fullmatch(key) and value is not None:
                try:
                    found[key] = any_tensor(value, key)
                except Unusable:  # kept, or left out, as metadata
                    continue
        if found:
            yield found


def _found(entries: list[dict[str, torch.Tensor]]) -> Iterator[TensorColumn]:
    counts = Counter(name for entry in entries for name in entry)
    for name, count in counts.items():
        tensors = [entry[name] for entry in entries if name in entry]
        shapes = [_one_record(tuple(tensor.shape)) for tensor in tensors]
        longest = max(shape[:1] for shape in shapes)
        if not 0 < len(shapes[0]) <= _MOST_AXES or 0 in shapes[0][1:] or longest == (0,):
            continue
        floating = tensors[0].is_floating_point()
        yield TensorColumn(
            name,
            (*longest, *shapes[0][1:]),
            optional=count < len(entries),
            dtype="float32" if floating else _DTYPES.get(tensors[0].dtype, "int64"),
            ragged=any(shape[:1] != longest for shape in shapes),
        )


def _one_record(shape: Shape) -> Shape:
    """Return a shape without the pipeline's batch axis: ``[1, 77, 2048]``, ``[1, 1280]``."""
    inner = without_batch(shape)
    return inner[1:] if len(inner) == _MOST_AXES and inner[0] == 1 else inner


def _fits(column: TensorColumn, shape: Shape) -> bool:
    """Whether a record of `shape` fits a column."""
    if not column.ragged:
        return shape == column.shape
    rest = len(shape) == len(column.shape) and shape[1:] == column.shape[1:]
    return rest and shape[0] <= column.shape[0]


def kind_of_columns(columns: Sequence[TensorColumn]) -> Kind:
    """Return which conditioning named columns are, as far as T5 and CLIP tell; else "custom"."""
    try:
        found = sorted(column_of(c.name, c.shape)[0] for c in columns if c.dtype == "float32")
    except Unusable:
        return "custom"
    if found == ["clip"]:
        sequences = [c for c in columns if c.dtype == "float32" and len(c.shape) == 2]
        return "sd" if sequences else "custom"
    return "flux" if found == ["clip", "t5"] else "custom"


def needed(kind: Kind, columns: Sequence[TensorColumn]) -> Columns:
    """Return the columns that samples have, `columns` or T5 and CLIP; None for one of any shape."""
    if columns:
        return {column.name: column for column in columns}
    return {"clip": None} if kind == "sd" else {"t5": None, "clip": None}


def shapes_of(slot: Slot) -> dict[str, Shape]:
    """Return the shape of each column of a sample."""
    return {column: shape for column, (_, shape) in slot.places.items()}


def _required(wanted: Columns) -> list[str]:
    """Return the columns that a sample must have; audio is optional in every store."""
    return [n for n, column in wanted.items() if n != "audio" and not (column and column.optional)]


def is_complete(slot: Slot, wanted: Columns) -> bool:
    """Whether a sample has all that is wanted, in shapes that fit."""
    shapes = shapes_of(slot)
    return all(
        name in shapes and ((column := wanted[name]) is None or _fits(column, shapes[name]))
        for name in _required(wanted)
    )


def columns_of(slot: Slot, wanted: Columns, *, audio: bool) -> list[str]:
    """Return the columns to read of a sample."""
    required = _required(wanted)
    there = [n for n in wanted if n in slot.places and n not in required]
    by_name = [name for name in there if slot.places[name][0] == name or name != "audio"]
    heard = ["audio"] if audio and "audio" in slot.places and "audio" not in by_name else []
    return [*required, *by_name, *heard]


def check_sample(
    slot: Slot, wanted: Columns, columns: list[str], seen: set[tuple[str, str, int]]
) -> None:
    """Raise `Unusable` for a sample that cannot be taken; no value is read for that."""
    shapes = shapes_of(slot)
    missing = [name for name in columns if name not in shapes]
    if missing:
        raise Unusable(f"no {' and no '.join(missing)}")
    for name in columns:
        column = wanted.get(name)
        if column is not None and not _fits(column, shapes[name]):
            got, expected = list(shapes[name]), list(column.shape)
            most = "at most " if column.ragged else ""
            raise Unusable(f"{name} has shape {got}, expected {most}{expected}")
    if (slot.split, slot.class_name, slot.index) in seen:
        raise Unusable("same split, class and index as an entry before")
