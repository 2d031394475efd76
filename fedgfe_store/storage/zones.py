"""Zone maps: the rounds and nodes in each chunk of the key columns, so that others are not read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Self

import numpy as np

from fedgfe_store.common.filters import matches
from fedgfe_store.common.words import is_utf8, shown

# A federation has up to some hundred nodes. Of more, and of longer names, a chunk's rounds tell as
# much, since one round fills it; each commit writes `zarr.json`, which must not grow with them.
MOST_NODES, _MOST_TEXT = 1024, 2**16
"""How many names of nodes are kept for the zone maps, and their characters."""
COLUMNS = ("created_in", "round", "node")
"""Key columns that zone maps are of."""


@dataclass(frozen=True)
class Zone:
    """What the records of one key chunk are of, deleted ones included.

    Parameters
    ----------
    first, last : int
        Least and greatest round; `last` is the lesser where there is no record.
    nodes : int or None
        A bit for each name of `Zones.nodes`, the first is 1; None for any nodes.
    """

    first: int
    last: int
    nodes: int | None

    def may_hold(self, rounds: Sequence[tuple[int, int]] | None, nodes: int | None) -> bool:
        """Whether a record may be of these rounds and nodes, None for any.

        Parameters
        ----------
        rounds : sequence of (int, int), optional
            First and last of runs of rounds, ascending and apart.
        nodes : int, optional
            Bits as in `Zone.nodes`.
        """
        if self.first > self.last:
            return False
        if nodes is not None and self.nodes is not None and not nodes & self.nodes:
            return False
        if rounds is None:
            return True
        place = bisect_left(rounds, self.first, key=itemgetter(1))
        return place < len(rounds) and rounds[place][0] <= self.last


@dataclass(frozen=True)
class Zones:
    """Zone maps of a store's key chunks; a chunk of None may hold anything."""

    nodes: tuple[str, ...] = ()
    chunks: tuple[Zone | None, ...] = ()

    @classmethod
    def unknown(cls, chunks: int) -> Self:
        """Return what is known of `chunks` chunks in a store that says nothing."""
        return cls((), (None,) * chunks)

    @classmethod
    def from_json(cls, found: Any, chunks: int) -> Self:
        """Return the zone maps of `chunks` chunks from a store's attribute.

        Raises
        ------
        ValueError
            If no writer can have left them.
        """
        nodes, zones = found["nodes"], found["chunks"]
        if not (isinstance(nodes, list) and len(nodes) <= MOST_NODES):
            raise ValueError(f"zones: expected up to {MOST_NODES} nodes, got {shown(nodes)}")
        for name in nodes:
            if not (isinstance(name, str) and is_utf8(name)):
                raise ValueError(f"zones: expected the name of a node, got {shown(name)}")
        if not isinstance(zones, list) or len(zones) != chunks:
            raise ValueError(f"zones: expected {chunks} chunks")
        return cls(tuple(nodes), tuple(_zone(zone, len(nodes)) for zone in zones))

    def to_json(self) -> dict[str, Any]:
        """Return them as they stand in a store's attribute."""
        zones = [
            z and [z.first, z.last, None if z.nodes is None else f"{z.nodes:x}"]
            for z in self.chunks
        ]
        return {"nodes": list(self.nodes), "chunks": zones}

    def may_hold(self, filters: Mapping[str, Sequence[Any]]) -> list[int]:
        """Return the chunks that may hold a record which meets every filter, ascending.

        Parameters
        ----------
        filters : mapping of str to sequence
            Values by key column, each a result of `filters.wanted_values`; those of other columns
            than ``round`` and ``node`` tell nothing.
        """
        rounds = _runs(filters["round"]) if "round" in filters else None
        bits = None
        if "node" in filters:
            names = np.array(self.nodes, np.dtypes.StringDType())
            bits = sum(1 << int(place) for place in np.flatnonzero(matches(names, filters["node"])))
        return [
            number
            for number, zone in enumerate(self.chunks)
            if zone is None or zone.may_hold(rounds, bits)
        ]

    def renewed(
        self,
        total: int,
        chunks: Mapping[tuple[str, int], np.ndarray],
        readable: Callable[[Sequence[str], int], list[np.ndarray] | None],
    ) -> Zones:
        """Return them for a store of `total` chunks, of whose key columns `chunks` changed.

        What `readable` gives is looked at where nothing is known of a chunk: releases without
        zone maps leave none.
        """
        zones = replace(self, chunks=self.chunks + (None,) * (total - len(self.chunks)))
        for number, zone in enumerate(zones.chunks):
            values = None
            if ("round", number) in chunks:
                values = [chunks[name, number] for name in COLUMNS]
            elif zone is None:
                values = readable(COLUMNS, number)
            if values is not None:
                zones = zones._seen(number, *values)
        return zones

    def _seen(
        self, number: int, created: np.ndarray, rounds: np.ndarray, nodes: np.ndarray
    ) -> Zones:
        """Return them with that of chunk `number`, whose rows have these values."""
        names, zone = self._of(created, rounds, nodes)
        chunks = (*self.chunks[:number], zone, *self.chunks[number + 1 :])
        return Zones(names, chunks)

    def would_miss(
        self, number: int, created: np.ndarray, rounds: np.ndarray, nodes: np.ndarray
    ) -> bool:
        """Whether a record in chunk `number`, whose rows have these values, would not be found."""
        zone = self.chunks[number]
        if zone is None:
            return False
        names, due = self._of(created, rounds, nodes)
        if due.first > due.last:
            return False
        if zone.first > due.first or zone.last < due.last:
            return True
        return zone.nodes is not None and (
            due.nodes is None or names != self.nodes or bool(due.nodes & ~zone.nodes)
        )

    def _of(
        self, created: np.ndarray, rounds: np.ndarray, nodes: np.ndarray
    ) -> tuple[tuple[str, ...], Zone]:
        """Return the zone of a chunk, and the names with those that it adds."""
        written = created > 0
        if not written.any():
            return self.nodes, Zone(0, -1, 0)
        first, last = int(rounds[written].min()), int(rounds[written].max())
        here = sorted(set(nodes[written].tolist()))
        names = tuple(dict.fromkeys((*self.nodes, *here)))
        if len(names) > MOST_NODES or sum(map(len, names)) > _MOST_TEXT:
            return self.nodes, Zone(first, last, None)
        places = {name: place for place, name in enumerate(names)}
        return names, Zone(first, last, sum(1 << places[name] for name in here))


def _runs(wanted: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the runs of numbers that `wanted` lies in, ascending; those that overlap are one."""
    bounds = [(min(e[0], e[-1]), max(e[0], e[-1])) for e in wanted if isinstance(e, range) and e]
    bounds += [(number, number) for number in wanted if not isinstance(number, range)]
    runs: list[tuple[int, int]] = []
    for low, high in sorted(bounds):
        if runs and low <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], high))
        else:
            runs.append((low, high))
    return runs


def _zone(found: Any, names: int) -> Zone | None:
    if found is None:
        return None
    first, last, nodes = found
    if type(first) is not int or type(last) is not int:
        raise ValueError(f"zones: expected whole numbers, got {shown(found)}")
    bits = None if nodes is None else int(nodes, 16)
    if not (-1 <= first < 2**31 and -1 <= last < 2**31) or (bits or 0) not in range(1 << names):
        raise ValueError(f"zones: expected rounds and {names} nodes, got {shown(found)}")
    return Zone(first, last, bits)
