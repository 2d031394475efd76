"""Contact sheets: the right picture in each cell, labels that never touch one, and animations."""

from __future__ import annotations

import itertools
import json
import os
import re
import string
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.images.arrange import arrange
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.labels import Label, label_of
from fedgfe_store.images.png import write_png
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.images.sheet import animate, check_output, save_sheet
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

NAMES = [
    "<script>alert('x')</script>", 'a"b/ü', "日本語", "中国語", "emoji 🐶", "multi\nline\tname", "",
    " ", "a very long class name that goes on until nobody reads it", "x" * 250, "../etc", "end.",
]  # fmt: skip


def colour(number: int) -> tuple[int, int, int]:
    """Return a colour of its own for each number, which no edge of a letter or line has."""
    return number % 16 * 12, number // 16 % 16 * 12, 250 - number // 256 * 20


def make(folder, keys, *, size=(16, 16), listed=True):
    """Write a picture of its own colour for each key, as generate does; return the colours."""
    folder.mkdir(exist_ok=True)
    colours, lines = {}, []
    for number, key in enumerate(keys):
        colours[key] = colour(number)
        pixels = np.full((size[1], size[0], 3), colours[key], np.uint8)
        line = {"key": key_json(key), "image": 0, "settings": {"width": size[0], "height": size[1]}}
        write_png(folder / image_name(key), pixels, line)
        lines.append(json.dumps({"file": image_name(key), **line}))
    if listed:
        (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return colours


def key(node="0", round=1, split="train", class_name="dog", index=0):
    return RecordKey(str(node), round, split, class_name, index)


def cells_of(file, colours):
    """Find each colour's rectangle on a sheet: key to (left, top, width, height), all filled."""
    pixels = np.asarray(Image.open(file).convert("RGB")) @ (1, 256, 256 * 256)
    found = {}
    for name, value in colours.items():
        rows, columns = np.nonzero(pixels == np.dot(value, (1, 256, 256 * 256)))
        if len(rows):
            box = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
            assert len(rows) == box[2] * box[3], f"something lies over {name}"
            found[name] = tuple(map(int, box))
    return found


def check_grid(file, colours, rows, columns, row_of, column_of):
    """Check that the pictures lie in a grid with rows and columns in these orders."""
    found = cells_of(file, colours)
    lefts = [{box[0] for k, box in found.items() if column_of(k) == c} for c in columns]
    tops = [{box[1] for k, box in found.items() if row_of(k) == r} for r in rows]
    for places in (lefts, tops):
        assert all(len(place) == 1 for place in places)
        numbers = [place.pop() for place in places]
        assert numbers == sorted(set(numbers))
    return found


def check_margins(file):
    """Check that nothing is cut off at the edges."""
    pixels = np.asarray(Image.open(file).convert("RGB"))
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all()


# Finding


def test_pictures_are_found_by_manifest_and_by_their_own_word(tmp_path):
    keys = [key(n, r, c, d, i) for n, r, c, d, i in itertools.product(
        ("0", "server"), (1, 5), ("train", "test"), NAMES[:4], (0, 1))]  # fmt: skip
    make(tmp_path / "a", keys)
    make(tmp_path / "b", keys, listed=False)
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = ImageFolder.scan(folder).select()
        assert [picture.key for picture in found] == sorted(keys)
        assert all(picture.file == folder / image_name(picture.key) for picture in found)
        assert {picture.size for picture in found} == {(16, 16)}


def test_only_pictures_that_are_there_and_ours_count(tmp_path):
    keys = [key(index=i) for i in range(6)]
    make(tmp_path, keys[:4])
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    (tmp_path / image_name(keys[0])).unlink()
    extra = [
        "{torn",
        json.dumps({"file": image_name(keys[4]), "key": key_json(keys[4]), "error": "bad"}),
        json.dumps({"file": image_name(keys[5]), "key": {"node": "0"}}),
        json.dumps({"key": key_json(keys[5])}),
    ]
    make(tmp_path, keys[5:], listed=False)
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, *extra]))
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert [picture.key.value("index") for picture in ImageFolder.scan(tmp_path).select()] == [
        1,
        2,
        3,
        5,
    ]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"node": "server"}, lambda k: k.node == "server"),
        ({"node": 0, "round": [5, 7]}, lambda k: (k.node, k.round) == ("0", 5)),
        ({"round": range(2, 9), "split": "test"}, lambda k: (k.round, k.split) == (5, "test")),
        ({"class_name": ["cat"], "index": 2}, lambda k: (k.class_name, k.index) == ("cat", 2)),
        ({"per_class": 1}, lambda k: k.index == 0),
        ({"per_class": 1, "index": [1, 2]}, lambda k: k.index == 1),
    ],
)
def test_filters_are_those_of_a_store(tmp_path, filters, expected):
    keys = [key(*parts) for parts in itertools.product(
        (0, "server"), (1, 5), ("train", "test"), ("dog", "cat"), range(3))]  # fmt: skip
    make(tmp_path, keys)
    found = ImageFolder.scan(tmp_path).select(**filters)
    assert [picture.key for picture in found] == sorted(filter(expected, keys))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(NotFoundError, match="no folder of pictures at"):
        ImageFolder.scan(tmp_path / "no").select()
    with pytest.raises(NotFoundError, match="no pictures of ours in"):
        ImageFolder.scan(tmp_path).select()
    make(tmp_path, [key()])
    with pytest.raises(NotFoundError, match="none of the 1 pictures in .* meets the filters"):
        ImageFolder.scan(tmp_path).select(round=7)
    with pytest.raises(SchemaMismatchError, match="round: expected whole numbers"):
        ImageFolder.scan(tmp_path).select(round="x")
    with pytest.raises(SchemaMismatchError, match="got sample_id"):
        ImageFolder.scan(tmp_path).select(sample_id="train_0")


# Arranging


def test_every_cell_shows_the_same_sample_where_it_can(tmp_path):
    keys = [key(node, r, split, c) for node, r, split, c in itertools.product(
        (2, 10, "server"), (1, 10, 2), ("train", "test"), ("dog", "cat"))]  # fmt: skip
    keys.remove(key(2, 1, "test", "dog"))
    make(tmp_path, keys)
    sheet = arrange(ImageFolder.scan(tmp_path).select())
    assert sheet.rows == (("cat",), ("dog",))
    assert sheet.columns == ((1,), (2,), (10,))
    assert {(p.key.value("node"), p.key.value("split")) for p in sheet.cells.values()} == {
        ("2", "train")
    }
    assert sheet.title == "node 2, train, index 0"
    assert {sheet.caption(picture) for picture in sheet.cells.values()} == {""}
    assert sheet.missing == 0
    by_node = arrange(
        ImageFolder.scan(tmp_path).select(), rows=["node"], columns=["class_name", "round"]
    )
    assert by_node.rows == (("2",), ("10",), ("server",))
    assert by_node.columns[:2] == (("cat", 1), ("cat", 2))


def test_where_samples_differ_each_cell_says_which(tmp_path):
    keys = [key(node, r, class_name=f"class {node}", index=i)
            for node, r, i in itertools.product(range(3), (1, 5), (0, 1))]  # fmt: skip
    keys.remove(key(2, 5, class_name="class 2", index=0))
    make(tmp_path, keys)
    sheet = arrange(ImageFolder.scan(tmp_path).select())
    assert sheet.title == "train"
    captions = {picture.key: sheet.caption(picture) for picture in sheet.cells.values()}
    assert captions[key(1, 5, class_name="class 1")] == "node 1, index 0"
    assert captions[key(2, 5, class_name="class 2", index=1)] == "node 2, index 1"
    colours = make(tmp_path, keys)
    save_sheet(sheet, tmp_path / "sheet.png", thumbnail=100)
    shown = {k: c for k, c in colours.items() if k in captions}
    found = check_grid(tmp_path / "sheet.png", shown, [f"class {i}" for i in range(3)], [1, 5],
                       lambda k: k.class_name, lambda k: k.round)  # fmt: skip
    assert set(found) == set(captions)


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (["class"], ["round"], "rows: expected some of node, round, split, class_name, index"),
        ([], ["round"], "got none"),
        (["round"], ["round", "node"], "expected other keys for columns than for rows, got round"),
    ],
)
def test_wrong_keys_are_named(tmp_path, rows, columns, words):
    picture = ImageRecord(tmp_path, "a.png", key())
    with pytest.raises(SchemaMismatchError, match=words):
        arrange([picture], rows=rows, columns=columns)
    with pytest.raises(SchemaMismatchError, match="expected at least one picture"):
        arrange([])


# Drawing


@pytest.mark.parametrize("thumbnail", [32, 100])
def test_pictures_lie_in_rows_and_columns_under_any_labels(tmp_path, thumbnail):
    keys = [key("server", r, class_name=c) for r in (1, 2, 1000) for c in NAMES]
    colours = make(tmp_path / "in", keys)
    sheet = arrange(ImageFolder.scan(tmp_path / "in").select())
    assert save_sheet(sheet, tmp_path / "a.png", thumbnail=thumbnail) == [tmp_path / "a.png"]
    found = check_grid(tmp_path / "a.png", colours, sorted(NAMES), [1, 2, 1000],
                       lambda k: k.class_name, lambda k: k.round)  # fmt: skip
    assert len(found) == len(keys)
    assert {box[2:] for box in found.values()} == {(thumbnail, thumbnail)}
    check_margins(tmp_path / "a.png")
    across = arrange(
        ImageFolder.scan(tmp_path / "in").select(), rows=["round"], columns=["class_name"]
    )
    save_sheet(across, tmp_path / "b.png", thumbnail=thumbnail, title="y\n\0é" * 200)
    assert len(cells_of(tmp_path / "b.png", colours)) == len(keys)
    check_margins(tmp_path / "b.png")


def test_labels_are_drawn_beside_and_above(tmp_path):
    keys = [key("server", r, class_name=c) for r in (1, 5) for c in ("dog", "cat")]
    colours = make(tmp_path / "in", keys)
    save_sheet(arrange(ImageFolder.scan(tmp_path / "in").select()), tmp_path / "a.png")
    found = cells_of(tmp_path / "a.png", colours)
    dark = np.asarray(Image.open(tmp_path / "a.png").convert("L")) < 100
    left, top, size = found[keys[0]][0], min(box[1] for box in found.values()), 128
    for x, y, _, _ in found.values():
        assert dark[y : y + size, :left].any()
        assert dark[:top, x : x + size].any()
        # The middle of a row's label is at the middle of the row.
        marked = np.flatnonzero(dark[y : y + size, :left].any(axis=1))
        assert abs(marked.mean() - size / 2) < 8


def test_missing_and_damaged_cells_are_marked(tmp_path):
    keys = [key(round=r, class_name=c) for r in (1, 2) for c in ("dog", "cat")]
    colours = make(tmp_path / "in", keys[:3])
    damaged = tmp_path / "in" / image_name(keys[0])
    damaged.write_bytes(damaged.read_bytes()[:60])
    sheet = arrange(ImageFolder.scan(tmp_path / "in").select())
    assert sheet.missing == 1
    reports: list[Any] = []
    done: list[int] = []
    save_sheet(sheet, tmp_path / "a.png", report=reports.append, progress=done.append)
    assert reports == [f"{damaged} is damaged"]
    assert sum(done) == 3
    found = cells_of(tmp_path / "a.png", colours)
    assert set(found) == set(keys[1:3])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    cat, dog = found[keys[1]], found[keys[2]]
    assert (pixels[dog[1], cat[0] : cat[0] + 128] == (190, 40, 40)).all()
    assert (pixels[cat[1], dog[0] : dog[0] + 128] == (225, 225, 225)).all()


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (300, 200)])
def test_pictures_keep_their_shape_and_cells_fit_it(tmp_path, size):
    colours = make(tmp_path / "in", [key(), key(round=2), key(class_name="cat")], size=size)
    save_sheet(
        arrange(ImageFolder.scan(tmp_path / "in").select()), tmp_path / "a.png", thumbnail=96
    )
    found = cells_of(tmp_path / "a.png", colours)
    high = round(96 * size[1] / max(size))
    assert {box[2:] for box in found.values()} == {(round(96 * size[0] / max(size)), high)}
    assert found[key()][1] - found[key(class_name="cat")][1] == high + 6


def test_a_large_sheet_goes_into_pages_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("fedgfe_store.images.drawing._PAGE", 600)
    keys = [key(round=r, class_name=f"class {c:02}") for r in range(13) for c in range(12)]
    colours = make(tmp_path / "in", keys, size=(2, 2))
    sheet = arrange(ImageFolder.scan(tmp_path / "in").select())
    files = save_sheet(sheet, tmp_path / "sheet.png", thumbnail=64)
    assert [file.name for file in files] == [f"sheet-{n}.png" for n in (1, 2, 3, 4)]
    seen = []
    for file in files:
        with Image.open(file) as image:
            assert max(image.size) <= 600
        seen += cells_of(file, colours)
        check_margins(file)
    assert sorted(seen) == sorted(keys)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.pdf", "A.PNG"])
def test_the_ending_tells_the_kind(tmp_path, name):
    make(tmp_path / "in", [key()])
    save_sheet(arrange(ImageFolder.scan(tmp_path / "in").select()), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 100
    assert {file.name for file in tmp_path.iterdir()} == {"in", name}


def test_files_that_cannot_be_written_are_refused_first(tmp_path):
    for name in ("a.txt", "a", "a.gif"):
        with pytest.raises(SchemaMismatchError, match=r"expected a name ending in \.png"):
            check_output(tmp_path / name)
    with pytest.raises(NotFoundError, match="there is no folder"):
        check_output(tmp_path / "no" / "a.png")
    sheet = arrange([ImageRecord(tmp_path, "a.png", key())])
    with pytest.raises(SchemaMismatchError, match="thumbnail: expected 32 to 1024 pixels, got 8"):
        save_sheet(sheet, tmp_path / "a.png", thumbnail=8)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    make(tmp_path / "in", [key()])
    sheet = arrange(ImageFolder.scan(tmp_path / "in").select())
    (tmp_path / "a.png").write_bytes(b"old")

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_sheet(sheet, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {"in", "a.png"}


# Labels


@settings(max_examples=150)
@given(st.text(alphabet=string.ascii_letters + " _-/.,", max_size=80),
       st.integers(12, 200), st.integers(1, 4))  # fmt: skip
def test_lines_fit_and_lose_nothing_without_saying_so(text, width, lines):
    font = ImageFont.load_default(12)
    wrapped = Label(12, width, lines=lines).wrapped(text)
    assert len(wrapped) <= lines
    assert all(font.getlength(line) <= width or len(line) == 1 for line in wrapped)
    kept = "".join(wrapped).replace(" ", "")
    if kept.endswith("…"):
        assert text.replace(" ", "").startswith(kept[:-1])
    else:
        assert kept == text.replace(" ", "")


def test_keys_in_words():
    names = ("node", "round", "class_name", "index", "image")
    assert label_of(["server", 5, "dog", 0, 0], names) == "server, round 5, dog, index 0"
    assert label_of(["3", 5, "", 1, 2], names) == "node 3, round 5, (empty), index 1, image 2"
    assert label_of(["a\nb\x00 é…"], ["class_name"]) == "a b e…"
    different = {label_of([name], ["class_name"]) for name in ("日本", "中国", "\ud800")}
    assert len(different) == 3
    assert Label(12, 60, lines=2).wrapped("dog, round 10") == ["dog,", "round 10"]


# Animating


def frames_of(file):
    with Image.open(file) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            yield np.asarray(image.convert("RGB")).astype(int), image.info["duration"]


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_an_animation_shows_one_sample_by_round(tmp_path, name):
    keys = [key("server", r, class_name="cat", index=1) for r in (10, 1, 2)]
    keys += [key("server", r, class_name="dog") for r in (1, 2)]
    colours = make(tmp_path / "in", keys)
    shown = animate(ImageFolder.scan(tmp_path / "in").select(), tmp_path / name, thumbnail=64)
    assert [picture.key for picture in shown] == sorted(keys[:3])
    frames = list(frames_of(tmp_path / name))
    assert len(frames) == 3
    for (pixels, _), k in zip(frames, sorted(keys[:3]), strict=True):
        middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
        assert np.abs(middle - colours[k]).max() < 12
        assert (pixels[:3] > 240).all()
    assert [duration for _, duration in frames] == [700, 700, 2000]


def test_animations_that_cannot_be(tmp_path):
    make(tmp_path / "in", [key(), key(class_name="cat", round=2)])
    pictures = ImageFolder.scan(tmp_path / "in").select()
    with pytest.raises(SchemaMismatchError, match=r"two rounds, got 1 \(node 0, train, cat, index"):
        animate(pictures, tmp_path / "a.gif")
    with pytest.raises(SchemaMismatchError, match=r"expected a name ending in \.gif, \.webp"):
        animate(pictures, tmp_path / "a.png")
    make(tmp_path / "in", [key(), key(round=2)])
    (tmp_path / "in" / image_name(key(round=2))).write_bytes(b"")
    with pytest.raises(DamagedDataError, match=r"node_0_train_dog_0_r2\.png is damaged"):
        animate(ImageFolder.scan(tmp_path / "in").select(), tmp_path / "a.gif")
    assert not (tmp_path / "a.gif").exists()


# The command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A store of the experiment vegas with two nodes and rounds, and pictures of its records."""
    monkeypatch.chdir(tmp_path)
    schema = Schema(SMALL.kind, SMALL.tensors, granule=4, metadata=Metadata(experiment="vegas"))
    store = EmbeddingStore.create("embeddings.zarr", schema)
    nodes: tuple[str | int, ...] = (0, "server")
    for node, number in itertools.product(nodes, (1, 5)):
        fill(store, node=node, round=number)
    (tmp_path / "output_images").mkdir()
    return make(tmp_path / "output_images" / "vegas", store.select().keys())


def run(*args):
    return CliRunner().invoke(group, ["sheet", *map(str, args)])


def test_sheet_as_it_stands(folder):
    result = run()
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "sheet.png: 2 rows, 2 columns, 4 pictures, 0 missing",
        "one picture for each cell, of 24: node 0, train, index 0",
    ]
    found = check_grid("sheet.png", folder, ["cat", "dog"], [1, 5],
                       lambda k: k.class_name, lambda k: k.round)  # fmt: skip
    assert {(k.node, k.index) for k in found} == {("0", 0)}


def test_sheet_of_chosen_keys_and_records(folder):
    options = ["--rows", "node", "--columns", "class,index", "--round", 5, "--output", "a.jpg"]
    result = run(*options, "--thumbnail", 40, "--title", "round five")
    assert result.output == "a.jpg: 2 rows, 6 columns, 12 pictures, 0 missing\n"
    result = run("--sample-id", "train_2", "--node", "server", "--input-dir", "output_images/vegas")
    assert "4 pictures, 0 missing" in result.output
    assert {k.index for k in cells_of("sheet.png", folder)} == {2}


def test_sheet_animates(folder):
    result = run("--animate", "--class", "dog", "--node", "server")
    assert result.output == "sheet.gif: dog, rounds 1, 5\n"
    assert len(list(frames_of("sheet.gif"))) == 2


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--rows", "clas"], 2, "expected some of node, round, split, class, index"),
        (["--thumbnail", 5], 2, "32<=x<=1024"),
        (["--rows", "round"], 1, "error: expected other keys for columns than for rows, got round"),
        (["--output", "a.txt"], 1, "error: a.txt: expected a name ending in .png"),
        (["--output", "a.png", "--animate"], 1, "expected a name ending in .gif, .webp"),
        (["--input-dir", "no"], 1, "error: no folder of pictures at no"),
        (
            ["--round", 9],
            1,
            "error: no round 9 in output_images/vegas; the nearest: 5; there are 1, 5",
        ),
        (
            ["--sample-id", "x"],
            1,
            "error: no sample id x in embeddings.zarr, commit 4; there are train_0",
        ),
        (["--round", 1, "--animate"], 1, "error: an animation needs pictures of two rounds"),
    ],
)
def test_mistakes_are_one_line(folder, options, code, words):
    result = run(*options)
    assert result.exit_code == code
    assert re.search(re.escape(words), result.output.splitlines()[-1])
