"""The pictures of a folder, and what their manifests and they themselves say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgfe_store.generation.images import inspect_image
from fedgfe_store.generation.manifest import latest
from fedgfe_store.records import RecordKey

_OWN = ("seed", "digests", "created", "seconds", "bytes")
_IDENTITY = ("file", "key", "image")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and where it came from.

    Parameters
    ----------
    file : str
        Its name in the folder.
    key : RecordKey
        The record that it shows.
    image : int
        Which image of the record, from 0.
    own : mapping
        What differs from picture to picture: seed, digests, time, seconds, bytes.
    shared : str
        All else of its provenance, as JSON: the same for many pictures.
    """

    file: str
    key: RecordKey
    image: int
    own: Mapping[str, Any]
    shared: str


def listed_pictures(folder: Path) -> dict[str, Picture]:
    """Read from a folder's manifests the pictures whose last line says that they are finished.

    Parameters
    ----------
    folder : Path
        Folder of the images.

    Returns
    -------
    dict
        Picture by file name; the files need not exist.
    """
    texts: dict[str, str] = {}
    lines = latest(folder, lambda line: None if "error" in line else _picture(line, texts))
    return {name: picture for name, picture in lines.items() if picture is not None}


def inspect_picture(path: Path) -> Picture | str:
    """Read what a picture says about itself.

    Parameters
    ----------
    path : Path
        A PNG file.

    Returns
    -------
    Picture or str
        The picture; where there is none, why.
    """
    state, facts = inspect_image(path)
    if state == "damaged":
        return "damaged"
    picture = _picture({**(facts or {}), "file": path.name}, {})
    return picture or "says nothing about a record"


def _picture(facts: Mapping[str, Any], texts: dict[str, str]) -> Picture | None:
    key, image = _key(facts.get("key")), facts.get("image")
    if key is None or not isinstance(image, int):
        return None
    own = {name: facts[name] for name in _OWN if name in facts}
    rest = {k: v for k, v in facts.items() if k not in _OWN and k not in _IDENTITY}
    text = json.dumps(rest)
    # Thousands of pictures then hold one text.
    return Picture(facts["file"], key, image, own, texts.setdefault(text, text))


def _key(fields: Any) -> RecordKey | None:
    kinds = {"node": str, "round": int, "split": str, "class_name": str, "index": int}
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        return None
    fits = all(isinstance(fields[name], kind) for name, kind in kinds.items())
    return RecordKey(**fields) if fits else None
