"""What became of the images of a selection; needs neither the model nor torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedgfe_store.common.words import numbers_first
from fedgfe_store.derived_keys import Key, MeanKey, WalkKey
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.compare import Comparer, Expected
from fedgfe_store.images.elsewhere import elsewhere_of, partners_of
from fedgfe_store.images.folder import ImageFolder, side_by_side
from fedgfe_store.images.identity import Identity, record_digests
from fedgfe_store.images.outdated import DELETED, mark_outdated
from fedgfe_store.images.png import read_provenance
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.names import image_name
from fedgfe_store.records import KEY_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.derived.record import Derived
    from fedgfe_store.selection import Selection

ImageState = Literal["done", "missing", "stale", "failed"]
GROUPS = ("node", "round", "split", "class_name", "derived")


@dataclass(frozen=True, eq=False)
class ImageStatus:
    """Status of each image of a selection.

    Parameters
    ----------
    frame : DataFrame
        A row for each image: ``node``, ``round``, ``split``, ``class_name``, ``index``,
        ``image`` (its number), ``file``, ``status`` and ``reason``. Of derived records the key
        columns say ``several`` where sources differ, and ``derived`` tells what they are.
    folder : Path
        Where the images are.
    settings : mapping or None
        What the folder's images are made with; None where there are none.
    images_per_record : int
        Images that each record should have.
    deleted : tuple of ImageRecord
        Images in the folder whose record the store does not have any more, by file name.
    """

    frame: pd.DataFrame
    folder: Path
    settings: Mapping[str, Any] | None
    images_per_record: int
    deleted: tuple[ImageRecord, ...] = ()
    keys: tuple[Key, ...] = ()
    """What the images of the frame show, row by row."""

    @property
    def totals(self) -> dict[str, int]:
        """Number of images by status, and ``all``."""
        found = self.frame["status"].value_counts()
        counts = {state: int(found.get(state, 0)) for state in get_args(ImageState)}
        return {**counts, "all": len(self.frame)}

    def counts(self, by: Sequence[str]) -> pd.DataFrame:
        """Count the images of each group.

        Parameters
        ----------
        by : sequence of str
            Among ``node``, ``round``, ``split`` and ``class_name``, of derived records ``derived``.

        Returns
        -------
        DataFrame
            A row for each group, in the order of `by`: its columns, then ``done``, ``missing``,
            ``stale``, ``failed`` and ``all``.

        Raises
        ------
        SchemaMismatchError
            If a name is none of these, or given twice.
        """
        known = [name for name in GROUPS if name in self.frame]
        if not by or not set(by) <= set(known) or len(set(by)) < len(by):
            raise SchemaMismatchError(f"by: expected some of {', '.join(known)}, got {list(by)}")
        states = list(get_args(ImageState))
        table = self.frame[list(by)].assign(
            **{state: (self.frame["status"] == state).astype(int) for state in states}, all=1
        )
        sums = table.groupby(list(by), as_index=False).sum()
        return sums.sort_values(list(by), key=natural_rank, ignore_index=True)

    @property
    def unfinished(self) -> set[Key]:
        """The records of which any image is not done."""
        undone = (self.frame["status"] != "done").tolist()
        return {key for key, is_undone in zip(self.keys, undone, strict=True) if is_undone}


def image_status(
    selection: Selection | Derived,
    folder: Path,
    *,
    images_per_record: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> ImageStatus:
    """Tell which images of a selection are done, missing, stale or failed.

    The settings that count are the folder's own: those of the image finished last by its
    manifests or, without any, of its newest sound file.

    Parameters
    ----------
    selection : Selection or Derived
        The records; their tensors are not read.
    folder : Path
        Folder of the images; it need not exist.
    images_per_record : int, optional
        By default as many as any of the records has had, finished or failed, else 1.
    progress : callable, optional
        Called with 1 for each record.

    Returns
    -------
    ImageStatus
        ``"done"`` is a sound file of the record's present embedding and the folder's settings;
        ``"stale"`` a sound one of another embedding, record or store, of other settings, or not
        ours;
        ``"failed"`` one that is not there since it could not be made; ``"missing"`` any other.

    Raises
    ------
    SchemaMismatchError
        If `images_per_record` is less than 1.
    """
    if images_per_record is not None and images_per_record < 1:
        raise SchemaMismatchError(f"images_per_record: expected from 1 up, got {images_per_record}")
    # A record that is selected twice counts once.
    keys = dict.fromkeys(selection.keys())
    images = ImageFolder.scan(folder, brief=keys.keys())
    fingerprint, settings = _made_with(images)
    partners = partners_of(selection, elsewhere_of(settings))
    found = record_digests(selection, selection.schema.columns, partners)
    digests = dict(zip(keys if len(keys) == len(found) else selection.keys(), found, strict=True))
    unlisted = _unlisted(images)
    number = images_per_record or _highest_number(images, unlisted) + 1
    items = [(key, image) for key in digests for image in range(number)]
    comparer = Comparer(settings, fingerprint, Identity.of_store(selection))
    check = _Checker(digests, images, comparer)
    findings = []
    for done, finding in enumerate(side_by_side(check, items), start=1):
        findings.append(finding)
        if progress is not None and done % number == 0:
            progress(1)
    deleted = _deleted(images, unlisted, selection)
    shown = tuple(key for key, _ in items)
    return ImageStatus(_frame(items, findings), folder, settings or None, number, deleted, shown)


def _made_with(images: ImageFolder) -> tuple[str, Mapping[str, Any]]:
    """Give fingerprint and settings of the image finished last; empty where there is none."""
    finished = [line for line in images.lines.values() if line.fingerprint in images.settings]
    if finished:
        newest = max(finished, key=lambda line: line.created).fingerprint or ""
        return newest, images.settings[newest]
    paths = [images.path / name for name in images.names]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    provenance = next(filter(None, map(read_provenance, newest_first)), None) or {}
    return provenance.get("fingerprint", ""), provenance.get("settings", {})


def _unlisted(images: ImageFolder) -> list[ImageRecord]:
    """Give the images of which neither a line nor their name as a record's first one tells."""
    unlisted = images.present - images.lines.keys()
    # Without any, as after a run, tens of thousands of names need not be made.
    first = {image_name(key) for key in images.brief} if unlisted else set()
    found = side_by_side(images.inspect, sorted(unlisted - first))
    return [image for image in found if isinstance(image, ImageRecord)]


def _highest_number(images: ImageFolder, unlisted: Sequence[ImageRecord]) -> int:
    """Give the highest image number that any of the records has had, at least 0."""
    listed = [line.record for line in images.lines.values()]
    # The number first: most are 0, and to look for a key costs more.
    later = (image for image in (*listed, *unlisted) if image and image.number)
    return max((image.number for image in later if image.key in images.brief), default=0)


def _deleted(
    images: ImageFolder, unlisted: Sequence[ImageRecord], selection: Selection | Derived
) -> tuple[ImageRecord, ...]:
    """Give the images that are there though the store does not have their record any more."""
    listed = [images.lines[name].record for name in images.present & images.lines.keys()]
    others = [each for each in (*listed, *unlisted) if each and each.key not in images.brief]
    marks = mark_outdated(others, selection)
    found = [image for image, mark in zip(others, marks, strict=True) if mark == DELETED]
    return tuple(sorted(found, key=lambda image: image.name))


class _Checker:
    """Looks at one image; threads may call it at once."""

    def __init__(
        self,
        digests: Mapping[Key, dict[str, str]],
        images: ImageFolder,
        comparer: Comparer,
    ) -> None:
        self._digests, self._images, self._comparer = digests, images, comparer

    def __call__(self, item: tuple[Key, int]) -> tuple[str, str, str]:
        key, number = item
        found = self._images.look(key, number)
        if found is None:
            name = image_name(key, number)
            line = self._images.lines.get(name)
            error = None if line is None else line.error
            return (name, "missing", "") if error is None else (name, "failed", error)
        expected = Expected(key, number, self._expected(key, found.provenance or {}))
        verdict = self._comparer.compare(expected, found.state, found.provenance)
        return found.path.name, verdict.status, verdict.reason

    def _expected(self, key: Key, provenance: Mapping[str, Any]) -> dict[str, str]:
        """Give the digests of the tensors that the image was made from, and of no others."""
        made_from = provenance.get("digests")
        own = self._digests[key]
        names = made_from if isinstance(made_from, dict) and made_from else own
        return {name: own[name] for name in names if name in own}


def _frame(
    items: Sequence[tuple[Key, int]], findings: Sequence[tuple[str, str, str]]
) -> pd.DataFrame:
    import pandas as pd

    columns = [*KEY_COLUMNS, "image", "file", "status", "reason"]
    rows = [
        [*map(key.shown, KEY_COLUMNS), number, *finding]
        for (key, number), finding in zip(items, findings, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=columns).astype({"image": "int64"})
    derived = [key.label if isinstance(key, MeanKey | WalkKey) else "" for key, _ in items]
    if any(derived):
        return frame.assign(derived=derived)
    return frame.astype({"round": "int64", "index": "int64"})


def natural_rank(column: pd.Series[Any]) -> pd.Series[Any]:
    """Rank a column's values for sorting: numbers by size, before names."""
    ordered = sorted(column.unique(), key=lambda value: numbers_first(str(value)))
    return column.map({value: rank for rank, value in enumerate(ordered)})
