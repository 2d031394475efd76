"""The pictures in a generated folder, by the keys of their records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.images import read_provenance
from fedgfe_store.generation.manifest import read_manifest
from fedgfe_store.records import KEY_COLUMNS, RecordKey
from fedgfe_store.selection import wanted_values


@dataclass(frozen=True)
class Picture:
    """An image file and what it shows.

    Parameters
    ----------
    file : Path
        The file.
    key : RecordKey
        The record that it was made from.
    number : int
        Which image of the record it is, from 0.
    size : tuple of int
        Width and height in pixels.
    """

    file: Path
    key: RecordKey
    number: int = 0
    size: tuple[int, int] = (1, 1)


def find_pictures(folder: Path, *, per_class: int | None = None, **filters: Any) -> list[Picture]:
    """Return the pictures in a folder whose records meet every filter.

    The manifest is believed; a PNG that it does not list is asked for its own provenance.

    Parameters
    ----------
    folder : Path
        A folder that images were generated into.
    per_class : int, optional
        Keep only this many records, those of the lowest index, of each node, round, split and
        class.
    **filters
        ``node``, ``round``, ``split``, ``class_name`` and ``index``, as in
        `EmbeddingStore.select`.

    Returns
    -------
    list of Picture
        In the order of their keys. Files that are not ours, or damaged, are left out.

    Raises
    ------
    NotFoundError
        If there is no such folder, or no such picture in it.
    SchemaMismatchError
        If a filter is of the wrong type.
    """
    wanted = {name: wanted_values(name, value) for name, value in filters.items()}
    unknown = [name for name in wanted if name not in KEY_COLUMNS]
    if unknown:
        raise SchemaMismatchError(
            f"expected filters of {', '.join(KEY_COLUMNS)}, got {', '.join(unknown)}"
        )
    if not folder.is_dir():
        raise NotFoundError(f"no folder of pictures at {folder} (fedgfe-store generate makes one)")
    found = {picture.file.name: picture for picture in _all(folder)}.values()
    if not found:
        raise NotFoundError(f"no pictures of ours in {folder}: expected PNG files of generate")
    kept = [p for p in found if all(getattr(p.key, n) in values for n, values in wanted.items())]
    if per_class is not None:
        kept = list(_lowest(kept, per_class))
    if not kept:
        raise NotFoundError(f"none of the {len(found):,} pictures in {folder} meets the filters")
    return sorted(kept, key=lambda p: (p.key, p.number))


def _all(folder: Path) -> Iterator[Picture]:
    there = {file.name for file in folder.glob("*.png")}
    listed = set()
    for line in read_manifest(folder):
        picture = _picture(folder, line.get("file"), line) if "error" not in line else None
        if picture is not None and picture.file.name in there:
            listed.add(picture.file.name)
            yield picture
    for name in sorted(there - listed):
        provenance = read_provenance(folder / name)
        picture = None if provenance is None else _picture(folder, name, provenance)
        if picture is not None:
            yield picture


def _picture(folder: Path, name: Any, provenance: dict[str, Any]) -> Picture | None:
    """Return the picture that a manifest's line or a file tells of, if it does."""
    try:
        settings = provenance["settings"]
        key, size = RecordKey(**provenance["key"]), (settings["width"], settings["height"])
        return Picture(folder / Path(name).name, key, provenance["image"], size)
    except (KeyError, TypeError):
        return None


def _lowest(pictures: list[Picture], n: int) -> Iterator[Picture]:
    indices = defaultdict(set)
    for picture in pictures:
        indices[_group(picture)].add(picture.key.index)
    kept = {group: set(sorted(found)[:n]) for group, found in indices.items()}
    yield from (picture for picture in pictures if picture.key.index in kept[_group(picture)])


def _group(picture: Picture) -> tuple[str, int, str, str]:
    return picture.key.node, picture.key.round, picture.key.split, picture.key.class_name
