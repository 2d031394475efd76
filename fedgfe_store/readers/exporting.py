"""Records as files of other formats: one for each node and round, each whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from fedgfe_store.common.words import numbers_first
from fedgfe_store.errors import ConflictError, DamagedDataError, SchemaMismatchError
from fedgfe_store.names import Origin, checkpoint_names
from fedgfe_store.rows import Rows
from fedgfe_store.schema import Schema, TensorColumn
from fedgfe_store.storage import files

R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class ExportedFile:
    """What became of one file.

    Parameters
    ----------
    path : Path
        The file.
    node : str
        Its node.
    round : int
        Its round.
    records : int
        Records in it.
    bytes : int
        Size of the file; 0 where it was not written.
    notes : tuple of str
        What its layout has no place for.
    error : str or None
        Why it was not written.
    """

    path: Path
    node: str
    round: int
    records: int
    bytes: int = 0
    notes: tuple[str, ...] = ()
    error: str | None = None


def export(
    rows: R,
    folder: Path,
    suffix: str,
    write: Callable[[R, Origin, BinaryIO], Iterable[str]],
    *,
    overwrite: bool = False,
    on_file: Callable[[ExportedFile], object] | None = None,
) -> tuple[ExportedFile, ...]:
    """Write a file for each node and round, by round and node.

    Each takes its place in one step when it is on the disk. One with a damaged record is reported
    and not written.

    Parameters
    ----------
    rows : Rows
        The records.
    folder : Path
        Where the files go; made if it is not there.
    suffix : str
        How their names end: ``node_0_embeddings_r5`` and this.
    write : callable
        Writes the records of a node and round into a file, and returns notes about it.
    overwrite : bool
        Replace files that are there already.
    on_file : callable, optional
        Called with each file's report when it is done.

    Raises
    ------
    ConflictError
        If files are there already, without `overwrite`; nothing is written then.
    """
    groups = rows.by_node_and_round()
    # In natural order, each in the store's.
    order = sorted(groups, key=lambda group: (group[1], numbers_first(group[0])))
    names = checkpoint_names(order)
    paths = {origin: (folder / name).with_suffix(suffix) for origin, name in names.items()}
    there = [path for path in paths.values() if path.exists()]
    if there and not overwrite:
        raise ConflictError(
            f"{folder}: {len(there)} of {len(paths)} files are there already, such as "
            f"{there[0].name}; overwrite them, or use another folder"
        )
    files.make_folders(folder.absolute())
    written = []
    for origin in order:
        part = rows.take(groups[origin])
        written.append(_export(part, origin, paths[origin], write))
        if on_file is not None:
            on_file(written[-1])
    return tuple(written)


def _export(
    part: R, origin: Origin, path: Path, write: Callable[[R, Origin, BinaryIO], Iterable[str]]
) -> ExportedFile:
    node, number = origin
    try:
        with files.replacing(path) as file:
            notes = tuple(write(part, origin, file))
    except DamagedDataError as error:
        return ExportedFile(path, node, number, len(part), error=str(error))
    return ExportedFile(path, node, number, len(part), path.stat().st_size, notes)


def exported_columns(schema: Schema, names: Sequence[str] | None) -> list[TensorColumn]:
    """Return the tensor columns that were asked for, by default all.

    Raises
    ------
    SchemaMismatchError
        If there is no such column, or no list of them is given.
    """
    if isinstance(names, str):
        raise SchemaMismatchError(f"tensors: expected a list of columns, got {names!r}")
    if names is None:
        return list(schema.tensors)
    return [schema.column(name) for name in dict.fromkeys(names)]
