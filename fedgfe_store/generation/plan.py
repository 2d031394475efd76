"""The plan of a run: which images are done, which are missing, which are out of date."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from fedgfe_store.common.words import counted
from fedgfe_store.derived.record import Derived
from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import ConflictError
from fedgfe_store.generation.parts import Part, places_of
from fedgfe_store.generation.request import DEFAULTS, Request
from fedgfe_store.generation.settings import Settings, fingerprint, seed_of, settings_json
from fedgfe_store.images.checked import still_right
from fedgfe_store.images.compare import Comparer, Expected, Status, Verdict
from fedgfe_store.images.elsewhere import Partners
from fedgfe_store.images.folder import FoundImage, ImageFolder, file_stamp, look_at, side_by_side
from fedgfe_store.images.identity import Identity, record_digests
from fedgfe_store.images.manifest import seconds_per_image
from fedgfe_store.images.png import Stamp
from fedgfe_store.names import image_name

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

__all__ = ["Plan", "PlanItem", "Settings", "fingerprint", "plan_images", "seed_of"]


AGAIN = "asked for again"
"""Reason of an image that is rendered though it is done."""

# An estimate: a PNG is taken for half of its 3 bytes a pixel.
_BYTES_PER_PIXEL = 1.5


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
class Plan:
    """What a run will do, decided before any weights are loaded.

    Parameters
    ----------
    items : tuple of PlanItem
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

    items: tuple[PlanItem, ...]
    settings: Settings
    folder: Path
    identity: Identity = field(default_factory=Identity)
    request: Request = DEFAULTS

    @cached_property
    def todo(self) -> tuple[PlanItem, ...]:
        """Images to render in this run."""
        return self._unfinished[: self.request.limit]

    @property
    def waiting(self) -> int:
        """Images that the limit leaves for another run."""
        return len(self._unfinished) - len(self.todo)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by status."""
        count = Counter(item.status for item in self.items)
        return {status: count[status] for status in get_args(Status)}

    @property
    def kept(self) -> int:
        """Stale images that stay as they are."""
        return sum(item.keep for item in self.items)

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
    def _unfinished(self) -> tuple[PlanItem, ...]:
        return tuple(i for i in self.items if i.status != "done" and not i.keep)

    def summary(self, batch_size: int) -> str:
        """Describe the plan in a few lines: counts, batches, disk and time."""
        counts, todo = self.counts, len(self.todo)
        again = sum(item.reason == AGAIN for item in self.items)
        outdated = counts["stale"] - again
        stale = f", {outdated} out of date" if outdated else ""
        stale += f", {again} to be made again" if again else ""
        kept = f" ({self.kept} kept as they are)" if self.kept else ""
        waiting = f" ({self.waiting} left for another run)" if self.waiting else ""
        number = math.ceil(todo / batch_size)
        batches = "1 batch" if number == 1 else f"{number} batches"
        images = counted(len(self.items), "image")
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
    ConflictError
        If there are such images and it says ``"error"``, or images of another store whose
        place is not given to this one: what differs, in how many files.
    """
    plan = Plan((), settings, output_dir, Identity.of_store(selection), request)
    items = _list_items(selection, plan, columns, partners or {})
    findings = _findings(items, output_dir, comparer_of(plan))
    refused = [f for f in findings if plan.refuses(f)]
    if refused and request.on_stale != "keep":
        raise ConflictError(_conflict_message(refused, output_dir))
    settled = (
        # With "keep" there may be some; else the run is refused.
        replace(f.item, keep=True) if plan.refuses(f) else f.item
        for f in findings
    )
    if request.again:
        settled = (
            replace(i, status="stale", reason=AGAIN) if i.status == "done" else i for i in settled
        )
    return replace(plan, items=tuple(settled))


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


def _findings(items: Sequence[PlanItem], folder: Path, comparer: Comparer) -> list[Finding]:
    """Look at the files of images; no thread is asked about those that no look is needed for."""
    images = ImageFolder.scan(folder)
    undone = [i for i in items if i.status != "done"] if images.names else []
    to_look = [i for i in undone if images.find(i.key, i.number)]
    looked = side_by_side(lambda i: _judge(i, images.look(i.key, i.number), comparer), to_look)
    judged = {id(item): finding for item, finding in zip(to_look, looked, strict=True)}
    verdict: dict[Status, Verdict] = {"done": Verdict("done"), "missing": Verdict()}
    return [judged.get(id(item)) or Finding(item, verdict[item.status]) for item in items]


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


def _list_items(
    selection: Selection | Derived,
    plan: Plan,
    columns: Collection[str],
    partners: Mapping[str, Partners],
) -> list[PlanItem]:
    """List the images of the records that a part holds; nothing is made for the others.

    Those that were found done before, and have not changed, are done; the others are missing.
    """
    settings, folder, request = plan.settings, plan.folder, plan.request
    places = _own_places(selection, request.part)
    own = selection.take(places)
    files = own.records["file_id"].tolist()
    sources = own.counts if isinstance(own, Derived) else [None] * len(files)
    digests = record_digests(own, columns, partners)
    facts = zip(places.tolist(), digests, files, sources, strict=True)
    records = dict(zip(own.keys(), facts, strict=True))
    images = [
        (image_name(key, number), key, number, facts)
        for key, facts in records.items()
        for number in request.numbers
    ]
    comparer, by_file = comparer_of(plan), settings.noise == "file_id"
    right = still_right(folder, ((name, comparer.mark(facts[1])) for name, _, _, facts in images))
    return [
        PlanItem(
            position=position,
            key=key,
            number=number,
            path=folder / name,
            seed=seed_of(settings.seed, key, number, file_id if by_file else ""),
            digests=made_from,
            status="done" if name in right else "missing",
            seen=right.get(name),
            file_id=file_id,
            sources=count,
        )
        for name, key, number, (position, made_from, file_id, count) in images
    ]


def _own_places(selection: Selection | Derived, part: Part) -> np.ndarray:
    if isinstance(selection, Derived):
        held = [place for place, key in enumerate(selection.keys()) if part.holds(key)]
        return np.array(held, np.int64)
    return places_of(selection.key_columns(), part)


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
