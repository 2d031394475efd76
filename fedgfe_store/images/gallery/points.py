"""A map of records beside their pictures: where each lies, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgfe_store.derived_keys import Key
from fedgfe_store.records import RecordKey

_DIGITS = 4


@dataclass(frozen=True)
class Points:
    """Where records lie on a map.

    Parameters
    ----------
    title : str
        What the map is of: ``UMAP of t5, 5,000 of 9,000 records``.
    places : mapping of RecordKey to (float, float)
        The place of each record that is on it, finite, in any unit.
    """

    title: str
    places: Mapping[RecordKey, tuple[float, float]]

    def data(self, keys: Sequence[Key]) -> dict[str, Any]:
        """Give what the page draws: ``title``, and ``x`` and ``y`` of each of `keys`.

        From 0 to 1 along the longer side, from the left and from the top; none where a record is
        not on the map, as no derived one is.
        """
        found = [self.places.get(key) if isinstance(key, RecordKey) else None for key in keys]
        across, up = ([place[axis] for place in found if place] for axis in (0, 1))
        left, top = min(across, default=0.0), max(up, default=0.0)
        # One scale for both: distances mean the same in both directions.
        longest = max(max(across, default=0.0) - left, top - min(up, default=0.0)) or 1.0
        return {
            "title": self.title,
            "x": [place and round((place[0] - left) / longest, _DIGITS) for place in found],
            "y": [place and round((top - place[1]) / longest, _DIGITS) for place in found],
        }
