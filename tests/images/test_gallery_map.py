"""The gallery's map: a point for each picture, by mouse, finger and keys in a real browser."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from browser import Watched, chromium, drives_chromium, empty_page
from click.testing import CliRunner
from conftest import SMALL, fill
from gallery_pages import add, content, needs_axe, violations
from playwright.sync_api import Page, Position, expect

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.images.gallery import Points, make_gallery
from fedgfe_store.records import RecordKey

KEYS = [RecordKey("0", round, "train", name, 0) for name in ("cat", "dog") for round in (1, 2)]
PLACES = {KEYS[0]: (0.0, 0.0), KEYS[1]: (8.0, 0.0), KEYS[2]: (8.0, 4.0)}
"""Two cats below, a dog above the second one; the dog of round 2 is not on the map."""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    for key in KEYS:
        add(folder, key, colour=90 * key.round)
    return make_gallery(folder, points=Points("PCA of t5, 3 of 4 records", PLACES)).page


def test_places_are_between_0_and_1_on_one_scale_with_up_above(page_file):
    page = content(page_file)
    assert page["map"]["title"] == "PCA of t5, 3 of 4 records"
    classes = [page["values"]["class"][place] for place in page["class"]]
    rounds = [page["values"]["round"][place] for place in page["round"]]
    places = zip(page["map"]["x"], page["map"]["y"], strict=True)
    shown = dict(zip(zip(classes, rounds, strict=True), places, strict=True))
    assert shown == {
        ("cat", 1): (0, 0.5),
        ("cat", 2): (1, 0.5),
        ("dog", 1): (1, 0),
        ("dog", 2): (None, None),
    }


def at(page: Page, key: RecordKey) -> Position:
    """Where a record's point is within the map, by the sizes of the field and of the margin."""
    field = page.locator("#map .field").bounding_box()
    assert field is not None
    width, height = field["width"], field["height"]
    scale = min(width - 48, (height - 48) / 0.5)
    x, y = PLACES[key][0] / 8, (4 - PLACES[key][1]) / 8
    return {"x": (width - scale) / 2 + x * scale, "y": (height - scale / 2) / 2 + y * scale}


@drives_chromium
def test_points_show_their_picture_and_open_it(page_file):
    with chromium() as browser:
        for width in (1280, 390):
            with empty_page(browser) as watched:
                watched.page.set_viewport_size({"width": width, "height": 800})
                look_around(watched, page_file)
                assert (watched.messages, watched.failed) == ([], [])
        context = browser.new_context(has_touch=True, viewport={"width": 390, "height": 800})
        page = context.new_page()
        page.goto(page_file.resolve().as_uri())
        page.locator("#show-map").tap()
        # A first tap shows, a second one opens.
        page.locator("#map .field").tap(position=at(page, KEYS[2]))
        expect(page.locator("#map .card b")).to_have_text("dog")
        expect(page.locator("#viewer")).not_to_be_visible()
        page.locator("#map .field").tap(position=at(page, KEYS[2]))
        expect(page.locator("#viewer-title")).to_have_text("dog")
        context.close()


def look_around(watched: Watched, page_file: Path) -> None:
    page = watched.open(page_file)
    expect(page.locator("#map")).not_to_be_visible()
    page.keyboard.press("m")
    expect(page.locator("#map .above")).to_contain_text("3 of 4 records")
    expect(page.locator("#grid")).not_to_be_visible()
    field, card = page.locator("#map .field"), page.locator("#map .card")
    field.hover(position=at(page, KEYS[1]))
    expect(card).to_contain_text("node 0, train 0, round 2")
    frame, inside = field.bounding_box(), card.bounding_box()
    assert frame is not None
    assert inside is not None
    assert inside["x"] >= frame["x"]
    assert inside["x"] + inside["width"] <= frame["x"] + frame["width"] + 2
    page.wait_for_function("document.querySelector('#map .card img').naturalWidth > 0")
    page.mouse.move(2, 2)
    expect(card).not_to_be_visible()
    # From the first point, of the last round, to the left and to the right again, then up.
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#map .told")).to_have_text("cat, node 0, train 0, round 1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#map .told")).to_have_text("dog, node 0, train 0, round 1")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer-title")).to_have_text("dog")
    page.keyboard.press("Escape")
    expect(field).to_be_focused()
    expect(card.locator("b")).to_have_text("dog")
    # A filter leaves points pale, which do not answer.
    page.locator("#filters li button", has_text="cat").click()
    field.hover(position=at(page, KEYS[2]))
    expect(card).not_to_be_visible()
    page.locator("#map select").select_option("round")
    expect(page.locator("#map .legend")).to_have_text("12")


def test_the_command_lays_out_the_records_that_have_a_picture(tmp_path):
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node="0", round=1, classes="dog cat", n=8)
    keys = EmbeddingStore.open(store.path).select().keys()
    for key in keys[:12]:
        add(tmp_path / "images", key)
    words = ["--store", str(store.path), "gallery", "--input-dir", str(tmp_path / "images")]
    done = CliRunner().invoke(group, [*words, "--map", "pca", "--column", "clip"])
    assert done.exit_code == 0, done.output
    assert "map: PCA of clip, 12 of 12 records" in done.stdout
    shown = content(tmp_path / "images" / "gallery.html")["map"]
    places = np.array([shown["x"], shown["y"]], float)
    assert places.shape == (2, 12)
    assert np.ptp(places, axis=1).max() == 1
    done = CliRunner().invoke(group, [*words, "--column", "clip"])
    assert (done.exit_code, "--column goes with --map" in done.stderr) == (2, True)
    gone = ["--store", str(tmp_path / "none.zarr"), *words[2:], "--map", "pca"]
    assert CliRunner().invoke(group, gone).exit_code == 1


SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@pytest.mark.long
@drives_chromium
@needs_axe
def test_axe_finds_nothing_to_say_against_the_map(page_file):
    with chromium() as browser:
        # The page allows no script but its own.
        context = browser.new_context(bypass_csp=True)
        for width, scheme in product([1400, 390], SCHEMES):
            page = context.new_page()
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.goto(page_file.as_uri() + "#view=map")
            expect(page.locator("#map .field")).to_be_visible()
            assert violations(page) == [], (width, scheme)
        context.close()
