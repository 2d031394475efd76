"""Folders of images as runs would leave them, and what a gallery's page shows of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from playwright.sync_api import Locator, Page

from fedgfe_store.generation.settings import Settings, fingerprint, settings_json
from fedgfe_store.images.manifest import Manifest
from fedgfe_store.images.png import write_png
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)
SEED = 7_212_018_836_994_589_241


def add(
    folder: Path,
    key: RecordKey,
    *,
    image: int = 0,
    colour: int | np.ndarray = 0,
    listed: bool = True,
    settings: Settings = SETTINGS,
    name: str | None = None,
) -> str:
    """Make an image as a run would, without one."""
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {
        "key": key_json(key),
        "image": image,
        "seed": SEED + key.index,
        "digests": {"t5": f"{key.round:016x}", "clip": f"{key.index:016x}"},
        "settings": settings_json(settings),
        "fingerprint": fingerprint(settings),
        "commit": 16,
        "versions": {"diffusers": "0.42.1"},
    }
    name = name or image_name(key, image)
    size = settings.height, settings.width, 3
    write_png(folder / name, np.full(size, colour, np.uint8), provenance)
    if listed:
        with Manifest(folder) as manifest:
            line = {"file": name, **provenance, "created": "2026-01-22T12:00:00+00:00"}
            manifest.append(line)
    return name


def key(round: int = 1, class_name: str = "dog", index: int = 0, node: str = "0") -> RecordKey:
    return RecordKey(node, round, "train", class_name, index)


def content(page: Path) -> dict[str, Any]:
    """Read back what a page says of its pictures."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found
    return json.loads(found[1])


def files(page: Path) -> set[str]:
    return set(map(unquote, content(page)["file"]))


def status(page: Page) -> Locator:
    return page.locator("#status")


def facet(page: Page, name: str, value: str) -> Locator:
    section = page.locator(f'#filters section[aria-label="{name}"]')
    return section.locator(f"button[title={json.dumps(value)}]")


def fact(page: Page, name: str) -> Locator:
    row = page.locator("#facts tr").filter(has=page.get_by_role("rowheader", name=name, exact=True))
    return row.first.locator("td")


AXE = Path(sys.prefix, "axe", "node_modules", "axe-core", "axe.min.js")
needs_axe = pytest.mark.skipif(
    not AXE.is_file(), reason="no axe-core: make test-long brings it where npm is"
)


def violations(page: Page) -> list[tuple[str, list[str]]]:
    """Return what axe-core finds against a page, and in which elements."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 10
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
