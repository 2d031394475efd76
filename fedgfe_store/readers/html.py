"""Stores and selections as notebooks show them; the page is ``notebook.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import Environment, StrictUndefined, Template

from fedgfe_store.common.words import counted, names, numbers, numbers_first, shortened, size

if TYPE_CHECKING:
    from fedgfe_store.rows import Rows
    from fedgfe_store.schema import Schema, TensorColumn
    from fedgfe_store.storage.state import State

T = TypeVar("T")

# A notebook keeps what it shows: so much stays under 30 kB, and fits a screen of 960 pixels.
_ROWS, _COLUMNS = 20, 12
_MOST_CHIPS = 24
_LONGEST_NAME = 32
_LONGEST_NODE = 12
# Opacity of the highest count's cell: text on it is still read in light and dark themes.
_DEEPEST = 0.32
_CUT = "…"


@dataclass(frozen=True)
class _Label:
    """A name as it is shown, and whole for the pointer to show where it is cut."""

    text: str
    full: str = ""

    @classmethod
    def of(cls, name: str, most: int) -> _Label:
        return cls(shortened(name, most), name if len(name) > most else "")


@dataclass(frozen=True)
class _Chips:
    """Names with their counts, and how many more there are."""

    shown: Sequence[tuple[_Label, int]]
    more: int

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> _Chips:
        found = islice(counts.items(), _MOST_CHIPS)
        # Stores of format 1 may have a class without a name.
        shown = [(_Label.of(name or "(empty)", _LONGEST_NAME), count) for name, count in found]
        return cls(shown, len(counts) - len(shown))


@dataclass(frozen=True)
class _Cell:
    text: str
    dim: bool = False
    tint: str = ""

    @classmethod
    def of(cls, count: int | None, highest: int) -> _Cell:
        if not count:
            return cls(_CUT if count is None else "0", dim=True)
        return cls(f"{count:,}", tint=f"{_DEEPEST * count / highest:.2f}" if highest else "")


@dataclass(frozen=True)
class _Row:
    label: str
    cells: Sequence[_Cell]
    total: str

    @classmethod
    def of(cls, label: str, counts: Sequence[int | None], total: int | None, highest: int) -> _Row:
        cells = [_Cell.of(count, highest) for count in counts]
        return cls(label, cells, _CUT if total is None else f"{total:,}")


@dataclass(frozen=True)
class _Table:
    """Counts by round and node, at most `_ROWS` by `_COLUMNS` of them."""

    head: Sequence[_Label]
    body: Sequence[_Row]
    foot: _Row
    hidden: str

    @classmethod
    def of(cls, counts: Mapping[tuple[int, str], int]) -> _Table:
        by_round, by_node = Counter[int](), Counter[str]()
        for (number, node), count in counts.items():
            by_round[number] += count
            by_node[node] += count
        rounds = _bounded(sorted(by_round), _ROWS - 1, last=9)
        nodes = _bounded(sorted(by_node, key=numbers_first), _COLUMNS - 1, last=1)
        body, highest = [], max(counts.values())
        for r in rounds:
            # Not unstacked: a store of many rounds and nodes has far more cells than are shown.
            cells = [None if r is None or n is None else counts.get((r, n), 0) for n in nodes]
            label, total = (_CUT, None) if r is None else (str(r), by_round[r])
            body.append(_Row.of(label, cells, total, highest))
        ends = [None if n is None else by_node[n] for n in nodes]
        return cls(
            head=[_Label(_CUT) if n is None else _Label.of(n, _LONGEST_NODE) for n in nodes],
            body=body,
            foot=_Row.of("all", ends, by_node.total(), highest=0),
            hidden=_hidden(len(by_round), rounds, "round") + _hidden(len(by_node), nodes, "node"),
        )


def store_html(everything: Rows, snapshot: State) -> str:
    """Return the store seen at `snapshot`, of which `everything` is the selection, as HTML."""
    metadata = snapshot.schema.metadata
    own = {"experiment": metadata.experiment, "model": metadata.model, "filters": None}
    sizes = snapshot.place.sizes()
    on_disk = f"{size(sum(sizes.values()))} in {counted(len(sizes), 'file')}" if sizes else None
    return _page("EmbeddingStore", everything, snapshot, **own, usage=on_disk)


def selection_html(selection: Rows, snapshot: State, description: Iterable[str]) -> str:
    """Return `selection` of `snapshot`, made by the filters in `description`, as HTML."""
    own = {"experiment": None, "model": None, "filters": list(description)}
    return _page("Selection", selection, snapshot, **own, usage=None)


def _page(kind: str, selection: Rows, snapshot: State, **own: object) -> str:
    n, latest, moment = len(selection), snapshot.point.commit, snapshot.committed_at
    counts = _counts(selection, "round", "node")
    return _template().render(
        kind=kind,
        path=str(selection.location),
        records=n,
        memory=_memory(snapshot.schema, n),
        schema=snapshot.schema,
        tensors=[(tensor, _kind(tensor)) for tensor in snapshot.schema.tensors],
        commit=f"{snapshot.commit}" + (f" of {latest}" if snapshot.commit < latest else ""),
        time=None if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC",
        table=_Table.of(counts) if counts else None,
        **(_key_facts(selection) if n else {}),
        **own,
    )


@cache
def _template() -> Template:
    """Return the page with its places: what is put there is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["thousands"] = "{:,}".format
    page = files("fedgfe_store.readers").joinpath("notebook.html")
    return environment.from_string(page.read_text(encoding="utf-8"))


def _memory(schema: Schema, records: int) -> str:
    plain = all(tensor.dtype == "float32" for tensor in schema.tensors)
    return f"{size(records * schema.record_nbytes)} {'as float32' if plain else 'in memory'}"


def _kind(column: TensorColumn) -> str:
    """Return what a column is besides a tensor of float32 in each record."""
    kinds = {
        f" {column.dtype}": column.dtype != "float32",
        " ragged": column.ragged,
        " optional": column.optional,
    }
    return "".join(kind for kind, holds in kinds.items() if holds)


def _key_facts(selection: Rows) -> dict[str, object]:
    nodes = [shortened(name, _LONGEST_NAME) for name in _counts(selection, "node")]
    return {
        "rounds": _ends(numbers(_counts(selection, "round"))),
        "nodes": _ends(names(nodes)),
        "splits": _Chips.of(_counts(selection, "split")),
        "classes": _Chips.of(_counts(selection, "class_name")),
    }


def _counts(selection: Rows, *columns: str) -> dict[Any, int]:
    return selection.counts(*columns).to_dict()


def _ends(text: str, most: int = 120) -> str:
    """Return a long list with its middle left out."""
    if len(text) <= most:
        return text
    parts = text.split(", ")
    return ", ".join([*parts[:8], _CUT, *parts[-8:]])


def _bounded(values: Sequence[T], most: int, *, last: int) -> list[T | None]:
    """Return `values`, or the first and last of too many with None between them."""
    if len(values) <= most:
        return list(values)
    return [*values[: most - last - 1], None, *values[-last:]]


def _hidden(count: int, shown: Sequence[object], noun: str) -> str:
    left = count - len([each for each in shown if each is not None])
    return f", {counted(left, noun)} not shown" if left else ""
