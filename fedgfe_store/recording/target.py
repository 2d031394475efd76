"""The store that is recorded to: made, or checked against, when the first records come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedgfe_store.errors import ConflictError, NotFoundError, SchemaMismatchError
from fedgfe_store.names import image_name
from fedgfe_store.recording.pages import arranged, schema_of
from fedgfe_store.records import RecordBatch
from fedgfe_store.schema import Metadata, Precision, Schema
from fedgfe_store.storage.append import AppendBatch, IfExists
from fedgfe_store.storage.metadata import GROUP_FILE
from fedgfe_store.store import EmbeddingStore


class Target:
    """The store that is recorded to; made at the first commit if it is not there.

    Parameters
    ----------
    path : Path
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
        path: Path,
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
        self._first: dict[str, Schema] = {}
        self._store: EmbeddingStore | None
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

    def arrange(self, given: dict[str, Any]) -> tuple[Schema, dict[str, torch.Tensor]]:
        """Return the schema, that of the first records if the store is new, and `arranged`."""
        schema = self.schema
        columns = arranged(given, schema)
        if schema is None:
            made = schema_of(columns, self._precision, self._metadata)
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
        return schema, columns

    @property
    def precision(self) -> Precision:
        """How the store keeps values."""
        return self._precision if self.schema is None else self.schema.precision

    def append(self, node: str | int, round: int, source: str) -> AppendBatch:
        """Open a commit of one node and round."""
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
        except ConflictError:
            if not (self.path / GROUP_FILE).exists():
                raise
            store = EmbeddingStore.open(self.path)  # made by another process meanwhile
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
        """Fill in what follows from a record's key: the file name of its image."""
        names, extra = records.columns["image_filename"], records.columns["extra"]
        for position in range(len(records)):
            names[position] = names[position] or image_name(records.key(position))
            if self._images_dir is not None:
                path = {"image_path": f"{self._images_dir}/{names[position]}"}
                known = json.loads(extra[position]) if extra[position] else {}
                if isinstance(known, dict):
                    extra[position] = json.dumps(path | known, ensure_ascii=False, sort_keys=True)
        return records
