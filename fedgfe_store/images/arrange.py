"""Which images a contact sheet shows, and in which rows and columns."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.labels import label_of
from fedgfe_store.images.pairing import sample_numbers
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.records import KEY_COLUMNS, check_keys, key_order

Place = tuple[Any, ...]
"""The values of a row's or a column's key columns."""


@dataclass(frozen=True)
class Sheet:
    """Images by row and column.

    Parameters
    ----------
    by_row, by_column : tuple of str
        Key columns of the rows and of the columns.
    rows, columns : tuple
        Their values, in the order in which they are drawn.
    cells : mapping
        An image for each (row, column) that has one.
    common : mapping
        The other key columns in which all of these images agree, and their values.
    """

    by_row: tuple[str, ...]
    by_column: tuple[str, ...]
    rows: tuple[Place, ...]
    columns: tuple[Place, ...]
    cells: Mapping[tuple[Place, Place], ImageRecord]
    common: Mapping[str, Any]

    @property
    def missing(self) -> int:
        """Number of cells without an image."""
        return len(self.rows) * len(self.columns) - len(self.cells)

    @property
    def title(self) -> str:
        """What all images have in common, in words."""
        return label_of(self.common.values(), self.common)

    def caption(self, image: ImageRecord) -> str:
        """Return in words what row, column and title do not say of an image, its mark included."""
        told = {*self.by_row, *self.by_column, *self.common}
        rest = {name: value for name, value in _facts(image).items() if name not in told}
        return ", ".join(filter(None, [label_of(rest.values(), rest), image.mark]))


def arrange(
    images: Iterable[ImageRecord],
    *,
    rows: Sequence[str] = ("class_name",),
    columns: Sequence[str] = ("round",),
) -> Sheet:
    """Put images into rows and columns by their keys.

    Where several belong in one cell, the same sample is taken for all cells as far as possible:
    that one of the other keys' combinations which fills most of them. Over rounds a sample is
    known by its ``file_id``, where its images name one, and by its index else: `index` then
    means the one of the first round that has the sample.

    Parameters
    ----------
    images : iterable of ImageRecord
        As `ImageFolder.select` gives them.
    rows, columns : sequence of str
        Key columns of the rows and of the columns; none in both.

    Raises
    ------
    SchemaMismatchError
        If `rows` or `columns` is of no use, or there is no image.
    """
    check_keys("rows", rows)
    check_keys("columns", columns)
    if set(rows) & set(columns):
        both = ", ".join(sorted(set(rows) & set(columns)))
        raise SchemaMismatchError(f"expected other keys for columns than for rows, got {both}")
    images = list(images)
    if not images:
        raise SchemaMismatchError("a sheet: expected at least one picture, got none")
    others = [name for name in (*KEY_COLUMNS, "image") if name not in {*rows, *columns}]
    found: dict[tuple[Place, Place], dict[Place, ImageRecord]] = defaultdict(dict)
    for image, number in zip(images, _numbers(images, {*rows, *columns}), strict=True):
        facts = _facts(image) | {"index": number}
        cell = tuple(facts[n] for n in rows), tuple(facts[n] for n in columns)
        found[cell][tuple(facts[n] for n in others)] = image
    counts = Counter(sample for samples in found.values() for sample in samples)
    order = key_order(others)
    ranked = sorted(counts, key=lambda sample: (-counts[sample], order(sample)))
    rank = {sample: place for place, sample in enumerate(ranked)}
    cells = {cell: samples[min(samples, key=rank.__getitem__)] for cell, samples in found.items()}
    return Sheet(
        tuple(rows),
        tuple(columns),
        tuple(sorted({row for row, _ in cells}, key=key_order(rows))),
        tuple(sorted({column for _, column in cells}, key=key_order(columns))),
        cells,
        _common(others, cells.values()),
    )


def _numbers(images: Sequence[ImageRecord], axes: Collection[str]) -> list[int]:
    """Give the index of each image, or what is the same for a sample in all rounds."""
    keys = [image.key for image in images]
    if "round" not in axes:
        return [key.index for key in keys]
    return sample_numbers(keys, [image.file_id for image in images])


def _facts(image: ImageRecord) -> dict[str, Any]:
    facts = {name: getattr(image.key, name) for name in KEY_COLUMNS}
    return facts | {"image": image.number}


def _common(names: list[str], images: Iterable[ImageRecord]) -> dict[str, Any]:
    facts = [_facts(image) for image in images]
    return {name: facts[0][name] for name in names if len({f[name] for f in facts}) == 1}
