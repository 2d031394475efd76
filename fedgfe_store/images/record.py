"""One finished image of a folder: what is known of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from fedgfe_store.derived_keys import Key, WalkKey
from fedgfe_store.images.foreign import Told
from fedgfe_store.names import read_key

FOREIGN = "of another program"
"""What is told of images that this package did not make."""

# What is another in each image; all else of a provenance is one text that many share.
_OWN = ("file_id", "sources", "seed", "digests", "created", "seconds", "bytes")
_IDENTITY = ("file", "key", "image")
# Pixels of a side: what says more is no size but damage, and no sheet is laid out by it.
_LARGEST = 2**20


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One finished image: the file, the record that it shows, and how it was made.

    Parameters
    ----------
    folder : Path
        Where it is.
    name : str
        Its file's name in there.
    key : RecordKey, MeanKey or WalkKey
        What it was made from: a record, or a derived one.
    number : int
        Which image of the record, from 0.
    own : mapping
        What differs from image to image: ``file_id``, seed, digests, time, seconds, bytes.
    shared : str
        All else of its provenance, as JSON: the same for many images.
    mark : str
        Why it is out of date, as `Records.mark` says; empty until it is compared with a store.
    is_foreign : bool
        Whether another program made it; only its name tells of a record.
    lacking : tuple of str
        Key columns that are not known of it, in whose place `foreign.BLANK` stands.
    """

    folder: Path
    name: str
    key: Key
    number: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)
    shared: str = "{}"
    mark: str = ""
    is_foreign: bool = False
    lacking: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        folder: Path,
        facts: Mapping[str, Any],
        texts: dict[str, str],
        *,
        brief: Collection[Key] = frozenset(),
    ) -> Self | None:
        """Make a record of a manifest's line, or of an image's provenance and its file's name.

        Parameters
        ----------
        folder : Path
            Where the image is.
        facts : mapping
            The line.
        texts : dict
            Holds what images share, for the next ones.
        brief : collection of RecordKey
            Records of whose images only key and number are kept.

        Returns
        -------
        ImageRecord or None
            None if the line names no record.
        """
        key, number = read_key(facts.get("key")), facts.get("image")
        if key is None or not isinstance(number, int):
            return None
        if key in brief:
            return cls(folder, facts["file"], key, number)
        own = {name: facts[name] for name in _OWN if name in facts}
        rest = {k: v for k, v in facts.items() if k not in _OWN and k not in _IDENTITY}
        text = json.dumps(rest)
        # Thousands of images then hold one text.
        return cls(folder, facts["file"], key, number, own, texts.setdefault(text, text))

    @classmethod
    def of_another_program(cls, folder: Path, name: str, told: Told, size: tuple[int, int]) -> Self:
        """Make a record of what the name of another program's image tells."""
        shared = json.dumps({"settings": {"width": size[0], "height": size[1]}})
        record = cls(folder, name, told.key, told.number, shared=shared)
        return replace(record, is_foreign=True, lacking=told.lacking)

    @property
    def file(self) -> Path:
        """The file."""
        return self.folder / self.name

    @property
    def file_id(self) -> str:
        """What identifies its sample; empty where that is not known."""
        return str(self.own.get("file_id") or "")

    @property
    def frame(self) -> int | str:
        """Which frame of a walk it is, from 0; empty of all else."""
        return self.key.frame if isinstance(self.key, WalkKey) else ""

    @property
    def remark(self) -> str:
        """What people are told beside it: that another program made it, or its `mark`."""
        return FOREIGN if self.is_foreign else self.mark

    def setting(self, name: str) -> Any:
        """Return one of the settings that it was made with; None where that is not known."""
        return _settings(self.shared).get(name)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels that its settings name; None where they name none."""
        return _size(self.shared)


@lru_cache(maxsize=64)
def _settings(shared: str) -> Mapping[str, Any]:
    known = json.loads(shared)
    settings = known.get("settings") if isinstance(known, dict) else None
    return settings if isinstance(settings, dict) else {}


def _size(shared: str) -> tuple[int, int] | None:
    settings = _settings(shared)
    try:
        size = settings["width"], settings["height"]
    except KeyError:
        return None
    fits = all(isinstance(pixels, int) and 1 <= pixels <= _LARGEST for pixels in size)
    return size if fits else None
