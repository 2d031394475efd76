"""One committed state of a store with one writer: key columns by chunks of Zarr arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store.common.filters import NUMBERS, matches_at
from fedgfe_store.common.location import Location, own_folder
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.key_chunks import KeyChunks
from fedgfe_store.storage.layout import KEY_CHUNK
from fedgfe_store.storage.metadata import Group
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.places import place_of
from fedgfe_store.storage.state import Filters, State


class Snapshot(State):
    """The store at `path` as its group `group` published it, seen at commit `as_of`.

    Key columns are read when first asked for, by chunks, and kept; tensors are not kept.
    """

    engine = "local"

    def __init__(
        self,
        path: Location,
        group: Group,
        as_of: int | None = None,
        *,
        place: Place | None = None,
    ) -> None:
        super().__init__(path, place or place_of(path), group, as_of)
        self.chunks = KeyChunks(path, self.place, group)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: another process, such as a DataLoader's, reads it anew."""
        return {"path": self.path, "group": self.group, "as_of": self.as_of, "place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def at(self, group: Group) -> Snapshot:
        """Return the same store as `group` published it, nothing read yet."""
        return Snapshot(self.path, group, place=self.place)

    def refreshed(self) -> Snapshot:
        """Return the latest state of the same store."""
        return self.at(Group.read(self.place))

    @property
    def root(self) -> Path:
        """The store's folder, for one who writes; SchemaMismatchError where it is none of ours."""
        return self.place.folder

    def check_writable(self) -> None:
        """Refuse a store that is not on this machine, or a state that was asked for by its commit.

        Raises
        ------
        SchemaMismatchError
            If it is one.
        """
        own_folder(self.path)
        self.check_latest()

    def commit_times(self) -> Mapping[int, int]:
        """Return when each commit up to this one was made, in milliseconds since 1970 UTC."""
        times = self.column("commit_time")[: self.commit].tolist()
        return dict(enumerate(times, 1))

    @cached_property
    def visible(self) -> np.ndarray:
        """Which rows hold a record at this commit, bool ``[records]``."""
        mask = _at(self, self.commit)
        latest = mask if self.commit == self.point.commit else _at(self, self.point.commit)
        if int(latest.sum()) != self.point.live:
            raise DamagedDataError(
                f"{self.path} is damaged: its commit marks show {int(latest.sum())} live records, "
                f"and commit {self.point.commit} published {self.point.live}"
            )
        return mask

    @property
    def live(self) -> int:
        """Number of records at this commit; of the latest one nothing is read for it."""
        # Marks of version 1 have no digests: that they come to the published number tells damage.
        if self.group.version == 1 or self.commit != self.point.commit:
            return int(self.visible.sum())
        return self.point.live

    def rows_matching(self, filters: Filters, *, deleted: bool = False) -> np.ndarray:
        """Return the rows of the records at this commit that meet every filter, ascending."""
        chunks = self.group.zones.may_hold(filters)
        # From a server, all at once: what a filter leaves out costs less than waiting in turn.
        starts = np.array(chunks, np.int64) * KEY_CHUNK
        self.fetch(("created_in", "deleted_in", *filters), starts)
        if self.group.version == 1:
            _ = self.visible  # for its check, which is all that there is
        # Numbers first: they are compared faster, and text only where they leave any.
        ordered = sorted(filters.items(), key=lambda each: each[0] in NUMBERS, reverse=True)
        found = [np.empty(0, np.int64)]
        for number in chunks:
            places = np.flatnonzero(self._written(number, deleted=deleted))
            for name, wanted in ordered:
                if len(places):
                    values = self.chunks.chunk(name, number)
                    places = places[matches_at(values, places, wanted)]
            found.append(number * KEY_CHUNK + places)
        return np.concatenate(found)

    def _written(self, number: int, *, deleted: bool) -> np.ndarray:
        """Return which rows of a key chunk hold a record at this commit, or held one before it."""
        created = self.chunks.chunk("created_in", number)
        if deleted:
            return (created > 0) & (created <= self.commit)
        return _alive(created, self.chunks.chunk("deleted_in", number), self.commit)

    def column(self, name: str) -> np.ndarray:
        """Return the whole key column `name`, skipped and deleted rows included."""
        return self.chunks.column(name)

    def column_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the key column `name` at `rows`, reading only the chunks that hold them."""
        return self.chunks.column_at(name, rows)

    def fetch(self, names: Iterable[str], rows: np.ndarray | None = None) -> None:
        """Read chunks of key columns that will be asked for, where each one asks a server."""
        self.chunks.fetch(names, rows)

    def extended(
        self,
        group: Group,
        chunks: Mapping[tuple[str, int], np.ndarray],
        packed: Mapping[tuple[str, int], bytes],
    ) -> Snapshot:
        """Return the state that `group` published by writing `chunks` of key columns.

        Chunks of key columns that are known stay known, so that a long-lived writer reads none.
        """
        new = self.at(group)
        new.chunks.follow(self.chunks, chunks, packed)
        return new

    def mend(self, chunks: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Show `chunks` of key columns in place of what their files hold."""
        self.chunks.mend(chunks)
        self.__dict__.pop("visible", None)


def _at(snapshot: Snapshot, commit: int) -> np.ndarray:
    snapshot.fetch(("created_in", "deleted_in"))
    return _alive(snapshot.column("created_in"), snapshot.column("deleted_in"), commit)


def _alive(created: np.ndarray, deleted: np.ndarray, commit: int) -> np.ndarray:
    """Return which rows hold a record at `commit`, bool ``[n]``."""
    alive: np.ndarray = (created > 0) & (created <= commit)
    if deleted.any():
        alive &= (deleted <= 0) | (deleted > commit)
    return alive
