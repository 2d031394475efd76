"""Images of other programs: found by their names, told apart, and never taken for ours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import fill
from PIL import Image

from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.arrange import arrange
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.foreign import PictureNames
from fedgfe_store.images.png import write_png
from fedgfe_store.images.scoring import selected_images
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

CLASSES = ["dog", "cat", "rail_transport", "transport"]


def told(names, name):
    found = names.read(name)
    return found and (found.key, found.number, found.lacking)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("round_5_node_3_x_dog_test_7.png", RecordKey("3", 5, "test", "dog", 7)),
        ("round_5_server_x_dog_train_0.png", RecordKey("server", 5, "train", "dog", 0)),
        ("round_5_node_3_my_base_cat_val_7.png", RecordKey("3", 5, "val", "cat", 7)),
        ("round_12_node_a_x_rail_transport_test_1.png",
         RecordKey("a", 12, "test", "rail_transport", 1)),
        ("node_0_train_dog_0_r5.png", RecordKey("0", 5, "train", "dog", 0)),
        ("server_test_rail_transport_10_r5.png",
         RecordKey("server", 5, "test", "rail_transport", 10)),
    ],
)  # fmt: skip
def test_names_of_fedgfe_tell_the_record(name, key):
    assert told(PictureNames.of(classes=CLASSES), name) == (key, 0, ())


def test_what_a_name_does_not_tell_is_lacking():
    names = PictureNames.of([r"(?P<class>[a-z]+)-(?P<round>\d+)(?:-(?P<image>\d+))?"])
    blank = RecordKey("unknown", 5, "unknown", "dog", 0)
    assert told(names, "dog-5.png") == (blank, 0, ("node", "split", "index"))
    assert told(names, "dog-5-2.png") == (blank, 2, ("node", "split", "index"))
    assert told(names, "round_5_node_3_img_dog_7.png") == (
        RecordKey("3", 5, "unknown", "dog", 7), 0, ("split",)
    )  # fmt: skip
    for name in ("holiday.png", "dog-five.png", f"dog-{'9' * 30}.png"):
        assert names.read(name) is None
    # Without known classes the base is one word.
    of_any = PictureNames.of().read("round_1_node_2_base_two_words_test_0.png")
    assert of_any is not None
    assert of_any.key.class_name == "two_words"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "pattern: expected a regular expression, got '\\('"),
        (r"\d+", "expected named groups .* of node, round, split, class, index, image, got none"),
        (r"(?P<klass>.+)", "got klass in"),
    ],
)
def test_a_wrong_pattern_is_named(pattern, words):
    with pytest.raises(SchemaMismatchError, match=words):
        PictureNames.of([pattern])


@pytest.fixture
def folder(tmp_path, store):
    """Pictures of training over three rounds, one of ours, one of nobody, and a torn one."""
    out = tmp_path / "out"
    out.mkdir()
    for number in (1, 5):
        fill(store, node=0, round=number)
    for number, name, at in itertools.product((1, 5, 9), ("dog", "cat"), range(2)):
        pixels = np.full((24, 32, 3), number * 20 + at, np.uint8)
        Image.fromarray(pixels).save(out / f"round_{number}_node_0_x_{name}_train_{at}.png")
    ours = RecordKey("0", 1, "train", "dog", 2)
    facts = {"key": key_json(ours), "image": 0, "settings": {"width": 32, "height": 24}}
    write_png(out / image_name(ours), np.zeros((24, 32, 3), np.uint8), facts)
    Image.new("RGB", (8, 8)).save(out / "holiday.png")
    (out / "round_1_node_0_x_dog_train_8.png").write_bytes(b"\x89PNG")
    return out


def test_they_are_records_beside_ours(folder, store):
    records = ImageFolder.scan(folder).records
    assert records["holiday.png"] == "says nothing about a record"
    assert records["round_1_node_0_x_dog_train_8.png"] == "damaged"
    found = ImageFolder.scan(folder).select(store=store)
    assert len(found) == 13
    assert [(i.key.value("round"), i.is_foreign) for i in found if not i.is_foreign] == [(1, False)]
    foreign = [image for image in found if image.is_foreign]
    assert {(i.size, i.remark, i.mark) for i in foreign} == {((32, 24), "of another program", "")}
    sheet = arrange(foreign, rows=["class_name"], columns=["round"])
    assert (sheet.rows, sheet.columns) == ((("cat",), ("dog",)), ((1,), (5,), (9,)))
    assert {sheet.caption(image) for image in sheet.cells.values()} == {"of another program"}


def test_they_are_neither_done_nor_in_the_way(folder, store):
    selection = store.select(round=5)
    Image.new("RGB", (8, 8)).save(folder / image_name(RecordKey("0", 5, "train", "dog", 0)))
    status = image_status(selection, folder)
    assert (status.totals["done"], status.totals["stale"]) == (0, 1)
    assert status.frame.query("status == 'stale'").reason.tolist() == ["not made by fedgfe-store"]
    assert status.deleted == ()


def test_a_score_takes_those_whose_names_fit(folder, store):
    names = {i.name for i in selected_images(store.select(round=[1, 5]), folder).images}
    assert len(names) == 9  # eight of training, and ours; round 9 is not in the store
    Image.new("RGB", (8, 8)).save(folder / "cat-5.png")
    Image.new("RGB", (8, 8)).save(folder / "bird-5.png")
    pattern = [r"(?P<class>[a-z]+)-(?P<round>\d+)"]
    found = selected_images(store.select(round=5), folder, patterns=pattern)
    assert [i.name for i in found.images if i.lacking] == ["cat-5.png"]


def test_commands_say_which_they_are(folder, store, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(group, ["--store", str(store.path), *map(str, arguments)])

    sheet = run("sheet", "--input-dir", folder, "--output", tmp_path / "a.png", "--round", "1,5")
    assert sheet.exit_code == 0, sheet.output
    assert "of another program: 4 pictures, by their names" in sheet.stdout
    page = tmp_path / "a.html"
    gallery = run("gallery", "--input-dir", folder, "--output", page, "-q")
    assert "of another program: 12 pictures, by their names" in gallery.stdout
    assert "of another program" in page.read_text()
    (folder / "dog@7.png").write_bytes((folder / "holiday.png").read_bytes())
    gallery = run(
        "gallery",
        "--input-dir",
        folder,
        "--output",
        page,
        "--pattern",
        r"(?P<class>\w+)@(?P<round>\d+)",
    )
    assert "of another program: 13 pictures" in gallery.stdout
    wrong = run("gallery", "--input-dir", folder, "--pattern", "(")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: pattern: expected a regular expression")
