"""Stores and selections as notebooks show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from fedgfe_store.common.words import counted, names, numbers, numbers_first, shortened, size
from fedgfe_store.storage.files import usage

if TYPE_CHECKING:
    from fedgfe_store.rows import Rows
    from fedgfe_store.schema import TensorColumn
    from fedgfe_store.storage.snapshot import Snapshot

T = TypeVar("T")

_ROWS, _COLUMNS = 20, 12
_MOST_CHIPS = 24
_LONGEST_NAME = 32
_LONGEST_NODE = 12
_CUT = "…"

# Colours are the page's own with some transparency, so that light and dark themes both work.
_STYLE = """
.fedgfe{font-size:13px;line-height:1.45;max-width:960px}
.fedgfe .fg-title{font-size:15px;margin:0 0 6px}
.fedgfe .fg-title b{margin-right:.5em}
.fedgfe code{font-family:monospace;background:none;color:inherit;overflow-wrap:anywhere}
.fedgfe dl{display:grid;grid-template-columns:max-content 1fr;gap:1px 14px;margin:0 0 10px}
.fedgfe dt{opacity:.7;font-weight:normal;margin:0;padding:0}
.fedgfe dd{margin:0;padding:0;overflow-wrap:anywhere}
.fedgfe .fg-chip{display:inline-block;white-space:nowrap;margin:1px 4px 1px 0;padding:0 7px;
border:1px solid rgba(128,128,128,.45);border-radius:9px}
.fedgfe .fg-dim{opacity:.65}
.fedgfe .fg-wide{overflow-x:auto}
.fedgfe table.fg-counts{border-collapse:collapse;border:none;margin:0;font-size:12px;color:inherit;
font-variant-numeric:tabular-nums;table-layout:auto}
.fedgfe table.fg-counts caption{caption-side:top;text-align:left;padding:0 0 3px;color:inherit;
opacity:.7}
.fedgfe table.fg-counts tr{background:none!important;border:none}
.fedgfe table.fg-counts th,.fedgfe table.fg-counts td{text-align:right;padding:2px 9px;
border:none;max-width:none;white-space:nowrap;vertical-align:middle}
.fedgfe table.fg-counts th{font-weight:600}
.fedgfe table.fg-counts thead th{border-bottom:1px solid rgba(128,128,128,.6)}
.fedgfe table.fg-counts .fg-all{border-left:1px solid rgba(128,128,128,.35)}
.fedgfe table.fg-counts tfoot th,.fedgfe table.fg-counts tfoot td{
border-top:1px solid rgba(128,128,128,.35)}
"""


def store_html(everything: Rows, snapshot: Snapshot) -> str:
    """Return the store seen at `snapshot`, of which `everything` is the selection, as HTML."""
    nbytes, files = usage(snapshot.root)
    facts = [
        ("experiment", _text(snapshot.schema.metadata.experiment)),
        ("records", _records(everything)),
        ("on disk", f"{size(nbytes)} in {counted(files, 'file')}"),
        *_schema_facts(snapshot),
        ("model", _text(snapshot.schema.metadata.model)),
    ]
    return _page("EmbeddingStore", everything, facts)


def selection_html(selection: Rows, snapshot: Snapshot, description: Iterable[str]) -> str:
    """Return `selection` of `snapshot`, made by the filters in `description`, as HTML."""
    filters = [f"<code>{escape(each)}</code>" for each in description]
    facts = [
        ("filters", ", ".join(filters) or "none: all records"),
        ("records", _records(selection)),
        *_schema_facts(snapshot),
    ]
    return _page("Selection", selection, facts)


def _page(kind: str, selection: Rows, facts: Iterable[tuple[str, str]]) -> str:
    facts = [*facts, *_key_facts(selection)] if len(selection) else facts
    items = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts if value)
    counts = _counts(selection, "round", "node")
    table = _table(counts) if counts else f"<div>{_dim('no records')}</div>"
    return (
        f'<div class="fedgfe"><style>{_STYLE}</style>'
        f'<div class="fg-title"><b>{kind}</b><code>{escape(str(selection.path))}</code></div>'
        f"<dl>{items}</dl>{table}</div>"
    )


def _records(selection: Rows) -> str:
    n = len(selection)
    nbytes = size(n * selection.schema.record_nbytes)
    plain = all(t.dtype == "float32" for t in selection.schema.tensors)
    return f"{n:,}" + (_dim(f", {nbytes} {'as float32' if plain else 'in memory'}") if n else "")


def _schema_facts(snapshot: Snapshot) -> list[tuple[str, str]]:
    schema = snapshot.schema
    shapes = [
        f"<code>{escape(t.name)}</code> [{', '.join(map(str, t.shape))}]"
        + (_dim(_kind(t)) if _kind(t) else "")
        for t in schema.tensors
    ]
    latest = snapshot.point.commit
    commit = f"{snapshot.commit}" + (f" of {latest}" if snapshot.commit < latest else "")
    moment = snapshot.committed_at
    time = "" if moment is None else _dim(f", {moment:%Y-%m-%d %H:%M} UTC")
    return [
        ("kind", f"{schema.kind}: {', '.join(shapes)}"),
        ("precision", schema.precision),
        ("commit", commit + time),
    ]


def _kind(column: TensorColumn) -> str:
    """Return what a column is besides a tensor of float32 in each record."""
    kinds = {
        f" {column.dtype}": column.dtype != "float32",
        " ragged": column.ragged,
        " optional": column.optional,
    }
    return "".join(kind for kind, holds in kinds.items() if holds)


def _key_facts(selection: Rows) -> list[tuple[str, str]]:
    nodes = [shortened(name, _LONGEST_NAME) for name in _counts(selection, "node")]
    return [
        ("rounds", _ends(numbers(_counts(selection, "round")))),
        ("nodes", escape(_ends(names(nodes)))),
        ("splits", _chips(_counts(selection, "split"))),
        ("classes", _chips(_counts(selection, "class_name"))),
    ]


def _counts(selection: Rows, *columns: str) -> dict[Any, int]:
    return selection.counts(*columns).to_dict()


def _ends(text: str, most: int = 120) -> str:
    """Return a long list with its middle left out."""
    if len(text) <= most:
        return text
    parts = text.split(", ")
    return ", ".join([*parts[:8], _CUT, *parts[-8:]])


def _chips(counts: Mapping[str, int]) -> str:
    shown = [_chip(name, count) for name, count in islice(counts.items(), _MOST_CHIPS)]
    more = len(counts) - len(shown)
    return "".join(shown) + (_dim(f"and {more:,} more") if more > 0 else "")


def _chip(name: str, count: int) -> str:
    label = escape(shortened(name, _LONGEST_NAME) or "(empty)")
    title = _title(name, _LONGEST_NAME)
    return f'<span class="fg-chip"{title}>{label} {_dim(f"{count:,}")}</span>'


def _table(counts: Mapping[tuple[int, str], int]) -> str:
    """Return the counts by round and node, at most `_ROWS` by `_COLUMNS` of them."""
    by_round, by_node = Counter[int](), Counter[str]()
    for (number, node), count in counts.items():
        by_round[number] += count
        by_node[node] += count
    rounds = _bounded(sorted(by_round), _ROWS - 1, last=9)
    nodes = _bounded(sorted(by_node, key=numbers_first), _COLUMNS - 1, last=1)
    rows, highest = [], max(counts.values())
    for r in rounds:
        # Not unstacked: a store of many rounds and nodes has far more cells than are shown.
        cells = [None if r is None or n is None else counts.get((r, n), 0) for n in nodes]
        label, total = (_CUT, None) if r is None else (str(r), by_round[r])
        rows.append(_row(label, cells, total, highest))
    ends = [None if n is None else by_node[n] for n in nodes]
    head = "".join(f"<th{_title(n or '', _LONGEST_NODE)}>{escape(_node(n))}</th>" for n in nodes)
    note = _hidden(len(by_round), rounds, "round") + _hidden(len(by_node), nodes, "node")
    return (
        f'<div class="fg-wide"><table class="fg-counts"><caption>records by round and node{note}'
        f'</caption><thead><tr><th>round</th>{head}<th class="fg-all">all</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{_row('all', ends, by_node.total(), 0)}</tfoot>"
        "</table></div>"
    )


def _row(label: str, cells: Sequence[int | None], total: int | None, highest: int) -> str:
    tail = f'<td class="fg-all">{_CUT if total is None else f"{total:,}"}</td>'
    return f"<tr><th>{label}</th>{''.join(_cell(n, highest) for n in cells)}{tail}</tr>"


def _cell(count: int | None, highest: int) -> str:
    if count is None:
        return f"<td>{_dim(_CUT)}</td>"
    if not count:
        return f"<td>{_dim('0')}</td>"
    tint = f' style="background:rgba(56,139,253,{0.32 * count / highest:.2f})"' if highest else ""
    return f"<td{tint}>{count:,}</td>"


def _bounded(values: Sequence[T], most: int, *, last: int) -> list[T | None]:
    """Return `values`, or the first and last of too many with None between them."""
    if len(values) <= most:
        return list(values)
    return [*values[: most - last - 1], None, *values[-last:]]


def _hidden(count: int, shown: Sequence[object], noun: str) -> str:
    left = count - len([each for each in shown if each is not None])
    return f", {counted(left, noun)} not shown" if left else ""


def _node(name: str | None) -> str:
    return _CUT if name is None else shortened(name, _LONGEST_NODE)


def _title(name: str, most: int) -> str:
    """Return the full name for the pointer to show, where the text is cut."""
    return f' title="{escape(name)}"' if len(name) > most else ""


def _text(value: str | None) -> str:
    return escape(value or "")


def _dim(text: str) -> str:
    return f'<span class="fg-dim">{escape(text)}</span>'
