"""The embedding store: create, open, append, select."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np

from fedgfe_store.common.filters import check_names
from fedgfe_store.common.location import Given, location
from fedgfe_store.common.words import is_whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema
from fedgfe_store.selection import Selection
from fedgfe_store.storage.append import AppendBatch
from fedgfe_store.storage.engine import LOCK_TIMEOUT
from fedgfe_store.storage.engines import create, engine_of, latest
from fedgfe_store.storage.sifting import IfExists
from fedgfe_store.storage.state import State
from fedgfe_store.storage.upkeep import Upkeep
from fedgfe_store.storage.writing import Change, committed


class EmbeddingStore(Upkeep):
    """Embeddings of one experiment: one ordinary Zarr v3 group in a folder, or behind a URL.

    Made by `EmbeddingStore.create` or `EmbeddingStore.open`. An open store shows the commit
    that was the latest when it was opened, or that it has itself written since, until `refresh`.
    """

    def __init__(self, snapshot: State) -> None:
        if not isinstance(snapshot, State):
            raise SchemaMismatchError(
                f"expected EmbeddingStore.open(path) or EmbeddingStore.create(path, schema), "
                f"got EmbeddingStore({snapshot!r})"
            )
        self._snapshot = snapshot
        self._engine = engine_of(snapshot)

    @classmethod
    def create(
        cls, path: Given, schema: Schema, *, shared: bool = False, timeout: float = LOCK_TIMEOUT
    ) -> EmbeddingStore:
        """Make an empty store at `path`.

        Parameters
        ----------
        path : path-like
            A folder that does not exist yet, or an empty one; of a shared store also a URL, such
            as ``s3://bucket/folder``.
        schema : Schema
            What its records look like.
        shared : bool
            Let many processes and machines write at once, without any lock (extra ``cloud``);
            otherwise one writes while others wait.
        timeout : float
            Seconds to wait for another process that is making it.

        Raises
        ------
        ConflictError
            If something else is there.
        BusyError
            If another process holds the store for longer than `timeout`.
        """
        create(location(path), schema, shared=shared, timeout=timeout)
        return cls.open(path)

    @classmethod
    def open(cls, path: Given, *, as_of: int | None = None) -> EmbeddingStore:
        """Open the store at `path`.

        Parameters
        ----------
        path : path-like or str
            The store's folder; or its URL: ``s3://bucket/folder``, ``az://``, ``gs://`` or
            ``https://`` (extra ``cloud``), where shared stores alone can be written.
        as_of : int, optional
            See the store as this commit left it; such a store cannot be appended to.

        Raises
        ------
        NotFoundError
            If there is no store, or no such commit.
        SchemaMismatchError
            If the store is of a newer format, or `as_of` is no whole number.
        DamagedDataError
            If its ``zarr.json`` is damaged.
        ConnectionError
            If the server of a URL does not answer, or refuses.
        """
        if as_of is not None and not is_whole(as_of):
            raise SchemaMismatchError(f"as_of: expected the number of a commit, got {as_of!r}")
        return cls(latest(location(path), as_of))

    @classmethod
    def create_from(
        cls,
        path: Given,
        selection: Selection,
        *,
        shared: bool = False,
        timeout: float = LOCK_TIMEOUT,
        progress: Callable[[int], object] = lambda records: None,
    ) -> EmbeddingStore:
        """Make a store of some records of another one, see `Selection.to_store`, and open it."""
        if not isinstance(selection, Selection):
            raise SchemaMismatchError(
                f"create_from: expected a selection, such as store.select(round=5), "
                f"got {selection!r}"
            )
        selection.to_store(path, shared=shared, timeout=timeout, progress=progress)
        return cls.open(path)

    @property
    def schema(self) -> Schema:
        """What the records look like."""
        return self._snapshot.schema

    @property
    def id(self) -> str | None:
        """What tells this store from every other one; None in format version 1."""
        return self._snapshot.group.id

    @property
    def snapshot(self) -> State:
        """The committed state that the store shows, for the package's own rooms."""
        return self._snapshot

    def __len__(self) -> int:
        """Return the number of records."""
        return self._snapshot.live

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"<EmbeddingStore {self.location}: {len(self)} records, commit {self.commit}, "
            f"{self.schema.describe()}, {self.schema.precision}>"
        )

    def _repr_html_(self) -> str:
        from fedgfe_store.readers.html import store_html

        return store_html(self.select(), self._snapshot)

    def refresh(self) -> None:
        """See the latest commit."""
        self._snapshot = self._snapshot.refreshed()

    def append(
        self,
        *,
        node: str | int | None = None,
        round: int | None = None,
        if_exists: IfExists = "error",
        encoder: str | None = None,
        source: str | None = None,
        timeout: float = LOCK_TIMEOUT,
    ) -> AppendBatch:
        """Open a batch of records that becomes one commit when its block ends.

        Parameters
        ----------
        node, round : optional
            Node and round of the records, unless `AppendBatch.add` says otherwise.
        if_exists : {"error", "replace", "skip"}
            What to do with a key that the store has already. Under ``"error"`` a record with
            the same tensors is left out, and one with other tensors refuses the whole commit.
        encoder : str, optional
            Fingerprint of the text encoders that these embeddings imitate; one that differs from
            the store's is refused.
        source : str, optional
            Where the records come from, which `history` shows; a store of format version 1 does
            not keep it.
        timeout : float
            Seconds to wait for another writer.

        Returns
        -------
        AppendBatch
            A context; nothing is committed if its block raises.

        Raises
        ------
        ConflictError
            On exit, if a record conflicts with one in the store.
        BusyError
            If another writer holds the store for longer than `timeout`.

        Examples
        --------
        >>> with store.append(node=0, round=5) as batch:  # doctest: +SKIP
        ...     batch.add(split="train", class_name="dog", index=0, t5=t5, clip=clip)
        """
        self._snapshot.check_writable()
        schema = self.schema
        if encoder is not None and encoder != (schema.metadata.encoder or encoder):
            raise SchemaMismatchError(
                f"encoder: expected {schema.metadata.encoder!r} as in {self.location}, "
                f"got {encoder!r}"
            )
        return AppendBatch(
            self._snapshot,
            begin=lambda known: self._engine.begin(known, timeout=timeout),
            node=node,
            round=round,
            if_exists=if_exists,
            source=source,
            done=self._see,
        )

    def _see(self, snapshot: State) -> None:
        self._snapshot = snapshot

    def select(
        self,
        *,
        node: Any = None,
        round: Any = None,
        split: Any = None,
        class_name: Any = None,
        index: Any = None,
        sample_id: Any = None,
        file_id: Any = None,
        per_class: int | None = None,
    ) -> Selection:
        """Return the records that meet every filter; no tensor is read.

        Negative embeddings, which `generate` keeps as node ``text`` and split ``negative``, are
        of no class and no sample: only a filter of the split finds them.

        Parameters
        ----------
        node, round, split, class_name, index, sample_id, file_id : scalar, list or range, optional
            Wanted values; by default all. An empty list wants nothing.
        per_class : int, optional
            Keep only this many records, those of the lowest index, for each node, round, split
            and class.

        Returns
        -------
        Selection
            Records in the order in which they lie in the store.

        Raises
        ------
        SchemaMismatchError
            If a filter is of the wrong type.
        """
        filters = {
            "node": node,
            "round": round,
            "split": split,
            "class_name": class_name,
            "index": index,
            "sample_id": sample_id,
            "file_id": file_id,
        }
        wanted = {name: value for name, value in filters.items() if value is not None}
        return Selection.of(self._snapshot, wanted, per_class=per_class)

    def delete(self, *, timeout: float = LOCK_TIMEOUT, **filters: Any) -> int:
        """Delete the records that meet every filter, in one commit.

        They stay visible to readers of an older commit (``as_of``) until `compact`.

        Parameters
        ----------
        timeout : float
            Seconds to wait for another writer.
        **filters
            As in `select`; at least one.

        Returns
        -------
        int
            Records deleted; with none there is no commit.

        Raises
        ------
        SchemaMismatchError
            If no filter is given, or there is none of that name, or one is of the wrong type.
        BusyError
            If another writer holds the store for longer than `timeout`.
        """
        check_names(filters, signature(self.select).parameters)
        wanted = {name: value for name, value in filters.items() if value is not None}
        if not wanted:
            raise SchemaMismatchError("delete: expected at least one filter, got none")
        per_class = wanted.pop("per_class", None)
        found = np.empty(0, np.int64)

        def change(latest: State) -> Change | None:
            # Selected anew in what is the latest state now: others may have written since this
            # store was opened.
            nonlocal found
            found = Selection.of(latest, wanted, per_class=per_class).rows
            return Change("delete", found, np.empty(0, np.int64)) if len(found) else None

        with self._engine.begin(self._snapshot, timeout=timeout) as writing:
            self._snapshot = committed(writing, change)
        return len(found)

    def merge(
        self,
        source: EmbeddingStore,
        *,
        if_exists: IfExists = "error",
        timeout: float = LOCK_TIMEOUT,
        progress: Callable[[int], object] = lambda records: None,
    ) -> AppendBatch:
        """Append the live records of another store, in one commit.

        Parameters
        ----------
        source : EmbeddingStore
            A store of the same kind and shapes; its precision may differ.
        if_exists : {"error", "replace", "skip"}
            What to do with a key that this store has already, see `append`.
        timeout : float
            Seconds to wait for another writer.
        progress : callable
            Called with the number of records just read.

        Returns
        -------
        AppendBatch
            The closed batch: ``added``, ``replaced`` and ``skipped``.

        Raises
        ------
        SchemaMismatchError
            If the stores do not fit; both schemas are shown.
        ConflictError
            If a record conflicts; nothing is committed.
        """
        if not isinstance(source, EmbeddingStore):
            raise SchemaMismatchError(
                f"merge: expected an EmbeddingStore, such as EmbeddingStore.open(path), "
                f"got {source!r}"
            )
        self._snapshot.check_writable()
        self.schema.check_fits(source.schema, f"{source.location}")
        selection = Selection.whole(source.snapshot)
        same_bits = self.schema.precision == source.schema.precision
        origin = f"merge of {source.schema.metadata.experiment or source.location.name}"
        with self.append(if_exists=if_exists, source=origin, timeout=timeout) as batch:
            # Digests compare records in one precision only; "skip" compares keys alone.
            if same_bits or if_exists == "skip":
                fresh = batch.unknown(selection.known_columns())
                progress(len(selection) - len(fresh))
                selection = selection.take(fresh)
            for records in selection.pieces():
                batch.add_records(records)
                progress(len(records))
        return batch
