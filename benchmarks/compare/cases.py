"""The reads that are timed, and what proves that all formats returned the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .data import Plan
from .formats.base import Format

PAGE = 1024
"""float32 values in one page of memory."""


def touch(arrays: Iterable[np.ndarray]) -> None:
    """Look at every page, so that what is only mapped is read."""
    for array in arrays:
        array.reshape(-1)[::PAGE].sum()


def _scan(fmt: Format, path: Path, plan: Plan) -> None:
    for tensors in fmt.scan(path):
        touch(tensors)


def _first(fmt: Format, path: Path, plan: Plan) -> Any:
    return fmt.first(path, 0, 4)


def _first_of_class(fmt: Format, path: Path, plan: Plan) -> Any:
    return fmt.first_of_class(path, "dog", 4)


def _of_class(fmt: Format, path: Path, plan: Plan) -> Any:
    return fmt.of_class(path, "dog")


def _sample(fmt: Format, path: Path, plan: Plan) -> Any:
    return fmt.sample(path, "dog", 0)


def _scattered(fmt: Format, path: Path, plan: Plan) -> Any:
    return fmt.at(path, plan.scattered())


def _open(fmt: Format, path: Path, plan: Plan) -> int:
    return fmt.count(path)


def _centroids(fmt: Format, path: Path, plan: Plan) -> dict[str, np.ndarray]:
    return fmt.centroids(path)


CASES: dict[str, Callable[[Format, Path, Plan], Any]] = {
    "open": _open,
    "first": _first,
    "first_of_class": _first_of_class,
    "of_class": _of_class,
    "sample": _sample,
    "scattered": _scattered,
    "scan": _scan,
    "centroids": _centroids,
}


def run(case: str, fmt: Format, path: Path, plan: Plan) -> Any:
    """Run one case and look at all that it returned."""
    found = CASES[case](fmt, path, plan)
    if isinstance(found, tuple):
        touch(found)
    return found


def check(case: str, fmt: Format, path: Path, plan: Plan, expected: Any) -> Any:
    """Fail unless `case` returns what the first format did; return what to expect of the next."""
    found: Any = _fingerprint(fmt, path) if case == "scan" else run(case, fmt, path, plan)
    if expected is None:
        return found
    if case == "scan":
        same = found[0] == expected[0] and (not fmt.exact or found == expected)
    elif case == "open":
        same = found == expected == plan.total
    elif case == "centroids":
        same = set(found) == set(expected) and all(
            np.allclose(found[name], expected[name], rtol=2**-8, atol=1e-3) for name in found
        )
    elif fmt.exact:
        same = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    else:
        same = all(np.allclose(a, b, rtol=2**-8) for a, b in zip(found, expected, strict=True))
    if not same:
        raise AssertionError(f"{fmt.name}, {case}: other values than the first format returned")
    return expected


def _fingerprint(fmt: Format, path: Path) -> tuple[int, str, str]:
    records, hashes = 0, (xxhash.xxh3_64(), xxhash.xxh3_64())
    for tensors in fmt.scan(path):
        records += len(tensors[0])
        for digest, array in zip(hashes, tensors, strict=True):
            digest.update(np.ascontiguousarray(array).data)
    return records, hashes[0].hexdigest(), hashes[1].hexdigest()
