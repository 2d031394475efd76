"""Which images are out of date: their record is deleted, or has another embedding now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedgfe_store.common.location import found_from
from fedgfe_store.derived.again import derive
from fedgfe_store.derived.record import Derived
from fedgfe_store.derived_keys import DerivedKey, MeanKey
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.elsewhere import Partners, elsewhere_of, partners_of
from fedgfe_store.images.identity import Identity, record_digests
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.records import RecordKey
from fedgfe_store.rows import Rows
from fedgfe_store.selection import Selection

if TYPE_CHECKING:
    from fedgfe_store.store import EmbeddingStore

DELETED, CHANGED = "record deleted", "embedding changed"
"""What is told of images that are out of date."""


class Records:
    """What a store has of the records that images show.

    Parameters
    ----------
    selection : Selection
        The records; their tensors are not read.
    """

    def __init__(self, selection: Rows) -> None:
        self._as_of = selection.as_of
        self._place = selection.location.resolve()
        self._identity = Identity.of_store(selection)
        digests = record_digests(selection, selection.schema.columns)
        self._digests = dict(zip(selection.keys(), digests, strict=True))
        self._selection = selection
        self._comparable = lru_cache(maxsize=256)(self._is_of_this_store)
        self._partners = lru_cache(maxsize=64)(self._columns_from_elsewhere)

    def mark(self, image: ImageRecord) -> str:
        """Tell why an image is out of date.

        Parameters
        ----------
        image : ImageRecord
            An image of this store's records; of those of other stores nothing is told.

        Returns
        -------
        str
            ``"record deleted"`` or ``"embedding changed"``; empty where it shows a record as
            the store has it.
        """
        if image.is_foreign or not self._comparable(image.shared, image.folder):
            return ""
        made_from = image.own.get("digests")
        if not isinstance(image.key, RecordKey):
            return self._mark_derived(image.key, made_from)
        own = self._digests.get(image.key)
        if own is None:
            return DELETED
        if not isinstance(made_from, dict):
            return ""
        others = self._partners(image.shared)
        now = own | {name: partners.digest(image.key) for name, partners in others.items()}
        return CHANGED if any(now.get(n) != digest for n, digest in made_from.items()) else ""

    def _mark_derived(self, key: DerivedKey, made_from: object) -> str:
        names = list(made_from) if isinstance(made_from, dict) else []
        if isinstance(key, MeanKey) and key.filters is None:
            return ""  # which records those are, only who took them knows
        try:
            now = record_digests(derive(self._selection, key), names)[0]
        except NotFoundError:
            return DELETED
        except SchemaMismatchError:
            return ""
        return CHANGED if names and now != made_from else ""

    def _columns_from_elsewhere(self, shared: str) -> dict[str, Partners]:
        settings = json.loads(shared).get("settings")
        known = settings if isinstance(settings, dict) else {}
        return partners_of(self._selection, elsewhere_of(known))

    def _is_of_this_store(self, shared: str, folder: Path) -> bool:
        """Whether images can be of this store, at a commit that this view of it has."""
        facts = json.loads(shared)
        commit, identity = facts.get("commit"), Identity.of_image(facts)
        if self._identity.is_another(identity):
            return False
        if self._as_of is not None and isinstance(commit, int) and commit > self._as_of:
            return False
        named = facts.get("store")
        if identity != Identity() or not isinstance(named, str):
            return True
        # Older images name the store's place only: if another one is there, they are of that.
        try:
            place = found_from(named, folder)
        except SchemaMismatchError:  # no place at all
            return True
        if place == self._place:
            return True
        return isinstance(place, Path) and not (place / "zarr.json").is_file()


def mark_outdated(
    images: Sequence[ImageRecord], store: EmbeddingStore | Selection | Derived | None
) -> list[str]:
    """Tell of each image why it is out of date; nothing where there is no store.

    Parameters
    ----------
    images : sequence of ImageRecord
        Images of one folder.
    store : EmbeddingStore, Selection, Derived or None
        What they are compared with: all records of the store.

    Returns
    -------
    list of str
        As `Records.mark` says.
    """
    if store is None or not images:
        return [""] * len(images)
    # Reading about the others would cost time that grows with the store, not with the folder.
    own = [image.key for image in images if isinstance(image.key, RecordKey)]
    nodes, rounds = sorted({key.node for key in own}), sorted({key.round for key in own})
    find = store.others if isinstance(store, Selection | Derived) else store.select
    records = Records(find(node=nodes, round=rounds))
    return [records.mark(image) for image in images]


def marked(images: Sequence[ImageRecord], store: EmbeddingStore | None) -> list[ImageRecord]:
    """Return images with what `mark_outdated` tells of them; as they are without a store."""
    marks = mark_outdated(images, store)
    return [
        replace(image, mark=mark) if mark else image
        for image, mark in zip(images, marks, strict=True)
    ]
