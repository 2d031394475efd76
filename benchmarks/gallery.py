"""The gallery of many pictures: making it, opening it and filtering it in a headless Chromium.

    python benchmarks/gallery.py [--pictures 10000] [--size 512]

A few pictures are drawn and linked under as many names as there are to be. Times in the page are
by its own clock, performance.now(), up to the frame that shows the result.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from playwright.sync_api import Page, sync_playwright

from fedgfe_store.generation.settings import Settings, fingerprint
from fedgfe_store.images.gallery import Gallery, make_gallery
from fedgfe_store.images.manifest import Manifest
from fedgfe_store.images.png import write_png
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

_DRAWN = 20
_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync"
)
_SHOWN = """async ({ act, argument }) => {
  const start = performance.now();
  if (act === "click") document.querySelector(argument).click();
  else {
    const search = document.getElementById("search");
    search.value = argument;
    search.dispatchEvent(new Event("input"));
  }
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start;
}"""


def draw(folder: Path, pictures: int, size: int) -> None:
    rng = np.random.default_rng(0)
    settings = Settings("tiny", "0" * 32, "bfloat16", 28, 3.5, size, size)
    shared = {"settings": asdict(settings), "fingerprint": fingerprint(settings), "image": 0}
    keys = itertools.product(range(10), range(40), [f"class_{i}" for i in range(10)], range(1000))
    drawn: list[Path] = []
    with Manifest(folder) as manifest:
        for number, (node, round_, name, index) in enumerate(
            itertools.islice(keys, 0, pictures * (4_000_000 // pictures), 4_000_000 // pictures)
        ):
            key = RecordKey(str(node), round_, "train", name, index)
            path = folder / image_name(key)
            if len(drawn) < _DRAWN:
                small = rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
                pixels = small.repeat(16, axis=0).repeat(16, axis=1)
                write_png(path, pixels, {"key": key_json(key), **shared})
                drawn.append(path)
            else:
                os.link(drawn[number % _DRAWN], path)
            own = {"seed": 2**62 + number, "digests": {"t5": f"{number:016x}", "clip": "0" * 16}}
            line = {"file": path.name, "key": key_json(key), **shared, **own, "bytes": 400_000}
            manifest.append({**line, "seconds": 6.5, "created": "2026-01-22T12:00:00+00:00"})


def row(name: str, value: float, unit: str) -> None:
    click.echo(f"{name:<44}{value:>10,.1f} {unit}")


def making(folder: Path) -> Gallery:
    start = time.perf_counter()
    gallery = make_gallery(folder)
    row(f"make page and {gallery.made:,} thumbnails", time.perf_counter() - start, "s")
    start = time.perf_counter()
    make_gallery(folder)
    row("make page again, no thumbnail", time.perf_counter() - start, "s")
    row("page", gallery.page.stat().st_size / 1e6, "MB")
    return gallery


def looking(page: Page, path: Path) -> None:
    page.goto(path.as_uri())
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    row("open: until loaded", page.evaluate(timing), "ms")
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    row("open: until something is seen", page.evaluate(paint), "ms")
    nodes = "document.getElementsByTagName('*').length"
    row("nodes in the document", page.evaluate(nodes), "")
    first_class = "#filters section[aria-label='Class'] button"
    for name, act, argument in [
        ("search for a word, first time", "type", "class_3"),
        ("search for two words", "type", "class_3 node_7"),
        ("clear the search", "type", ""),
        ("filter by class", "click", first_class),
        ("clear the filter", "click", "#summary .clear"),
        ("compare two rounds", "click", "#compare"),
        ("filter the pairs by class", "click", first_class),
    ]:
        row(name, page.evaluate(_SHOWN, {"act": act, "argument": argument}), "ms")
    row("nodes in the document", page.evaluate(nodes), "")


@click.command()
@click.option("--pictures", default=10_000, show_default=True)
@click.option("--size", default=512, show_default=True, help="Width and height in pixels.")
def main(pictures: int, size: int) -> None:
    """Print the figures of one run."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        draw(Path(folder), pictures, size)
        gallery = making(Path(folder))
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=_ARGUMENTS.split())
        looking(browser.new_page(viewport={"width": 1280, "height": 800}), gallery.page)
        browser.close()


if __name__ == "__main__":
    main()
