"""A folder of images, seen once: its files, and what its manifests, else they, say of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from PIL import Image

from fedgfe_store.common.filters import NUMBERS, is_wanted, wanted_values
from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.compare import is_of
from fedgfe_store.images.foreign import PictureNames
from fedgfe_store.images.manifest import latest
from fedgfe_store.images.outdated import marked
from fedgfe_store.images.png import FileState, Stamp, inspect_image, png_names, stamp_of
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.names import image_name, older_name
from fedgfe_store.records import KEY_COLUMNS, RecordKey

if TYPE_CHECKING:
    from fedgfe_store.store import EmbeddingStore

THREADS = 8
"""Images that are looked at side by side: a network disk answers late, and decoding is C code."""


_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True, slots=True)
class Line:
    """What counts of the last line that a folder's manifests have of an image.

    Parameters
    ----------
    created : str
        When it was written.
    error : str or None
        Why the image could not be made; None where it was.
    fingerprint : str or None
        Of the settings that it was made with.
    record : ImageRecord or None
        The image; None if the line names no record. Its file need not exist.
    """

    created: str
    error: str | None
    fingerprint: str | None
    record: ImageRecord | None


@dataclass(frozen=True, slots=True)
class FoundImage:
    """A look at the file of an image.

    Parameters
    ----------
    path : Path
        The file; an image with capital letters may have an older name.
    stamp : Stamp or None
        Which state of the file it was, see `file_stamp`.
    state, provenance
        What `inspect_image` says of it.
    """

    path: Path
    stamp: Stamp | None
    state: FileState
    provenance: dict[str, Any] | None


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images as it was when it was listed; manifests are read once, when asked for.

    Parameters
    ----------
    path : Path
        The folder; it need not exist.
    names : sequence of str
        Names of its PNG files, sorted.
    brief : collection of RecordKey
        Records of whose manifest lines neither ``own`` nor ``shared`` is kept.
    others : PictureNames
        How other programs name the images that `record` tells of.
    """

    path: Path
    names: Sequence[str]
    brief: Collection[Key] = frozenset()
    others: PictureNames = PictureNames()  # noqa: RUF009

    @classmethod
    def scan(
        cls,
        path: Path,
        *,
        brief: Collection[Key] = frozenset(),
        others: PictureNames | None = None,
    ) -> Self:
        """List a folder.

        Parameters
        ----------
        path : Path
            The folder; without one there are no files.
        brief : collection of RecordKey
            Records of whose manifest lines only key and number are wanted, to save memory.
        others : PictureNames, optional
            How other programs name their images, by default as FedGFE does.
        """
        return cls(path, png_names(path), brief, others or PictureNames())

    @cached_property
    def present(self) -> frozenset[str]:
        """Names of the PNG files."""
        return frozenset(self.names)

    @property
    def lines(self) -> Mapping[str, Line]:
        """The last manifest line of each image, by its file's name; the file need not exist."""
        return self._manifest[0]

    @property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The settings that the manifests name, by fingerprint."""
        return self._manifest[1]

    @cached_property
    def _manifest(self) -> tuple[dict[str, Line], dict[str, Mapping[str, Any]]]:
        # Lines are many, settings few: each is kept once, by its fingerprint.
        settings: dict[str, Mapping[str, Any]] = {}
        texts: dict[str, str] = {}

        def pick(line: dict[str, Any]) -> Line:
            made_with = line.get("fingerprint")
            if made_with is not None and "settings" in line:
                settings.setdefault(made_with, line["settings"])
            record = self._read(line, texts)
            return Line(str(line.get("created", "")), line.get("error"), made_with, record)

        return latest(self.path, pick), settings

    def record(self, name: str) -> ImageRecord | str:
        """Tell of a file what the manifests say, else what it says itself; threads may call it.

        Of a sound image of another program its name counts.

        Returns
        -------
        ImageRecord or str
            The image; where there is none, why.
        """
        line = self.lines.get(name)
        if line is not None and line.error is None and line.record is not None:
            return line.record
        state, facts = inspect_image(self.path / name)
        told = self.others.read(name) if state == "foreign" else None
        if told is None:
            return self._said(name, state, facts)
        try:
            with Image.open(self.path / name, formats=["PNG"]) as image:
                return ImageRecord.of_another_program(self.path, name, told, image.size)
        except FileNotFoundError:  # removed meanwhile
            return "damaged"

    def inspect(self, name: str) -> ImageRecord | str:
        """Tell of a file what it says itself: images of other programs are none of ours."""
        return self._said(name, *inspect_image(self.path / name))

    def _said(
        self, name: str, state: FileState, facts: Mapping[str, Any] | None
    ) -> ImageRecord | str:
        if state == "damaged":
            return "damaged"
        record = self._read({**(facts or {}), "file": name}, {})
        return record or "says nothing about a record"

    def _read(self, facts: Mapping[str, Any], texts: dict[str, str]) -> ImageRecord | None:
        return ImageRecord.of(self.path, facts, texts, brief=self.brief)

    @cached_property
    def records(self) -> Mapping[str, ImageRecord | str]:
        """What `record` tells of each file, by name, in the order of the names."""
        # Read before the threads start: they would do it once each.
        _ = self.lines
        return dict(zip(self.names, side_by_side(self.record, self.names), strict=True))

    def look(self, key: Key, number: int) -> FoundImage | None:
        """Look at the file that is to hold an image of a record; threads may call it.

        Returns
        -------
        FoundImage or None
            None if there is no such file. One of an older name counts if it says itself that
            it is this image.
        """
        name = self.find(key, number)
        if name is None:
            return None
        found = look_at(self.path / name)
        is_older = name != image_name(key, number)
        return None if is_older and not is_of(found.provenance or {}, key, number) else found

    def find(self, key: Key, number: int) -> str | None:
        """Name the file that may hold an image of a record; None if there is no such file."""
        name = image_name(key, number)
        if name in self.present:
            return name
        older = older_name(key, number)
        return older if older in self.present else None

    def select(
        self, *, per_class: int | None = None, store: EmbeddingStore | None = None, **filters: Any
    ) -> list[ImageRecord]:
        """Return the images whose records meet every filter.

        The manifest is believed; a PNG that it does not list is asked for its own provenance.

        Parameters
        ----------
        per_class : int, optional
            Keep only this many records, those of the lowest index, of each node, round, split and
            class.
        store : EmbeddingStore, optional
            Mark the images of its records that are out of date.
        **filters
            ``node``, ``round``, ``split``, ``class_name`` and ``index``, as in
            `EmbeddingStore.select`.

        Returns
        -------
        list of ImageRecord
            In the order of their keys. Files that are not ours, or damaged, are left out.

        Raises
        ------
        NotFoundError
            If there is no such folder, or no such image in it.
        SchemaMismatchError
            If a filter is of the wrong type.
        """
        found = pick(self._shown(), str(self.path), per_class=per_class, **filters)
        return marked(found, store)

    def _shown(self) -> list[ImageRecord]:
        if not self.path.is_dir():
            raise NotFoundError(
                f"no folder of pictures at {self.path} (fedgfe-store generate makes one)"
            )
        known = (each for each in self.records.values() if isinstance(each, ImageRecord))
        found = [image for image in known if image.size is not None]
        if not found:
            raise NotFoundError(
                f"no pictures of ours in {self.path}: expected PNG files of generate, or such "
                f"names as --pattern reads"
            )
        return found


def pick(
    images: Sequence[ImageRecord], where: str, *, per_class: int | None = None, **filters: Any
) -> list[ImageRecord]:
    """Return the images whose records meet every filter, in the order of their keys.

    Parameters
    ----------
    images : sequence of ImageRecord
        Images of one folder or several.
    where : str
        What to call where they are.
    per_class, **filters
        As for `ImageFolder.select`.

    Raises
    ------
    NotFoundError
        If there is none.
    SchemaMismatchError
        If a filter is of the wrong type.
    """
    wanted = {name: wanted_values(name, value) for name, value in filters.items()}
    unknown = [name for name in wanted if name not in KEY_COLUMNS]
    if unknown:
        raise SchemaMismatchError(
            f"expected filters of {', '.join(KEY_COLUMNS)}, got {', '.join(unknown)}"
        )
    kept = [
        image
        for image in images
        if all(_meets(image.key, n, values) for n, values in wanted.items())
    ]
    if per_class is not None:
        kept = list(_lowest(kept, per_class))
    if not kept:
        raise NotFoundError(f"none of the {len(images):,} pictures in {where} meets the filters")
    return sorted(kept, key=lambda image: (image.key.rank, image.number))


def side_by_side(look: Callable[[_T], _U], things: Iterable[_T]) -> Iterator[_U]:
    """Yield what `look` gives for each thing, in their order; `THREADS` threads call it."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(look, things)


def file_stamp(path: Path) -> Stamp | None:
    """Tell one state of a file from another by number, size and time; None where there is none."""
    try:
        return stamp_of(path.stat())
    except FileNotFoundError:
        return None


def key_values(images: Iterable[ImageRecord], name: str) -> np.ndarray:
    """Return the values of a key column of `images`, as those of a store; some may have none."""
    kind = np.int64 if name in NUMBERS else np.dtypes.StringDType()
    values = (image.key.value(name) for image in images)
    return np.array([value for value in values if value is not None], kind)


def _meets(key: Key, name: str, wanted: Sequence[Any]) -> bool:
    value = key.value(name)
    return value is not None and is_wanted(value, wanted)


def look_at(path: Path) -> FoundImage:
    """Look at one file; one that is not there counts as damaged."""
    # The stamp comes first: a file that is replaced meanwhile is then seen to have changed.
    stamp = file_stamp(path)
    return FoundImage(path, stamp, *inspect_image(path))


def _lowest(images: Sequence[ImageRecord], n: int) -> Iterator[ImageRecord]:
    # Of the records, not of the images: one record may have several.
    indices = defaultdict(set)
    for image in images:
        if isinstance(image.key, RecordKey):
            indices[_group(image.key)].add(image.key.index)
    kept = {group: set(sorted(found)[:n]) for group, found in indices.items()}
    for image in images:
        if not isinstance(image.key, RecordKey) or image.key.index in kept[_group(image.key)]:
            yield image


def _group(key: RecordKey) -> tuple[str, int, str, str]:
    return key.node, key.round, key.split, key.class_name
