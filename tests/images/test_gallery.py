"""The gallery: what it takes from a folder, and how its page behaves in a real browser."""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from browser import drives_chromium
from click.testing import CliRunner
from conftest import fill
from gallery_pages import SEED, SETTINGS, add, content, facet, fact, files, key, status
from PIL import Image
from playwright.sync_api import Page, expect

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.errors import NotFoundError
from fedgfe_store.generation.settings import fingerprint, settings_json
from fedgfe_store.images.gallery import make_gallery, scan_images
from fedgfe_store.images.manifest import Manifest
from fedgfe_store.names import key_json
from fedgfe_store.records import RecordKey

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    'a"b/ü',
    "🐶 \u2028 dog's",
    "%41#?&amp;",
]


def test_pictures_come_from_manifests_and_without_a_line_from_themselves(tmp_path):
    listed, unlisted = add(tmp_path, key()), add(tmp_path, key(index=1), listed=False)
    failed, gone = add(tmp_path, key(index=2)), add(tmp_path, key(index=3))
    with Manifest(tmp_path) as manifest:
        manifest.fail(failed, key=key(index=2), image=0, error="out of memory")
        manifest.append({"file": "../outside.png", "key": key_json(key()), "image": 0})
        manifest.append({"file": 5, "key": key_json(key()), "image": 0})
    (tmp_path / failed).unlink()
    (tmp_path / gone).unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / listed).read_bytes()[:90])

    done: list[int] = []
    gallery = make_gallery(tmp_path, progress=done.append)

    assert files(gallery.page) == {listed, unlisted}
    assert gallery.left_out == {
        "holiday.png": "says nothing about a record",
        "torn.png": "damaged",
    }
    assert (gallery.pictures, sum(done)) == (2, 4)
    shown = content(gallery.page)
    assert shown["own"]["seed"] == [str(SEED), str(SEED + 1)]
    assert [facts["settings"] for facts in shown["values"]["shared"]] == [settings_json(SETTINGS)]


def test_a_listed_picture_that_cannot_be_read_is_left_out(tmp_path):
    good, torn = add(tmp_path, key()), add(tmp_path, key(index=1))
    (tmp_path / torn).write_bytes((tmp_path / torn).read_bytes()[:-30])
    gallery = make_gallery(tmp_path)
    assert (files(gallery.page), gallery.left_out) == ({good}, {torn: "damaged"})


def test_only_thumbnails_that_are_missing_or_out_of_date_are_made(tmp_path):
    big = replace(SETTINGS, height=600, width=300)
    names = [add(tmp_path, key(index=i), settings=big) for i in range(3)]
    assert make_gallery(tmp_path).made == 3
    thumbnails = tmp_path / "thumbnails"
    assert {p.name for p in thumbnails.iterdir()} == {n.replace(".png", ".webp") for n in names}
    assert make_gallery(tmp_path).made == 0

    (thumbnails / names[0].replace(".png", ".webp")).unlink()
    add(tmp_path, key(index=1), settings=big, colour=200)
    # An older picture that is put back is another picture all the same.
    os.utime(tmp_path / names[1], (1_000_000_000, 1_000_000_000))
    assert make_gallery(tmp_path).made == 2
    with Image.open(thumbnails / names[1].replace(".png", ".webp")) as image:
        assert image.size == (128, 256)
        assert np.abs(np.asarray(image).astype(int) - 200).max() < 4


def test_a_page_elsewhere_has_thumbnails_of_its_own_and_finds_the_pictures(tmp_path):
    folder = tmp_path / "run #1 ü"
    name = add(folder, key())
    gallery = make_gallery(folder, tmp_path / "pages" / "first.html")
    assert gallery.thumbnails == tmp_path / "pages" / "first_thumbnails"
    shown = content(gallery.page)
    picture = gallery.page.parent / unquote(shown["pictures"][0] + shown["file"][0])
    assert picture.resolve() == (folder / name).resolve()
    assert [p.name for p in folder.iterdir() if p.suffix == ".html"] == []


def test_latest_rounds_come_first_and_numbers_are_ordered_by_size(tmp_path):
    for node in ("server", "10", "9"):
        for round in (2, 11):
            add(tmp_path, key(round, node=node))
    shown = content(make_gallery(tmp_path).page)
    assert shown["values"]["node"] == ["9", "10", "server"]
    assert shown["values"]["round"] == [2, 11]
    assert [shown["values"]["round"][i] for i in shown["round"]] == [11] * 3 + [2] * 3
    assert shown["node"] == [0, 1, 2, 0, 1, 2]


def test_numbers_that_a_browser_would_round_are_text(tmp_path):
    add(tmp_path, key(index=2**60), settings=replace(SETTINGS, seed=2**62 + 1))
    shown = content(make_gallery(tmp_path).page)
    assert shown["index"] == [str(2**60)]
    assert shown["values"]["shared"][0]["settings"]["seed"] == str(2**62 + 1)


def test_a_folder_without_pictures_is_an_error_that_names_it(tmp_path):
    with pytest.raises(NotFoundError, match="no folder of pictures at .*nowhere"):
        make_gallery(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="no pictures in"):
        scan_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    with pytest.raises(NotFoundError, match="holiday.png: says nothing about a record"):
        make_gallery(tmp_path)
    assert not (tmp_path / "gallery.html").exists()


def test_the_command_takes_the_stores_folder_and_reports_what_is_left_out(
    store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fill(store, node=0, round=1, n=1)
    folder = Path("output_images/embeddings")
    for each in EmbeddingStore.open(store.path).select().keys():
        add(folder, each)
    (folder / "torn.png").write_bytes(b"\x89PNG")
    result = CliRunner().invoke(group, ["gallery"])
    assert result.exit_code == 3, result.output
    assert result.stdout.startswith(f"2 pictures in {folder}/gallery.html, ")
    # Their digests are made up.
    assert result.stdout.endswith("; 2 thumbnails made\nout of date: 2 embeddings changed\n")
    assert result.stderr == "left out: torn.png: damaged\n"


def test_without_a_store_the_command_says_how_to_name_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(group, ["gallery"])
    assert result.exit_code == 1
    assert "--images names the folder" in result.stderr
    add(tmp_path / "images", key())
    result = CliRunner().invoke(group, ["gallery", "--input-dir", "images", "--output", "a.html"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.html").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three nodes and a server, four rounds, ten classes, one test and two train samples."""
    path = tmp_path_factory.mktemp("gallery") / "experiment"
    for node, round, name in itertools.product(["0", "1", "2", "server"], [1, 3, 5, 10], CLASSES):
        for split, index in (("test", 0), ("train", 0), ("train", 1)):
            add(path, RecordKey(node, round, split, name, index), colour=20 * round)
    make_gallery(path)
    return path


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.id")


@drives_chromium
def test_filters_show_the_right_pictures_and_counts(watched, folder):
    page = watched.open(folder / "gallery.html")
    expect(status(page)).to_have_text("480 pictures")
    facet(page, "Class", "dog").click()
    expect(status(page)).to_have_text("48 of 480 pictures")
    facet(page, "Round", "10").click()
    facet(page, "Node", "server").click()
    facet(page, "Class", "drum").click()
    # Two classes, one node, one round: 2 train and 1 test sample each.
    expect(status(page)).to_have_text("6 of 480 pictures")
    assert page.locator(".cell p:first-of-type").all_inner_texts() == ["dog", "drum"] * 3
    # A count says how many there would be with that value, the other filters as they are.
    expect(facet(page, "Node", "0").locator("i")).to_have_text("6")
    expect(facet(page, "Split", "train").locator("i")).to_have_text("4")
    expect(facet(page, "Class", "snoring").locator("i")).to_have_text("3")
    facet(page, "Split", "train").click()
    expect(status(page)).to_have_text("4 of 480 pictures")
    page.locator("#summary .clear").click()
    expect(status(page)).to_have_text("480 pictures")


@drives_chromium
def test_search_takes_every_word(watched, folder):
    page = watched.open(folder / "gallery.html")
    page.fill("#search", "SERVER helicopter")
    expect(status(page)).to_have_text("12 of 480 pictures")
    page.fill("#search", "node_1_train_dog_0_r5.png")
    expect(status(page)).to_have_text("1 of 480 pictures")
    page.fill("#search", "no such thing")
    expect(page.locator("#nothing")).to_be_visible()
    page.locator("#nothing .clear").click()
    expect(status(page)).to_have_text("480 pictures")


@drives_chromium
def test_a_click_shows_the_picture_with_its_provenance(watched, folder):
    page = watched.open(folder / "gallery.html")
    page.fill("#search", "node_1_train_dog_0_r5.png")
    page.locator(".cell").click()
    lines = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    line = next(each for each in lines if each["file"] == "node_1_train_dog_0_r5.png")
    shown = {
        "node": "1",
        "round": "5",
        "class": "dog",
        "file": line["file"],
        "steps": str(line["settings"]["steps"]),
        "model": "tiny",
        "fingerprint": line["fingerprint"],
        "commit": str(line["commit"]),
        "t5 digest": line["digests"]["t5"],
        "clip digest": line["digests"]["clip"],
        "diffusers": line["versions"]["diffusers"],
    }
    for name, text in shown.items():
        expect(fact(page, name)).to_have_text(text)
    # The picture's own seed, not the base seed of the settings; 64 bits, to the last digit.
    expect(fact(page, "seed")).to_have_text(str(line["seed"]))
    picture = page.locator("#stage img")
    page.wait_for_function("document.querySelector('#stage img').complete")
    assert picture.evaluate("image => image.naturalWidth") == 8
    assert picture.get_attribute("src") == line["file"]


@drives_chromium
def test_two_rounds_are_compared_sample_by_sample(watched, folder):
    page = watched.open(folder / "gallery.html")
    page.get_by_role("button", name="Compare").click()
    expect(status(page)).to_have_text("120 pairs")
    page.select_option("#left", label="round 3")
    facet(page, "Class", "drum").click()
    facet(page, "Node", "2").click()
    expect(status(page)).to_have_text("3 of 120 pairs")
    thumbnails = page.locator(".cell img").evaluate_all("all => all.map(i => i.src)")
    names = [re.sub(r".*/thumbnails/|\.webp", "", each) for each in thumbnails]
    samples = ["node_2_test_drum_0", "node_2_train_drum_0", "node_2_train_drum_1"]
    assert names == [f"{sample}_r{round}" for sample in samples for round in (3, 10)]

    page.locator(".cell").nth(1).click()
    pictures = page.locator("#stage img").evaluate_all("all => all.map(i => i.getAttribute('src'))")
    assert pictures == ["node_2_train_drum_0_r3.png", "node_2_train_drum_0_r10.png"]
    assert fact(page, "round").all_inner_texts() == ["3", "10"]
    assert fact(page, "model").all_inner_texts() == ["tiny"]
    slider = page.locator("#stage input")
    clip = "getComputedStyle(document.querySelectorAll('#stage img')[1]).clipPath"
    assert page.evaluate(clip) == "inset(0px 0px 0px 50%)"
    slider.focus()
    page.keyboard.press("Home")
    assert page.evaluate(clip) == "inset(0px 0px 0px 0%)"
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    assert 75 <= int(slider.input_value()) <= 85
    assert page.evaluate(clip) == f"inset(0px 0px 0px {slider.input_value()}%)"


@drives_chromium
def test_only_pictures_with_a_partner_are_compared(watched, tmp_path):
    for round, index in ((1, 0), (2, 0), (1, 1), (2, 2)):
        add(tmp_path, key(round, index=index))
    page = watched.open(make_gallery(tmp_path).page)
    expect(status(page)).to_have_text("4 pictures")
    page.keyboard.press("c")
    expect(status(page)).to_have_text("1 pair")
    page.keyboard.press("c")
    expect(status(page)).to_have_text("4 pictures")


@drives_chromium
def test_everything_can_be_done_from_the_keyboard(watched, folder):
    page = watched.open(folder / "gallery.html")
    active = page.locator(".cell.active")
    assert focused(page) == "grid"
    page.keyboard.press("ArrowRight")
    expect(active).to_have_attribute("aria-posinset", "2")
    assert page.locator("#grid").get_attribute("aria-activedescendant") == "cell-1"
    page.keyboard.press("End")
    expect(active).to_have_attribute("aria-posinset", "480")
    expect(active).to_be_in_viewport()
    assert (
        active.evaluate("e => getComputedStyle(e.querySelector('.frames')).outlineWidth") == "3px"
    )
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    before = page.locator("#place").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#place").inner_text() != before
    page.keyboard.press("ArrowRight")
    expect(page.locator("#place")).to_have_text(before)
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    assert focused(page) == "grid"
    page.keyboard.press("/")
    assert focused(page) == "search"
    page.keyboard.type("c drum")
    expect(status(page)).to_have_text("48 of 480 pictures")
    page.keyboard.press("Escape")
    expect(status(page)).to_have_text("480 pictures")
    assert focused(page) == "grid"
    page.keyboard.press("c")
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "true")


@drives_chromium
def test_every_control_has_a_name(watched, folder):
    page = watched.open(folder / "gallery.html")
    page.keyboard.press("c")
    page.locator(".cell").first.click()
    for role in ("button", "option", "combobox", "searchbox", "slider", "listbox"):
        found = page.get_by_role(role, include_hidden=True)
        nameless = page.get_by_role(role, name=re.compile(r"^\s*$"), include_hidden=True)
        assert (found.count() > 0, nameless.count()) == (True, 0), role


@drives_chromium
def test_hostile_names_are_shown_as_they_are(watched, tmp_path):
    folder = tmp_path / "<b onmouseover=alert(3)>{{data}}"
    for round in (1, 2):
        for name in HOSTILE:
            add(folder, key(round, name))
    odd = [os.fsdecode(b"odd \xff.png"), "a#b?c%20d.png"]
    for index, name in enumerate(odd, start=1):
        add(folder, key(class_name="plain", index=index), listed=False, name=name)
    page = watched.open(make_gallery(folder).page)
    expect(page.locator("h1")).to_have_text(folder.name)
    assert page.title() == folder.name
    expect(status(page)).to_have_text("12 pictures")
    buttons = page.locator('#filters section[aria-label="Class"] b')
    assert set(buttons.evaluate_all("all => all.map(b => b.textContent)")) == {*HOSTILE, "plain"}
    for name in HOSTILE:
        button = page.get_by_role("button").filter(has=page.locator("b", has_text=name)).first
        button.click()
        expect(status(page)).to_have_text("2 of 12 pictures")
        page.locator(".cell").first.click()
        assert page.locator("#viewer-title").evaluate("e => e.textContent") == name
        page.keyboard.press("Escape")
        button.click()
    page.locator(".cell").last.scroll_into_view_if_needed()
    page.wait_for_load_state("networkidle")
    widths = page.locator(".cell img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert widths == [8] * 12


@drives_chromium
def test_ten_thousand_pictures_make_a_small_page_with_few_nodes(watched, tmp_path):
    first = add(tmp_path, key(), listed=False)
    make_gallery(tmp_path)
    thumbnail = tmp_path / "thumbnails" / first.replace(".png", ".webp")
    line = {"image": 0, "settings": settings_json(SETTINGS), "fingerprint": fingerprint(SETTINGS)}
    with Manifest(tmp_path) as manifest:
        for number in range(10_000):
            one = key(number % 20, f"class_{number // 20 % 10}", number // 200)
            os.link(tmp_path / first, tmp_path / f"x{number}.png")
            os.link(thumbnail, thumbnail.with_name(f"x{number}.webp"))
            facts = {"key": key_json(one), "seed": SEED + number, "digests": {"t5": "0" * 16}}
            manifest.append({"file": f"x{number}.png", **line, **facts})
    gallery = make_gallery(tmp_path)
    assert (gallery.pictures, gallery.made) == (10_001, 0)
    assert gallery.page.stat().st_size < 3_000_000
    page = watched.open(gallery.page)
    expect(status(page)).to_have_text("10,001 pictures")
    nodes = "document.getElementsByTagName('*').length"
    assert page.evaluate(nodes) < 700
    for _ in range(20):
        page.keyboard.press("PageDown")
    page.keyboard.press("End")
    expect(page.locator(".cell.active")).to_have_attribute("aria-posinset", "10001")
    assert page.evaluate(nodes) < 700
    facet(page, "Round", "7").click()
    expect(status(page)).to_have_text("500 of 10,001 pictures")


@drives_chromium
def test_pictures_out_of_date_carry_a_badge(watched, store, tmp_path):
    fill(store, node=0, round=1, classes="dog", n=1)
    # Made-up digests are those of another embedding; the other picture's record is not there.
    for index in (0, 1):
        add(tmp_path / "images", key(index=index))
    page = watched.open(make_gallery(tmp_path / "images", store=store).page)
    badges = page.locator(".cell .badge")
    assert badges.all_inner_texts() == ["embedding changed", "record deleted"]
    page.fill("#search", "deleted")
    expect(status(page)).to_have_text("1 of 2 pictures")
    page.locator(".cell").click()
    expect(fact(page, "out of date")).to_have_text("record deleted")
