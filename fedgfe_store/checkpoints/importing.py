"""Importing legacy FedGFE `.pt` checkpoints: each file becomes one commit of a store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Unpack

from fedgfe_store.checkpoints.ahead import Ahead, Prepared
from fedgfe_store.checkpoints.earlier import DeletedRecords, Identities
from fedgfe_store.checkpoints.experiments import Experiment, check_fit, schema_with_audio
from fedgfe_store.checkpoints.header import is_a_time
from fedgfe_store.checkpoints.ledger import Ledger, content_digest
from fedgfe_store.checkpoints.listing import (
    almost_matching,
    find_checkpoints,
    is_named_as_text_cache,
    paths_of,
)
from fedgfe_store.checkpoints.reading import (
    Checkpoint,
    Opened,
    audio_shape,
    opened,
    own_shapes,
    read_checkpoint,
)
from fedgfe_store.checkpoints.report import FileReport, ImportReport, Tally, headed, in_words
from fedgfe_store.checkpoints.request import DEFAULTS, ImportOptions, ImportRequest
from fedgfe_store.checkpoints.samples import Entry
from fedgfe_store.checkpoints.text_cache import opened_text_cache
from fedgfe_store.checkpoints.torch_files import Source, inspect
from fedgfe_store.checkpoints.zip_members import Mapped
from fedgfe_store.common.location import Given, Location, location
from fedgfe_store.errors import (
    BusyError,
    ConflictError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)
from fedgfe_store.records import TEXT_NODE
from fedgfe_store.schema import Schema
from fedgfe_store.storage.append import AppendBatch
from fedgfe_store.storage.engines import check_target, latest
from fedgfe_store.store import EmbeddingStore

_GROUP_BYTES = 128 << 20
"""Tensors that are appended at once: many samples a call, in bounded memory."""

_log = logging.getLogger("fedgfe_store")


def import_checkpoints(
    store_path: Given,
    paths: str | Path | Iterable[str | Path],
    request: ImportRequest = DEFAULTS,
    *,
    on_file: Callable[[FileReport], None] | None = None,
    **options: Unpack[ImportOptions],
) -> ImportReport:
    """Import checkpoint files, each as one commit; importing them again changes nothing.

    Caches of reference text embeddings, by their name, come last; see `read_text_cache`.

    Parameters
    ----------
    store_path : path-like
        The store; made from the first file with a complete record if it is not there.
    paths : path-like or iterable of path-like
        Files and folders, see `find_checkpoints`.
    request : ImportRequest
        What is asked.
    on_file : callable, optional
        Called with each file's report when it is done.
    **options
        Fields of `ImportRequest` that take the place of those of `request`, as ``audio=True``.

    Returns
    -------
    ImportReport
        A file that cannot be imported is reported in it, and the others are imported. A record
        without timestamp gets the file's time of change.

    Raises
    ------
    NotFoundError
        If no file is found.
    ConflictError
        If files are of another experiment than the store or one another; nothing is written then.
    SchemaMismatchError
        If audio is asked for and the store has no column for it.
    BusyError
        If another writer holds the store for longer than `ImportRequest.timeout`.
    """
    request, folder = replace(request, **options), location(store_path)
    check_target(folder)
    given = paths_of(paths)
    # Checkpoints first: they, not a cache that fits every kind, decide on a new store.
    files = sorted(find_checkpoints(given, pattern=request.pattern), key=is_named_as_text_cache)
    target = _Target(folder, files, request)
    target.check_experiments()
    reports: list[FileReport] = []
    try:
        for path, following in zip_longest(files, files[1:]):
            reports.append(target.take(path, following))
            if on_file is not None:
                on_file(reports[-1])
            if request.fail_fast and reports[-1].error is not None:
                break
    finally:
        target.close()
    return ImportReport(folder, tuple(reports), _notes(given, request.pattern))


def _notes(given: Iterable[Path], pattern: str) -> tuple[str, ...]:
    folders = (path for path in given if path.is_dir())
    return tuple(
        f"{folder}: {note}" for folder in folders for note in almost_matching(folder, pattern)
    )


class _Target:
    """The store that files go into, made when the first good file is there."""

    def __init__(self, path: Location, files: Iterable[Path], request: ImportRequest) -> None:
        self._path, self._files, self._request = path, files, request
        self._ledger = Ledger(path)
        self._ahead = Ahead(self._opened)
        self._groups: set[tuple[str, int, str]] = set()
        self._store = _open_if_there(path)
        self._schema = self._store.schema if self._store is not None else None
        name = self._schema.metadata.experiment if self._schema is not None else None
        self._experiment = Experiment(path, name, self._ledger, new=self._store is None)
        if request.audio and self._schema is not None and "audio" not in self._schema.columns:
            raise SchemaMismatchError(
                f"audio: expected a store with a column for it, got {path} with"
                f" {self._schema.describe()}"
            )

    def check_experiments(self) -> None:
        """Refuse files of another experiment, as far as one of each folder tells."""
        if not self._request.other_experiment:
            checkpoints = [path for path in self._files if not is_named_as_text_cache(path)]
            self._experiment.check_folders(checkpoints, new_only=self._request.new_only)

    def close(self) -> None:
        """Forget a file that was opened ahead."""
        self._ahead.end()

    def take(self, path: Path, following: Path | None) -> FileReport:
        """Import one file, or report why not; open the `following` one meanwhile."""
        if not self._request.new_only:
            return self._read(path, following)
        known = FileReport(path, known=True)
        if self._ledger.knows(path):
            _log.info("%s: known, not read again", path)
            return known
        with self._ledger.turn(self._request.timeout):
            # Asked again: another process may have had its turn before.
            if self._ledger.knows(path):
                _log.info("%s: imported by another process meanwhile", path)
                return known
            return self._read(path, following)

    def _read(self, path: Path, following: Path | None) -> FileReport:
        report = FileReport(path, bytes=_size(path))
        prepared = self._ahead.take(path)
        self._look_ahead(following)
        try:
            if prepared is None:
                source = inspect(path)
                # Before it is read: if it changes meanwhile, it is read again next time.
                prepared = Prepared(content_digest(source), self._opened(source))
                report = headed(prepared.file.checkpoint)
                prepared.file.loaded.verify()
            checkpoint = prepared.file.checkpoint
            report = headed(checkpoint)
            report = self._import(prepared.file, report)
            if self._store is not None and not self._request.dry_run:
                node, number = checkpoint.node, checkpoint.round
                self._ledger.add(path, prepared.content, node=node, round=number)
            _log.info("%s: %s", path, in_words(report))
            return report
        except BusyError:  # every other file would wait as long
            raise
        except (FedgfeStoreError, OSError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            notes = getattr(error, "__notes__", [])
            return replace(report, error="; ".join([reason, *notes]))

    def _look_ahead(self, path: Path | None) -> None:
        # Caches are read by the kind and the classes of the store, which the file before may bring.
        if path is None or is_named_as_text_cache(path):
            return
        if not (self._request.new_only and self._ledger.line_of(path)):
            self._ahead.begin(path)

    def _opened(self, source: Source) -> Opened:
        if not is_named_as_text_cache(source.path):
            return opened(source, audio=self._request.audio, round_from=self._request.round_from)
        if self._schema is None:
            return opened_text_cache(source)
        known = self._schema.metadata.classes
        return opened_text_cache(source, kind=self._schema.kind, classes=known)

    def _import(self, file: Opened, report: FileReport) -> FileReport:
        checkpoint = file.checkpoint
        if not self._request.other_experiment and checkpoint.node != TEXT_NODE:
            self._experiment.check(checkpoint)
        schema = self._schema
        if schema is None and own_shapes(checkpoint):
            schema = self._new_schema(checkpoint)
        if schema is None:
            tally = Tally(None, None, fail_fast=self._request.fail_fast)
            for _ in tally.watch(file.read()):
                pass
            return tally.on(report)
        if not self._request.dry_run:
            schema = self._made(schema).schema
        check_fit(checkpoint, schema)
        return self._take_samples(file, schema, report)

    def _take_samples(self, file: Opened, schema: Schema, report: FileReport) -> FileReport:
        checkpoint = file.checkpoint
        tally = Tally(schema, self._deleted(checkpoint), fail_fast=self._request.fail_fast)
        samples = tally.watch(file.read(schema))
        if self._store is None or self._request.dry_run:
            self._schema = schema
            return tally.on(replace(report, records=sum(1 for _ in samples)))
        identities = Identities(checkpoint.node, checkpoint.round)
        batch = self._append(self._store, file, identities.watch(samples), tally)
        self._schema = self._store.schema  # with the classes that the file brought
        report = replace(
            report,
            records=batch.added,
            replaced=batch.replaced,
            removed=batch.removed,
            unchanged=batch.skipped,
            notes=(*report.notes, *identities.notes(self._store.snapshot)),
        )
        return tally.on(report)

    def _deleted(self, checkpoint: Checkpoint) -> DeletedRecords | None:
        if not self._request.new_only or self._store is None:
            return None
        # Not as this import has seen the store: somebody may have deleted records meanwhile.
        return DeletedRecords(latest(self._path), checkpoint.node, checkpoint.round)

    def _append(
        self, store: EmbeddingStore, file: Opened, samples: Iterable[Entry], tally: Tally
    ) -> AppendBatch:
        checkpoint, mapped = file.checkpoint, file.loaded.mapped
        moment = checkpoint.timestamp or _changed(checkpoint.path)
        with store.append(
            node=checkpoint.node,
            round=checkpoint.round,
            if_exists=self._request.if_exists,
            timeout=self._request.timeout,
            source=_source(checkpoint.path),
        ) as batch:
            for group in _groups(samples):
                columns = _columns(group, store.schema, mapped, old=store.id is None)
                batch.add(timestamp=moment, **columns)
            if self._request.if_exists == "replace" and checkpoint.node != TEXT_NODE:
                for split in self._begun(checkpoint, tally.splits):
                    batch.supersede(node=checkpoint.node, round=checkpoint.round, split=split)
        return batch

    def _begun(self, checkpoint: Checkpoint, splits: Iterable[str]) -> Iterator[str]:
        """Yield the splits of which this is the first file; another one adds to it."""
        for split in splits:
            group = checkpoint.node, checkpoint.round, split
            if group not in self._groups:
                self._groups.add(group)
                yield split

    def _new_schema(self, checkpoint: Checkpoint) -> Schema:
        audio = None
        if self._request.audio:  # the first file need not be one that has audio
            audio = next(filter(None, map(_audio_in, [checkpoint.path, *self._files])), None)
        return schema_with_audio(checkpoint, audio, self._request.precision)

    def _made(self, schema: Schema) -> EmbeddingStore:
        if self._store is None:
            try:
                self._store = EmbeddingStore.create(
                    self._path, schema, timeout=self._request.timeout
                )
            except ConflictError:  # another import made it meanwhile
                self._store = EmbeddingStore.open(self._path)
            self._schema = self._store.schema
        return self._store


def _source(path: Path) -> str:
    # Names of files may be no text, or hold line breaks, which `history` would print.
    name = path.name if path.name.isprintable() else ascii(path.name)[1:-1]
    return f"import {name}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # what is wrong with it comes up when it is read
        return 0


def _changed(path: Path) -> datetime | None:
    """Return when a file was changed, None for a time that cannot be kept."""
    try:
        moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except (ValueError, OverflowError):
        return None
    return moment if is_a_time(moment) else None


def _open_if_there(path: Location) -> EmbeddingStore | None:
    try:
        return EmbeddingStore.open(path)
    except NotFoundError:
        return None


def _audio_in(path: Path) -> tuple[int, int] | None:
    try:
        return audio_shape(read_checkpoint(path, audio=True))
    except FedgfeStoreError:  # reported when the file's turn comes
        return None


def _groups(samples: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Gather samples to some 32 MiB; those with and without an optional column apart."""
    for _, alike in groupby(samples, key=lambda entry: entry.tensors.keys()):
        group: list[Entry] = []
        size = 0
        for entry in alike:
            group.append(entry)
            size += sum(tensor.nbytes for tensor in entry.tensors.values())
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group


def _columns(group: list[Entry], schema: Schema, mapped: Mapped, *, old: bool) -> dict[str, Any]:
    """Return what `AppendBatch.add` takes; `old` stores have no column of their own for file_id."""
    names = ["split", "class_name", "index", "sample_id", "image_filename", "audio_path"]
    names += [] if old else ["file_id"]
    columns: dict[str, Any] = {name: [getattr(entry, name) for entry in group] for name in names}
    columns["extra"] = [
        {**entry.extra, "file_id": entry.file_id} if old and entry.file_id else entry.extra
        for entry in group
    ]
    for column in schema.tensors:
        if column.name in group[0].tensors:
            arrays = [entry.tensors[column.name].numpy() for entry in group]
            columns[column.name] = arrays if column.ragged else mapped.stacked(arrays)
    return columns
