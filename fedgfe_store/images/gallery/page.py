"""The gallery's page: one HTML file that holds its style, its script and the images' facts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template

from fedgfe_store.common.words import numbers_first
from fedgfe_store.derived_keys import WalkKey
from fedgfe_store.images.arrange import differing_settings, plain_setting, samples, setting_order
from fedgfe_store.images.gallery.points import Points
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.records import RecordKey

# Shown also where there is one value only.
_ALWAYS = ("node", "round", "split", "class")
_EXACT_IN_BROWSERS = 2**53
# One script in the page: its parts see one another's names, in the order in which they run.
_SCRIPTS = (*("facts", "search", "filters", "compare", "grid", "viewer", "map", "address", "main"),)


@dataclass(frozen=True)
class ShownFolder:
    """A folder whose images a page shows.

    Parameters
    ----------
    path : Path
        The folder.
    label : str
        What it is called.
    images, thumbnails : str
        What stands before the images' and the thumbnails' names in the page: empty, or a folder
        that ends with ``/``.
    """

    path: Path
    label: str
    images: str
    thumbnails: str


def render_page(
    images: Sequence[ImageRecord],
    *,
    title: str,
    folders: Sequence[ShownFolder],
    points: Points | None = None,
) -> str:
    """Write the page of some images.

    Parameters
    ----------
    images : sequence of ImageRecord
        What it shows.
    title : str
        Its heading.
    folders : sequence of ShownFolder
        Where they are.
    points : Points, optional
        A map to show the images on, too.

    Returns
    -------
    str
        HTML that needs nothing but the images and the thumbnails.
    """
    content = page_data(images, {each.path: each.label for each in folders}, points)
    content |= {
        "title": title,
        "pictures": [each.images for each in folders],
        "thumbnails": [each.thumbnails for each in folders],
    }
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=title,
        style=_asset("page.css") + _asset("map.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=content,
    )


def _template() -> Template:
    """Return the page with its places: what is put there is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    # Facts keep their order, which the page shows them in.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    return environment.from_string(_asset("page.html"))


def page_data(
    images: Iterable[ImageRecord], labels: Mapping[Path, str], points: Points | None = None
) -> dict[str, Any]:
    """Give the facts of images by columns, what they share only once.

    Parameters
    ----------
    images : iterable of ImageRecord
        In any order.
    labels : mapping
        What each folder is called, in the order in which they are shown.
    points : Points, optional
        A map to show them on.

    Returns
    -------
    dict
        ``facets`` names what images can be filtered by: node, round, split and class, and image
        number, settings and folder where images differ in them. Of each of these, and of
        ``shared``, an image has a place in the list of the same name under ``values``; of
        ``file``, ``index``, ``sample`` (see `sample_numbers`), ``mark`` and each of ``own`` a
        value. Latest rounds come first. Without a remark on any image there is no ``mark``, and
        without a map no ``map`` (see `Points.data`). Whole numbers that JavaScript would round
        are text.
    """
    shown = sorted(images, key=lambda image: _order(image, list(labels)))
    settings = differing_settings(shown)
    columns: dict[str, list[Any]] = {
        "node": [p.key.shown("node") for p in shown],
        "round": [p.key.shown("round") for p in shown],
        "split": [p.key.shown("split") for p in shown],
        "class": [p.key.shown("class_name") for p in shown],
        "image": [p.number for p in shown],
        **{name: [plain_setting(p, name) for p in shown] for name in settings},
        "folder": [labels[p.folder] for p in shown],
        "shared": [p.shared for p in shown],
    }
    values: dict[str, list[Any]] = {
        **{n: sorted(set(columns[n]), key=_value_order) for n in columns},
        **{n: sorted(set(columns[n]), key=setting_order) for n in settings},
        "folder": list(labels.values()),
        "shared": list(dict.fromkeys(columns["shared"])),
    }
    places = {name: {v: i for i, v in enumerate(found)} for name, found in values.items()}
    facets = [n for n in columns if n in _ALWAYS or (n != "shared" and len(values[n]) > 1)]
    values["shared"] = [_exact(json.loads(text)) for text in values["shared"]]
    values |= {name: [_exact(value) for value in values[name]] for name in ("image", *settings)}
    own = [_flat(_derived(p) | dict(p.own)) for p in shown]
    return {
        "facets": facets,
        "values": values,
        **{name: [places[name][v] for v in column] for name, column in columns.items()},
        # Names that are no UTF-8 have a URL all the same.
        "file": [quote(os.fsencode(p.name), safe="") for p in shown],
        "index": [_exact(_place(p)) for p in shown],
        "sample": [_exact(number) for number in samples(shown, _place)],
        **({"mark": [p.remark for p in shown]} if any(p.remark for p in shown) else {}),
        **({"map": points.data([p.key for p in shown])} if points is not None else {}),
        "own": {
            name: [_exact(facts.get(name)) for facts in own]
            for name in dict.fromkeys(name for facts in own for name in facts)
        },
    }


def _order(image: ImageRecord, folders: Sequence[Path]) -> tuple[Any, ...]:
    key, number = image.key, image.key.value("round")
    file = folders.index(image.folder), image.name
    if isinstance(key, RecordKey):
        sample = key.split, 0, key.index, image.number, key.class_name
        return (-key.round, numbers_first(key.node), *sample, *file)
    place = -int(number) if number is not None else 1  # behind all rounds, which are below
    shown = str(key.shown("node")), str(key.shown("split"))
    return (place, numbers_first(shown[0]), shown[1], 1, key.rank, image.number, *file)


def _value_order(value: str | int) -> tuple[bool, int, str]:
    return numbers_first(str(value))


def _place(image: ImageRecord) -> str | int:
    """Give what tells an image from others of its node, round, split and class."""
    key = image.key
    if isinstance(key, RecordKey):
        return key.index
    return f"frame {key.frame}" if isinstance(key, WalkKey) else key.label


def _derived(image: ImageRecord) -> dict[str, Any]:
    return {} if isinstance(image.key, RecordKey) else {"derived": str(image.key)}


def _flat(own: Mapping[str, Any]) -> dict[str, Any]:
    digests = own.get("digests")
    rest = {name: value for name, value in own.items() if name != "digests"}
    named = digests if isinstance(digests, dict) else {}
    return {**rest, **{f"{name} digest": value for name, value in named.items()}}


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _exact(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_exact(each) for each in value]
    # JavaScript has no NaN in its JSON, and rounds numbers beyond 2^53.
    if isinstance(value, int) and abs(value) > _EXACT_IN_BROWSERS:
        return str(value)
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _asset(name: str) -> str:
    folder = files("fedgfe_store.images.gallery").joinpath("assets")
    return folder.joinpath(name).read_text(encoding="utf-8")
