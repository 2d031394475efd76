"""Importing legacy FedGFE `.pt` checkpoints: each file becomes one commit of a store."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgfe_store.checkpoints.deleted import DeletedRecords
from fedgfe_store.checkpoints.entries import Skipped
from fedgfe_store.checkpoints.experiments import Experiment
from fedgfe_store.checkpoints.header import RoundFrom, is_a_time
from fedgfe_store.checkpoints.identity import Identities
from fedgfe_store.checkpoints.ledger import Ledger, content_digest
from fedgfe_store.checkpoints.reading import (
    Checkpoint,
    Entry,
    audio_shape,
    own_shapes,
    read_checkpoint,
    schema_with_audio,
)
from fedgfe_store.checkpoints.text_cache import is_named_as_text_cache, read_text_cache
from fedgfe_store.errors import (
    BusyError,
    ConflictError,
    FedgfeStoreError,
    NotFoundError,
    SchemaMismatchError,
)
from fedgfe_store.records import TEXT_NODE
from fedgfe_store.schema import Precision, Schema
from fedgfe_store.storage.append import IfExists
from fedgfe_store.storage.snapshot import Snapshot
from fedgfe_store.storage.upkeep import LOCK_TIMEOUT
from fedgfe_store.store import EmbeddingStore

_GROUP_BYTES = 32 << 20
_LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max

_log = logging.getLogger("fedgfe_store")


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Parameters
    ----------
    path : Path
        The file.
    node : str or None
        Its node; None where it could not be read.
    round : int or None
        Its round.
    records : int
        Records that are new in the store (in a dry run: all records found).
    replaced : int
        Records that took the place of others with the same key.
    removed : int
        Records that were deleted with ``if_exists="replace"``, since the file does not hold them:
        what the store had besides of its node, round and splits.
    unchanged : int
        Records that the store had already.
    classes, splits : mapping of str to int
        Records of each, whether new, replaced or unchanged.
    skipped : mapping of str to int
        Samples left out, by reason.
    left_out : mapping of str to tuple of str
        Those of them that could not be taken, in words, by reason: all but records that were
        deleted from the store before.
    notes : tuple of str
        What is odd about the file.
    error : str or None
        Why nothing of the file was imported.
    bytes : int
        Size of the file.
    known : bool
        Whether the store had taken it in before, so that it was not read.
    """

    path: Path
    node: str | None = None
    round: int | None = None
    records: int = 0
    replaced: int = 0
    removed: int = 0
    unchanged: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None
    bytes: int = 0
    known: bool = False


@dataclass(frozen=True)
class ImportReport:
    """What became of all files, in the order in which they were taken.

    Parameters
    ----------
    store_path : Path
        The store.
    files : tuple of FileReport
        One each, up to the first that failed where `fail_fast` was asked for.
    notes : tuple of str
        What is odd about the folders.
    """

    store_path: Path
    files: tuple[FileReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> int:
        """Records that are new in the store."""
        return sum(file.records for file in self.files)

    @property
    def unchanged(self) -> int:
        """Records that the store had already."""
        return sum(file.unchanged for file in self.files)

    @property
    def failed(self) -> tuple[FileReport, ...]:
        """The files of which nothing was imported because of an error."""
        return tuple(file for file in self.files if file.error is not None)

    @property
    def incomplete(self) -> tuple[FileReport, ...]:
        """The files of which some samples could not be taken."""
        return tuple(file for file in self.files if file.left_out)


def find_checkpoints(
    paths: str | Path | Iterable[str | Path], *, pattern: str = "*.pt"
) -> list[Path]:
    """Expand files and folders to checkpoint files.

    Parameters
    ----------
    paths : path-like or iterable of path-like
        Files, taken as they are, and folders.
    pattern : str
        Which files of a folder, not of the folders in it.

    Returns
    -------
    list of Path
        Each file once. The files of a folder come in natural order, ``r2`` before ``r10``.

    Raises
    ------
    NotFoundError
        If no file of a folder matches.
    SchemaMismatchError
        If `pattern` is none.
    """
    found: list[Path] = []
    for path in _paths(paths):
        if not path.is_dir():
            found.append(path)
            continue
        matching = sorted(_matching(path, pattern), key=natural_order)
        if not matching:
            hint = hint_at_folders(path, pattern) + "".join(
                f"; {note}" for note in _almost_matching(path, pattern)
            )
            raise NotFoundError(f"{path}: no file matches {pattern!r}{hint}")
        found += matching
    return list(dict.fromkeys(found))


def _paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return what matches in a folder, but for folders; a link to nothing is reported as a file."""
    try:
        found = list(folder.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise SchemaMismatchError(
            f"pattern: expected one of file names such as node_*.pt, got {pattern!r}: {error}"
        ) from None
    return [path for path in found if not path.is_dir() and not hides(path.name, pattern)]


def _almost_matching(folder: Path, pattern: str) -> list[str]:
    """Return a note where names differ from `pattern` in case only, such as ``.PT``."""
    there = {path.name for path in _matching(folder, pattern)}
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if fnmatchcase(path.name.casefold(), pattern.casefold())
        and not (path.name in there or hides(path.name, pattern) or path.is_dir())
    ]
    if not others:
        return []
    count = "1 file" if len(others) == 1 else f"{len(others)} files"
    shown = " and ".join(others[:2]) if len(others) < 3 else f"such as {others[0]}"
    return [f"{count} by a name of another case left out: {shown} (pattern {pattern!r})"]


def hint_at_folders(folder: Path, pattern: str, store_name: str | None = None) -> str:
    """Return the names of the folders inside `folder` that have what is not in itself."""
    inner = [
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.is_dir()
        and not entry.name.endswith(".zarr")
        and (any(entry.glob(pattern)) or (store_name and (entry / store_name).is_dir()))
    ]
    return f" (but in its folders {', '.join(inner)}: name one)" if inner else ""


def import_checkpoints(
    store_path: str | Path,
    paths: str | Path | Iterable[str | Path],
    *,
    pattern: str = "*.pt",
    audio: bool = False,
    precision: Precision = "float32",
    if_exists: IfExists = "error",
    dry_run: bool = False,
    new_only: bool = False,
    round_from: RoundFrom | None = None,
    fail_fast: bool = False,
    other_experiment: bool = False,
    timeout: float = LOCK_TIMEOUT,
    on_file: Callable[[FileReport], None] | None = None,
) -> ImportReport:
    """Import checkpoint files, each as one commit; importing them again changes nothing.

    Caches of reference text embeddings, by their name, come last; see `read_text_cache`.

    Parameters
    ----------
    store_path : path-like
        The store; made from the first file with a complete record if it is not there.
    paths : path-like or iterable of path-like
        Files and folders, see `find_checkpoints`.
    pattern : str
        Which files of a folder.
    audio : bool
        Keep audio embeddings too.
    precision : {"float32", "bfloat16"}
        How a store that is made here keeps values. float64 values are rounded to float32.
    if_exists : {"error", "replace", "skip"}
        What becomes of records whose key the store has with other tensors. With ``"replace"`` a
        file stands for all of its node, round and splits: other records of those, as an earlier
        run left them, are deleted in the same commit.
    dry_run : bool
        Read and report, write nothing.
    new_only : bool
        Do not read files that the store has taken in as they are, see `Ledger`, and do not put
        back records that were deleted from it.
    round_from : {"name", "content"}, optional
        Which round counts where a file's name and its content tell different ones; by default
        such a file is refused.
    fail_fast : bool
        Stop at the first file that fails, and let a file fail of which a sample cannot be taken.
    other_experiment : bool
        Take files of another experiment than the store's, too. A file is of the experiment that
        the folder of its images names, or its own folder.
    timeout : float
        Seconds that each file waits for another writer.
    on_file : callable, optional
        Called with each file's report when it is done.

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
        If `audio` is asked for and the store has no column for it.
    BusyError
        If another writer holds the store for longer than `timeout`.
    """
    # Checkpoints first: they, not a cache that fits every kind, decide on a new store.
    given = _paths(paths)
    files = sorted(find_checkpoints(given, pattern=pattern), key=is_named_as_text_cache)
    wishes = _Wishes(
        audio,
        precision,
        if_exists,
        dry_run,
        new_only,
        round_from,
        fail_fast,
        other_experiment,
        timeout,
    )
    target = _Target(Path(store_path), files, wishes)
    target.check_experiments()
    reports: list[FileReport] = []
    for path in files:
        reports.append(target.take(path))
        if on_file is not None:
            on_file(reports[-1])
        if fail_fast and reports[-1].error is not None:
            break
    folders = (path for path in given if path.is_dir())
    notes = [
        f"{folder}: {note}" for folder in folders for note in _almost_matching(folder, pattern)
    ]
    return ImportReport(Path(store_path), tuple(reports), tuple(notes))


@dataclass(frozen=True)
class _Wishes:
    """The options of `import_checkpoints`."""

    audio: bool
    precision: Precision
    if_exists: IfExists
    dry_run: bool
    new_only: bool
    round_from: RoundFrom | None
    fail_fast: bool
    other_experiment: bool
    timeout: float


class _Target:
    """The store that files go into, made when the first good file is there."""

    def __init__(self, path: Path, files: Iterable[Path], wishes: _Wishes) -> None:
        self._path, self._files, self._wishes = path, files, wishes
        self._ledger = Ledger(path)
        self._groups: set[tuple[str, int, str]] = set()
        self._store = _open_if_there(path)
        self._schema = self._store.schema if self._store is not None else None
        name = self._schema.metadata.experiment if self._schema is not None else None
        self._experiment = Experiment(path, name, self._ledger, new=self._store is None)
        if wishes.audio and self._schema is not None and "audio" not in self._schema.columns:
            raise SchemaMismatchError(
                f"audio: expected a store with a column for it, got {path} with"
                f" {self._schema.describe()}"
            )

    def check_experiments(self) -> None:
        """Refuse files of another experiment, as far as one of each folder tells."""
        if not self._wishes.other_experiment:
            checkpoints = [path for path in self._files if not is_named_as_text_cache(path)]
            self._experiment.check_folders(checkpoints, new_only=self._wishes.new_only)

    def take(self, path: Path) -> FileReport:
        """Import one file, or report why not."""
        if not self._wishes.new_only:
            return self._read(path)
        known = FileReport(path, known=True)
        if self._ledger.knows(path):
            _log.info("%s: known, not read again", path)
            return known
        with self._ledger.turn(self._wishes.timeout):
            if self._ledger.knows(path):
                _log.info("%s: imported by another process meanwhile", path)
                return known
            return self._read(path)

    def _read(self, path: Path) -> FileReport:
        report = FileReport(path, bytes=_size(path))
        try:
            content = content_digest(path)
            checkpoint = self._opened(path)
            report = _headed(checkpoint)
            checkpoint.verify()
            report = self._import(checkpoint, report)
            if self._store is not None and not self._wishes.dry_run:
                node, number = checkpoint.node, checkpoint.round
                self._ledger.add(path, content, node=node, round=number)
            _log.info("%s: %s", path, _in_words(report))
            return report
        except BusyError:
            raise
        except (FedgfeStoreError, OSError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            notes = getattr(error, "__notes__", [])
            return replace(report, error="; ".join([reason, *notes]))

    def _opened(self, path: Path) -> Checkpoint:
        if not is_named_as_text_cache(path):
            return read_checkpoint(
                path, audio=self._wishes.audio, round_from=self._wishes.round_from
            )
        if self._schema is None:
            return read_text_cache(path)
        known = self._schema.metadata.classes
        return read_text_cache(path, kind=self._schema.kind, classes=known)

    def _import(self, checkpoint: Checkpoint, report: FileReport) -> FileReport:
        if not self._wishes.other_experiment and checkpoint.node != TEXT_NODE:
            self._experiment.check(checkpoint)
        schema = self._schema
        if schema is None and own_shapes(checkpoint):
            schema = self._new_schema(checkpoint)
        if schema is None:
            tally = _Tally(None, None, fail_fast=self._wishes.fail_fast)
            for _ in tally.watch(checkpoint.read()):
                pass
            return tally.on(report)
        if not self._wishes.dry_run:
            schema = self._made(schema).schema
        _check_fit(checkpoint, schema)
        deleted = None
        if self._wishes.new_only and self._store is not None:
            snapshot = Snapshot.latest(self._path)
            deleted = DeletedRecords(snapshot, checkpoint.node, checkpoint.round)
        tally = _Tally(schema, deleted, fail_fast=self._wishes.fail_fast)
        identities = Identities(checkpoint.node, checkpoint.round)
        samples = identities.watch(tally.watch(checkpoint.read(schema.columns)))
        if self._store is None or self._wishes.dry_run:
            self._schema = schema
            records = sum(1 for _ in samples)
            return tally.on(replace(report, records=records))
        moment = checkpoint.timestamp or _changed(checkpoint.path)
        with self._store.append(
            node=checkpoint.node,
            round=checkpoint.round,
            if_exists=self._wishes.if_exists,
            timeout=self._wishes.timeout,
            source=_source(checkpoint.path),
        ) as batch:
            for group in _groups(samples):
                batch.add(timestamp=moment, **_columns(group, old=self._store.id is None))
            if self._wishes.if_exists == "replace" and checkpoint.node != TEXT_NODE:
                for split in self._begun(checkpoint, tally.splits):
                    batch.supersede(node=checkpoint.node, round=checkpoint.round, split=split)
        self._schema = self._store.schema  # with the classes that the file brought
        report = replace(
            report, records=batch.added, replaced=batch.replaced, removed=batch.removed
        )
        report = replace(report, notes=(*report.notes, *identities.notes(self._store)))
        return tally.on(replace(report, unchanged=batch.skipped))

    def _begun(self, checkpoint: Checkpoint, splits: Iterable[str]) -> Iterator[str]:
        """Yield the splits of which this is the first file; another one adds to it."""
        for split in splits:
            group = checkpoint.node, checkpoint.round, split
            if group not in self._groups:
                self._groups.add(group)
                yield split

    def _new_schema(self, checkpoint: Checkpoint) -> Schema:
        audio = None
        if self._wishes.audio:  # the first file need not be one that has audio
            audio = next(filter(None, map(_audio_in, [checkpoint.path, *self._files])), None)
        return schema_with_audio(checkpoint, audio, self._wishes.precision)

    def _made(self, schema: Schema) -> EmbeddingStore:
        if self._store is None:
            try:
                self._store = EmbeddingStore.create(
                    self._path, schema, timeout=self._wishes.timeout
                )
            except ConflictError:  # another import made it meanwhile
                self._store = EmbeddingStore.open(self._path)
            self._schema = self._store.schema
        return self._store


class _Tally:
    """Counts samples by class, split and reason as they pass."""

    def __init__(
        self, schema: Schema | None, deleted: DeletedRecords | None, *, fail_fast: bool
    ) -> None:
        self._schema, self._deleted, self._fail_fast = schema, deleted, fail_fast
        self._classes: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._left_out: dict[str, list[str]] = {}

    def watch(self, items: Iterable[Entry | Skipped]) -> Iterator[Entry]:
        for item in items:
            if isinstance(item, Skipped):
                unnamed = item.what == "unknown"
                self._leave(f"entry {item.position}" if unnamed else item.what, item.reason)
            elif self._schema is None:
                self._leave(item.what, f"clip has shape {list(item.clip.shape)}, expected two axes")
            elif self._schema.precision == "bfloat16" and _beyond_bfloat16(item):
                self._leave(item.what, "values beyond bfloat16")
            elif self._deleted is not None and item in self._deleted:
                self._skipped["deleted from the store before"] += 1
            else:
                self._classes[item.class_name] += 1
                self._splits[item.split] += 1
                yield item

    @property
    def splits(self) -> list[str]:
        """Splits of which samples were taken."""
        return list(self._splits)

    def _leave(self, what: str, reason: str) -> None:
        if self._fail_fast:
            raise SchemaMismatchError(f"{what}: {reason}")
        self._skipped[reason] += 1
        self._left_out.setdefault(reason, []).append(what)

    def on(self, report: FileReport) -> FileReport:
        return replace(
            report,
            classes=dict(sorted(self._classes.items())),
            splits=dict(self._splits),
            skipped=dict(self._skipped),
            left_out={reason: tuple(what) for reason, what in self._left_out.items()},
        )


def _source(path: Path) -> str:
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


def _open_if_there(path: Path) -> EmbeddingStore | None:
    try:
        return EmbeddingStore.open(path)
    except NotFoundError:
        return None


def _in_words(report: FileReport) -> str:
    return (
        f"node {report.node}, round {report.round}: {report.records} new records,"
        f" {report.replaced} replaced, {report.unchanged} unchanged,"
        f" {sum(report.skipped.values())} skipped"
    )


def _headed(checkpoint: Checkpoint) -> FileReport:
    return FileReport(
        checkpoint.path,
        checkpoint.node,
        checkpoint.round,
        notes=checkpoint.notes,
        bytes=checkpoint.nbytes,
    )


def _check_fit(checkpoint: Checkpoint, schema: Schema) -> None:
    """Refuse a file none of whose complete samples fits the store."""
    own = own_shapes(checkpoint)
    if own and not own_shapes(checkpoint, schema.columns):
        got = ", ".join(f"{k} {list(shape)}" for k, shape in own[0].items() if k != "audio")
        raise SchemaMismatchError(
            f"{checkpoint.path}: expected tensors as in the store ({schema.describe()}), got"
            f" {checkpoint.kind}: {got}"
        )


def _audio_in(path: Path) -> tuple[int, int] | None:
    try:
        return audio_shape(read_checkpoint(path, audio=True))
    except FedgfeStoreError:  # reported when the file's turn comes
        return None


def _beyond_bfloat16(entry: Entry) -> bool:
    tensors = (entry.t5, entry.clip, entry.audio)
    return any(t is not None and np.abs(t.numpy()).max() > _LARGEST_BFLOAT16 for t in tensors)


def _groups(samples: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Gather samples to some 32 MiB; those with and without audio apart."""
    for _, alike in groupby(samples, key=lambda entry: entry.audio is None):
        group: list[Entry] = []
        size = 0
        for entry in alike:
            group.append(entry)
            size += sum(t.nbytes for t in (entry.t5, entry.clip, entry.audio) if t is not None)
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group


def _columns(group: list[Entry], *, old: bool) -> dict[str, Any]:
    """Return what `AppendBatch.add` takes; `old` stores have no column of their own for file_id."""
    names = ["split", "class_name", "index", "sample_id", "image_filename", "audio_path"]
    names += [] if old else ["file_id"]
    columns: dict[str, Any] = {name: [getattr(entry, name) for entry in group] for name in names}
    columns["extra"] = [
        {**entry.extra, "file_id": entry.file_id} if old and entry.file_id else entry.extra
        for entry in group
    ]
    for name in ("t5", "clip", "audio"):
        tensors = [getattr(entry, name) for entry in group]
        given = tensors[0] is not None
        columns[name] = np.stack([t.numpy() for t in tensors]) if given else None
    return columns


def hides(name: str, pattern: str) -> bool:
    """Whether a file is hidden from `pattern`, as a shell would have it: a store's lock, say."""
    return name.startswith(".") and not pattern.rpartition("/")[2].startswith(".")


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return what sorts files so that ``r2`` comes before ``r10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
