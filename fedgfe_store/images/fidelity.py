"""How far generated images are from others as sets: KID and Frechet distance."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgfe_store.common.extra import extra
from fedgfe_store.common.frechet import frechet
from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.embedded import MOST, Embedded, Embedder
from fedgfe_store.images.scoring import Found
from fedgfe_store.images.status import natural_rank
from fedgfe_store.records import KEY_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.images.features import Features

BLOCK = 1_000
"""Images of a block of KID at most, as its authors take them (arXiv 1801.01401)."""
BLOCKS = 5
"""Blocks of KID at least, from which its standard error is taken."""
SURE = 2_048
"""Images from which the covariance of Inception's 2,048 features has full rank; with fewer the
Frechet distance is too large, by more the fewer they are (arXiv 1911.07023)."""

_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_COLUMNS = ("pictures", "others", "kid", "kid_error", "frechet")


@dataclass(frozen=True, eq=False)
class Fidelity:
    """How far sets of images are from others.

    Parameters
    ----------
    frame : DataFrame
        A row for each group: its keys, ``pictures`` and ``others`` (images of it and of what it is
        compared with, of which at most 10,000 each are), ``kid`` (squared maximum mean discrepancy
        of a cubic kernel, unbiased: about 0 for sets of one distribution, and may be below),
        ``kid_error`` (its standard error) and ``frechet`` (squared distance of normal
        distributions, from 0). Where nodes are told apart ``frechet`` is only in the rows of all
        nodes together, whose node is ``all``: means over nodes rank models wrongly, KID's do not
        (arXiv 2310.11714). NaN where a set is too small.
    name : str
        What ``frechet`` is called: FID with the standard Inception weights only.
    notes : sequence of str
        What to keep in mind, such as that sets are small.
    left_out : mapping
        Why a file was not looked at, by its name.
    """

    frame: pd.DataFrame
    name: str
    notes: Sequence[str]
    left_out: Mapping[str, str]


def kid(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the kernel distance of two sets of features, and its standard error.

    The mean of torchmetrics' ``poly_mmd`` over disjoint blocks of at most 1,000, of which there are
    five or more.

    Parameters
    ----------
    first, second : ndarray, shape [n, features] and [m, features]
        Features of independent pictures; which ones form a block is drawn, always the same.

    Returns
    -------
    tuple of float
        NaN twice where a set has fewer than ten.
    """
    import torch

    least = min(len(first), len(second))
    blocks = max(BLOCKS, -(-least // BLOCK))
    size = least // blocks
    if size < 2:
        return float("nan"), float("nan")
    poly_mmd = extra("torchmetrics.image.kid", "KID", "metrics").poly_mmd
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(len(each))[: blocks * size].reshape(blocks, size)
              for each in (first, second)]  # fmt: skip
    values = [
        float(
            poly_mmd(
                torch.from_numpy(first[rows].astype(np.float64)),
                torch.from_numpy(second[others].astype(np.float64)),
            )
        )
        for rows, others in zip(*chosen, strict=True)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(blocks))


def pictures_below(folder: Path) -> list[Path]:
    """Return the picture files in a folder and those inside it, by name.

    Raises
    ------
    NotFoundError
        If there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no folder of pictures at {folder}")
    files = [f for f in folder.rglob("*") if f.suffix.lower() in _PICTURES and f.is_file()]
    if not files:
        raise NotFoundError(f"no picture in {folder}: expected files of {', '.join(_PICTURES)}")
    return sorted(files)


def fidelity(
    found: Found,
    features: Features,
    *,
    real: Sequence[Path] | None = None,
    to: Mapping[str, Any] | None = None,
    by: Sequence[str] = ("node", "round"),
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda pictures: None,
) -> Fidelity:
    """Compare groups of images with real ones, or with those of one node, round or split.

    Each picture is embedded once. Features are kept on the disk; in memory are those of two sets.

    Parameters
    ----------
    found : Found
        The images.
    features : Features
        What tells them apart.
    real : sequence of Path, optional
        Files of real pictures.
    to : mapping, optional
        Keys of the images to compare the others with, such as ``{"node": "server"}``: each group
        with those of them that share its other keys.
    by : sequence of str
        Key columns that make a group.
    batch_size : int
        Images in memory and in a call of the model.
    progress : callable
        Called with the number of pictures just embedded.

    Raises
    ------
    NotFoundError
        If no image is there to compare, or torchmetrics is not installed.
    SchemaMismatchError
        If neither or both of `real` and `to` are given, or a key is none.
    """
    if (real is None) == (to is None):
        raise SchemaMismatchError("fidelity: expected one of real and to, got both or none")
    wrong = [name for name in (*by, *(to or ())) if name not in KEY_COLUMNS]
    if wrong:
        raise SchemaMismatchError(f"expected some of {', '.join(KEY_COLUMNS)}, got {wrong}")
    extra("torchmetrics.image.kid", "KID", "metrics")
    with tempfile.TemporaryDirectory() as folder:
        embedder = Embedder(features.embed, Path(folder), batch_size, progress)
        images = embedder.embed([image.file for image in found.images])
        keys = [image.key for image in found.images]
        sets = _Sets(keys, images, by, to or {}, None if real is None else embedder.embed(real))
        rows = list(sets.rows())
    if not rows:
        raise NotFoundError(f"no image is left to compare with those of {_said(to or {})}")
    left_out = {**found.left_out, **embedder.left_out}
    return Fidelity(_frame(rows, by), features.frechet, _notes(rows, sets.width), left_out)


def _said(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in keys.items())


class _Sets:
    """The groups of images, and what each is compared with."""

    def __init__(
        self,
        keys: Sequence[Key],
        images: Embedded,
        by: Sequence[str],
        to: Mapping[str, Any],
        real: Embedded | None,
    ) -> None:
        self._images, self._by, self._to = images, by, to
        self._real = None if real is None else _features(real, np.arange(len(real.there)))
        self.width = images.width
        columns = {n: np.array([k.value(n) for k in keys], object) for n in KEY_COLUMNS}
        is_other = np.full(len(keys), bool(to))
        for name, value in to.items():
            is_other &= np.array([str(each) == str(value) for each in columns[name]])
        self._columns, self._others = columns, np.flatnonzero(is_other)
        self._own = np.flatnonzero(~is_other)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the measures of each group, those of all nodes together after them."""
        for key, rows in self._groups(self._by):
            yield self._row(key, rows, is_pooled="node" not in self._by)
        if "node" in self._by:
            rest = [name for name in self._by if name != "node"]
            for key, rows in self._groups(rest):
                yield self._row({"node": "all", **key}, rows, is_pooled=True)

    def _groups(self, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row in self._own.tolist():
            groups.setdefault(tuple(self._columns[name][row] for name in by), []).append(row)
        for key, rows in groups.items():
            yield dict(zip(by, key, strict=True)), np.array(rows)

    def _row(self, key: dict[str, Any], rows: np.ndarray, *, is_pooled: bool) -> dict[str, Any]:
        own, other = _features(self._images, rows), self._compared(key)
        value, error = kid(own, other)
        distance = frechet(own, other) if is_pooled else float("nan")
        found = (len(own), len(other), value, error, distance)
        return key | dict(zip(_COLUMNS, found, strict=True))

    def _compared(self, key: Mapping[str, Any]) -> np.ndarray:
        if self._real is not None:
            return self._real
        rows = self._others
        for name, value in key.items():
            if name not in self._to and (name, value) != ("node", "all"):
                rows = rows[[each == value for each in self._columns[name][rows]]]
        return _features(self._images, rows)


def _features(pictures: Embedded, rows: np.ndarray) -> np.ndarray:
    return pictures.read(pictures.compared(rows))


def _frame(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[*by, *_COLUMNS])
    return frame.sort_values(list(by), key=natural_rank, ignore_index=True) if by else frame


def _notes(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    pooled = [min(row["pictures"], row["others"]) for row in rows if row["frechet"] >= 0]
    notes = []
    if pooled and min(pooled) < max(SURE, width + 1):
        notes.append(
            f"a set has {min(pooled)} pictures: the Frechet distance is too large with fewer than "
            f"{max(SURE, width + 1)}, so compare it between sets of one size only; KID is unbiased"
        )
    if any(row["kid"] != row["kid"] for row in rows):
        notes.append(f"KID needs {2 * BLOCKS} pictures in both sets; those with fewer show none")
    if any(max(row["pictures"], row["others"]) >= MOST for row in rows):
        notes.append(f"of sets with more than {MOST:,} pictures as many were drawn")
    return notes
