"""Images of other programs: which records their files' names tell of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, SERVER, RecordKey

GROUPS = ("node", "round", "split", "class", "index", "image")
"""What a pattern may find in a name; a key and the number of the record's image."""

UNKNOWN = "unknown"
BLANK: Mapping[str, Any] = {
    **dict.fromkeys(("node", "split", "class_name"), UNKNOWN),
    **dict.fromkeys(("round", "index"), 0),
}
"""What stands in a key for what a name does not tell."""

_NUMBERS = ("round", "index", "image")
_NUMBER = re.compile(r"[0-9]{1,18}")
# What training itself draws: round_5_node_3_x_dog_test_7.png, round_5_node_3_img_dog_7.png. What
# stands before the class is of its user's choice.
_TRAINING = re.compile(
    r"round_(?P<round>\d+)_(?:node_(?P<node>[^_]+)|(?P<server>server))_(?P<tail>.+?)"
    r"(?:_(?P<split>train|val|test))?_(?P<index>\d+)"
)
# What the script that rendered checkpoints wrote; neither a node nor a split has an underscore.
_SCRIPT = re.compile(
    r"(?:node_(?P<node>[^_]+)|(?P<server>server))_(?P<split>[^_]+)_(?P<class>.+)_(?P<index>\d+)"
    r"_r(?P<round>\d+)(?:_i(?P<image>\d+))?"
)


@dataclass(frozen=True, slots=True)
class Told:
    """What the name of an image tells.

    Parameters
    ----------
    key : RecordKey
        The record; what is not told is `BLANK`.
    number : int
        Which image of the record, from 0.
    lacking : tuple of str
        Key columns that are not told.
    """

    key: RecordKey
    number: int
    lacking: tuple[str, ...]


@dataclass(frozen=True)
class PictureNames:
    """How other programs name their images: FedGFE's training and old script, and as one says.

    Parameters
    ----------
    patterns : tuple of Pattern
        Tried first, in this order; see `of`.
    classes : frozenset of str
        Known classes: in ``x_rail_transport`` the longest that the text ends with, else all behind
        the first underscore.
    """

    patterns: tuple[re.Pattern[str], ...] = ()
    classes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, patterns: Iterable[str] = (), classes: Collection[str] = ()) -> Self:
        r"""Read patterns, such as ``(?P<class>[a-z]+)-(?P<round>\d+)``.

        Parameters
        ----------
        patterns : iterable of str
            Regular expressions of whole names, with or without ``.png``. Their groups are some of
            `GROUPS`; what one lacks is not known of its images.
        classes : collection of str
            Known classes.

        Raises
        ------
        SchemaMismatchError
            If one is no regular expression, or has no such group or others.
        """
        return cls(tuple(map(_compiled, patterns)), frozenset(classes))

    def read(self, name: str) -> Told | None:
        """Return what a file's name tells; None where no pattern fits it."""
        stem = name.removesuffix(".png")
        for pattern in (*self.patterns, _TRAINING, _SCRIPT):
            match = pattern.fullmatch(stem) or pattern.fullmatch(name)
            if match and (told := self._told(match.groupdict())) is not None:
                return told
        return None

    def _told(self, found: dict[str, str | None]) -> Told | None:
        known: dict[str, Any] = {name: text for name, text in found.items() if text is not None}
        for name in _NUMBERS:
            if name in known:
                if not _NUMBER.fullmatch(known[name]):
                    return None
                known[name] = int(known[name])
        if known.pop("server", None):
            known["node"] = SERVER
        if "tail" in known:
            known["class"] = self._class_in(known.pop("tail"))
        if "class" in known:
            known["class_name"] = known.pop("class")
        number = known.pop("image", 0)
        lacking = tuple(name for name in KEY_COLUMNS if name not in known)
        return Told(RecordKey(**{**BLANK, **known}), number, lacking)

    def _class_in(self, tail: str) -> str:
        ends = [name for name in self.classes if tail == name or tail.endswith(f"_{name}")]
        return max(ends, key=len) if ends else tail.partition("_")[2] or tail


def _compiled(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise SchemaMismatchError(
            f"pattern: expected a regular expression, got {text!r}: {error}"
        ) from None
    groups = set(pattern.groupindex)
    if not groups or not groups <= set(GROUPS):
        raise SchemaMismatchError(
            f"pattern: expected named groups (?P<name>...) of {', '.join(GROUPS)}, "
            f"got {', '.join(sorted(groups)) or 'none'} in {text!r}"
        )
    return pattern
