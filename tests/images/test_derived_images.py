"""Pictures of means and walks beside those of records: sheets, animations, filters, the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_sheets import cells_of, frames_of, key, make

from fedgfe_store.cli.main import group
from fedgfe_store.derived_keys import Key, MeanKey, WalkKey
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.arrange import arrange
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.gallery.page import page_data
from fedgfe_store.images.sheet import animate, save_sheet
from fedgfe_store.names import image_name

RECORDS: list[Key] = [key("server", r, "test", c) for r in (1, 20) for c in ("cat", "dog")]
MEANS: list[Key] = [
    MeanKey((("round", r), ("class_name", c))) for r in (1, 20) for c in ("cat", "dog")
]
ENDS = key("server", 20, "test", "dog"), key("server", 20, "test", "cat")
WALK: list[Key] = [WalkKey(*ENDS, "slerp", 11, frame) for frame in range(11)]


def run(*args: object) -> str:
    result = CliRunner().invoke(group, ["sheet", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_walk_is_a_row_of_frames_in_their_order(tmp_path: Path) -> None:
    colours = make(tmp_path / "in", [*WALK, *RECORDS])
    sheet = arrange(ImageFolder.scan(tmp_path / "in").select(), rows=["derived"], columns=["frame"])
    assert sheet.rows == (("walk dog to cat, slerp, 11 frames",),)
    assert sheet.columns == tuple((frame,) for frame in range(11))
    assert sheet.title == "server, round 20, test, dog to cat, index 0"
    save_sheet(sheet, tmp_path / "sheet.png", thumbnail=64)
    found = cells_of(tmp_path / "sheet.png", colours)
    assert sorted(found, key=lambda each: found[each][0]) == WALK


def test_means_fill_the_sheet_of_classes_and_rounds(tmp_path: Path) -> None:
    make(tmp_path / "in", MEANS)
    sheet = arrange(ImageFolder.scan(tmp_path / "in").select())
    assert (sheet.rows, sheet.columns, sheet.missing) == ((("cat",), ("dog",)), ((1,), (20,)), 0)
    assert sheet.title == "mean"
    make(tmp_path / "both", [*MEANS, *RECORDS])
    mixed = arrange(ImageFolder.scan(tmp_path / "both").select())
    assert {image.key for image in mixed.cells.values()} == set(RECORDS)
    apart = arrange(ImageFolder.scan(tmp_path / "both").select(), columns=["derived", "round"])
    assert {image.key for image in apart.cells.values()} == {*RECORDS, *MEANS}


def test_an_animation_goes_over_the_frames_of_a_walk(tmp_path: Path) -> None:
    colours = make(tmp_path / "in", [*WALK, *RECORDS])
    images = ImageFolder.scan(tmp_path / "in").select()
    shown = animate(images, tmp_path / "walk.gif", over="frame", thumbnail=64)
    assert [image.key for image in shown] == WALK
    for (pixels, _), each in zip(frames_of(tmp_path / "walk.gif"), WALK, strict=True):
        middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
        assert np.abs(middle - colours[each]).max() < 12
    (tmp_path / "in" / image_name(WALK[3])).unlink()
    alone = [image for image in images if image.key in (WALK[0], RECORDS[0])]
    with pytest.raises(SchemaMismatchError, match="two frames, got 1 .walk dog to cat, .* frame 0"):
        animate(alone, tmp_path / "one.gif", over="frame")
    with pytest.raises(SchemaMismatchError, match="at least one picture of a walk, got none"):
        arrange([image for image in images if image.key in RECORDS], columns=["frame"])


def test_the_command_shows_walks_where_there_is_nothing_else_or_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "walks", WALK)
    make(tmp_path / "all", [*WALK, *RECORDS, *MEANS])
    assert "1 row, 11 columns, 11 pictures, 0 missing" in run("--input-dir", "walks")
    assert "2 rows, 2 columns, 4 pictures, 0 missing" in run("--input-dir", "all")
    asked = run("--input-dir", "all", "--columns", "frame", "--node", "server", "--round", 20)
    assert "1 row, 11 columns, 11 pictures, 0 missing" in asked
    told = run("--input-dir", "walks", "--animate", "--output", "walk.webp")
    assert told.startswith("walk.webp: dog to cat, frames 0, 1, 2, ")
    with Image.open("walk.webp") as moving:
        assert getattr(moving, "n_frames", 1) == 11


def test_filters_choose_derived_pictures_by_what_their_sources_share(tmp_path: Path) -> None:
    make(tmp_path / "in", [*WALK, *MEANS, *RECORDS])
    folder = ImageFolder.scan(tmp_path / "in")

    def found(**filters: object) -> set[Key]:
        return {image.key for image in folder.select(**filters)}  # type: ignore[arg-type]

    assert found(class_name="dog", round=20) == {RECORDS[3], MEANS[3]}
    assert found(node="server") == {*RECORDS, *WALK}
    assert [image.key for image in folder.select()] == [*sorted(RECORDS, key=str), *MEANS, *WALK]


def test_the_page_has_values_of_their_own_for_derived_pictures(tmp_path: Path) -> None:
    make(tmp_path / "in", [*WALK, *MEANS, *RECORDS])
    data = page_data(ImageFolder.scan(tmp_path / "in").select(), {tmp_path / "in": "in"})
    values = data["values"]
    assert values["node"] == ["server", "several"]
    assert values["round"] == [1, 20]
    assert values["class"] == ["cat", "dog", "dog to cat"]
    classes = [values["class"][place] for place in data["class"]]
    rows = zip(classes, data["index"], data["own"]["derived"], strict=True)
    walks = [(index, said) for name, index, said in rows if name == "dog to cat"]
    assert [index for index, _ in walks] == [f"frame {n}" for n in range(11)]
    assert walks[3][1].endswith("11 frames (server, round 20, test, index 0): frame 3")
    names = ("node", "split", "class", "sample", "round")
    pairs = zip(*(data[name] for name in names), strict=True)
    assert len(set(pairs)) == len(data["file"])
