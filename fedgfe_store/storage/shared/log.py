"""The Delta table of a store: which files its commits added, and the one step that commits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, Transaction

from fedgfe_store.common.location import Address, Location
from fedgfe_store.errors import ConflictError, DamagedDataError, SchemaMismatchError
from fedgfe_store.schema import Schema
from fedgfe_store.storage.place import Place, RemoteError
from fedgfe_store.storage.shared.facts import BOUNDED, Facts, KeyFile
from fedgfe_store.storage.shared.key_table import PARTITIONS, TABLE, table_schema

_CHECKPOINT_COMMITS = 50
"""Commits between two checkpoints of the log: a reader asks for each commit since the last one."""
_OURS = "WRITE"
"""What Delta calls our commits."""
_REMOTE = re.compile(
    r"error sending request|Generic \w+ error|timed? ?out|connection", re.IGNORECASE
)
T = TypeVar("T")
_users: set[int] = set()


class Log:
    """The table of the store at `location`, as it was when it was last refreshed."""

    def __init__(self, location: Location) -> None:
        self._location, self._process = location, os.getpid()
        self._table = self.ask(
            lambda: DeltaTable(_uri(location), storage_options=_options(location))
        )

    @staticmethod
    def create(location: Location, schema: Schema) -> None:
        """Make the table, unless there is an empty one of the same columns, as of a dead maker."""
        _check_process()
        # Another one may have made it; or this one, whose answer was lost.
        with contextlib.suppress(CommitFailedError):
            _asked(location, lambda: _make(location, schema))
        told = _asked(
            location, lambda: DeltaTable(_uri(location), storage_options=_options(location))
        )
        if told.version() != 0 or _names(told) != set(table_schema(schema).names):
            raise ConflictError(
                f"cannot make a store at {location}: the folder holds another table ({TABLE})"
            )

    def ask(self, function: Callable[[], T]) -> T:
        """Call a function of the library, with our errors."""
        if os.getpid() != self._process:
            raise _forked(self._location)
        _check_process()
        return _asked(self._location, function)

    @property
    def version(self) -> int:
        """Number of the latest entry of the log."""
        return int(self._table.version())

    def refresh(self) -> None:
        """See what was committed since."""
        self.ask(self._table.update_incremental)

    def made_in(self, token: str) -> int | None:
        """Return the commit that the writer `token` has made, None if it made none."""
        found: int | None = self.ask(lambda: self._table.transaction_version(token))
        return found

    def files(self) -> tuple[KeyFile, ...]:
        """Return the files that the latest entry refers to, in the order of their commits.

        Raises
        ------
        DamagedDataError
            If an entry is not what was committed.
        """
        table = self.ask(lambda: pa.table(self._table.get_add_actions(flatten=True)))
        found = [self._file(row) for row in table.to_pylist()]
        return tuple(sorted(found, key=lambda file: (file.commit, file.path)))

    def _file(self, row: Mapping[str, Any]) -> KeyFile:
        bounds = {n: (row.get(f"min.{n}"), row.get(f"max.{n}")) for n in BOUNDED}
        file = KeyFile(
            path=row["path"],
            size=row["size_bytes"],
            n=row["num_records"],
            unmarked=row.get("null_count.deleted_in"),  # type: ignore[arg-type]
            part=row["partition.part"],
            commit=row["partition.commit"],
            about=row["partition.about"],
            bounds={name: pair for name, pair in bounds.items() if pair[0] is not None},
        )
        if row["partition.sum"] != file.checksum:
            raise self.damaged(f"the entry of {file.path} is not what was committed")
        return file

    def damaged(self, what: str) -> DamagedDataError:
        """Return the error of a log of which `what` is wrong."""
        return DamagedDataError(f"{self._location}/{TABLE} is damaged: {what}")

    def foreign_since(self, version: int) -> bool:
        """Whether all entries after `version` are upkeep by another tool, such as a vacuum."""
        n = self.version - version
        told = self.ask(lambda: self._table.history(n))
        return len(told) == n and all(entry.get("operation") != _OURS for entry in told)

    def commit(self, token: str, added: Sequence[KeyFile], removed: Sequence[KeyFile]) -> bool:
        """Add and remove files in one step, as the entry after `version`.

        Parameters
        ----------
        token : str
            Of the writer, who makes one commit: by it `made_in` finds that, also where the
            answer was lost.
        added, removed : sequence of KeyFile
            The files.

        Returns
        -------
        bool
            False where there is an entry of that number, which may be this very one.

        Raises
        ------
        ConnectionError
            If no answer came.
        """
        number = self.version + 1
        actions: list[AddAction | RemoveAction] = [*map(_adding, added)]
        actions += map(_removing, removed)
        # Never as another entry than this one: the files' entries hold its number.
        properties = CommitProperties(
            max_commit_retries=0, app_transactions=[Transaction(token, number)]
        )
        try:
            self.ask(
                lambda: self._table.create_write_transaction(
                    actions,
                    "append",
                    self._table.schema(),
                    partition_by=list(PARTITIONS),
                    commit_properties=properties,
                )
            )
        except CommitFailedError:
            return False
        return True

    def expired(self, hours: float) -> set[str]:
        """Return files of the table to which nothing has referred for so many hours."""
        found = self.ask(
            lambda: self._table.vacuum(
                retention_hours=int(hours),
                dry_run=True,
                enforce_retention_duration=False,
                full=True,
            )
        )
        return set(found)

    def replaced(self) -> set[str]:
        """Return files in whose place another one was put, and that readers may still use."""
        options: dict[str, Any] = {"dry_run": True, "enforce_retention_duration": False}
        return set(self.ask(lambda: self._table.vacuum(retention_hours=0, **options)))


def _adding(file: KeyFile) -> AddAction:
    stats = {
        "numRecords": file.n,
        "minValues": {name: low for name, (low, _) in file.bounds.items()},
        "maxValues": {name: high for name, (_, high) in file.bounds.items()},
        "nullCount": {"deleted_in": file.unmarked},
    }
    return AddAction(
        path=file.path,
        size=file.size,
        partition_values=_partition(file),
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps(stats, ensure_ascii=False),
    )


def _removing(file: KeyFile) -> RemoveAction:
    now = int(time.time() * 1000)
    return RemoveAction(file.path, True, now, file.size, _partition(file))


def _partition(file: KeyFile) -> dict[str, str | None]:
    values = (str(file.commit), file.part, file.about, file.checksum)
    return dict(zip(PARTITIONS, values, strict=True))


def latest_facts(files: Sequence[KeyFile]) -> dict[int, Facts]:
    """Return the facts of the commits whose files stand in the log."""
    return {file.commit: Facts.parse(file.about) for file in files}


def _make(location: Location, schema: Schema) -> None:
    DeltaTable.create(
        _uri(location),
        table_schema(schema),
        mode="ignore",
        partition_by=list(PARTITIONS),
        name="fedgfe-store",
        configuration={
            "delta.checkpointInterval": str(_CHECKPOINT_COMMITS),
            "delta.setTransactionRetentionDuration": "interval 30 days",
        },
        storage_options=_options(location),
        commit_properties=CommitProperties(max_commit_retries=0),
    )


def same_anywhere(location: Location, place: Place) -> Location:
    """Return `location` so that it means the same in any working directory."""
    return location if isinstance(location, Address) else place.folder


def _uri(location: Location) -> str:
    return f"{location}/{TABLE}"


def _options(location: Location) -> dict[str, str]:
    if not isinstance(location, Address):
        return {}
    if location.url.startswith("http"):
        raise SchemaMismatchError(
            f"{location}: a shared store is read from a folder or an object store, "
            f"not from a web server"
        )
    return {"max_retries": "8", "retry_timeout": "60s"}


def _names(table: DeltaTable) -> set[str]:
    return {field.name for field in table.schema().fields}


def _check_process() -> None:
    # Its threads stay in the process that called it first; in a fork of that it would hang.
    _users.add(os.getpid())
    if len(_users) > 1:
        raise _forked(None)


def _forked(location: Location | None) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"{location or 'a shared store'} cannot be opened or written in a process that was forked "
        f"from one that has used such a store: start it by 'spawn'"
    )


def _asked(location: Location, function: Callable[[], T]) -> T:
    try:
        return function()
    except CommitFailedError:
        raise
    except TableNotFoundError:
        raise DamagedDataError(f"{location}/{TABLE} is missing or has no log") from None
    except BaseException as error:
        # Panics of the library are no Exception; what a damaged log makes it raise has any type.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:300]
        if isinstance(location, Address) and _REMOTE.search(told):
            raise RemoteError(f"{location}/{TABLE} cannot be read or written: {told}") from None
        raise DamagedDataError(f"{location}/{TABLE} cannot be read: {told}") from error
