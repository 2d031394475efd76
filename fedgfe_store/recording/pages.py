"""Records on their way to the writer, in memory of their own that is used again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch

from fedgfe_store.common.plain import Unusable
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import RecordBatch
from fedgfe_store.schema import Metadata, Precision, Schema
from fedgfe_store.shapes import T5_WIDTH, Shape, as_tensor, column_of, row_shape, without_batch

PAGE_BYTES = 16 * 2**20
CLIP_TOKENS = 77
_NUMPY_DTYPES = (torch.float32, torch.float16, torch.float64)


class Page:
    """Room for some 16 MiB of records of one schema, filled from the start.

    Tensors are copied into it as they come, in one piece each: rows one by one would take twice
    the time, and memory that was never written to takes twice the time again.
    """

    def __init__(self, schema: Schema) -> None:
        self.size = page_records(schema)
        self.count = 0
        self._columns: list[Mapping[str, np.ndarray]] = []
        self._optional = [t.name for t in schema.tensors if t.optional]
        self._tensors = {
            t.name: np.empty((self.size, *t.shape), np.float32) for t in schema.tensors
        }

    @property
    def room(self) -> int:
        """Records that fit in yet."""
        return self.size - self.count

    def put(self, columns: Mapping[str, np.ndarray], tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy records in, at most `room`: key columns and notes, and tensors of any device."""
        n = len(columns["index"])
        for name, tensor in tensors.items():
            _copy(self._tensors[name][self.count : self.count + n], tensor)
        has = {f"has_{name}": np.full(n, name in tensors) for name in self._optional}
        self._columns.append({**columns, **has})
        self.count += n

    def records(self) -> RecordBatch:
        """Return what the page holds, in memory of its own."""
        columns = {
            name: np.concatenate([part[name] for part in self._columns])
            for name in self._columns[0]
        }
        tensors = {
            name: np.array(values[: self.count])
            for name, values in self._tensors.items()
            if columns.get(f"has_{name}", np.True_).any()
        }
        return RecordBatch(columns, tensors)

    def clear(self) -> None:
        """Make the page empty; its memory stays."""
        self.count, self._columns = 0, []


def _copy(room: np.ndarray, tensor: torch.Tensor) -> None:
    """Copy values; on the CPU by numpy, as torch's threads wait for each other where it is busy."""
    if tensor.is_cpu and tensor.dtype in _NUMPY_DTYPES and not tensor.is_neg():
        with np.errstate(over="ignore"):
            np.copyto(room, tensor.numpy(), casting="same_kind")
    else:
        torch.from_numpy(room).copy_(tensor)


def page_records(schema: Schema) -> int:
    """Return how many records fit in a page, at least one."""
    return max(1, PAGE_BYTES // schema.record_nbytes)


def arranged(given: Mapping[str, Any], schema: Schema | None) -> dict[str, torch.Tensor]:
    r"""Sort tensors into columns and bring each to ``[n, \*shape]``, without copying a value.

    Parameters
    ----------
    given : mapping of str to Tensor, ndarray or None
        Tensors by the name that the caller gave them: one record's or `n` records', with or
        without axes of length 1 before a record's own.
    schema : Schema or None
        Of the store, whose shapes then tell one column from another; else width and rank do, as
        in checkpoints.

    Returns
    -------
    dict of str to Tensor
        Detached, on their device.

    Raises
    ------
    SchemaMismatchError
        If a tensor is none, or of a shape that fits no column, or two fit the same one.
    """
    try:
        tensors = {k: as_tensor(value, k) for k, value in given.items() if value is not None}
        n = None if schema else _records_in(tensors)
        columns: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if schema is not None:
                column, inner = _stored_column(name, tuple(tensor.shape), schema)
            else:
                column, inner = _new_column(name, tuple(tensor.shape), n)
            if column in columns:
                raise Unusable(f"ambiguous: two of the tensors look like {column}")
            columns[column] = tensor.reshape(-1, *inner)
    except Unusable as reason:
        raise SchemaMismatchError(str(reason)) from None
    return columns


def schema_of(
    tensors: Mapping[str, torch.Tensor], precision: Precision, metadata: Metadata
) -> Schema:
    """Return the schema of a store for such tensors as `arranged` returns."""
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    clip = shapes.get("clip", ())
    # Without T5, vectors of several records look like a sequence: that of CLIP has 77 tokens.
    if not clip or ("t5" not in shapes and (len(clip) != 2 or clip[0] % CLIP_TOKENS)):
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"
        raise SchemaMismatchError(
            f"expected t5 [tokens, 4096] and clip [768], or for Stable Diffusion clip [77, 768] "
            f"alone, got {got}; for other shapes make the store first"
        )
    kind = "flux" if "t5" in shapes else "sd"
    if metadata.diffusion_type not in (None, kind):
        raise SchemaMismatchError(
            f"diffusion_type: expected {kind!r}, as the tensors are, got "
            f"{metadata.diffusion_type!r}"
        )
    metadata = replace(metadata, diffusion_type=kind)
    options: dict[str, Any] = {"precision": precision, "metadata": metadata}
    if "audio" in shapes:
        options["audio"] = shapes["audio"]
    if kind == "sd":
        return Schema.sd(clip[0], width=clip[1], **options)
    tokens, width = shapes["t5"]
    return Schema.flux(tokens, width=width, clip=clip, **options)


def _stored_column(name: str, shape: Shape, schema: Schema) -> tuple[str, Shape]:
    """Find the column that `shape` ends with the shape of, the one called `name` first."""
    columns = schema.columns
    for column in sorted(columns, key=lambda c: c != name):
        inner = columns[column]
        before = shape[: len(shape) - len(inner)]
        if shape[len(before) :] == inner and sum(n != 1 for n in before) <= 1:
            return column, inner
    wanted = f"[n, {', '.join(map(str, columns[name]))}]" if name in columns else "no such tensor"
    raise Unusable(
        f"{name}: expected {wanted} as in the store ({schema.describe()}), got {list(shape)}"
    )


def _records_in(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return how many records tensors hold, by the leading axis of the T5 sequence if any."""
    shapes = [tuple(t.shape) for name, t in tensors.items() if name != "audio"]
    wide = [shape for shape in shapes if shape[-1:] == (T5_WIDTH,)]
    for shape in wide or shapes:
        if len(shape) >= 3 and prod(shape[:-2]) != 1:
            return shape[0]
    return None


def _new_column(name: str, shape: Shape, n: int | None) -> tuple[str, Shape]:
    row = row_shape(name, shape, n)
    if name == "audio":
        inner = without_batch(row)
        if len(inner) != 2:
            raise Unusable(f"audio: expected [n, frames, width], got {list(shape)}")
        return name, inner
    return column_of(name, row)
