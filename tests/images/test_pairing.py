"""Samples of several rounds are paired by what they are, not by their place in a shuffled pass."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, drives_chromium, empty_page
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import expect

from fedgfe_store import EmbeddingStore
from fedgfe_store.analysis import centroids, drift
from fedgfe_store.images.arrange import Sheet, arrange
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.gallery import make_gallery
from fedgfe_store.images.pairing import sample_numbers
from fedgfe_store.images.png import write_png
from fedgfe_store.images.sheet import animate
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

FILES = 8
ROUNDS = (1, 5, 10)
CLASSES = ("cat", "dog")


def key(round: int, index: int, class_name: str = "dog", node: str = "0") -> RecordKey:
    return RecordKey(node, round, "train", class_name, index)


def shuffled(rounds: tuple[int, ...] = ROUNDS, files: int = FILES) -> dict[RecordKey, str]:
    """Give the file of each record, as a loader that shuffles numbers them in every round."""
    found: dict[Any, str] = {}
    rng = random.Random(3)
    for round_ in rounds:
        for class_name in CLASSES:
            names = [f"{class_name}/{number}.wav" for number in range(files)]
            rng.shuffle(names)
            found |= {key(round_, i, class_name): name for i, name in enumerate(names)}
    return found


def draw(folder: Path, records: dict[RecordKey, str]) -> dict[str, str]:
    """Make a picture of each record; returns the sample of each file."""
    folder.mkdir(exist_ok=True)
    lines = []
    for each, file_id in records.items():
        known = {"file_id": file_id} if file_id else {}
        line = {"key": key_json(each), **known, "image": 0, "settings": {"width": 4, "height": 4}}
        write_png(folder / image_name(each), np.full((4, 4, 3), each.index, np.uint8), line)
        lines.append(json.dumps({"file": image_name(each), **line}))
    (folder / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return {image_name(each): file_id for each, file_id in records.items()}


def lines_of(sheet: Sheet) -> list[list[str]]:
    """Give the names of the pictures of each row."""
    return [
        [
            sheet.cells[row, column].file.name
            for column in sheet.columns
            if (row, column) in sheet.cells
        ]
        for row in sheet.rows
    ]


def test_a_sheet_shows_one_file_over_the_rounds(tmp_path: Path) -> None:
    sample = draw(tmp_path, shuffled())
    rows = lines_of(arrange(ImageFolder.scan(tmp_path).select()))
    assert [len(row) for row in rows] == [len(ROUNDS)] * len(CLASSES)
    assert all(len({sample[name] for name in row}) == 1 for row in rows)


def test_rows_by_index_are_the_samples_of_the_first_round(tmp_path: Path) -> None:
    sample = draw(tmp_path, shuffled())
    sheet = arrange(ImageFolder.scan(tmp_path).select(class_name="dog"), rows=["index"])
    rows = lines_of(sheet)
    assert [len(row) for row in rows] == [len(ROUNDS)] * FILES
    assert all(len({sample[name] for name in row}) == 1 for row in rows)
    assert [row[0] for row in rows] == [image_name(key(1, i)) for i in range(FILES)]
    assert sheet.rows == tuple((i,) for i in range(FILES))


def test_an_animation_is_of_one_file(tmp_path: Path) -> None:
    sample = draw(tmp_path, shuffled())
    shown = animate(ImageFolder.scan(tmp_path).select(class_name="dog"), tmp_path / "dog.gif")
    assert [picture.key.value("round") for picture in shown] == list(ROUNDS)
    assert len({sample[picture.file.name] for picture in shown}) == 1


def test_what_differs_in_index_is_not_said_to_be_of_one_index(tmp_path: Path) -> None:
    draw(tmp_path, {key(1, 0): "a", key(5, 3): "a", key(5, 0): "b"})
    sheet = arrange(ImageFolder.scan(tmp_path).select())
    (row,) = lines_of(sheet)
    assert row == [image_name(key(1, 0)), image_name(key(5, 3))]
    assert "index" not in sheet.title
    assert [sheet.caption(p) for p in sheet.cells.values()] == ["index 0", "index 3"]


def pairs(folder: Path, left: int, right: int) -> set[tuple[str, str]]:
    """Pair two rounds' pictures as the gallery's page does."""
    text = make_gallery(folder).page.read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    rounds = data["values"]["round"]
    names = {
        wanted: {
            tuple(data[n][i] for n in ("node", "split", "class", "sample", "image")): data["file"][
                i
            ]
            for i in range(len(data["file"]))
            if rounds[data["round"][i]] == wanted
        }
        for wanted in (left, right)
    }
    return {(name, names[right][at]) for at, name in names[left].items() if at in names[right]}


def test_the_gallery_compares_the_same_files(tmp_path: Path) -> None:
    sample = draw(tmp_path, shuffled())
    for left, right in [(1, 5), (5, 10), (1, 10)]:
        found = pairs(tmp_path, left, right)
        assert len(found) == FILES * len(CLASSES)
        assert all(sample[one] == sample[other] for one, other in found)


@drives_chromium
def test_the_page_shows_the_same_files_side_by_side(tmp_path: Path) -> None:
    sample = draw(tmp_path, shuffled())
    page_file = make_gallery(tmp_path).page
    with chromium() as browser, empty_page(browser) as watched:
        page = watched.open(page_file)
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#status")).to_have_text(f"{FILES * len(CLASSES)} pairs")
        cells = page.locator(".cell").evaluate_all(
            "all => all.map(c => [...c.querySelectorAll('img')].map(i => i.src))"
        )
    names = [[Path(source).with_suffix(".png").name for source in cell] for cell in cells]
    assert names
    assert all(sample[one] == sample[other] for one, other in names)


def test_a_sample_that_is_not_in_a_round_has_no_partner_there(tmp_path: Path) -> None:
    draw(tmp_path, {key(1, 0): "a", key(1, 1): "b", key(5, 0): "b", key(5, 1): "c"})
    assert pairs(tmp_path, 1, 5) == {(image_name(key(1, 1)), image_name(key(5, 0)))}


@pytest.mark.parametrize("known", [(), (1,), (5,)])
def test_where_one_does_not_say_its_file_the_index_counts(tmp_path: Path, known) -> None:
    records = {each: f if each.round in known else "" for each, f in shuffled((1, 5)).items()}
    draw(tmp_path, records)
    expected = {
        (image_name(k), image_name(key(5, k.index, k.class_name))) for k in records if k.round == 1
    }
    assert pairs(tmp_path, 1, 5) == expected


def test_a_picture_itself_says_what_file_it_is_of(tmp_path: Path) -> None:
    sample = draw(tmp_path, {key(1, 0): "a/b.wav", key(1, 1): ""})
    (tmp_path / "manifest.jsonl").unlink()
    assert {p.file.name: p.file_id for p in ImageFolder.scan(tmp_path).select()} == sample


def test_drift_by_sample_compares_a_file_with_itself(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    records = shuffled((1, 5))
    for round_ in (1, 5):
        own = {k: file for k, file in records.items() if k.round == round_}
        clip = np.zeros((len(own), 4), np.float32)
        clip[:, 0] = [10 * CLASSES.index(k.class_name) + int(f[4]) for k, f in own.items()]
        with store.append(node=0, round=round_) as batch:
            batch.add(
                split="train",
                class_name=[k.class_name for k in own],
                index=[k.index for k in own],
                file_id=list(own.values()),
                t5=np.zeros((len(own), 3, 8), np.float32),
                clip=clip + (0 if round_ == 1 else 0.5),
            )
    by = ("round", "class_name", "index")
    moved = drift(centroids(store.select(), by, column="clip"))
    assert moved["index"].tolist() == [*range(FILES)] * len(CLASSES)
    np.testing.assert_allclose(moved["l2"], 1.0)
    first = centroids(store.select(round=1), by, column="clip")["centroid"].to_numpy()
    expected = store.select(round=1).read("clip")
    assert sorted(map(tuple, first)) == sorted(map(tuple, expected))


RECORDS = st.dictionaries(
    st.builds(key, st.integers(0, 3), st.integers(0, 6), st.sampled_from(CLASSES)),
    st.sampled_from(["", "", "a", "b", "c", "d"]),
)


@given(RECORDS)
def test_numbers_pair_equal_files_and_no_others(records: dict[RecordKey, str]) -> None:
    keys = list(records)
    numbers = dict(zip(keys, sample_numbers(keys, list(records.values())), strict=True))
    assert len({(k.round, k.class_name, n) for k, n in numbers.items()}) == len(keys)
    for one in keys:
        for other in keys:
            if one.class_name == other.class_name and numbers[one] == numbers[other]:
                both = records[one] and records[other]
                assert records[one] == records[other] if both else True
    # A file that is once in each of two rounds has one number in both.
    for each, file_id in records.items():
        twins = [k for k, f in records.items() if f == file_id and k.class_name == each.class_name]
        if file_id and len({k.round for k in twins}) == len(twins):
            assert len({numbers[k] for k in twins}) == 1
    # What does not depend on the order that they are given in.
    back = dict(
        zip(keys[::-1], sample_numbers(keys[::-1], list(records.values())[::-1]), strict=True)
    )
    assert back == numbers
    assert sample_numbers(keys, [""] * len(keys)) == [k.index for k in keys]
