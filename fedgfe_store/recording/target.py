"""The store that is recorded to: made, or checked against, when the first records come."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch

from fedgfe_store.common.location import Location
from fedgfe_store.common.plain import Unusable
from fedgfe_store.errors import ConflictError, NotFoundError, SchemaMismatchError
from fedgfe_store.names import image_name
from fedgfe_store.records import RecordBatch
from fedgfe_store.schema import Metadata, Precision, Schema
from fedgfe_store.shapes import T5_WIDTH, Shape, as_tensor, column_of, row_shape, without_batch
from fedgfe_store.storage.append import AppendBatch
from fedgfe_store.storage.engines import check_target
from fedgfe_store.storage.entry import check_texts, named
from fedgfe_store.storage.incoming import checked_lengths
from fedgfe_store.storage.sifting import IfExists
from fedgfe_store.storage.values import taken
from fedgfe_store.store import EmbeddingStore

CLIP_TOKENS = 77
"""Positions of CLIP's text encoder; longer prompts come as several sequences in a row."""
_log = logging.getLogger("fedgfe_store")


class Run:
    """Tells what this run has recorded from what earlier ones left in the store.

    It is a few plain values: a host of the mixins that is copied or pickled takes it along.

    Attributes
    ----------
    id : str
        Random, made with the run.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self._recorded: set[tuple[str, int, str]] = set()

    @property
    def source(self) -> str:
        """What the store's commits are marked by."""
        return f"recorder {self.id}"

    def is_new(self, node: str, round: int, split: str) -> bool:
        """Whether nothing of this node, round and split was committed by this run."""
        return (node, round, split) not in self._recorded

    def keep(self, round: int, groups: Iterable[tuple[str, str]]) -> None:
        """Note that records of these nodes and splits are committed."""
        self._recorded.update((node, round, split) for node, split in groups)


class Target:
    """The store that is recorded to; made at the first commit if it is not there.

    Parameters
    ----------
    path : Path or Address
        The store.
    precision : {"float32", "bfloat16"} or None
        How a new store keeps values; one that is there must keep them so, unless None.
    metadata : Metadata
        Of a new store; encoder and experiment are compared with those of one that is there.
    other_experiment : bool
        Whether it is meant that the store is of another experiment.
    if_exists : {"error", "replace", "skip"}
        See `EmbeddingStore.append`.
    keep_earlier : bool
        Whether what earlier runs left of a round stays, see `Recorder`.
    timeout : float
        Seconds to wait for another writer.
    images_dir : str or None
        Folder that a record's ``image_path`` names.
    """

    def __init__(
        self,
        path: Location,
        *,
        precision: Precision | None,
        metadata: Metadata,
        other_experiment: bool,
        if_exists: IfExists,
        keep_earlier: bool,
        timeout: float,
        images_dir: str | None,
    ) -> None:
        self.path = path
        self._precision: Precision = precision or "float32"
        self._metadata, self._if_exists, self._timeout = metadata, if_exists, timeout
        self.supersedes = if_exists == "replace" and not keep_earlier
        self._images_dir, self._other_experiment = images_dir, other_experiment
        self._said_rounded = False
        self._first: dict[str, Schema] = {}
        self._store: EmbeddingStore | None
        check_target(path)
        try:
            self._store = EmbeddingStore.open(path)
            self.schema: Schema | None = self._store.schema
        except NotFoundError:
            self._store = self.schema = None
        if self._store is not None:
            self._check_known(self._store.schema.metadata)
        if precision and self.schema is not None and self.schema.precision != precision:
            raise SchemaMismatchError(
                f"precision: expected {self.schema.precision!r} as in {path}, got {precision!r}"
            )

    def arrange(
        self, given: dict[str, Any]
    ) -> tuple[Schema, dict[str, torch.Tensor], dict[str, np.ndarray]]:
        """Return the schema, that of the first records if the store is new, columns and lengths."""
        schema = self.schema
        if schema is not None and not schema.is_plain:
            named, lengths, given = _by_name(given, schema)
        else:
            named, lengths = {}, {}
        columns = arranged(given, schema) | named
        if schema is None:
            made = schema_of(columns, self._precision, self._metadata)
            # One step, which needs no lock: of several threads that bring first records one says
            # what the store looks like, and the others are held to it.
            schema = self.schema = self._first.setdefault("of any thread", made)
            if schema is not made:
                columns = arranged(given, schema)
        for column in schema.tensors:
            if column.name not in columns and not column.optional:
                raise SchemaMismatchError(
                    f"{column.name}: expected a tensor {list(column.shape)}, got None"
                )
        counts = {name: len(tensor) for name, tensor in columns.items()}
        if len(set(counts.values())) > 1:
            raise SchemaMismatchError(f"expected as many records in every tensor, got {counts}")
        return schema, columns, lengths

    def say_rounded(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Log once that some values are not kept as they come."""
        names = [name for name, tensor in tensors.items() if tensor.dtype is torch.float64]
        if names and not self._said_rounded:
            self._said_rounded = True
            _log.warning("%s: float64 is rounded to float32 (%s)", self.path, ", ".join(names))

    def append(self, node: str | None, round: int, source: str) -> AppendBatch:
        """Open a commit of one node and round, or of a whole round."""
        if self._store is None:
            self._store = self._made()
            self.schema = self._store.schema
        return self._store.append(
            node=node,
            round=round,
            if_exists=self._if_exists,
            encoder=self._metadata.encoder,
            source=source,
            timeout=self._timeout,
        )

    def _made(self) -> EmbeddingStore:
        assert self.schema is not None
        try:
            return EmbeddingStore.create(self.path, self.schema, timeout=self._timeout)
        except ConflictError as error:
            try:
                store = EmbeddingStore.open(self.path)  # made by another process meanwhile
            except NotFoundError:
                raise error from None
        store.schema.check_fits(self.schema, f"recording to {self.path}")
        self._check_known(store.schema.metadata)
        return store

    def _check_known(self, known: Metadata) -> None:
        """Refuse a store of another encoder or experiment; where a name is missing nothing is."""
        encoder, experiment = self._metadata.encoder, self._metadata.experiment
        if encoder and known.encoder and encoder != known.encoder:
            raise SchemaMismatchError(
                f"encoder: expected {known.encoder!r} as in {self.path}, got {encoder!r}"
            )
        if self._other_experiment or not (experiment and known.experiment):
            return
        if experiment != known.experiment:
            raise SchemaMismatchError(
                f"experiment: expected {known.experiment!r} as in {self.path}, got {experiment!r}: "
                f"one would replace rounds of the other; record to another store, or say that it "
                f"is meant by other_experiment=True (feda2v.embeddings_other_experiment)"
            )

    def finished(self, records: RecordBatch) -> RecordBatch:
        """Fill in what follows from a record's key: the file name of its image.

        Training does not wait for that: it is done in the writer's thread.
        """
        names = records.columns["image_filename"]
        for position in range(len(records)):
            names[position] = names[position] or image_name(records.key(position))
        if self._images_dir is not None:
            self._put_paths(records)
        return records

    def _put_paths(self, records: RecordBatch) -> None:
        names, extra = records.columns["image_filename"], records.columns["extra"]
        for position, name in enumerate(names.tolist()):
            path = {"image_path": f"{self._images_dir}/{name}"}
            known = json.loads(extra[position]) if extra[position] else {}
            if isinstance(known, dict):
                extra[position] = json.dumps(path | known, ensure_ascii=False, sort_keys=True)
        # Longer now than it was when the training thread had it checked.
        check_texts("extra", extra.tolist(), lambda position: named(records.key(position)))


def _by_name(
    given: Mapping[str, Any], schema: Schema
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], dict[str, Any]]:
    """Return masks, numbers and ragged columns, the lengths of these, and what else is given."""
    columns = [t for t in schema.tensors if t.ragged or t.dtype != "float32"]
    found = {t.name: taken(schema, t, given.get(t.name)) for t in columns}
    there = {name: each for name, each in found.items() if each is not None}
    n = next((len(values) for values, _ in there.values()), 0)
    marks = {name for column in columns for name in column.marks}
    rest = {k: v for k, v in given.items() if k not in found and k not in marks}
    tensors = {name: torch.from_numpy(values) for name, (values, _) in there.items()}
    return tensors, checked_lengths(given, there, n), rest


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
        hint = "; make the store first, for columns other than T5 and CLIP" if not schema else ""
        raise SchemaMismatchError(f"{reason}{hint}") from None
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
    """Find the column that `shape` ends with the shape of, the one called `name` first.

    By shape alone only T5, CLIP and audio are found: FedGFE's code exchanges their names.
    """
    plain = {t.name: t.shape for t in schema.tensors if t.dtype == "float32" and not t.ragged}
    columns = {c: s for c, s in plain.items() if c == name or c in ("t5", "clip", "audio")}
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
