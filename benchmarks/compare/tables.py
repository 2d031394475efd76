"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OURS = "store"

TITLES = {
    "append": "append of one node-round",
    "append_flushed": "the same, flushed to disk",
    "open": "open, count the records",
    "first": "first batch of 4 of one round",
    "first_of_class": "first batch of 4 dogs of all rounds",
    "of_class": "all dogs of all rounds",
    "sample": "one sample across the rounds",
    "scattered": "64 scattered records",
    "scan": "full scan, batches of 32",
    "centroids": "class centroids",
}


def markdown(results: Mapping[str, Any]) -> str:
    """Return all tables."""
    parts = [f"# The store beside other formats\n\n{_about(results)}"]
    for part in results["shapes"]:
        parts += _shape(part, results["formats"])
    if results["growth"]:
        parts += _growth(results)
    return "\n\n".join(parts) + "\n"


def _about(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    cache = (
        "files dropped from the page cache before each read" if results["cold"] else "warm cache"
    )
    return (
        f"{machine['cores']} cores, load average {machine['load_before']:.1f} before and "
        f"{machine['load_after']:.1f} after, Python {machine['python']}, {machine['system']}; "
        f"{cache}; {results['seconds']:.0f} s in all. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".\n\nSeconds are the best of the repeats, which the formats took in turn; in brackets, "
        "how many times those of the store (above 1: the store is faster)."
    )


def _shape(part: Mapping[str, Any], formats: Sequence[str]) -> Iterable[str]:
    yield f"## {part['shape']}"
    sizes = (
        f"{part['records']} records of {part['bytes_per_record']:,} bytes in {part['rounds']} "
        f"rounds, the first a whole node-round of {part['whole']}, the others of {part['small']} "
        f"to save disk; best of {part['repeats']}."
    )
    yield sizes
    rows = [
        ["bytes per record", *(_relative(part["bytes"], f, "{:,.0f}") for f in formats)],
        ["files", *(f"{part['files'][f]:,}" for f in formats)],
    ]
    rows += [
        [TITLES[case], *(_seconds(times, f) for f in formats)]
        for case, times in part["times"].items()
    ]
    yield table(["", *formats], rows)
    if part["memory"]:
        yield "Peak memory in MB above the imports (and an append's data), one process each:"
        rows = [
            [TITLES[case], *(f"{peaks[f]:,.0f}" if f in peaks else "as above" for f in formats)]
            for case, peaks in part["memory"].items()
        ]
        yield table(["", *formats], rows)
    yield _bounds(part)


def _bounds(part: Mapping[str, Any]) -> str:
    seconds = part["bounds"]
    scan = part["records"] * part["bytes_per_record"] / 1e6
    whole = part["whole"] * part["bytes_per_record"] / 1e6
    scanned, appended = (min(part["times"][case][OURS]) for case in ("scan", "append_flushed"))
    rows = [
        ["memcpy, as in a full scan", scan, seconds["memcpy"]],
        ["file read from the page cache", scan, seconds["read"]],
        ["the store's full scan", scan, scanned],
        ["file write and fsync, one node-round", whole, seconds["write"]],
        ["the store's append, flushed", whole, appended],
    ]
    cells = [[n, f"{mb:,.0f}", f"{s:.3f}", f"{mb / s:,.0f}"] for n, mb, s in rows]
    return "What the machine allows:\n\n" + table(["", "MB", "seconds", "MB/s"], cells)


def _growth(results: Mapping[str, Any]) -> Iterable[str]:
    formats = [f for f in results["formats"] if f in next(iter(results["growth"].values()))]
    yield "## As a store grows"
    shape = results["growth_shape"]
    yield (
        f"Append of {shape['records']} records of tiny tensors ([{shape['tokens']}, "
        f"{shape['width']}] and [{shape['clip']}], {shape['bytes']} bytes a record) to a store of "
        f"so many commits of as many records each: all that is left is bookkeeping, and for the "
        f"store and TensorStore the flushes to disk."
    )
    rows = [
        [_commits(case), *(_seconds(times, f) for f in formats)]
        for case, times in results["growth"].items()
    ]
    yield table(["", *formats], rows)


def _commits(case: str) -> str:
    number = case.removeprefix("append_at_")
    return f"{number} commit" if number == "1" else f"{number} commits"


def _seconds(times: Mapping[str, Sequence[float]], name: str) -> str:
    if name not in times:
        return "as above"
    return _relative({each: min(taken) for each, taken in times.items()}, name, "{:.4f}")


def _relative(values: Mapping[str, float], name: str, form: str) -> str:
    shown = form.format(values[name])
    return shown if name == OURS else f"{shown} ({values[name] / values[OURS]:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])
