"""Keys of derived records: which mean, or which frame of which walk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fedgfe_store.common.lookup import noun, said
from fedgfe_store.records import KEY_COLUMNS, SERVER, RecordKey

Mode = Literal["slerp", "lerp"]
"""How a walk goes from one vector to another: along the arc between them, or straight."""

SEVERAL = "several"
"""What is shown of a key column in which the sources of a mean differ."""


@dataclass(frozen=True)
class MeanKey:
    """What identifies the mean of a group of records.

    Parameters
    ----------
    fixed : tuple of (str, str or int)
        Key columns in which the group's records agree by definition, in the order of
        `KEY_COLUMNS`, and their values.
    others : str
        What else chose the records, as JSON: filters of other columns that have several values.
    """

    fixed: tuple[tuple[str, str | int], ...]
    others: str = "{}"

    def value(self, column: str) -> str | int | None:
        """Return the value of a key column; None where the records may differ in it."""
        return dict(self.fixed).get(column)

    def shown(self, column: str) -> str | int:
        """Return what is shown of a key column."""
        value = self.value(column)
        return SEVERAL if value is None else value

    @property
    def rank(self) -> tuple[Any, ...]:
        """Where it stands among all keys."""
        return 1, self.fixed, self.others

    @property
    def filters(self) -> dict[str, Any] | None:
        """What chooses the records, as `EmbeddingStore.select` takes it; None if nothing can."""
        named = json.loads(self.others)
        if "records" in named:
            return None
        chosen = {name: _ranges(values) for name, values in named.items()}
        return {**chosen, **dict(self.fixed)}

    @property
    def label(self) -> str:
        """What it is, without the columns that it shares with other keys."""
        return "mean"

    def __str__(self) -> str:
        return f"mean of {_said(self.fixed)}{_more(self)}"


@dataclass(frozen=True)
class WalkKey:
    """What identifies one frame of a walk.

    Parameters
    ----------
    start, end : RecordKey or MeanKey
        Its ends.
    mode : {"slerp", "lerp"}
        How it goes.
    frames : int
        Number of its frames, at least 2: the ends are among them.
    frame : int
        Which one, from 0.
    """

    start: RecordKey | MeanKey
    end: RecordKey | MeanKey
    mode: Mode
    frames: int
    frame: int = 0

    @property
    def weight(self) -> float:
        """How far it is on the way: 0 is the start, 1 the end."""
        return self.frame / (self.frames - 1)

    def value(self, column: str) -> str | int | None:
        """Return the value of a key column; None where the ends differ in it or have none."""
        value = self.start.value(column)
        return value if value == self.end.value(column) else None

    def shown(self, column: str) -> str | int:
        """Return what is shown of a key column."""
        start, end = self.start.shown(column), self.end.shown(column)
        return start if start == end else f"{start} to {end}"

    @property
    def rank(self) -> tuple[Any, ...]:
        """Where it stands among all keys."""
        return 2, self.start.rank, self.end.rank, self.mode, self.frames, self.frame

    @property
    def differing(self) -> tuple[str, ...]:
        """Key columns in which the ends differ."""
        return tuple(c for c in KEY_COLUMNS if self.start.shown(c) != self.end.shown(c))

    @property
    def label(self) -> str:
        """What it is, the same for all its frames."""
        if not self.differing:
            return f"walk from {self.start} to {self.end}, {self.mode}, {self.frames} frames"
        ways = ", ".join(f"{_noun(c)}{self.shown(c)}" for c in self.differing)
        return f"walk {ways}, {self.mode}, {self.frames} frames"

    def __str__(self) -> str:
        same = [(c, v) for c in KEY_COLUMNS if (v := self.value(c)) is not None]
        rest = f" ({_said(same)})" if same else ""
        return f"{self.label}{rest}: frame {self.frame}"


DerivedKey: TypeAlias = MeanKey | WalkKey
Key: TypeAlias = RecordKey | DerivedKey
"""What identifies an embedding that an image can show."""


def filters_text(filters: Mapping[str, Any]) -> str:
    """Return filters, as `wanted_values` gives them, as one text: the same of the same."""
    plain = {name: _plain(values) for name, values in filters.items()}
    return json.dumps(plain, sort_keys=True)


def _plain(values: Any) -> Any:
    if not isinstance(values, list):
        return values
    return [[v.start, v.stop, v.step] if isinstance(v, range) else v for v in values]


def _ranges(values: Any) -> Any:
    """Return what `_plain` was given."""
    if not isinstance(values, list):
        return values
    return [range(*v) if isinstance(v, list) else v for v in values]


def _said(values: Any) -> str:
    return ", ".join(f"{_noun(c, v)}{v}" for c, v in values)


def _noun(column: str, value: str | int | None = None) -> str:
    """Return what stands before the value of a key column."""
    named = column in ("node", "round", "index") and value != SERVER
    return f"{column} " if named else ""


def _more(key: MeanKey) -> str:
    """Say what else chose the records of a mean."""
    filters = key.filters
    if filters is None:
        return ", of records taken by position"
    chosen = [(c, v) for c, v in filters.items() if c not in dict(key.fixed)]
    words = [
        f"the first {values} of each class"
        if column == "per_class"
        else f"{noun(column)} {said(values)}"
        for column, values in chosen
    ]
    return f", of {', '.join(words)}" if words else ""
