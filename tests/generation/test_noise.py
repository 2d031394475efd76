"""The noise of a sample: the same in every round by what the sample is, in folders begun so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, values
from generation_fakes import SIZE, FakePipeline
from pictures import provenance_of
from PIL import Image

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import Settings, fingerprint, seed_of
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.names import image_name
from fedgfe_store.records import RecordKey

FILES = {5: ("a", "b", "c"), 6: ("c", "a", "b")}


def key(round: int, index: int) -> RecordKey:
    return RecordKey("0", round, "train", "dog", index)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Two rounds of three files, shuffled, and one record of which no file is known."""
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    for round_, files in FILES.items():
        add(store, round_, range(3), list(files))
    add(store, 6, [3], None)
    return store


def add(store: EmbeddingStore, round_: int, index: Any, files: Any, **options: Any) -> None:
    tensors = values(len(index), round_)
    with store.append(node=0, round=round_, **options) as batch:
        batch.add(split="train", class_name="dog", index=index, file_id=files, **tensors)


def make(store: EmbeddingStore, folder: Path, flux: Path, **options: Any) -> GenerationReport:
    settings: dict[str, Any] = {"steps": 1, "height": SIZE, "width": SIZE}
    return generate(store.select(), folder, pipeline=FakePipeline(flux), **settings, **options)


def facts(folder: Path) -> dict[RecordKey, dict]:
    found = map(provenance_of, sorted(folder.glob("*.png")))
    return {RecordKey(**each["key"]): each for each in found}


def test_a_file_has_one_noise_in_every_round(store, flux, tmp_path: Path) -> None:
    make(store, tmp_path / "out", flux)
    seeds = {k: each["seed"] for k, each in facts(tmp_path / "out").items()}
    by_file = {
        (file, seeds[key(round_, i)])
        for round_, files in FILES.items()
        for i, file in enumerate(files)
    }
    assert len(by_file) == 3
    assert seeds[key(5, 0)] == seed_of(0, key(9, 9), file_id="a")
    assert seeds[key(6, 3)] == seed_of(0, key(6, 3)), "without a file the index counts"


def test_images_and_manifest_name_the_rule_and_the_file(store, flux, tmp_path: Path) -> None:
    make(store, tmp_path / "out", flux)
    pictures = facts(tmp_path / "out")
    lines = {RecordKey(**line["key"]): line for line in read_manifest(tmp_path / "out")}
    for found in (pictures, lines):
        assert {each["settings"]["noise"] for each in found.values()} == {"file_id"}
        assert found[key(6, 0)]["file_id"] == "c"
        assert "file_id" not in found[key(6, 3)]


@pytest.mark.parametrize("listed", [True, False])
def test_a_folder_keeps_its_rule_and_nothing_is_made_again(
    store, flux, tmp_path: Path, listed: bool
) -> None:
    folder = tmp_path / "out"
    first = make(store, folder, flux, noise="index", limit=2)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    if not listed:
        (folder / "manifest.jsonl").unlink()
    again = make(store, folder, flux)
    assert (first.done, again.skipped, again.done) == (2, 2, 5)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = facts(folder)
    assert {k: each["seed"] for k, each in found.items()} == {k: seed_of(0, k) for k in found}
    assert not any("noise" in each["settings"] for each in found.values())


def test_settings_without_a_rule_are_those_of_images_made_before_there_were_rules() -> None:
    settings = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)
    assert fingerprint(settings) == "1bf3f7e87462acf937c083d5c106f057"
    unknown: Any = "x"
    with pytest.raises(SchemaMismatchError, match="noise: expected index or file_id, got 'x'"):
        Settings("tiny", "abc", "float32", 2, 3.5, 8, 8, noise=unknown)


def test_a_folder_of_another_rule_is_named_and_refused(store, flux, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(store, folder, flux, limit=1)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"noise": "file_id"', '"noise": "later"'))
    with pytest.raises(SchemaMismatchError, match="noise: expected index or file_id, got 'later'"):
        make(store, folder, flux)


def test_a_record_that_gets_a_file_later_is_not_made_again(store, flux, tmp_path: Path) -> None:
    make(store, tmp_path / "out", flux)
    add(store, 6, [3], ["d"], if_exists="replace")
    again = make(EmbeddingStore.open(store.path), tmp_path / "out", flux)
    assert (again.done, again.skipped) == (0, 7)


@pytest.mark.parametrize("rule", ["index", "file_id"])
def test_a_picture_is_made_again_by_the_rule_that_it_names(
    store, flux, tmp_path: Path, rule: str
) -> None:
    words = ["--store", str(store.path), "generate", "--device", "cpu"]
    size = ["--steps", "1", "--height", str(SIZE), "--width", str(SIZE), "--model", str(flux)]
    folder, again, name = tmp_path / "out", tmp_path / "again", image_name(key(6, 0))
    if rule == "index":
        make(store, folder, flux, noise="index", limit=1)
    result = CliRunner().invoke(group, [*words, *size, "--output-dir", str(folder)])
    assert result.exit_code == 0, result.output
    # What the record is known by now does not change it.
    add(store, 6, range(3), ["x", "y", "z"], if_exists="replace")
    result = CliRunner().invoke(
        group, [*words, "--from-image", str(folder / name), "--output-dir", str(again)]
    )
    assert result.exit_code == 0, result.output
    one, other = provenance_of(folder / name), provenance_of(again / name)
    assert one["settings"].get("noise", "index") == rule
    for fact in ("seed", "settings", "fingerprint"):
        assert one[fact] == other[fact]
    assert one.get("file_id") == other.get("file_id")
    with Image.open(folder / name) as first, Image.open(again / name) as second:
        # Alone, not in a batch: some processors' kernels round otherwise then.
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
