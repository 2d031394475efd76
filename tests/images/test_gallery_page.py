"""What the gallery's page shows of several folders, and what its address keeps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from browser import drives_chromium
from click.testing import CliRunner
from conftest import fill
from gallery_pages import (
    SETTINGS,
    add,
    content,
    facet,
    files,
    key,
    needs_axe,
    status,
    violations,
)
from playwright.sync_api import Page, expect

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.images.arrange import arrange
from fedgfe_store.images.folders import folder_labels, scan_folders
from fedgfe_store.images.gallery import make_gallery, scan_images
from fedgfe_store.images.manifest import Manifest, read_manifest
from fedgfe_store.names import key_json


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nodes, two rounds and two classes with 1, 4 and 10 steps, each in a folder of its own."""
    path = tmp_path_factory.mktemp("sweep") / "sweep"
    for steps in (10, 1, 4):
        for node, round, name in [("0", 1, "dog"), ("0", 5, "dog"), ("1", 5, "rail_transport")]:
            where = path / f"steps-{steps}"
            add(where, key(round, name, node=node), settings=replace(SETTINGS, steps=steps))
    make_gallery(scan_images(path))
    return path


def shown_pairs(page: Page) -> list[tuple[str, str]]:
    """The pictures that are shown side by side: folder and file."""
    frames = page.locator(".cell").evaluate_all(
        "all => all.map(c => [...c.querySelectorAll('img')].map(i => i.getAttribute('src')))"
    )
    names = [[re.sub(r"^.*thumbnails/|\.webp$", "", each) for each in pair] for pair in frames]
    return [(left, right) for left, right in names]


def test_folders_are_called_by_what_tells_them_apart(tmp_path):
    names = ["one/images", "two/images", "two/steps-10", "two/steps-4"]
    labels = folder_labels([tmp_path / name for name in names])
    assert list(labels.values()) == ["one/images", "two/images", "steps-10", "steps-4"]


def test_a_sweeps_page_lies_beside_its_folders_and_knows_what_they_differ_in(sweep):
    page = sweep / "gallery.html"
    shown = content(page)
    assert shown["facets"] == ["node", "round", "split", "class", "steps", "folder"]
    assert shown["values"]["steps"] == [1, 4, 10]
    assert shown["values"]["folder"] == ["steps-1", "steps-4", "steps-10"]
    for i, name in enumerate(shown["file"]):
        folder = shown["folder"][i]
        picture = sweep / f"{shown['pictures'][folder]}{name}"
        (line,) = [each for each in read_manifest(picture.parent) if each["file"] == name]
        assert line["settings"]["steps"] == shown["values"]["steps"][shown["steps"][i]]
        thumbnail = name.replace(".png", ".webp")
        assert (sweep / f"{shown['thumbnails'][folder]}{thumbnail}").is_file()
    assert make_gallery(scan_images(sweep)).made == 0


def test_sheets_tell_folders_of_one_name_apart_and_order_settings_by_size(tmp_path, sweep):
    for parent in ("one", "two"):
        add(tmp_path / parent / "images", key())
    found = scan_folders([tmp_path / "one/images", tmp_path / "two/images"])
    sheet = arrange([each for one in found for each in one.select()], columns=["folder"])
    assert sheet.columns == (("one/images",), ("two/images",))
    steps = [each for one in scan_folders([sweep]) for each in one.select()]
    assert arrange(steps, columns=["steps"]).columns == ((1,), (4,), (10,))


def test_the_command_takes_filters_and_several_folders(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(store, node=0, round=1, n=2)
    first, second = tmp_path / "first", tmp_path / "second"
    for record in EmbeddingStore.open(store.path).select().keys():
        add(first, record)
    add(second, key(5, "drum"))
    (second / "torn.png").write_bytes(b"\x89PNG")
    both = ["gallery", "--input-dir", str(first), "--input-dir", str(second)]
    result = CliRunner().invoke(group, both)
    assert result.exit_code == 3, result.output
    assert result.stdout.startswith(f"5 pictures in {tmp_path}/gallery.html, ")
    assert result.stderr == "left out: second/torn.png: damaged\n"
    for filters, expected in [
        (["--class", "drum"], {"node_0_train_drum_0_r5.png"}),
        (["--round", "1", "--per-class", "1", "--class", "dog"], {"node_0_train_dog_0_r1.png"}),
        (["--sample-id", "train_1", "--class", "cat"], {"node_0_train_cat_1_r1.png"}),
    ]:
        result = CliRunner().invoke(group, [*both, *filters, "--output", "some.html"])
        assert result.exit_code == 0, result.output
        assert files(tmp_path / "some.html") == expected
    result = CliRunner().invoke(group, [*both, "--class", "dgo"])
    assert (result.exit_code, "the nearest: dog" in result.stderr) == (1, True), result.output


@drives_chromium
def test_the_address_keeps_what_is_shown_and_is_gone_back_from(watched, sweep):
    page = watched.open(sweep / "gallery.html")

    def kept() -> dict[str, list[str]]:
        return parse_qs(urlsplit(page.url).fragment)

    facet(page, "Class", "dog").click()
    expect(status(page)).to_have_text("6 of 9 pictures")
    assert kept() == {"class": ["dog"]}
    page.keyboard.press("/")
    entries = page.evaluate("history.length")
    page.keyboard.type('"round 5"')
    assert page.evaluate("history.length") == entries + 1, "typing is one step"
    expect(status(page)).to_have_text("3 of 9 pictures")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("ArrowRight")
    name = "steps-4/node_0_train_dog_0_r5.png"
    page.wait_for_function("name => decodeURIComponent(location.hash).includes(name)", arg=name)
    expected = {"class": ["dog"], "search": ['"round 5"'], "open": [name]}
    assert kept() == expected

    page.reload()
    expect(page.locator("#viewer")).to_be_visible()
    expect(page.locator("#place")).to_have_text("2 of 3")
    page.go_back()
    expect(page.locator("#viewer")).to_be_hidden()
    assert page.input_value("#search") == '"round 5"'
    expect(page.locator(".cell.active")).to_have_attribute("aria-posinset", "2")
    page.go_back()
    expect(status(page)).to_have_text("6 of 9 pictures")
    page.go_back()
    expect(status(page)).to_have_text("9 pictures")
    page.go_forward()
    expect(facet(page, "Class", "dog")).to_have_attribute("aria-pressed", "true")

    # Closing a picture is going back; of one that the address began with, it stays on the page.
    page.locator(".cell").first.click()
    page.keyboard.press("Escape")
    page.wait_for_function("!location.hash.includes('open')")
    page.goto("about:blank")
    page.goto((sweep / "gallery.html").as_uri() + "#compare=steps&left=4&right=10&open=" + name)
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("Escape")
    page.wait_for_function("!location.hash.includes('open')")
    assert kept() == {"compare": ["steps"], "left": ["4"], "right": ["10"]}
    expect(status(page)).to_have_text("3 pairs")


@drives_chromium
def test_two_values_of_anything_are_compared(watched, sweep):
    page = watched.open(sweep / "gallery.html")
    page.keyboard.press("c")
    dog, rail = "node_0_train_dog_0_r", "node_1_train_rail_transport_0_r5"
    assert shown_pairs(page) == [
        (f"steps-{n}/{dog}1", f"steps-{n}/{dog}5") for n in (1, 4, 10)
    ]  # fmt: skip
    for by, expected in [
        ("Steps", [(f"steps-1/{n}", f"steps-10/{n}") for n in (f"{dog}5", rail, f"{dog}1")]),
        ("Folder", [(f"steps-1/{n}", f"steps-10/{n}") for n in (f"{dog}5", rail, f"{dog}1")]),
        ("Node", []),
    ]:
        page.select_option("#by", label=by)
        assert shown_pairs(page) == expected, by
    expect(page.locator("#nothing")).to_contain_text("No sample was drawn with both.")
    page.select_option("#by", label="Steps")
    page.select_option("#right", label="steps 4")
    page.locator(".cell").first.click()
    labels = page.locator("#stage .label").all_inner_texts()
    assert labels == ["steps 1", "steps 4"]


@drives_chromium
@pytest.mark.parametrize("known", [True, False])
def test_samples_of_two_folders_and_of_two_nodes_are_the_same_files(watched, tmp_path, known):
    # Loaders shuffle: each folder's records have other files at the same indices.
    order = {"first": "abc", "second": "cab", "0": "abc", "1": "bca"}
    for folder, node in [("first", "0"), ("second", "0"), ("first", "1")]:
        names = order["1" if node == "1" else folder]
        for index, file_id in enumerate(names):
            name = add(tmp_path / folder, key(index=index, node=node), listed=False)
            with Manifest(tmp_path / folder) as manifest:
                record = key_json(key(index=index, node=node))
                facts = {"file": name, "key": record, "image": 0}
                manifest.append(facts | ({"file_id": file_id} if known else {}))
    page = watched.open(make_gallery(scan_images([tmp_path / "first", tmp_path / "second"])).page)
    named = re.compile(r"node_(.)_train_dog_(.)_r1$")
    for by, right in [("folder", "second"), ("node", "1")]:
        page.goto(page.url.split("#")[0] + f"#compare={by}")
        found = [[named.search(each) for each in pair] for pair in shown_pairs(page)]
        places = [(int(one[2]), int(other[2])) for one, other in found if one and other]
        expected = [(i, order[right].index(f) if known else i) for i, f in enumerate("abc")]
        assert sorted(places) == expected, by


@drives_chromium
def test_phrases_and_words_of_any_field_are_found(watched, tmp_path):
    for round, name in [(5, "rail_transport"), (50, "rail_transport"), (5, "transport_by_rail")]:
        add(tmp_path, key(round, name))
    add(tmp_path, key(5, "bad dog"))
    page = watched.open(make_gallery(tmp_path).page)
    for asked, found in [
        ('"rail transport"', 2),
        ("rail transport", 3),
        ("“rail transport” r5.png", 1),
        ('"round 5"', 3),
        ('"round 5', 4),
        ("RAIL_transport", 2),
        ('"steps 2" tiny', 4),
        ("diffusers", 4),
        ("2026-01-22", 4),
        ("b", 2),  # by, bad; of digests and fingerprints only what is longer
        ("0000000000000032", 1),
        ('"', 4),
    ]:
        page.fill("#search", asked)
        expected = "4 pictures" if found == 4 else f"{found} of 4 pictures"
        expect(status(page), asked).to_have_text(expected)


@drives_chromium
def test_on_a_phone_each_filter_shows_values_and_nothing_moves_sideways(watched, sweep):
    watched.page.set_viewport_size({"width": 390, "height": 844})
    page = watched.open(sweep / "gallery.html")
    for name in ("Node", "Round", "Split", "Class", "Steps"):
        button = page.locator(f'#filters section[aria-label="{name}"] button').first
        expect(button).to_be_in_viewport(ratio=1)
    expect(page.locator(".cell").first).to_be_in_viewport(ratio=1)
    page.keyboard.press("c")
    for name in ("#by", "#left", "#right", "#compare", "#search"):
        expect(page.locator(name)).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


VIEWS = ["", "#round=5&class=dog", "#search=nothing+at+all", "#compare=steps&left=1&right=4",
         "#open=steps-4/node_0_train_dog_0_r5.png",
         "#compare=steps&left=1&right=4&open=steps-1/node_0_train_dog_0_r5.png"]  # fmt: skip


@pytest.mark.long
@drives_chromium
@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1400, 900), (390, 844)])
def test_axe_finds_nothing_to_say_against_the_page(browser, sweep, size, scheme):
    # The page allows no script but its own.
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, bypass_csp=True
    )
    for view in VIEWS:
        page = context.new_page()
        page.goto((sweep / "gallery.html").as_uri() + view)
        assert violations(page) == [], view
        page.close()
    context.close()
