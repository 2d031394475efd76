"""The pictures in a generated folder: what its manifests, and they themselves, say of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgfe_store.common.filters import NUMBERS, is_wanted, wanted_values
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.plan import record_digests
from fedgfe_store.images.identity import Identity
from fedgfe_store.images.manifest import latest
from fedgfe_store.images.png import inspect_image, png_names
from fedgfe_store.names import read_key
from fedgfe_store.records import KEY_COLUMNS, RecordKey
from fedgfe_store.selection import Selection

if TYPE_CHECKING:
    from fedgfe_store.store import EmbeddingStore

_OWN = ("file_id", "seed", "digests", "created", "seconds", "bytes")
_READERS = 8
_LARGEST = 2**20
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
    mark : str
        Why it is out of date, as `Records.mark` says.
    """

    file: Path
    key: RecordKey
    number: int = 0
    size: tuple[int, int] = (1, 1)
    file_id: str = ""
    mark: str = ""


def find_pictures(
    folder: Path,
    *,
    per_class: int | None = None,
    store: EmbeddingStore | None = None,
    **filters: Any,
) -> list[Picture]:
    """Return the pictures in a folder whose records meet every filter.

    The manifest is believed; a PNG that it does not list is asked for its own provenance.

    Parameters
    ----------
    folder : Path
        A folder that images were generated into.
    per_class : int, optional
        Keep only this many records, those of the lowest index, of each node, round, split and
        class.
    store : EmbeddingStore, optional
        Mark the pictures of its records that are out of date.
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
    found = {picture.file.name: picture for picture in _all(folder, store)}.values()
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


def _all(folder: Path, store: EmbeddingStore | None) -> Iterator[Picture]:
    found = {
        path: (known, size)
        for path, known in read_pictures(folder).items()
        if not isinstance(known, str) and (size := _size(known.shared)) is not None
    }
    marks = mark_outdated([known for known, _ in found.values()], store)
    for (path, (known, size)), mark in zip(found.items(), marks, strict=True):
        yield Picture(path, known.key, known.image, size, known.file_id, mark)


@lru_cache(maxsize=64)
def _size(shared: str) -> tuple[int, int] | None:
    """Give width and height from the part of a provenance that many pictures have in common."""
    try:
        settings = json.loads(shared)["settings"]
        size = settings["width"], settings["height"]
    except (KeyError, TypeError):
        return None
    fits = all(isinstance(pixels, int) and 1 <= pixels <= _LARGEST for pixels in size)
    return size if fits else None


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
    mark : str
        Why it is out of date, as `Records.mark` says; empty until it is compared with a store.
    """

    file: str
    key: RecordKey
    image: int
    own: Mapping[str, Any]
    shared: str
    mark: str = ""

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
    lines = latest(folder, lambda line: None if "error" in line else listed_picture(line, texts))
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
    paths = [folder / name for name in png_names(folder)]
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
    picture = listed_picture({**(facts or {}), "file": path.name}, {})
    return picture or "says nothing about a record"


def listed_picture(facts: Mapping[str, Any], texts: dict[str, str]) -> ListedPicture | None:
    """Make a picture of a manifest's line.

    Parameters
    ----------
    facts : mapping
        The line.
    texts : dict
        Holds what pictures share, for the next ones.

    Returns
    -------
    ListedPicture or None
        None if the line names no record.
    """
    key, image = read_key(facts.get("key")), facts.get("image")
    if key is None or not isinstance(image, int):
        return None
    own = {name: facts[name] for name in _OWN if name in facts}
    rest = {k: v for k, v in facts.items() if k not in _OWN and k not in _IDENTITY}
    text = json.dumps(rest)
    # Thousands of pictures then hold one text.
    return ListedPicture(facts["file"], key, image, own, texts.setdefault(text, text))


DELETED, CHANGED = "record deleted", "embedding changed"
"""What is told of pictures that are out of date."""


class Records:
    """What a store has of the records that pictures show.

    Parameters
    ----------
    selection : Selection
        The records; their tensors are not read.
    """

    def __init__(self, selection: Selection) -> None:
        self._as_of = selection.as_of
        self._place = selection.path.resolve()
        self._identity = Identity.of_store(selection)
        digests = record_digests(selection, selection.schema.columns)
        self._digests = dict(zip(selection.keys(), digests, strict=True))
        self._comparable = lru_cache(maxsize=64)(self._is_of_this_store)

    def mark(self, picture: ListedPicture) -> str:
        """Tell why a picture is out of date.

        Parameters
        ----------
        picture : ListedPicture
            A picture of this store's records; of those of other stores nothing is told.

        Returns
        -------
        str
            ``"record deleted"`` or ``"embedding changed"``; empty where it shows a record as
            the store has it.
        """
        if not self._comparable(picture.shared):
            return ""
        own = self._digests.get(picture.key)
        if own is None:
            return DELETED
        made_from = picture.own.get("digests")
        if not isinstance(made_from, dict):
            return ""
        return CHANGED if any(own.get(n) != digest for n, digest in made_from.items()) else ""

    def _is_of_this_store(self, shared: str) -> bool:
        """Whether pictures can be of this store, at a commit that this view of it has."""
        facts = json.loads(shared)
        commit, identity = facts.get("commit"), Identity.of_image(facts)
        if self._identity.is_another(identity):
            return False
        if self._as_of is not None and isinstance(commit, int) and commit > self._as_of:
            return False
        named = facts.get("store")
        if identity != Identity() or not isinstance(named, str) or "\0" in named:
            return True
        # Older pictures name the store's place only: if another one is there, they are of that.
        return Path(named) == self._place or not (Path(named) / "zarr.json").is_file()


def mark_outdated(
    pictures: Sequence[ListedPicture], store: EmbeddingStore | Selection | None
) -> list[str]:
    """Tell of each picture why it is out of date; nothing where there is no store.

    Parameters
    ----------
    pictures : sequence of ListedPicture
        Pictures of one folder.
    store : EmbeddingStore, Selection or None
        What they are compared with: all records of the store.

    Returns
    -------
    list of str
        As `Records.mark` says.
    """
    if store is None or not pictures:
        return [""] * len(pictures)
    # Reading about the others would cost time that grows with the store, not with the folder.
    nodes = sorted({picture.key.node for picture in pictures})
    rounds = sorted({picture.key.round for picture in pictures})
    find = store.others if isinstance(store, Selection) else store.select
    records = Records(find(node=nodes, round=rounds))
    return [records.mark(picture) for picture in pictures]
