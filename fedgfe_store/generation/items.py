"""The images of a plan: as columns, with an object for each of those that somebody asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np

from fedgfe_store.derived.record import Derived
from fedgfe_store.derived_keys import Key
from fedgfe_store.generation.parts import Part, places_of
from fedgfe_store.generation.settings import Settings, seed_of
from fedgfe_store.images.compare import Status
from fedgfe_store.images.identity import digest_columns, digests_of
from fedgfe_store.images.png import Stamp
from fedgfe_store.names import image_name, image_names
from fedgfe_store.records import KEY_COLUMNS, RecordKey

if TYPE_CHECKING:
    from collections.abc import Collection

    from fedgfe_store.images.elsewhere import Partners
    from fedgfe_store.selection import Selection


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One image of a plan.

    Parameters
    ----------
    position : int
        Position of the record in the selection.
    key : RecordKey, MeanKey or WalkKey
        The record.
    number : int
        Which image of the record.
    path : Path
        Its file.
    seed : int
        Seed of its noise.
    digests : dict
        Digest of each of the record's tensors that the image depends on, 16 hex digits.
    status : {"done", "missing", "stale"}
        ``"stale"`` is a sound image of another embedding, of other settings, or not ours.
    reason : str
        Why it is not done: what changed, or what is wrong with the file.
    keep : bool
        True for a stale image that is to stay as it is.
    seen : Stamp or None
        Which file was there when it was planned, see `file_stamp`.
    file_id : str
        What identifies the record's sample; empty where that is not known.
    sources : int or None
        How many records a derived one is made of.
    """

    position: int
    key: Key
    number: int
    path: Path
    seed: int
    digests: dict[str, str] = field(hash=False)
    status: Status = "missing"
    reason: str = ""
    keep: bool = False
    seen: Stamp | None = None
    file_id: str = ""
    sources: int | None = None


@dataclass(frozen=True)
class Records:
    """What a plan needs to know of its records, a column each.

    Parameters
    ----------
    places : sequence of int
        Positions in the selection.
    keys : sequence of Key, or mapping
        Their keys, or their key columns.
    digests : mapping
        Digests of their tensors by column, see `digest_columns`.
    file_ids : sequence of str
        What identifies their samples; empty where that is not known.
    sources : sequence of int or None
        How many records a derived one is made of; None of records of the store.
    """

    places: Sequence[int]
    keys: Sequence[Key] | Mapping[str, Sequence[Any]]
    digests: Mapping[str, Sequence[str | None]]
    file_ids: Sequence[str]
    sources: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        selection: Selection | Derived,
        part: Part,
        columns: Collection[str],
        partners: Mapping[str, Partners],
    ) -> Self:
        """Look at the records that a part holds, each once; nothing is made for the others.

        That keys and notes belong together is not checked here.
        """
        if isinstance(selection, Derived):
            firsts = {key: n for n, key in reversed([*enumerate(selection.keys())])}
            held = sorted(place for key, place in firsts.items() if part.holds(key))
            own = selection.take(held)
            digests = digest_columns(own, columns, partners)
            return cls(held, own.keys(), digests, own.file_ids, own.counts)
        places = _first_of_each(selection.rows)
        if part.count > 1:
            places = places[places_of(selection.take(places).key_columns(), part)]
        records = selection.take(places)
        keys = {name: values.tolist() for name, values in records.key_columns().items()}
        digests = digest_columns(records, columns, partners)
        return cls(places.tolist(), keys, digests, records.column("file_id").tolist())

    def __len__(self) -> int:
        return len(self.places)

    def key(self, record: int) -> Key:
        """Give the key of a record."""
        if isinstance(self.keys, Mapping):
            return RecordKey(*(self.keys[name][record] for name in KEY_COLUMNS))
        return self.keys[record]

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Name their images, record by record."""
        if isinstance(self.keys, Mapping):
            return [*image_names(self.keys, numbers)]
        return [image_name(key, number) for key in self.keys for number in numbers]


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    if (rows[1:] > rows[:-1]).all():
        return np.arange(len(rows))
    return np.sort(np.unique(rows, return_index=True)[1])


@dataclass(frozen=True)
class Listing:
    """The images that a plan lists of records, and where they go.

    Parameters
    ----------
    records : Records
        The records.
    numbers : sequence of int
        Which images of each.
    folder : Path
        Folder of the images.
    settings : Settings
        What they are made with.
    """

    records: Records
    numbers: Sequence[int]
    folder: Path
    settings: Settings

    def names(self) -> list[str]:
        """Name their files, record by record."""
        return self.records.names(self.numbers)

    def key(self, position: int) -> tuple[Key, int]:
        """Give the key and number of an image."""
        record, number = divmod(position, len(self.numbers))
        return self.records.key(record), self.numbers[number]

    def item(self, position: int, name: str, stamp: Stamp | None) -> PlanItem:
        """Make the object of an image, which is done if there is a stamp of its file."""
        record, (key, number) = position // len(self.numbers), self.key(position)
        records, settings = self.records, self.settings
        file_id = records.file_ids[record]
        digests = (values[record] for values in records.digests.values())
        return PlanItem(
            position=records.places[record],
            key=key,
            number=number,
            path=self.folder / name,
            seed=seed_of(
                settings.seed, key, number, file_id if settings.noise == "file_id" else ""
            ),
            digests=digests_of(records.digests, digests),
            status="missing" if stamp is None else "done",
            seen=stamp,
            file_id=file_id,
            sources=None if records.sources is None else records.sources[record],
        )


@dataclass(frozen=True)
class Images:
    """The images of a plan by their positions in it; few have an object before it is asked for.

    Of a second run over hundreds of thousands of images that are done, objects would take more time
    and memory than all else. An image that is neither among `right` nor among `items` is missing.

    Parameters
    ----------
    names : sequence of str
        Names of their files.
    listing : Listing, optional
        Tells of those that are not among `items`.
    right : mapping
        Stamps of the files that need no look, since they are what they should be, by name.
    items : mapping
        The images that are not as these say, by position.
    """

    names: Sequence[str]
    listing: Listing | None = None
    right: Mapping[str, Stamp] = field(default_factory=dict)
    items: Mapping[int, PlanItem] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[PlanItem]) -> Self:
        """Hold images that are objects already."""
        known = dict(enumerate(items))
        return cls([item.path.name for item in known.values()], items=known)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> PlanItem:
        """Return an image."""
        if self.listing is None or position in self.items:
            return self.items[position]
        name = self.names[position]
        return self.listing.item(position, name, self.right.get(name))

    @property
    def counts(self) -> dict[Status, int]:
        """Number of images by status."""
        count: Counter[Status] = Counter(item.status for item in self.items.values())
        count["done"] += len(self.right)
        count["missing"] += len(self.names) - len(self.right) - len(self.items)
        return {status: count[status] for status in get_args(Status)}

    @property
    def missing(self) -> Iterator[int]:
        """Positions of the images of which nothing is known but that they are missing."""
        return (p for p, n in enumerate(self.names) if n not in self.right and p not in self.items)

    @property
    def unfinished(self) -> list[int]:
        """Positions of the images that are to be rendered, in their order."""
        known = (p for p, item in self.items.items() if item.status != "done" and not item.keep)
        return sorted([*self.missing, *known])

    @property
    def done(self) -> list[str]:
        """Names of the files of the images that are done."""
        looked_at = [item.path.name for item in self.items.values() if item.status == "done"]
        return [*self.right, *looked_at]
