"""Checkpoint files as names for records, whether the files are there or training wrote a store."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store.checkpoints.ledger import Ledger
from fedgfe_store.checkpoints.listing import (
    hides,
    hint_at_folders,
    is_named_as_text_cache,
    natural_order,
)
from fedgfe_store.checkpoints.report import FileReport
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.names import STORE_NAME, Origin, checkpoint_name, checkpoint_origin
from fedgfe_store.records import TEXT_NODE
from fedgfe_store.selection import Selection
from fedgfe_store.store import EmbeddingStore


@dataclass(frozen=True)
class Sources:
    """Checkpoint files, named or in a folder, that stand for the records in them.

    A record counts as of the file that it would have had, `node_0_embeddings_r5.pt` for node 0
    at round 5 and `server_embeddings_r5.pt` for the server. A file of another name, or with
    another content, stands for what it says that it holds, once a store has taken it in.

    Parameters
    ----------
    files : tuple of Path
        Files by name.
    folder : Path, optional
        A folder, whose files count that match `pattern`.
    pattern : str
        Such as ``node_[0-4]*.pt``; hidden files match only where it begins with a dot.
    """

    files: tuple[Path, ...] = ()
    folder: Path | None = None
    pattern: str = "*.pt"

    @property
    def store_path(self) -> Path:
        """The store among the checkpoints: ``embeddings.zarr`` in their folder.

        Raises
        ------
        SchemaMismatchError
            If they lie in several folders.
        """
        folders = {file.parent.resolve(): file.parent for file in self.files}
        if self.folder is not None:
            folders[self.folder.resolve()] = self.folder
        if len(folders) != 1:
            listed = ", ".join(map(str, folders.values())) or "none"
            raise SchemaMismatchError(f"checkpoints: expected files of one folder, got {listed}")
        return next(iter(folders.values())) / STORE_NAME

    def present(self) -> list[Path]:
        """Return the files that are there, those of the folder in natural order."""
        named = [f for f in dict.fromkeys(self.files) if f.exists() or f.is_symlink()]
        if self.folder is None or not self.folder.is_dir():
            return named
        found = (p for p in self.folder.iterdir() if self._matches(p.name) and not p.is_dir())
        return [
            *named,
            *sorted((p for p in found if not is_named_as_text_cache(p)), key=natural_order),
        ]

    def _matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern) and not hides(name, self.pattern)

    def origins(self, store: EmbeddingStore) -> set[Origin]:
        """Return the nodes and rounds in `store` that the files stand for.

        Raises
        ------
        NotFoundError
            If a named file is neither there nor has records in the store, or nothing matches.
        """
        ledger = Ledger(store.path)
        stored = store.select().by_node_and_round().keys()
        by_file = {file: origins_of(file, ledger) & stored for file in self.files}
        for file, found in by_file.items():
            if not found and not file.exists():
                raise NotFoundError(
                    f"{file}: no such file, and no record of it in {store.location}"
                )
        inside = self._in_folder(stored, ledger)
        if self.folder is not None and not inside and not self.present():
            raise NotFoundError(
                f"{self._nothing()}, and no record of such a file in {store.location}"
            )
        return inside.union(*by_file.values())

    def _in_folder(self, stored: Set[Origin], ledger: Ledger) -> set[Origin]:
        if self.folder is None:
            return set()
        files = {
            o: checkpoint_name(*o) for o in stored if o[0] != TEXT_NODE
        }  # it has no checkpoint
        named = {origin for origin, name in files.items() if self._matches(name)}
        lines = [(ledger.path_of(line), line) for line in ledger.lines().values()]
        said = {
            (line.node, line.round)
            for file, line in lines
            if file.parent == self.folder.resolve() and self._matches(file.name)
        }
        return named | (said & stored)

    def open_store(self, path: Path, *, as_of: int | None = None) -> EmbeddingStore:
        """Open the store at `path`; if it is not there, say which files are not there either.

        Raises
        ------
        NotFoundError
            If there is no store, or no such commit.
        """
        try:
            return EmbeddingStore.open(path, as_of=as_of)
        except NotFoundError as error:
            if self.present():
                raise
            what = self._nothing() if self.folder else f"{self.files[0]}: no such file"
            raise NotFoundError(f"{what}, and {error}") from None

    def _nothing(self) -> str:
        assert self.folder is not None
        if not self.folder.is_dir():
            return f"{self.folder}: no such folder"
        hint = hint_at_folders(self.folder, self.pattern, STORE_NAME)
        return f"{self.folder}: no file matches {self.pattern!r}{hint}"


def origins_of(file: Path, ledger: Ledger) -> set[Origin]:
    """Return node and round that a file had when it was taken in, else those of its name."""
    line, named = ledger.line_of(file), checkpoint_origin(file.name)
    if line is not None:
        return {(line.node, line.round)}
    return set() if named is None else {named}


def find_new(store_path: Path, sources: Sources) -> list[Path]:
    """Return the files of `sources` that the store at `store_path` has not taken in as they are."""
    ledger = Ledger(store_path)
    return [file for file in sources.present() if not ledger.knows(file)]


def select_records(
    store: EmbeddingStore,
    sources: Sources,
    *,
    failed: Iterable[FileReport] = (),
    **filters: Any,
) -> Selection:
    """Return the records that checkpoint files stand for.

    Parameters
    ----------
    store : EmbeddingStore
        The store that has them.
    sources : Sources
        The files.
    failed : iterable of FileReport
        Files that could not be imported: what they stand for is left out.
    **filters
        As in `EmbeddingStore.select`, to narrow it further.

    Returns
    -------
    Selection
        Exactly the records of those nodes and rounds, in the store's order.

    Raises
    ------
    NotFoundError
        As for `Sources.origins`.
    """
    wanted = sources.origins(store)
    ledger = Ledger(store.path)
    for report in failed:
        wanted -= {(report.node, report.round), *origins_of(report.path, ledger)}
    selection = store.select(**filters)
    groups = selection.by_node_and_round()
    positions = [at for origin, at in groups.items() if origin in wanted]
    return selection.take(np.sort(np.concatenate([np.empty(0, np.int64), *positions])))
