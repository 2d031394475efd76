"""The plan of a run: which images are done, which are missing, which are out of date."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.words import counted
from fedgfe_store.errors import ConflictError
from fedgfe_store.generation.items import Images, Listing, PlanItem, Records
from fedgfe_store.generation.request import DEFAULTS, Request
from fedgfe_store.generation.settings import Settings, fingerprint, seed_of, settings_json
from fedgfe_store.images.checked import still_right
from fedgfe_store.images.compare import Comparer, Expected, Status, Verdict
from fedgfe_store.images.elsewhere import Partners
from fedgfe_store.images.folder import FoundImage, ImageFolder, file_stamp, look_at, side_by_side
from fedgfe_store.images.identity import Identity
from fedgfe_store.images.manifest import seconds_per_image
from fedgfe_store.names import may_have_older_name
from fedgfe_store.rows import Rows

if TYPE_CHECKING:
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.selection import Selection

__all__ = ["Plan", "PlanItem", "Settings", "fingerprint", "plan_images", "seed_of"]


AGAIN = "asked for again"
"""Reason of an image that is rendered though it is done."""

# An estimate: a PNG is taken for half of its 3 bytes a pixel.
_BYTES_PER_PIXEL = 1.5


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided before any weights are loaded.

    Parameters
    ----------
    images : Images
        All images of the selection, in its order.
    settings : Settings
        What they are made with.
    folder : Path
        Where they go.
    identity : Identity
        The store that they are of.
    request : Request
        What was asked: how many images at most, and which may be replaced.
    """

    images: Images
    settings: Settings
    folder: Path
    identity: Identity = field(default_factory=Identity)
    request: Request = DEFAULTS

    @cached_property
    def items(self) -> tuple[PlanItem, ...]:
        """All images: an object for each, made when they are first asked for."""
        return tuple(map(self.images.__getitem__, range(len(self.images))))

    def with_items(self, items: Iterable[PlanItem]) -> Plan:
        """Return a plan of other images."""
        return replace(self, images=Images.of(items))

    @cached_property
    def todo(self) -> tuple[PlanItem, ...]:
        """Images to render in this run."""
        return tuple(map(self.images.__getitem__, self._unfinished[: self.request.limit]))

    @property
    def waiting(self) -> int:
        """Images that the limit leaves for another run."""
        return len(self._unfinished) - len(self.todo)

    @property
    def counts(self) -> Mapping[Status, int]:
        """Number of images by status."""
        return self.images.counts

    @property
    def kept(self) -> int:
        """Stale images that stay as they are."""
        return sum(item.keep for item in self.images.items.values())

    @property
    def bytes_expected(self) -> int:
        """Disk space that the images to render will take, estimated from their size."""
        pixels = self.settings.height * self.settings.width
        return int(len(self.todo) * pixels * _BYTES_PER_PIXEL)

    @cached_property
    def seconds_each(self) -> float | None:
        """Seconds of rendering an image; None until some were made here with these settings."""
        return seconds_per_image(self.folder, fingerprint(self.settings))

    @property
    def seconds_expected(self) -> float | None:
        """Seconds of rendering; None until images were made here with these settings."""
        return None if self.seconds_each is None else self.seconds_each * len(self.todo)

    def refuses(self, finding: Finding) -> bool:
        """Whether the file that was found is not to be replaced."""
        if finding.verdict.of_another:
            return not self.request.replace_others
        if self.request.on_stale == "keep":
            return finding.verdict.keepable
        return bool(finding.verdict.conflict) and self.request.on_stale == "error"

    def shortage(self, batch_size: int, seconds_left: float | None) -> str | None:
        """Say that a batch takes longer than there is time, and what would help; None otherwise.

        Parameters
        ----------
        batch_size : int
            Images of a batch.
        seconds_left : float or None
            Seconds until the run has to stop; None where that is not known.
        """
        size = min(batch_size, len(self.todo))
        if self.seconds_each is None or seconds_left is None:
            return None
        return shortage(size, self.seconds_each * size, seconds_left)

    @cached_property
    def _unfinished(self) -> list[int]:
        return self.images.unfinished

    def summary(self, batch_size: int) -> str:
        """Describe the plan in a few lines: counts, batches, disk and time."""
        counts, todo = self.counts, len(self.todo)
        again = sum(item.reason == AGAIN for item in self.images.items.values())
        outdated = counts["stale"] - again
        stale = f", {outdated} out of date" if outdated else ""
        stale += f", {again} to be made again" if again else ""
        kept = f" ({self.kept} kept as they are)" if self.kept else ""
        waiting = f" ({self.waiting} left for another run)" if self.waiting else ""
        number = math.ceil(todo / batch_size)
        batches = "1 batch" if number == 1 else f"{number} batches"
        images = counted(len(self.images), "image")
        lines = [
            f"{images}: {counts['done']} done, {counts['missing']} missing{stale}{kept}",
            f"to render: {todo} in {batches} of {batch_size}{waiting}",
        ]
        if todo:
            lines.append(f"disk: about {_megabytes(self.bytes_expected)}")
        seconds = self.seconds_expected
        if seconds is not None and todo:
            lines.append(f"time: about {_duration(seconds)}, going by the images made so far")
        return "\n".join(lines)


def shortage(size: int, seconds: float, seconds_left: float) -> str | None:
    """Say that a batch of `size` images takes longer than is left, and what would help, or None."""
    if seconds <= seconds_left:
        return None
    fitting = int(size * seconds_left / seconds)
    remedy = f"--batch-size {fitting} or " if fitting else ""
    return (
        f"a batch of {size} takes about {_duration(seconds)}, and it is "
        f"{_duration(seconds_left)} until this run has to stop: nothing of it would be finished; "
        f"{remedy}a longer time limit helps"
    )


def plan_images(
    selection: Selection | Derived,
    settings: Settings,
    output_dir: Path,
    request: Request = DEFAULTS,
    *,
    columns: Collection[str] = ("t5", "clip"),
    partners: Mapping[str, Partners] | None = None,
) -> Plan:
    """Compare the images of a selection with those in a folder.

    An image counts as done only if its file is sound and was made from this record's present
    embeddings with these settings. One made from an embedding that has changed is rendered again.

    Parameters
    ----------
    selection : Selection or Derived
        The records.
    settings : Settings
        What the images are made with.
    output_dir : Path
        Their folder; it need not exist.
    request : Request
        Which images of each record, which part of the records, how many at most, and what may be
        replaced.
    columns : collection of str
        Tensor columns that the images depend on.
    partners : mapping, optional
        Other records that some of the columns are from, by column.

    Returns
    -------
    Plan
        The images in the selection's order; a record selected twice counts once.

    Raises
    ------
    DamagedDataError
        If the key or notes of a record that is to be rendered are not what was committed.
    ConflictError
        If there are such images and it says ``"error"``, or images of another store whose
        place is not given to this one: what differs, in how many files.
    """
    records = Records.of(selection, request.part, columns, partners or {})
    listing = Listing(records, request.numbers, output_dir, settings)
    identity, names = Identity.of_store(selection), listing.names()
    plan = Plan(Images(names, listing), settings, output_dir, identity, request)
    folder, comparer = ImageFolder.scan(output_dir), comparer_of(plan)
    # What was found done before, and has not changed, is done.
    right = still_right(output_dir, _marks(plan.images, listing, folder, comparer))
    images = Images(names, listing, right)
    findings = _findings(images, listing, folder, comparer)
    refused = [f for f in findings.values() if plan.refuses(f)]
    if refused and request.on_stale != "keep":
        raise ConflictError(_conflict_message(refused, output_dir))
    settled = {
        # With "keep" there may be some; else the run is refused.
        position: replace(f.item, keep=True) if plan.refuses(f) else f.item
        for position, f in findings.items()
    }
    images = Images(names, listing, right, settled)
    plan = replace(plan, images=_to_be_made_again(images) if request.again else images)
    if isinstance(selection, Rows):
        # Of what is done the file has said whose image it is.
        used = np.unique(np.array(plan.images.unfinished, np.int64) // len(request.numbers))
        selection.take(np.array(records.places, np.int64)[used]).check_keys()
    return plan


def _marks(
    images: Images, listing: Listing, folder: ImageFolder, comparer: Comparer
) -> Iterator[tuple[str, str]]:
    """Yield the files that are there, and what each should be."""
    digests, numbers = listing.records.digests, len(listing.numbers)
    marks = comparer.marks(digests, len(listing.records))
    of_images = marks if numbers == 1 else (mark for mark in marks for _ in range(numbers))
    present = folder.present
    return (pair for pair in zip(images.names, of_images, strict=True) if pair[0] in present)


def _to_be_made_again(images: Images) -> Images:
    """Return the images with those that are done as out of date."""
    every = {p: images[p] for p, name in enumerate(images.names) if name in images.right}
    every |= images.items
    again = {
        p: replace(item, status="stale", reason=AGAIN) if item.status == "done" else item
        for p, item in every.items()
    }
    return Images(images.names, images.listing, {}, again)


@dataclass(frozen=True, slots=True)
class Finding:
    """An item after a look at its file, and what the look says."""

    item: PlanItem
    verdict: Verdict


def look_again(item: PlanItem, plan: Plan) -> Finding | None:
    """Look at the file of an image to render: None if it is still what it was when planned."""
    if file_stamp(item.path) == item.seen:
        return None
    return _judge(item, look_at(item.path), comparer_of(plan))


def _findings(
    images: Images, listing: Listing, folder: ImageFolder, comparer: Comparer
) -> dict[int, Finding]:
    """Look at the files of images that are there; at none of which it is known what it is."""
    if not folder.names:
        return {}
    names, present = images.names, folder.present
    places = [
        place
        for place in images.missing
        if names[place] in present
        or (may_have_older_name(names[place]) and folder.find(*listing.key(place)))
    ]
    items = [images[place] for place in places]
    looked = side_by_side(lambda i: _judge(i, folder.look(i.key, i.number), comparer), items)
    return dict(zip(places, looked, strict=True))


def comparer_of(plan: Plan) -> Comparer:
    """Give what compares images with those that are planned."""
    return Comparer(settings_json(plan.settings), fingerprint(plan.settings), plan.identity)


def _judge(item: PlanItem, found: FoundImage | None, comparer: Comparer) -> Finding:
    if found is None:
        return Finding(item, Verdict())
    expected = Expected(item.key, item.number, item.digests)
    verdict = comparer.compare(expected, found.state, found.provenance)
    seen = replace(item, path=found.path, seen=found.stamp)
    return Finding(replace(seen, status=verdict.status, reason=verdict.reason), verdict)


def _conflict_message(refused: Collection[Finding], folder: Path) -> str:
    conflicts = Counter(finding.verdict.conflict for finding in refused)
    lines = [f"  {count} files: {reason}" for reason, count in conflicts.most_common(5)]
    if len(conflicts) > 5:
        lines.append(f"  and {len(conflicts) - 5} other differences")
    advice = (
        "on_stale='regenerate' makes them again, on_stale='keep' leaves them as they are; or use "
        "another output folder."
    )
    if any(finding.verdict.of_another for finding in refused):
        advice += " Images of others are replaced with --replace-others only."
    return "\n".join(
        [f"{folder} holds {len(refused)} images that this run would replace:", *lines, advice]
    )


def _megabytes(size: int) -> str:
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
