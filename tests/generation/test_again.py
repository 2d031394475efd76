"""Several images a record, and making one picture again from its own metadata."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values
from generation_fakes import SIZE, FakePipeline, checksum, save_random_flux, save_random_sd
from pictures import provenance_of
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.images.png import write_png
from fedgfe_store.names import image_name

SETTINGS = {"steps": 2, "height": SIZE, "width": SIZE}


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=5)
    return store


def run(store: Path, *arguments: str) -> tuple[int, str]:
    command = ["--store", str(store), "generate", "--device", "cpu", *arguments]
    result = CliRunner().invoke(group, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def make(store: Path, flux: Path, folder: Path, *more: str) -> str:
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "2"]
    code, output = run(store, "--model", str(flux), *size, "--output-dir", str(folder), *more)
    assert code == 0, output
    return output


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_each_image_has_its_records_pair_and_a_seed_of_its_own(
    flux: Path, store: EmbeddingStore, tmp_path: Path, batch_size: int
) -> None:
    selection, pipeline = store.select(), FakePipeline(flux)
    options: dict[str, Any] = {**SETTINGS, "batch_size": batch_size, "images_per_record": 3}
    report = generate(selection, tmp_path / "out", pipeline=pipeline, **options)
    assert report.done == 30
    assert sum(pipeline.batch_sizes) == 30
    assert pipeline.batch_sizes[-1] == (30 - 1) % batch_size + 1
    t5, clip = selection.read("t5"), selection.read("clip")
    seeds = set()
    for row, key in enumerate(selection.keys()):
        for number in range(3):
            seed = seed_of(0, key, number)
            seeds.add(seed)
            expected = np.frombuffer(checksum(t5[row], clip[row], seed), np.uint8)
            assert (pixels(tmp_path / "out" / image_name(key, number)) == expected).all()
    assert len(seeds) == 30


def test_more_images_are_added_to_those_that_are_there(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    selection = store.select()
    for count, expected in ((1, 10), (3, 20), (2, 0)):
        options: dict[str, Any] = {**SETTINGS, "images_per_record": count}
        report = generate(selection, tmp_path, pipeline=FakePipeline(flux), **options)
        assert report.done == expected
    numbers = [line["image"] for line in read_manifest(tmp_path)]
    assert sorted(numbers) == [0] * 10 + [1] * 10 + [2] * 10


def test_a_picture_is_made_again_from_its_own_metadata(
    flux: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    more = ["--seed", "7", "--guidance", "2", "--images-per-record", "2", "--batch-size", "1"]
    make(store.path, flux, folder, *more)
    key = store.select().keys()[3]
    path = folder / image_name(key, 1)
    elsewhere = tmp_path / "a picture by mail.png"
    shutil.copy(path, elsewhere)
    expected, provenance = pixels(path), provenance_of(path)
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.png") if p != path}
    path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    # What comes by mail knows no way to its model.
    again = ["generate", "--model", str(flux), "--from-image", str(elsewhere)]
    result = CliRunner().invoke(group, [*again, "--output-dir", str(folder)])
    assert result.exit_code == 0, result.output
    assert "1 image rendered" in result.output
    np.testing.assert_array_equal(pixels(path), expected)
    made = provenance_of(path)
    for name in ("key", "image", "seed", "digests", "settings", "fingerprint"):
        assert made[name] == provenance[name]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_folder_names_no_place_of_the_machine_and_works_where_it_is_moved(
    flux: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder = tmp_path / "home", tmp_path / "home" / "out"
    shutil.copytree(store.path, home / "e.zarr")
    shutil.copytree(flux, home / "models" / "flux")
    keys = store.select().keys()
    (folder / image_name(keys[1])).mkdir(parents=True)  # cannot be written
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "1", "--index", "0-1"]
    model = ["--model", str(home / "models" / "flux"), "--output-dir", str(folder)]
    code, output = run(home / "e.zarr", *size, *model)
    assert (code, "cannot write" in output) == (3, True), output
    for made in (["gallery"], ["sheet", "--output", str(folder / "sheet.png")]):
        told = CliRunner().invoke(group, [*made, "--input-dir", str(folder)])
        assert told.exit_code == 0, told.output
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".png", ".jsonl", ".html", ".webp"}
    lines = list(read_manifest(folder))
    assert [line["error"] for line in lines if "error" in line] != []
    named = {(line["store"], line["model_folder"]) for line in lines if "store" in line}
    assert named == {("../e.zarr", "../models/flux")}
    for path in written:
        assert str(tmp_path).encode() not in path.read_bytes(), path

    moved = tmp_path / "moved"
    home.rename(moved)
    path = moved / "out" / image_name(keys[0])
    monkeypatch.chdir(tmp_path / "moved" / "models")
    again = ["generate", "--device", "cpu", "--from-image", str(path), "--output-dir", "again"]
    result = CliRunner().invoke(group, again)
    assert result.exit_code == 0, result.output
    assert f"records: 1 of {moved / 'e.zarr'}, commit 1" in result.output
    difference = pixels(Path("again") / path.name).astype(int) - pixels(path)
    assert np.abs(difference).max() <= 1

    # Pictures of earlier releases name absolute paths.
    old = provenance_of(path) | {
        "store": str(moved / "e.zarr"),
        "model_folder": str(moved / "models" / "flux"),
    }
    mailed = tmp_path / "old.png"
    write_png(mailed, pixels(path), old)
    result = CliRunner().invoke(group, [*again[:4], str(mailed), "--output-dir", "old"])
    assert result.exit_code == 0, result.output
    assert f"records: 1 of {moved / 'e.zarr'}, commit 1" in result.output


def test_making_a_picture_again_leaves_the_picture_alone(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    make(store.path, flux, tmp_path / "out")
    path = min((tmp_path / "out").glob("*.png"))
    before, expected = (path.stat().st_ino, path.read_bytes()), pixels(path)
    code, output = run(store.path, "--from-image", str(path))
    assert (code, "1 image rendered" in output) == (0, True), output
    assert "out of date" not in output
    assert (path.stat().st_ino, path.read_bytes()) == before
    again = tmp_path / "out" / "again" / path.name
    assert np.abs(pixels(again).astype(int) - expected).max() <= 1
    for target, more in ((again, []), (path, ["--output-dir", str(path.parent)])):
        before = target.stat().st_ino, target.read_bytes()
        code, output = run(store.path, "--from-image", str(path), *more)
        assert (code, f"{target} is there already" in output) == (1, True), output
        assert "--overwrite" in output
        assert "--images" in output
        assert (target.stat().st_ino, target.read_bytes()) == before


def test_a_picture_is_overwritten_where_that_is_asked_for(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    make(store.path, flux, tmp_path / "out")
    path = min((tmp_path / "out").glob("*.png"))
    before, expected = path.stat().st_ino, pixels(path)
    code, output = run(store.path, "--from-image", str(path), "--overwrite")
    assert (code, "1 image rendered" in output) == (0, True), output
    assert "1 image: 0 done, 0 missing, 1 to be made again\n" in output
    assert path.stat().st_ino != before
    assert np.abs(pixels(path).astype(int) - expected).max() <= 1
    code, output = run(store.path, "--overwrite")
    assert (code, "--overwrite goes with --from-image" in output) == (2, True), output


def test_the_store_in_reach_comes_before_the_one_that_the_picture_names(
    flux: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store.path, flux, tmp_path / "out")
    path = min((tmp_path / "out").glob("*.png"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copytree(store.path, "embeddings.zarr")
    again = ["generate", "--device", "cpu", "--from-image", str(path), "--output-dir"]
    result = CliRunner().invoke(group, [*again, "copy"])
    assert result.exit_code == 0, result.output
    assert "records: 1 of embeddings.zarr, commit 1" in result.output

    other = EmbeddingStore.create(here / "other.zarr", SMALL)
    fill(other, node=7, round=5)
    shutil.rmtree("embeddings.zarr")
    shutil.copytree(other.path, "embeddings.zarr")
    for given in ([], ["--store", "other.zarr"]):
        result = CliRunner().invoke(group, [*given, *again, f"named {len(given)}"])
        assert result.exit_code == 0, result.output
        assert f"records: 1 of {store.path}, commit 1" in result.output
        assert f"using {store.path} instead" in result.output

    shutil.rmtree(store.path)
    shutil.copytree(other.path, store.path)
    result = CliRunner().invoke(group, [*again, "none"])
    assert result.exit_code == 1
    assert "embeddings.zarr: expected a record node 0" in result.output
    assert f"{store.path}: expected a record node 0" in result.output
    assert not Path("none").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"key": {"node": 5}},
        {"key": None},
        {"image": "1"},
        {"digests": ["t5"]},
        {"commit": None},
        {"fingerprint": 5},
        {"store": 5, "commit": "x"},
        {"settings": {"width": SIZE, "height": SIZE, "steps": "2"}},
    ],
)
def test_metadata_of_the_wrong_kind_is_one_clear_line(
    flux: Path, store: EmbeddingStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    provenance = {
        "key": {"node": "0", "round": 5, "split": "train", "class_name": "dog", "index": 0},
        "image": 0,
        "settings": {"width": SIZE, "height": SIZE},
        **change,
    }
    path = tmp_path / "a.png"
    write_png(path, np.zeros((SIZE, SIZE, 3), np.uint8), provenance)
    code, output = run(store.path, "--from-image", str(path))
    assert (code, output.count("\n")) == (1, 1), output
    assert f"{path}: expected a picture that says how it was made" in output


def test_a_changed_record_is_taken_as_of_the_pictures_commit(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    make(store.path, flux, tmp_path / "out", "--batch-size", "1")
    path = min((tmp_path / "out").glob("*.png"))
    expected, key = pixels(path), provenance_of(path)["key"]
    with store.append(node=key["node"], round=key["round"], if_exists="replace") as batch:
        rest = {name: key[name] for name in ("split", "class_name", "index")}
        batch.add(**rest, **values(1, seed=99))
    code, output = run(store.path, "--from-image", str(path))
    assert code == 0
    assert "has changed since commit 1: using it as of then" in output
    np.testing.assert_array_equal(pixels(path.parent / "again" / path.name), expected)
    store.delete(node=0)
    store.compact()
    code, output = run(store.path, "--from-image", str(path), "--overwrite")
    assert code == 3
    assert "compacted away" in output


def test_what_cannot_be_made_again_says_why(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    make(store.path, flux, tmp_path / "out")
    path = min((tmp_path / "out").glob("*.png"))
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    fill(other, node=1, round=5)
    foreign = tmp_path / "foreign.png"
    Image.new("RGB", (8, 8)).save(foreign)
    trained = save_random_flux(tmp_path / "trained on", seed=1)
    cases = [
        ([str(tmp_path / "none.png")], 1, "expected a picture, got none"),
        ([str(foreign)], 1, "got one of another program"),
        ([str(path), "--steps", "9"], 2, "--from-image decides on --steps itself"),
        ([str(path), "--round", "5"], 2, "--from-image decides on --round itself"),
        ([str(path), "--model", str(trained)], 1, "cannot be made again: model"),
    ]
    for arguments, expected, message in cases:
        code, output = run(store.path, "--from-image", *arguments)
        assert (code, message in output) == (expected, True), output
    make(store.path, flux, tmp_path / "seeded", "--seed", "3")
    code, output = run(
        store.path, "--from-image", str(path), "--output-dir", str(tmp_path / "seeded")
    )
    assert (code, "is another picture (seed 3 -> 0)" in output) == (1, True), output
    store.path.rename(tmp_path / "gone.zarr")
    code, output = run(other.path, "--from-image", str(path))
    assert (code, "expected a record node 0, round 5" in output) == (1, True), output


@pytest.mark.slow
def test_stable_diffusion_is_made_again_with_its_negative(tmp_path: Path) -> None:
    sd = save_random_sd(tmp_path / "sd")
    store = EmbeddingStore.create(tmp_path / "e.zarr", Schema.flux(3, width=8, clip=(77, 8)))
    fill(store, node=0, round=1, n=1)
    make(store.path, sd, tmp_path / "out", "--diffusion-type", "sd", "--negative", "blur")
    path = min((tmp_path / "out").glob("*.png"))
    expected = pixels(path)
    code, output = run(store.path, "--from-image", str(path))
    assert (code, "cannot be made again: negative" in output) == (1, True), output
    code, output = run(store.path, "--from-image", str(path), "--negative", "blur")
    assert code == 0, output
    assert np.abs(pixels(path.parent / "again" / path.name).astype(int) - expected).max() <= 1
