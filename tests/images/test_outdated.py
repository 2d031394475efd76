"""Pictures whose record was deleted or replaced are marked and counted, whoever looks at them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import fill, values
from PIL import Image

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.generation.settings import Settings, fingerprint, settings_json
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.gallery import make_gallery
from fedgfe_store.images.manifest import Manifest
from fedgfe_store.images.png import write_png
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name, key_json

SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=32, width=32)


def make(store: EmbeddingStore, folder: Path, /, *, listed: bool = True, **changes: object) -> None:
    """Make an image of each record as a run would, without one."""
    folder.mkdir(parents=True, exist_ok=True)
    selection = store.select()
    with Manifest(folder) as manifest:
        for key, (_, row) in zip(selection.keys(), selection.records.iterrows(), strict=True):
            provenance = {
                "key": key_json(key),
                "image": 0,
                "digests": {c: row[f"{c}_digest"] for c in ("t5", "clip")},
                "settings": settings_json(SETTINGS),
                "fingerprint": fingerprint(SETTINGS),
                "commit": store.commit,
                "store": str(store.path.resolve()),
                **changes,
            }
            write_png(folder / image_name(key), np.full((32, 32, 3), 99, np.uint8), provenance)
            if listed:
                line = {"file": image_name(key), **provenance, "created": "2026-01-22T12:00:00"}
                manifest.append(line)


def replace_one(store: EmbeddingStore) -> None:
    """Give cat 0 of node 0 and round 5 another embedding."""
    tensors = {name: array[0] for name, array in values(1, seed=77).items()}
    with store.append(node=0, round=5, if_exists="replace") as batch:
        batch.add(split="train", class_name="cat", index=0, **tensors)


def run(store: EmbeddingStore, folder: Path, *words: str, named: str = "input") -> Result:
    options = ["--store", str(store.path), *words, f"--{named}-dir", str(folder)]
    result = CliRunner().invoke(group, options)
    assert result.exit_code == 0, result.output
    return result


def content(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found
    return json.loads(found[1])


@pytest.fixture(params=[True, False], ids=["listed", "unlisted"])
def folder(request: pytest.FixtureRequest, store: EmbeddingStore, tmp_path: Path) -> Path:
    """Images of six records: dog 0 was deleted since, cat 0 replaced."""
    fill(store, node=0, round=5)
    make(store, tmp_path / "images", listed=request.param)
    store.delete(class_name="dog", index=0)
    replace_one(store)
    return tmp_path / "images"


MARKS = {
    "node_0_train_dog_0_r5.png": "record deleted",
    "node_0_train_cat_0_r5.png": "embedding changed",
}


def test_the_gallery_marks_them(store: EmbeddingStore, folder: Path) -> None:
    result = run(store, folder, "gallery")
    shown = content(folder / "gallery.html")
    marked = {file: mark for file, mark in zip(shown["file"], shown["mark"], strict=True) if mark}
    assert marked == MARKS
    assert result.stdout.endswith("\nout of date: 1 embedding changed, 1 record deleted\n")
    assert make_gallery(folder, store=store).outdated == dict.fromkeys(MARKS.values(), 1)


def test_the_sheet_marks_them(store: EmbeddingStore, folder: Path, tmp_path: Path) -> None:
    marks = {p.file.name: p.mark for p in ImageFolder.scan(folder).select(store=store) if p.mark}
    assert marks == MARKS
    output = str(tmp_path / "a.png")
    layout = ["--rows", "class", "--columns", "index", "--output", output]
    result = run(store, folder, "sheet", *layout)
    assert result.stdout.endswith("\nout of date: 1 embedding changed, 1 record deleted\n")
    red = (190, 40, 40)
    with Image.open(output) as image:
        framed = (np.asarray(image) == red).all(axis=2)
    # Two pixels around each of two cells of 128 pixels, and words beside.
    assert framed.sum() >= 2 * (128**2 - 124**2)
    plain = run(store, folder, "sheet", "--class", "dog", "--index", "1", "--output", output)
    assert "out of date" not in plain.stdout
    with Image.open(output) as image:
        assert not (np.asarray(image) == red).all(axis=2).any()


def test_an_animation_marks_them(store: EmbeddingStore, tmp_path: Path) -> None:
    for number in (1, 2):
        fill(store, node=0, round=number, classes="dog", n=1)
    make(store, tmp_path / "images")
    store.delete(round=2)
    output = str(tmp_path / "a.gif")
    result = run(store, tmp_path / "images", "sheet", "--animate", "--output", output)
    assert result.stdout.endswith("\nout of date: 1 record deleted\n")


def test_status_counts_them(store: EmbeddingStore, folder: Path) -> None:
    status = image_status(store.select(), folder)
    assert status.totals == {"done": 4, "missing": 0, "stale": 1, "failed": 0, "all": 5}
    assert [image.name for image in status.deleted] == ["node_0_train_dog_0_r5.png"]
    output = run(store, folder, "status", named="output").stdout
    assert "\ndeleted: 1 image in the folder of records that are deleted (--deleted lists" in output
    assert "stale: 1 image: embedding changed" in output
    listed = run(store, folder, "status", "--deleted", "--format", "csv", named="output").stdout
    assert listed.splitlines() == [
        "node,round,split,class_name,index,image,file",
        "0,5,train,dog,0,0,node_0_train_dog_0_r5.png",
    ]
    assert (
        "node_0_train_dog_0_r5.png"
        in run(store, folder, "status", "--deleted", named="output").stdout
    )
    # Filters leave records out, but do not delete them.
    for selection in (store.select(class_name="dog"), store.select(round=9)):
        assert len(image_status(selection, folder).deleted) == 1
    (folder / "node_0_train_dog_0_r5.png").unlink()
    assert image_status(store.select(), folder).deleted == ()


def test_records_of_later_commits_are_not_deleted_ones(store: EmbeddingStore, folder: Path) -> None:
    fill(store, node=1, round=6)
    make(store, folder)
    before = EmbeddingStore.open(store.path, as_of=1)
    assert image_status(before.select(), folder).deleted == ()


def test_without_a_store_nothing_is_marked(
    store: EmbeddingStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.path.rename(tmp_path / "gone.zarr")
    monkeypatch.chdir(tmp_path)
    for command in (["gallery"], ["sheet"]):
        result = CliRunner().invoke(group, [*command, "--input-dir", str(folder)])
        assert result.exit_code == 0, result.output
        assert "out of date" not in result.output
    assert "mark" not in content(folder / "gallery.html")


def test_pictures_of_another_store_are_not_compared(store: EmbeddingStore, tmp_path: Path) -> None:
    first = Schema.flux(3, width=8, clip=(4,), granule=4, metadata=Metadata(experiment="first"))
    ours = EmbeddingStore.create(tmp_path / "first.zarr", first)
    fill(ours, node=1, round=5)
    fill(store, node=0, round=5)
    make(store, tmp_path / "named", experiment="second")
    make(store, tmp_path / "older")
    for folder in (tmp_path / "named", tmp_path / "older"):
        assert {p.mark for p in ImageFolder.scan(folder).select(store=ours)} == {""}
    make(ours, tmp_path / "ours", experiment="first", store="/elsewhere")
    ours.delete(class_name="dog")
    assert [p.mark for p in ImageFolder.scan(tmp_path / "ours").select(store=ours)] == [""] * 3 + [
        "record deleted"
    ] * 3


def test_a_store_that_cannot_be_read_is_a_note(store: EmbeddingStore, folder: Path) -> None:
    (store.path / "zarr.json").write_text("{")
    result = run(store, folder, "gallery")
    assert "note: the pictures are not compared with the store: " in result.stderr
