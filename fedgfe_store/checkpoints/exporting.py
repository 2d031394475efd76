"""Exporting records as legacy FedGFE `.pt` checkpoints: one file per node and round."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch

from fedgfe_store.checkpoints.columns import DECLARED, declared
from fedgfe_store.common.plain import Unusable
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.names import Origin, image_name
from fedgfe_store.readers.exporting import ExportedFile, export
from fedgfe_store.records import SERVER, RecordBatch
from fedgfe_store.schema import Schema, TensorColumn
from fedgfe_store.selection import Selection
from fedgfe_store.shapes import column_of

Layout = Literal["guide", "upstream"]
_NAMED = ("sample_id", "audio_path")
_NOTES = (*_NAMED, "file_id", "image_filename")
_TAKEN = {"split", "index", "class_name", "node_id", "image_path", "image_filename"}
_TAKEN |= {"sample_metadata"}


def export_checkpoints(
    selection: Selection,
    folder: str | Path,
    *,
    layout: Layout = "guide",
    overwrite: bool = False,
    on_file: Callable[[ExportedFile], None] | None = None,
) -> tuple[ExportedFile, ...]:
    """Write records as checkpoints that FedGFE's scripts and `import_checkpoints` read.

    Each file takes its place in one step when it is on the disk. As `torch.save` needs all of a
    file at once, memory for the largest one is needed.

    Parameters
    ----------
    selection : Selection
        The records.
    folder : path-like
        Where the files go; made if it is not there.
    layout : {"guide", "upstream"}
        ``"guide"``: an entry per sample, tensors with a batch axis, ``t5_embedding [1, 17, 4096]``
        and ``clip_embedding [1, 768]``. ``"upstream"``, as FedGFE's code writes: nodes without the
        axis, the server with an entry per split and class that holds stacks, ``t5 [n, 17, 4096]``
        and ``clip [n, 768]``. Columns that FedGFE's scripts do not know are written under their
        own names, an entry per sample, of their data types and, if ragged, without padding; the
        file's metadata declares them.
    overwrite : bool
        Replace files that are there already.
    on_file : callable, optional
        Called with each file's report when it is done.

    Returns
    -------
    tuple of ExportedFile
        By round and node. A file with a damaged record is reported in it and not written, and
        the others are.

    Raises
    ------
    SchemaMismatchError
        If `layout` is not one of those above, or a column is called as something else is in a
        checkpoint.
    ConflictError
        If files are there already, without `overwrite`; nothing is written then.
    """
    if layout not in get_args(Layout):
        expected = ", ".join(get_args(Layout))
        raise SchemaMismatchError(f"layout: expected one of {expected}, got {layout!r}")
    _check_places(selection)

    def write(part: Selection, origin: Origin, file: BinaryIO) -> list[str]:
        notes: list[str] = []
        torch.save(_content(part, origin, layout, notes), file)
        return notes

    return export(selection, Path(folder), ".pt", write, overwrite=overwrite, on_file=on_file)


def _check_places(selection: Selection) -> None:
    """Refuse columns whose names in a checkpoint are those of something else."""
    places = [_place(selection.schema, column) for column in selection.schema.tensors]
    for column, place in zip(selection.schema.tensors, places, strict=True):
        if place in _TAKEN or places.count(place) > 1:
            raise SchemaMismatchError(
                f"{selection.location}: the column {column.name} has no place in a checkpoint, "
                f"where {place} is something else"
            )


def _place(schema: Schema, column: TensorColumn) -> str:
    """Return the key of a column in a sample's entry."""
    return f"{column.name}_embedding" if _reads_back(schema, column) else column.name


def _is_plain(schema: Schema) -> bool:
    """Whether a store has what FedGFE's scripts know: T5, CLIP and audio, as they are there."""
    needed = {"flux": {"t5", "clip"}, "sd": {"clip"}}.get(schema.kind)
    has_all = needed is not None and needed <= schema.columns.keys()
    return has_all and all(_reads_back(schema, column) for column in schema.tensors)


def _reads_back(schema: Schema, column: TensorColumn) -> bool:
    """Whether import would take the column for what it is, by its shape."""
    if column.dtype != "float32" or column.ragged:
        return False
    if column.name == "audio":
        # Import takes it only where it is asked for, so it is declared among others.
        rest = [other for other in schema.tensors if other.name != "audio"]
        known = all(_reads_back(schema, other) for other in rest)
        return known and column.optional and len(column.shape) == 2
    try:
        found = column_of(column.name, column.shape)
    except Unusable:
        return False
    right = found == (column.name, column.shape) and not column.optional
    return right and (schema.kind == "flux" or (len(column.shape) == 2 and column.name == "clip"))


def _content(part: Selection, origin: Origin, layout: Layout, notes: list[str]) -> dict[str, Any]:
    node, number = origin
    stacked = layout == "upstream" and node == SERVER and _is_plain(part.schema)
    entries = _stacks(part, notes) if stacked else _samples(part, batch_axis=layout == "guide")
    return {
        "node_id": int(node) if _is_number(node) else node,
        "round": number,
        "timestamp": _moment(part),
        "embeddings": list(entries),
        "metadata": _metadata(part, stacked=stacked),
    }


def _is_number(node: str) -> bool:
    """Whether a node can be written as a number and come back as the same text: 007 cannot."""
    return node.isascii() and node.isdecimal() and str(int(node)) == node


def _moment(part: Selection) -> str:
    """Return the latest time of the records as the guide writes it: UTC, without zone."""
    moment: datetime = part.records["timestamp"].max().to_pydatetime()
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()


def _metadata(part: Selection, *, stacked: bool) -> dict[str, Any]:
    known = part.schema.metadata
    here = set(part.records["class_name"])
    columns = {} if _is_plain(part.schema) else {DECLARED: declared(part.schema)}
    return {
        "diffusion_type": part.schema.kind,
        "federation_classes" if stacked else "selected_classes": [
            name for name in known.classes if stacked or name in here
        ],
        **columns,
    }


def _samples(part: Selection, *, batch_axis: bool) -> Iterator[dict[str, Any]]:
    lead = (1,) if batch_axis else ()
    for records in part.pieces():
        for position in range(len(records)):
            tensors = {
                key: None if values is None else values.reshape(lead + values.shape)
                for key, values in _tensors(records, position, part.schema).items()
            }
            notes = _notes(records, position, part.schema)
            key = records.key(position)
            yield {
                "split": key.split,
                "index": key.index,
                "class_name": key.class_name,
                "image_path": notes.pop("image_path"),
                "image_filename": notes.pop("image_filename"),
                **tensors,
                "sample_metadata": notes,
            }


def _tensors(records: RecordBatch, position: int, schema: Schema) -> dict[str, torch.Tensor | None]:
    """Return one record's tensors by key, each in a storage of its own, without padding.

    T5 is None in FedGFE's checkpoints without one.
    """
    found: dict[str, torch.Tensor | None] = {"t5_embedding": None} if _is_plain(schema) else {}
    for column in schema.tensors:
        if records.columns.get(f"has_{column.name}", np.full(len(records), True))[position]:
            values = records.tensors[column.name][position]
            if column.ragged:
                values = values[: records.columns[f"length_{column.name}"][position]]
            found[_place(schema, column)] = torch.from_numpy(np.array(values))
    return found


def _notes(records: RecordBatch, position: int, schema: Schema) -> dict[str, Any]:
    """Return what is known of a record besides key and tensors, under the checkpoint's keys."""
    columns = {name: str(records.columns[name][position]) for name in _NOTES}
    text = str(records.columns["extra"][position])
    extra = json.loads(text) if text else {}
    if not isinstance(extra, Mapping):
        extra = {"extra": extra}
    name = columns["image_filename"] or image_name(records.key(position))
    folder = f"output_images/{schema.metadata.experiment or ''}".rstrip("/")
    named: dict[str, Any] = {key: columns[key] or None for key in _NAMED}
    if columns["file_id"]:
        named["file_id"] = columns["file_id"]
    return {**named, "image_path": f"{folder}/{name}", "image_filename": name, **extra}


def _stacks(part: Selection, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield an entry per split and class; where only some records have audio, one per run."""
    keys = part.keys()
    order = sorted(
        range(len(keys)), key=lambda i: (keys[i].split, keys[i].class_name, keys[i].index)
    )
    for (split, name), group in groupby(order, lambda i: (keys[i].split, keys[i].class_name)):
        positions = list(group)
        indices = [keys[i].index for i in positions]
        if indices != list(range(len(indices))):
            notes.append(
                f"split {split}, class {name}: the layout counts samples from 0, so that their "
                f"indices ({indices[0]} to {indices[-1]}) are lost"
            )
        rows = part.take(positions)
        for run in _runs(rows):
            yield {"split": split, "class_name": name, "node_id": SERVER, **_stack(rows.take(run))}


def _runs(rows: Selection) -> Iterator[list[int]]:
    has = rows.records["has_audio"] if "audio" in rows.schema.columns else [True] * len(rows)
    for _, run in groupby(range(len(rows)), lambda i: bool(has[i])):
        yield list(run)


def _stack(rows: Selection) -> dict[str, Any]:
    pieces = list(rows.pieces())
    notes = [
        _notes(records, position, rows.schema)
        for records in pieces
        for position in range(len(records))
    ]
    found: dict[str, Any] = {"t5": None}
    for column in rows.schema.tensors:
        has = pieces[0].columns.get(f"has_{column.name}", np.True_)
        if np.all(has):
            name = "audio_embeddings" if column.name == "audio" else column.name
            values = [records.tensors[column.name] for records in pieces]
            found[name] = torch.from_numpy(np.concatenate(values))
    return {**found, "sample_metadata": _together(notes)}


def _together(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the notes of several samples as a list under each key, of one as they are."""
    if len(notes) == 1:
        return notes[0]
    names: Iterable[str] = dict.fromkeys(name for each in notes for name in each)
    return {name: [each.get(name) for each in notes] for name in names}
