"""Several folders of images looked at together: which they are, and what each is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedgfe_store.common.words import natural_order
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.foreign import PictureNames


def scan_folders(paths: Iterable[Path], others: PictureNames | None = None) -> list[ImageFolder]:
    """List folders of images; one without any stands for those inside it, as that of a sweep does.

    Parameters
    ----------
    paths : iterable of Path
        The folders; one that is named twice is listed once.
    others : PictureNames, optional
        How other programs name their images, by default as FedGFE does.
    """
    found = {each.path.resolve(): each for path in paths for each in _scanned(path, others)}
    return list(found.values())


def _scanned(path: Path, others: PictureNames | None) -> list[ImageFolder]:
    own = ImageFolder.scan(path, others=others)
    if own.names or not path.is_dir():
        return [own]
    inner = [ImageFolder.scan(each, others=others) for each in path.iterdir() if each.is_dir()]
    held = [each for each in inner if each.names]
    return sorted(held, key=lambda each: natural_order(each.path.name)) or [own]


def folder_labels(paths: Iterable[Path]) -> dict[Path, str]:
    """Name folders by so many of the last parts of their paths as tell them apart.

    Parameters
    ----------
    paths : iterable of Path
        The folders.

    Returns
    -------
    dict
        ``steps-4`` and ``steps-8``, or ``first/images`` and ``second/images``, by folder.
    """
    parts = {path: path.resolve().parts for path in paths}
    return {path: _label(own, list(parts.values())) for path, own in parts.items()}


def _label(own: Sequence[str], all_parts: Sequence[Sequence[str]]) -> str:
    for length in range(1, len(own)):
        ends = Counter(tuple(each[-length:]) for each in set(map(tuple, all_parts)))
        if ends[tuple(own[-length:])] == 1:
            return "/".join(own[-length:])
    return "/".join(own[1:])
