"""What became of the images of a selection; needs neither the model nor torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedgfe_store.common.words import numbers_first
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.parts import shard_of
from fedgfe_store.generation.plan import PlanItem, compare_image, locate, record_digests
from fedgfe_store.images.folder import (
    DELETED,
    ListedPicture,
    inspect_picture,
    listed_picture,
    mark_outdated,
)
from fedgfe_store.images.identity import Identity
from fedgfe_store.images.manifest import latest
from fedgfe_store.images.png import inspect_image, png_names, read_provenance
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import KEY_COLUMNS, RecordKey

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.selection import Selection

ImageState = Literal["done", "missing", "stale", "failed"]
GROUPS = ("node", "round", "split", "class_name")

_CHECKERS = 8


@dataclass(frozen=True, eq=False)
class ImageStatus:
    """Status of each image of a selection.

    Parameters
    ----------
    frame : DataFrame
        A row for each image: ``node``, ``round``, ``split``, ``class_name``, ``index``,
        ``image`` (its number), ``file``, ``status`` and ``reason``.
    folder : Path
        Where the images are.
    settings : mapping or None
        What the folder's images are made with; None where there are none.
    images_per_record : int
        Images that each record should have.
    deleted : tuple of ListedPicture
        Images in the folder whose record the store does not have any more, by file name.
    """

    frame: pd.DataFrame
    folder: Path
    settings: Mapping[str, Any] | None
    images_per_record: int
    deleted: tuple[ListedPicture, ...] = ()

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
            Among ``node``, ``round``, ``split`` and ``class_name``.

        Returns
        -------
        DataFrame
            A row for each group, in the order of `by`: its columns, then ``done``, ``missing``,
            ``stale``, ``failed`` and ``all``.

        Raises
        ------
        SchemaMismatchError
            If a name is none of the four, or given twice.
        """
        if not by or not set(by) <= set(GROUPS) or len(set(by)) < len(by):
            raise SchemaMismatchError(f"by: expected some of {', '.join(GROUPS)}, got {list(by)}")
        states = list(get_args(ImageState))
        table = self.frame[list(by)].assign(
            **{state: (self.frame["status"] == state).astype(int) for state in states}, all=1
        )
        sums = table.groupby(list(by), as_index=False).sum()
        return sums.sort_values(list(by), key=natural_rank, ignore_index=True)

    def unfinished_shards(self, count: int) -> list[int]:
        """Give the shards of `count` in which any image is not done."""
        undone = self.frame[self.frame["status"] != "done"]
        keys = undone[list(KEY_COLUMNS)].drop_duplicates().itertuples(index=False)
        return sorted({shard_of(_key(row), count) for row in keys})


def image_status(
    selection: Selection,
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
    selection : Selection
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
    positions = {key: position for position, key in enumerate(selection.keys())}
    state = _FolderState.read(folder, positions.keys())
    number = images_per_record or state.highest_number() + 1
    items = _list_items(positions, number, state)
    check = _Checker(selection, state)
    findings = []
    with ThreadPoolExecutor(_CHECKERS) as pool:
        for done, finding in enumerate(pool.map(check, items), start=1):
            findings.append(finding)
            if progress is not None and done % number == 0:
                progress(1)
    frame, deleted = _frame(items, findings), _deleted(state, selection)
    return ImageStatus(frame, folder, state.settings, number, deleted)


def _deleted(state: _FolderState, selection: Selection) -> tuple[ListedPicture, ...]:
    others = state.others()
    marks = mark_outdated(others, selection)
    found = [picture for picture, mark in zip(others, marks, strict=True) if mark == DELETED]
    return tuple(sorted(found, key=lambda picture: picture.file))


@dataclass(frozen=True, slots=True)
class _Line:
    """What counts of the last manifest line of an image."""

    created: str
    number: int | None
    error: str | None
    fingerprint: str | None
    other: ListedPicture | None


@dataclass(frozen=True)
class _FolderState:
    """What a folder's manifests and file names say, and what its images are made with."""

    folder: Path
    present: Set[str]
    lines: Mapping[str, _Line]
    selected: Set[RecordKey]
    fingerprint: str
    settings: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path, selected: Set[RecordKey]) -> _FolderState:
        settings: dict[str, Mapping[str, Any]] = {}
        texts: dict[str, str] = {}

        def pick(line: dict[str, Any]) -> _Line:
            made_with = line.get("fingerprint")
            if made_with is not None and "settings" in line:
                settings.setdefault(made_with, line["settings"])
            error = line.get("error")
            number = _number_of(line, selected)
            other = listed_picture(line, texts) if number is None else None
            return _Line(str(line.get("created", "")), number, error, made_with, other)

        lines = latest(folder, pick)
        present = set(png_names(folder))
        finished = [line for line in lines.values() if line.fingerprint in settings]
        if finished:
            newest = max(finished, key=lambda line: line.created).fingerprint or ""
            return cls(folder, present, lines, selected, newest, settings[newest])
        provenance = _newest_provenance(folder) or {}
        fingerprint, own = provenance.get("fingerprint", ""), provenance.get("settings")
        return cls(folder, present, lines, selected, fingerprint, own)

    def highest_number(self) -> int:
        """Give the highest image number that any of the records has had, at least 0."""
        numbers = [line.number for line in self.lines.values()]
        numbers += [p.image for p in self._unlisted.values() if p.key in self.selected]
        return max((number for number in numbers if number is not None), default=0)

    def others(self) -> list[ListedPicture]:
        """Give the pictures that are there and of other records than the selected ones."""
        listed = [self.lines[name].other for name in self.present & self.lines.keys()]
        unlisted = [p for p in self._unlisted.values() if p.key not in self.selected]
        return [picture for picture in (*listed, *unlisted) if picture is not None]

    @cached_property
    def _unlisted(self) -> dict[str, ListedPicture]:
        """Pictures of which neither a line nor their name as a record's first image tells."""
        first = {image_name(key) for key in self.selected}
        names = sorted(self.present - self.lines.keys() - first)
        with ThreadPoolExecutor(_CHECKERS) as pool:
            found = pool.map(lambda name: inspect_picture(self.folder / name), names)
            pictures = zip(names, found, strict=True)
            return {name: each for name, each in pictures if not isinstance(each, str)}


def _number_of(facts: Mapping[str, Any], selected: Set[RecordKey]) -> int | None:
    """Give the image number in a manifest line of a selected record."""
    try:
        number = int(facts["image"])
        return number if RecordKey(**facts["key"]) in selected else None
    except (KeyError, TypeError, ValueError):
        return None


def _newest_provenance(folder: Path) -> dict[str, Any] | None:
    paths = [folder / name for name in png_names(folder)]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(filter(None, map(read_provenance, newest_first)), None)


def _list_items(
    positions: Mapping[RecordKey, int], number: int, state: _FolderState
) -> list[PlanItem]:
    return [
        PlanItem(
            position=position,
            key=key,
            number=image,
            path=state.folder / image_name(key, image),
            seed=0,  # of no use here, and another for each image
            digests={},
        )
        for key, position in positions.items()
        for image in range(number)
    ]


class _Checker:
    """Looks at one image; threads may call it at once."""

    def __init__(self, selection: Selection, state: _FolderState) -> None:
        self._state = state
        self._digests = record_digests(selection, selection.schema.columns)
        self._identity = Identity.of_store(selection)

    def __call__(self, item: PlanItem) -> tuple[str, str, str]:
        item = locate(item, self._state.present)
        name = item.path.name
        if name not in self._state.present:
            line = self._state.lines.get(name)
            if line is None or line.error is None:
                return name, "missing", ""
            return name, "failed", line.error
        state, provenance = inspect_image(item.path)
        item = replace(item, digests=self._expected(item, provenance or {}))
        settings, fingerprint = self._state.settings or {}, self._state.fingerprint
        found = compare_image(
            item, state, provenance, settings, fingerprint, identity=self._identity
        ).item
        return name, found.status, found.reason

    def _expected(self, item: PlanItem, provenance: Mapping[str, Any]) -> dict[str, str]:
        """Give the digests of the tensors that the image was made from, and of no others."""
        made_from = provenance.get("digests")
        own = self._digests[item.position]
        names = made_from if isinstance(made_from, dict) and made_from else own
        return {name: own[name] for name in names if name in own}


def _frame(items: Sequence[PlanItem], findings: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    import pandas as pd

    columns = [*KEY_COLUMNS, "image", "file", "status", "reason"]
    rows = [
        [*key_json(item.key).values(), item.number, *finding]
        for item, finding in zip(items, findings, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({"round": "int64", "index": "int64", "image": "int64"})


def _key(row: Any) -> RecordKey:
    node, round_, split, class_name, index = row
    return RecordKey(str(node), int(round_), str(split), str(class_name), int(index))


def natural_rank(column: pd.Series[Any]) -> pd.Series[Any]:
    """Rank a column's values for sorting: numbers by size, before names."""
    ordered = sorted(column.unique(), key=lambda value: numbers_first(str(value)))
    return column.map({value: rank for rank, value in enumerate(ordered)})
