"""What became of files that were imported, and of the samples in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fedgfe_store.checkpoints.earlier import DeletedRecords
from fedgfe_store.checkpoints.entries import Skipped
from fedgfe_store.checkpoints.reading import Checkpoint
from fedgfe_store.checkpoints.samples import Entry
from fedgfe_store.common.location import Location
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema

_LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max


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
    store_path : Path or Address
        The store.
    files : tuple of FileReport
        One each, up to the first that failed where `fail_fast` was asked for.
    notes : tuple of str
        What is odd about the folders.
    """

    store_path: Location
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


class Tally:
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
        """Yield the samples that a store of the schema can take, counting all.

        Raises
        ------
        SchemaMismatchError
            If one cannot be taken, with `fail_fast`.
        """
        for item in items:
            if isinstance(item, Skipped):
                unnamed = item.what == "unknown"
                self._leave(f"entry {item.position}" if unnamed else item.what, item.reason)
            elif self._schema is None:
                shapes = ", ".join(f"{k} has shape {[*t.shape]}" for k, t in item.tensors.items())
                self._leave(item.what, f"{shapes}, expected two axes")
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
        """Return `report` with what was counted."""
        return replace(
            report,
            classes=dict(sorted(self._classes.items())),
            splits=dict(self._splits),
            skipped=dict(self._skipped),
            left_out={reason: tuple(what) for reason, what in self._left_out.items()},
        )


def _beyond_bfloat16(entry: Entry) -> bool:
    tensors = [t.numpy() for t in entry.tensors.values() if t.is_floating_point()]
    return any(np.abs(values).max(initial=0) > _LARGEST_BFLOAT16 for values in tensors)


def headed(checkpoint: Checkpoint) -> FileReport:
    """Return the report on a file of which the samples are still to be read."""
    return FileReport(
        checkpoint.path,
        checkpoint.node,
        checkpoint.round,
        notes=checkpoint.notes,
        bytes=checkpoint.nbytes,
    )


def in_words(report: FileReport) -> str:
    """Return a report as a line of the log."""
    return (
        f"node {report.node}, round {report.round}: {report.records} new records,"
        f" {report.replaced} replaced, {report.unchanged} unchanged,"
        f" {sum(report.skipped.values())} skipped"
    )
