"""Image files: names that never clash, files that are whole or not there."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from processes import finished, started

from fedgfe_store.images import png
from fedgfe_store.images.folder import file_stamp
from fedgfe_store.images.png import (
    inspect_image,
    read_provenance,
    remove_stale_temps,
    write_png,
    writer_is_gone,
    writer_token,
)
from fedgfe_store.names import image_name, image_names
from fedgfe_store.records import KEY_COLUMNS, RecordKey

GUIDE_NAME = re.compile(r"(?:node_([^_]+)|server)_([^_]+)_(.+)_(\d+)_r(\d+)(?:_i(\d+))?\.png")
UNSAFE_CLASSES = [
    "fate/apocrypha",
    "../../x",
    "a:b",
    "tab\there",
    "line\nbreak",
    "dot.",
    "space ",
    "CON",
    "x" * 400,
    "",
    ".",
    "..",
    "münchen",
    "mu\u0308nchen",
    "🐶",
    "a\\b",
    "nul\0",
    "a*?<>|b",
]
PROVENANCE = {"settings": {"width": 5, "height": 3}, "key": {"class_name": "dög"}}
PIXELS = np.arange(45, dtype=np.uint8).reshape(3, 5, 3)

fields = st.text(alphabet="abAB_0r5i1h-./ üÜ\u0308", max_size=6)
keys = st.builds(
    RecordKey,
    node=st.one_of(st.sampled_from(["0", "server", "node", "0_train"]), fields),
    round=st.integers(0, 12),
    split=st.one_of(st.just("train"), fields),
    class_name=st.one_of(
        st.sampled_from(["dog", "Dog", "con", "dog_0_r5", *UNSAFE_CLASSES]), fields
    ),
    index=st.integers(0, 12),
)


def key(**changes: Any) -> RecordKey:
    plain = {"node": "0", "round": 5, "split": "train", "class_name": "dog", "index": 0}
    return RecordKey(**{**plain, **changes})


def test_names_are_those_of_the_guide() -> None:
    assert image_name(key()) == "node_0_train_dog_0_r5.png"
    assert image_name(key(node="server")) == "server_train_dog_0_r5.png"
    assert image_name(key(class_name="baby_cry", index=12)) == "node_0_train_baby_cry_12_r5.png"
    assert image_name(key(), 1) == "node_0_train_dog_0_r5_i1.png"


@given(st.lists(st.tuples(keys, st.integers(0, 2)), unique=True, min_size=2, max_size=30))
@example([(key(node="server", split="a"), 0), (key(node="server_a", split="b"), 0)])
@example([(key(class_name="dog_0_r5"), 0), (key(class_name="dog"), 0)])
@example([(key(class_name="a/b"), 0), (key(class_name="a-b"), 0)])
@example([(key(class_name="Cat"), 0), (key(class_name="cat"), 0)])
@example([(key(node="A"), 0), (key(node="a"), 0)])
@example([(key(split="Train"), 1), (key(split="train"), 1)])
@example([(key(class_name="m\u00fcnchen"), 0), (key(class_name="mu\u0308nchen"), 0)])
@example([(key(class_name="a."), 0), (key(class_name="a"), 0), (key(class_name="a "), 0)])
def test_no_file_system_takes_two_keys_for_one(images: list[tuple[RecordKey, int]]) -> None:
    """One that ignores case, and folds Unicode's forms, as those of macOS, Windows and SMB do."""
    names = {unicodedata.normalize("NFD", image_name(*image)).casefold() for image in images}
    assert len(names) == len(images)


@given(keys, st.integers(0, 2))
def test_a_plain_name_reads_back_as_its_key(record: RecordKey, number: int) -> None:
    name = image_name(record, number)
    if re.search(r"_h[0-9a-f]{32}\.png$", name):
        return
    match = GUIDE_NAME.fullmatch(name)
    assert match is not None, name
    node, split, class_name, index, round_number, image = match.groups()
    assert RecordKey(node or "server", int(round_number), split, class_name, int(index)) == record
    assert int(image or 0) == number


large = st.sampled_from([0, 7, 2**31 - 1, 2**63 - 1])


@given(
    st.lists(
        st.one_of(
            keys,
            st.builds(
                RecordKey,
                node=st.sampled_from(["server", "0", "n" * 60]),
                round=large,
                split=st.sampled_from(["train", "s" * 60]),
                class_name=st.sampled_from(["dog", "c" * 30, "c" * 90, "a_r5_i1"]),
                index=large,
            ),
        ),
        max_size=30,
    ),
    st.lists(large, max_size=3),
)
def test_many_names_at_once_are_the_same(records: list[RecordKey], numbers: list[int]) -> None:
    columns = {name: [record.value(name) for record in records] for name in KEY_COLUMNS}
    assert list(image_names(columns, numbers)) == [
        image_name(record, number) for record in records for number in numbers
    ]


@pytest.mark.parametrize("class_name", UNSAFE_CLASSES)
def test_any_class_makes_a_name_that_every_file_system_takes(class_name: str) -> None:
    for record in (key(class_name=class_name), key(node=class_name), key(split=class_name)):
        name = image_name(record)
        assert re.fullmatch(r"[A-Za-z0-9._-]+\.png", name)
        assert len(name.encode()) <= 200
        # So it is no device of Windows, whose names count without what follows a dot.
        assert name.startswith(("node_", "server_"))
        assert unicodedata.normalize("NFC", name) == name


def test_a_name_is_the_same_in_every_process() -> None:
    assert image_name(key(class_name="a/b")) == (
        "node_0_train_a-b_0_r5_h" + image_name(key(class_name="a/b"))[-36:]
    )
    code = (
        "from fedgfe_store.names import image_name;"
        "from fedgfe_store.records import RecordKey;"
        "print(image_name(RecordKey('0', 5, 'train', 'a/b', 0)))"
    )
    outputs = {
        finished(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {image_name(key(class_name="a/b"))}


def test_a_picture_comes_back_with_its_provenance(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert write_png(path, PIXELS, PROVENANCE) == file_stamp(path)
    assert read_provenance(path) == PROVENANCE
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
        assert json.loads(image.info["fedgfe_store"]) == PROVENANCE
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("compressor", ["isal", "zlib"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (64, 1), (61, 37), (512, 256)])
def test_pillow_reads_what_was_written(
    monkeypatch: pytest.MonkeyPatch, compressor: str, shape: tuple[int, int]
) -> None:
    if compressor == "zlib":  # as where the other is not built for the processor
        monkeypatch.setattr(png, "isal_zlib", None)
    random = np.random.default_rng(3).integers(0, 256, (*shape, 3), np.uint8)
    smooth = np.tile(np.arange(shape[1], dtype=np.uint8)[None, :, None], (shape[0], 1, 3))
    # As a decoder may give it: another order in memory.
    for pixels in (random, smooth, random[::-1, :, ::-1]):
        data = png.png_bytes(pixels, PROVENANCE)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.mode, image.info) == ("RGB", {"fedgfe_store": json.dumps(PROVENANCE)})
            np.testing.assert_array_equal(np.asarray(image), pixels)
    assert len(png.png_bytes(smooth, {})) < smooth.size / 10 + 300


def test_no_cut_and_no_flipped_byte_of_an_image_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, PIXELS, PROVENANCE)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [bytes([*whole[:n], whole[n] ^ 1, *whole[n + 1 :]]) for n in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        assert inspect_image(path) == ("damaged", None)


def test_a_picture_of_another_size_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, PIXELS[:2], PROVENANCE)
    assert inspect_image(path) == ("damaged", None)


def test_a_foreign_picture_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    assert inspect_image(path) == ("foreign", None)
    path.write_bytes(b"")
    assert inspect_image(path) == ("damaged", None)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.png"
    write_png(path, PIXELS, PROVENANCE)
    before = path.read_bytes()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_png(path, PIXELS + 1, PROVENANCE)
    assert os.listdir(tmp_path) == ["a.png"]
    assert path.read_bytes() == before


KILLED_WRITER = """
import os, sys, time
import numpy as np
from pathlib import Path
from fedgfe_store.images.png import write_png
def slow(file):
    print("writing", flush=True)
    time.sleep(10**6)
os.fsync = slow
write_png(Path(sys.argv[1]), np.zeros((3, 5, 3), np.uint8), {"settings": {"width": 5, "height": 3}})
"""


@pytest.mark.kill
def test_a_killed_writer_leaves_only_a_temp_file_that_goes_next_time(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with started([sys.executable, "-c", KILLED_WRITER, path]) as process:
        assert process.line() == "writing"
        assert remove_stale_temps(tmp_path) == 0, "the writer lives"
        process.kill()
    assert not path.exists()
    assert len(os.listdir(tmp_path)) == 1
    assert remove_stale_temps(tmp_path) == 1
    assert os.listdir(tmp_path) == []


def test_a_process_of_another_user_lives_also_where_proc_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)  # and nothing of that number is in /proc
    assert not writer_is_gone(writer_token(), 2**30)


def test_temp_files_of_other_machines_go_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp = tmp_path / ".fedgfe-00000000-1-0.tmp"
    other = tmp_path / ".fedgfe-notes.tmp"
    temp.touch()
    other.touch()
    assert remove_stale_temps(tmp_path) == 0
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(temp, (two_days_ago, two_days_ago))
    os.utime(other, (two_days_ago, two_days_ago))
    assert remove_stale_temps(tmp_path) == 1
    assert os.listdir(tmp_path) == [other.name]
