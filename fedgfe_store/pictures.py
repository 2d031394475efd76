"""The pictures in a generated folder: what its manifests, and they themselves, say of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedgfe_store._filters import NUMBERS, is_wanted, wanted_values
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.images import inspect_image
from fedgfe_store.generation.manifest import latest
from fedgfe_store.records import KEY_COLUMNS, RecordKey

_OWN = ("file_id", "seed", "digests", "created", "seconds", "bytes")
_READERS = 8
_IDENTITY = ("file", "key", "image")


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
    file_id : str
        What identifies its sample; empty where that is not known.
    """

    file: Path
    key: RecordKey
    number: int = 0
    size: tuple[int, int] = (1, 1)
    file_id: str = ""


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
    kept = [
        p
        for p in found
        if all(is_wanted(getattr(p.key, n), values) for n, values in wanted.items())
    ]
    if per_class is not None:
        kept = list(_lowest(kept, per_class))
    if not kept:
        raise NotFoundError(f"none of the {len(found):,} pictures in {folder} meets the filters")
    return sorted(kept, key=lambda p: (p.key, p.number))


def key_values(pictures: Iterable[Picture], name: str) -> np.ndarray:
    """Return the values of a key column of `pictures`, as those of a store."""
    kind = np.int64 if name in NUMBERS else np.dtypes.StringDType()
    return np.array([getattr(picture.key, name) for picture in pictures], kind)


def _all(folder: Path) -> Iterator[Picture]:
    for path, known in read_pictures(folder).items():
        size = None if isinstance(known, str) else _size(known.shared)
        if size is not None and not isinstance(known, str):
            yield Picture(path, known.key, known.image, size, known.file_id)


@lru_cache(maxsize=64)
def _size(shared: str) -> tuple[int, int] | None:
    """Give width and height from the part of a provenance that many pictures have in common."""
    try:
        settings = json.loads(shared)["settings"]
        return settings["width"], settings["height"]
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


@dataclass(frozen=True, slots=True)
class ListedPicture:
    """One picture and where it came from.

    Parameters
    ----------
    file : str
        Its name in the folder.
    key : RecordKey
        The record that it shows.
    image : int
        Which image of the record, from 0.
    own : mapping
        What differs from picture to picture: ``file_id``, seed, digests, time, seconds, bytes.
    shared : str
        All else of its provenance, as JSON: the same for many pictures.
    """

    file: str
    key: RecordKey
    image: int
    own: Mapping[str, Any]
    shared: str

    @property
    def file_id(self) -> str:
        """What identifies its sample; empty where that is not known."""
        return str(self.own.get("file_id") or "")


def listed_pictures(folder: Path) -> dict[str, ListedPicture]:
    """Read from a folder's manifests the pictures whose last line says that they are finished.

    Parameters
    ----------
    folder : Path
        Folder of the images.

    Returns
    -------
    dict
        Picture by file name; the files need not exist.
    """
    texts: dict[str, str] = {}
    lines = latest(folder, lambda line: None if "error" in line else _listed(line, texts))
    return {name: picture for name, picture in lines.items() if picture is not None}


def read_pictures(folder: Path) -> dict[Path, ListedPicture | str]:
    """Tell of each PNG file of a folder what its manifests say, else what it says itself.

    Parameters
    ----------
    folder : Path
        Folder of the images.

    Returns
    -------
    dict
        By file, in the order of their names: the picture; where there is none, why.
    """
    listed = listed_pictures(folder)
    paths = sorted(path for path in folder.glob("*.png") if path.is_file())
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda path: listed.get(path.name) or inspect_picture(path), paths)
        return dict(zip(paths, found, strict=True))


def inspect_picture(path: Path) -> ListedPicture | str:
    """Read what a picture says about itself.

    Parameters
    ----------
    path : Path
        A PNG file.

    Returns
    -------
    ListedPicture or str
        The picture; where there is none, why.
    """
    state, facts = inspect_image(path)
    if state == "damaged":
        return "damaged"
    picture = _listed({**(facts or {}), "file": path.name}, {})
    return picture or "says nothing about a record"


def _listed(facts: Mapping[str, Any], texts: dict[str, str]) -> ListedPicture | None:
    key, image = _key(facts.get("key")), facts.get("image")
    if key is None or not isinstance(image, int):
        return None
    own = {name: facts[name] for name in _OWN if name in facts}
    rest = {k: v for k, v in facts.items() if k not in _OWN and k not in _IDENTITY}
    text = json.dumps(rest)
    # Thousands of pictures then hold one text.
    return ListedPicture(facts["file"], key, image, own, texts.setdefault(text, text))


def _key(fields: Any) -> RecordKey | None:
    kinds = {"node": str, "round": int, "split": str, "class_name": str, "index": int}
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        return None
    fits = all(isinstance(fields[name], kind) for name, kind in kinds.items())
    return RecordKey(**fields) if fits else None
