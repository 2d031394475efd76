"""Which images a contact sheet shows, and in which rows and columns."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgfe_store.common.lookup import noun
from fedgfe_store.common.words import natural_order, numbers_first
from fedgfe_store.derived_keys import SEVERAL, WalkKey
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.axes import OF_DERIVED, SETTINGS
from fedgfe_store.images.folders import folder_labels
from fedgfe_store.images.labels import label_of
from fedgfe_store.images.pairing import sample_numbers
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.records import KEY_COLUMNS, RecordKey, check_keys

AXES = (*KEY_COLUMNS, *OF_DERIVED, *SETTINGS)
"""What a row or a column can be."""

Place = tuple[Any, ...]
"""The values of a row's or a column's key columns."""


@dataclass(frozen=True)
class Sheet:
    """Images by row and column.

    Parameters
    ----------
    by_row, by_column : tuple of str
        What a row and a column is, of `AXES`.
    rows, columns : tuple
        Their values, in the order in which they are drawn.
    cells : mapping
        An image for each (row, column) that has one.
    common : mapping
        The other key columns in which all of these images agree, and their values; settings only
        where the images that were given differ in them.
    """

    by_row: tuple[str, ...]
    by_column: tuple[str, ...]
    rows: tuple[Place, ...]
    columns: tuple[Place, ...]
    cells: Mapping[tuple[Place, Place], ImageRecord]
    common: Mapping[str, Any]
    differing: tuple[str, ...] = ()
    """Settings in which the images that were given differ."""
    labels: Mapping[Path, str] = field(default_factory=dict)
    """What each folder is called."""

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
        facts = _facts(image, self.differing, self.labels)
        rest = {name: value for name, value in facts.items() if name not in told}
        rest = {name: value for name, value in rest.items() if not _says_nothing(name, value)}
        return ", ".join(filter(None, [label_of(rest.values(), rest), image.remark]))


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
    means the one of the first round that has the sample. With frames only walks are shown.

    Parameters
    ----------
    images : iterable of ImageRecord
        As `ImageFolder.select` gives them.
    rows, columns : sequence of str
        What a row and a column is, of `AXES`; none in both.

    Raises
    ------
    SchemaMismatchError
        If `rows` or `columns` is of no use, or there is no image.
    """
    check_keys("rows", rows, AXES)
    check_keys("columns", columns, AXES)
    if set(rows) & set(columns):
        both = ", ".join(sorted(map(noun, set(rows) & set(columns))))
        raise SchemaMismatchError(f"expected other keys for columns than for rows, got {both}")
    images = list(images)
    if "frame" in {*rows, *columns}:
        images = [image for image in images if isinstance(image.key, WalkKey)]
    if not images:
        what = "one picture of a walk" if "frame" in {*rows, *columns} else "one picture"
        raise SchemaMismatchError(f"a sheet: expected at least {what}, got none")
    labels = folder_labels({image.folder for image in images})
    differing = _differing(images, labels)
    of_settings = tuple(
        dict.fromkeys((*differing, *(n for n in (*rows, *columns) if n in SETTINGS)))
    )
    derived = () if all(isinstance(i.key, RecordKey) for i in images) else OF_DERIVED
    told = (*KEY_COLUMNS, "image", *derived, *differing)
    others = [n for n in told if n not in {*rows, *columns}]
    found: dict[tuple[Place, Place], dict[Place, ImageRecord]] = defaultdict(dict)
    for image, number in zip(images, _numbers(images, {*rows, *columns}), strict=True):
        facts = _facts(image, of_settings, labels) | {"index": number}
        cell = tuple(facts[n] for n in rows), tuple(facts[n] for n in columns)
        found[cell][tuple(facts[n] for n in others)] = image
    counts = Counter(sample for samples in found.values() for sample in samples)
    order = _order(others)
    ranked = sorted(counts, key=lambda sample: (-counts[sample], order(sample)))
    rank = {sample: place for place, sample in enumerate(ranked)}
    cells = {cell: samples[min(samples, key=rank.__getitem__)] for cell, samples in found.items()}
    return Sheet(
        tuple(rows),
        tuple(columns),
        tuple(sorted({row for row, _ in cells}, key=_order(rows))),
        tuple(sorted({column for _, column in cells}, key=_order(columns))),
        cells,
        _common(others, cells.values(), differing, labels),
        differing,
        labels,
    )


def _numbers(images: Sequence[ImageRecord], axes: Collection[str]) -> list[str | int]:
    """Give the index of each image, or what is the same for a sample in all rounds."""
    if "round" not in axes:
        return [image.key.shown("index") for image in images]
    return samples(images, lambda image: image.key.shown("index"))


def samples(
    images: Sequence[ImageRecord], of_derived: Callable[[ImageRecord], str | int]
) -> list[str | int]:
    """Give each image the number of its sample, see `sample_numbers`; else what `of_derived` does.

    Parameters
    ----------
    images : sequence of ImageRecord
        Images of one folder or several.
    of_derived : callable
        Called with those that are of no record.
    """
    known = [(i.key, i.file_id, str(i.folder)) for i in images if isinstance(i.key, RecordKey)]
    columns = [list(each) for each in zip(*known, strict=True)] or [[], [], []]
    numbers = iter(sample_numbers(*columns))
    return [next(numbers) if isinstance(i.key, RecordKey) else of_derived(i) for i in images]


def _facts(
    image: ImageRecord, settings: Collection[str], labels: Mapping[Path, str]
) -> dict[str, Any]:
    facts = {name: image.key.shown(name) for name in KEY_COLUMNS}
    known = {
        n: labels[image.folder] if n == "folder" else plain_setting(image, n) for n in settings
    }
    return facts | {"image": image.number} | _of_derived(image) | known


def _of_derived(image: ImageRecord) -> dict[str, Any]:
    """Tell which mean or walk an image is of, and which frame of it; nothing of records."""
    if isinstance(image.key, RecordKey):
        return dict.fromkeys(OF_DERIVED, "")
    return {"derived": image.key.label, "frame": image.frame}


def _differing(images: Sequence[ImageRecord], labels: Mapping[Path, str]) -> tuple[str, ...]:
    """Return the settings in which images differ; the folder only where nothing else tells them."""
    found = differing_settings(images)
    told = {
        (image.key, image.number, *(plain_setting(image, name) for name in found))
        for image in images
    }
    return (*found, "folder") if len(told) < len(images) and len(labels) > 1 else found


def differing_settings(images: Iterable[ImageRecord]) -> tuple[str, ...]:
    """Return those of `SETTINGS`, the folder left out, in which images differ."""
    kinds = {image.shared: image for image in images}.values()  # the same for many images
    names = [name for name in SETTINGS if name != "folder"]
    return tuple(n for n in names if len({plain_setting(image, n) for image in kinds}) > 1)


def plain_setting(image: ImageRecord, name: str) -> int | float | str:
    """Return a setting as a number or text, whatever a provenance holds."""
    value = image.setting(name)
    return value if isinstance(value, int | float | str) else str(value or "")


def setting_order(value: int | float | str) -> tuple[bool, float, list[tuple[bool, int, str]]]:
    """Return a setting's place among its values, a key for `sorted`: numbers first, by size."""
    if isinstance(value, int | float):
        return False, float(value), []
    return True, 0.0, natural_order(value)


def _order(names: Sequence[str]) -> Callable[[Place], Any]:
    """Return a key for `sorted`: numbers by size and before texts, in keys and in settings."""
    kinds: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("split", "class_name"), str),
        **dict.fromkeys(SETTINGS, setting_order),
    }
    return lambda place: [
        kinds[name](value) if name in kinds else numbers_first(str(value))
        for name, value in zip(names, place, strict=True)
    ]


def _common(
    names: list[str],
    images: Iterable[ImageRecord],
    settings: Collection[str],
    labels: Mapping[Path, str],
) -> dict[str, Any]:
    facts = [_facts(image, settings, labels) for image in images]
    shown = {name: facts[0][name] for name in names if len({f[name] for f in facts}) == 1}
    return {name: value for name, value in shown.items() if not _says_nothing(name, value)}


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a fact is only there since other images, or all of a mean's sources, differ in it."""
    return value == "" if name in OF_DERIVED else name in KEY_COLUMNS and value == SEVERAL
