"""Options of commands that also take means of records, and walks between two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .option_types import KEYS, KeyList

if TYPE_CHECKING:
    from fedgfe_store.derived.mean import Means
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.derived_keys import Key, Mode
    from fedgfe_store.selection import Selection

NAMES = ("mean", "walk", "frames", "mode")
_FRAMES = 9
_MODE: Mode = "slerp"
_OPTIONS = [
    click.option(
        "--mean",
        type=KeyList(),
        metavar="KEYS",
        help="The mean of each group of records that agree in these keys: round,class.",
    ),
    click.option(
        "--walk",
        metavar="[KEY=]A:B",
        help="What lies between two records, or means: dog:drum, node=0:server, round=1:20.",
    ),
    click.option(
        "--frames",
        type=click.IntRange(2, 10_000),
        help=f"Frames of a walk, both ends too [{_FRAMES}].",
    ),
    click.option(
        "--mode",
        type=click.Choice(["slerp", "lerp"]),
        help=f"A walk along the arc between two vectors, or straight [{_MODE}].",
    ),
]


@dataclass(frozen=True)
class Asked:
    """What is to be made of the records that were chosen; all None where they are taken as is.

    Parameters
    ----------
    mean : list of str or None
        Key columns of `Selection.mean`.
    walk : str or None
        Ends of a walk as they were typed.
    frames, mode
        As in `walk`.
    """

    mean: list[str] | None
    walk: str | None
    frames: int | None
    mode: Mode | None

    def __post_init__(self) -> None:
        for name in ("frames", "mode"):
            if getattr(self, name) is not None and self.walk is None:
                raise click.UsageError(f"--{name} goes with --walk")

    def of(self, selection: Selection) -> Selection | Derived:
        """Return what is asked for of some records.

        Raises
        ------
        NotFoundError
            If an end of a walk is not there.
        SchemaMismatchError
            If it is not one record or mean.
        """
        chosen = selection if self.mean is None else selection.mean(self.mean)
        if self.walk is None:
            return chosen
        from fedgfe_store import walk

        start, end = _ends(chosen, self.walk)
        return walk(start, end, self.frames or _FRAMES, mode=self.mode or _MODE)


def derived_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of derived records, as one argument `derived`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        asked = Asked(**{name: kwargs.pop(name) for name in NAMES})
        return function(*args, derived=asked, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def described(selection: Selection | Derived) -> str:
    """Say what is rendered, and of which store and commit."""
    from fedgfe_store.derived.record import Derived

    what = f"records: {len(selection)}"
    if isinstance(selection, Derived):
        what = f"derived: {selection.describe()}"
    return f"{what} of {selection.location}, commit {selection.commit}"


def _ends(chosen: Selection | Means, text: str) -> tuple[Selection | Means, Selection | Means]:
    name, equals, values = text.partition("=")
    column, values = (KEYS[name], values) if equals and name in KEYS else ("class_name", text)
    known = {str(key.value(column)) for key in chosen.keys()}
    start, end = _parts(values, known)
    return _end(chosen, column, start), _end(chosen, column, end)


def _parts(text: str, known: set[str]) -> tuple[str, str]:
    """Return both ends; of names that have colons themselves those that there are."""
    words = text.split(":")
    cuts = [(":".join(words[:n]), ":".join(words[n:])) for n in range(1, len(words))]
    there = [cut for cut in cuts if set(cut) <= known] or cuts[:1]
    if not there or not all(there[0]):
        raise click.UsageError(
            f"--walk: expected two ends such as dog:drum, node=0:server or round=1:20, got {text!r}"
        )
    return there[0]


def _end(chosen: Selection | Means, column: str, value: str) -> Selection | Means:
    from fedgfe_store.common.lookup import noun
    from fedgfe_store.derived.mean import Means
    from fedgfe_store.errors import SchemaMismatchError

    keys: Sequence[Key] = chosen.keys()
    places = [n for n, key in enumerate(keys) if str(key.value(column)) == value]
    if len(places) == 1:
        return chosen.take(places)
    what = "mean" if isinstance(chosen, Means) else "record"
    if places:
        more = "other filters, --per-class 1, --index 0 or --mean leave one"
    elif any(key.value(column) is None for key in keys):
        more = f"the means are of several: add {noun(column)} to --mean, or a filter"
    else:
        more = f"there are those of {', '.join(sorted({str(k.shown(column)) for k in keys}))}"
    raise SchemaMismatchError(
        f"--walk: expected one {what} of {noun(column)} {value}, got {len(places)}; {more}"
    )
