"""Images of means and walks: what numpy computes, drawn as any record is, and kept up to date."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, fill, values
from generation_fakes import SIZE, FakePipeline, checksum, load_flux
from pictures import provenance_of
from PIL import Image
from processes import started

from fedgfe_store import EmbeddingStore, Selection, walk
from fedgfe_store.cli.main import group
from fedgfe_store.derived.record import Derived
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.parts import Part
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name

ASKED: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "device": "cpu"}


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Three samples of two classes of two nodes, at rounds 5 and 20."""
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    for node in (0, 1):
        for number in (5, 20):
            fill(store, node=node, round=number)
    return store


def draw(
    flux: Path, selection: Selection | Derived, folder: Path, **options: Any
) -> GenerationReport:
    return generate(selection, folder, pipeline=FakePipeline(flux), **ASKED, **options)


def colour(path: Path) -> bytes:
    with Image.open(path) as image:
        return np.asarray(image)[0, 0].tobytes()


def one(store: EmbeddingStore, class_name: str, **keys: Any) -> Selection:
    return store.select(class_name=class_name, index=0, **{"node": 0, "round": 20, **keys})


def numpys_mean(store: EmbeddingStore, column: str, **keys: Any) -> np.ndarray:
    return store.select(**keys).read(column).mean(axis=0, dtype=np.float64).astype(np.float32)


def replace(store: EmbeddingStore, *, node: int, round: int, class_name: str) -> None:
    with store.append(node=node, round=round, if_exists="replace") as batch:
        batch.add(split="train", class_name=class_name, index=[1], **values(1, 999))


def test_the_image_of_a_mean_is_the_pipelines_own_of_numpys_mean(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    means = store.select(round=5).mean(by=("round", "class_name"))
    folder = tmp_path / "images"
    made = generate(means, folder, model=str(flux), batch_size=2, **ASKED)
    assert (made.done, sorted(p.name for p in folder.glob("*.png"))) == (
        2,
        ["mean_r5_cat.png", "mean_r5_dog.png"],
    )
    keys = means.keys()
    given = {
        name: np.stack([numpys_mean(store, name, round=5, class_name=c) for c in ("cat", "dog")])
        for name in ("t5", "clip")
    }
    expected = load_flux(flux)(
        prompt_embeds=torch.from_numpy(given["t5"]),
        pooled_prompt_embeds=torch.from_numpy(given["clip"]),
        generator=[torch.Generator().manual_seed(seed_of(0, key)) for key in keys],
        num_inference_steps=2,
        guidance_scale=3.5,
        height=SIZE,
        width=SIZE,
    ).images
    for key, image in zip(keys, expected, strict=True):
        with Image.open(folder / image_name(key)) as drawn:
            np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_the_ends_of_a_walk_are_the_plain_pictures(
    flux: Path, store: EmbeddingStore, tmp_path: Path, mode: Any
) -> None:
    """Over rounds both are, since both have one noise; over classes the end has the start's."""
    over_rounds = walk(one(store, "dog", round=5), one(store, "dog"), 5, mode=mode)
    over_classes = walk(one(store, "dog"), one(store, "cat"), 5, mode=mode)
    plain, folder = tmp_path / "plain", tmp_path / "walks"
    draw(flux, store.select(node=0), plain)
    for frames in (over_rounds, over_classes):
        assert draw(flux, frames, folder, batch_size=2).done == 5
        drawn = [colour(folder / image_name(key)) for key in frames.keys()]
        ends = frames.start.keys()[0], frames.end.keys()[0]
        assert drawn[0] == colour(plain / image_name(ends[0]))
        tensors = [one(store, str(ends[1].value("class_name"))).read(c)[0] for c in ("t5", "clip")]
        assert drawn[-1] == checksum(tensors[0], tensors[1], seed_of(0, ends[0]))
        assert len(set(drawn)) == 5
    (last,) = over_rounds.end.keys()
    assert colour(folder / image_name(over_rounds.keys()[-1])) == colour(plain / image_name(last))


def test_a_changed_source_makes_exactly_its_derived_pictures_out_of_date(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    folder = tmp_path / "images"

    def asked() -> list[Derived]:
        means = store.select().mean(by=("node", "round", "class_name"))
        ends = [store.select(node=0, round=r, class_name="dog", index=1) for r in (5, 20)]
        return [means, walk(ends[0], ends[1], 4)]

    for each in asked():
        draw(flux, each, folder)
    for each in asked():
        assert draw(flux, each, folder).done == 0
        assert image_status(each, folder).totals["done"] == len(each)
    replace(store, node=0, round=20, class_name="dog")
    frames_of = [image_status(each, folder).frame for each in asked()]
    stale = [set(frame["file"][frame["status"] == "stale"]) for frame in frames_of]
    assert stale[0] == {"mean_node-0_r20_dog.png"}
    frames = [image_name(key) for key in asked()[1].keys()]
    assert stale[1] == set(frames[1:])  # the first frame depends on the start alone
    marks = {i.name: i.mark for i in ImageFolder.scan(folder).select(store=store)}
    outdated = {name for name, mark in marks.items() if mark}
    assert outdated == stale[0] | stale[1]
    assert set(marks.values()) == {"", "embedding changed"}
    assert [draw(flux, each, folder).done for each in asked()] == [1, 3]
    assert [image_status(each, folder).totals["done"] for each in asked()] == [8, 4]
    store.delete(node=0, round=20, class_name="dog")
    marks = {i.name: i.mark for i in ImageFolder.scan(folder).select(store=store)}
    assert marks["mean_node-0_r20_dog.png"] == marks[frames[0]] == "record deleted"


def test_parts_render_every_derived_image_once(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    frames = walk(one(store, "dog"), one(store, "cat"), 9)
    done = [
        draw(flux, frames, tmp_path / "parts", part=Part(i, 3), batch_size=2).done for i in range(3)
    ]
    assert sum(done) == 9
    assert max(done) < 9
    draw(flux, frames, tmp_path / "whole")
    for key in frames.keys():
        name = image_name(key)
        assert colour(tmp_path / "parts" / name) == colour(tmp_path / "whole" / name)


def test_images_of_derived_records_say_their_recipe(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    draw(flux, store.select(node=[0, 1], round=20, class_name="dog").mean(by=["round"]), folder)
    (path,) = folder.glob("*.png")
    assert provenance_of(path)["key"] == {
        "mean": {"round": 20, "class_name": "dog"},
        "of": {"node": ["0", "1"]},
    }
    assert provenance_of(path)["sources"] == 6
    dog, cat = (store.select(round=20, class_name=c).mean(by=["round"]) for c in ("dog", "cat"))
    frames = walk(dog, cat, 3, mode="lerp")
    draw(flux, frames, folder)
    middle = provenance_of(folder / image_name(frames.keys()[1]))
    assert middle["key"] == {
        "walk": {
            "from": {"mean": {"round": 20, "class_name": "dog"}, "of": {}},
            "to": {"mean": {"round": 20, "class_name": "cat"}, "of": {}},
            "mode": "lerp",
            "frames": 3,
        },
        "frame": 1,
    }
    straight: dict[str, np.ndarray] = {}
    for column in ("t5", "clip"):
        ends = [numpys_mean(store, column, round=20, class_name=name) for name in ("dog", "cat")]
        straight[column] = np.asarray(np.mean(ends, axis=0, dtype=np.float64), np.float32)
    drawn = colour(folder / image_name(frames.keys()[1]))
    assert drawn == checksum(straight["t5"], straight["clip"], seed_of(0, dog.keys()[0]))


def test_a_column_of_other_records_is_refused(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    with pytest.raises(SchemaMismatchError, match="column: expected records, .* got 2 means"):
        draw(flux, store.select(round=5).mean(), tmp_path / "images", column=("t5=round:20",))


def test_damage_of_a_source_fails_its_derived_images_alone(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    files = sorted((store.path / "t5").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    opened = EmbeddingStore.open(store.path)
    means = opened.select().mean(by=["node", "round"])
    made = draw(flux, means, tmp_path / "images", batch_size=4)
    assert made.done == 3
    assert [str(each.key) for each in made.failed] == ["mean of node 0, round 5"]
    assert "t5 of node 0, round 5" in made.failed[0].reason


def test_a_compaction_meanwhile_moves_the_sources_and_changes_nothing(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=7, round=1, n=20)

    class Meanwhile(FakePipeline):
        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            if not self.batch_sizes:
                other = EmbeddingStore.open(store.path)
                other.delete(node=7, index=range(1, 20))
                assert other.compact().records_moved
            return super().denoise(*args, **options)

    means = store.select().mean(by=["node", "round", "class_name"])
    asked = {"batch_size": 1, **ASKED}
    made = generate(means, tmp_path / "images", pipeline=Meanwhile(flux), **asked)
    others = {key for key in means.keys() if key.value("node") == "7"}
    assert {failure.key for failure in made.failed} == others
    assert all("has been replaced since" in failure.reason for failure in made.failed)
    assert made.done + len(made.failed) == len(means)
    draw(
        flux,
        EmbeddingStore.open(store.path)
        .select(node=[0, 1])
        .mean(by=["node", "round", "class_name"]),
        tmp_path / "straight",
    )
    for path in (tmp_path / "straight").glob("*.png"):
        assert colour(tmp_path / "images" / path.name) == colour(path)


def run(store: EmbeddingStore, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["--store", str(store.path), *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


SIZES = ("--height", SIZE, "--width", SIZE, "--steps", 2, "--device", "cpu")
WALK = ("--walk", "node=0:1", "--round", 20, "--class", "dog", "--per-class", 1, "--frames", 4)
ONE = ("--node", "0", "--round", "20", "--index", "0")
MEAN = ("--mean", "round,class", "--node", "0-1")


@pytest.mark.slow
def test_the_command_line_draws_means_and_walks_and_knows_them_again(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    folder, again = tmp_path / "images", tmp_path / "again"
    where = ("--output-dir", folder)
    for asked, count in ((WALK, 4), (MEAN, 4)):
        draw_them = ("generate", "--model", flux, *SIZES, *asked, *where)
        code, said = run(store, *draw_them)
        assert code == 0, said
        assert f"{count} images rendered" in said
        assert f"{count} done, 0 missing" in run(store, *draw_them, "--dry-run")[1]
        assert "nothing is missing" in run(store, "status", *asked, *where)[1]
    assert "walk node 0 to 1, slerp, 4 frames" in run(store, "status", *WALK, *where)[1]
    for path in sorted(folder.glob("*.png")):
        code, said = run(store, "generate", "--from-image", path, "--output-dir", again)
        assert code == 0, said
        with Image.open(path) as first, Image.open(again / path.name) as second:
            assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1
    replace(store, node=0, round=20, class_name="dog")
    code, said = run(store, "status", *MEAN, *where)
    assert "stale: 1 image: embedding changed" in said
    told = [run(store, "generate", "--from-image", path)[1] for path in folder.glob("mean_*.png")]
    assert sum("has changed since commit 4: using it as of then" in each for each in told) == 1
    assert [each for each in told if "1 image rendered" not in each] == []
    code, line = run(store, "generate", "--from-image", path, "--mean", "round")
    assert (code, "--from-image decides on --mean itself" in line) == (2, True)


@pytest.mark.parametrize(
    ("asked", "code", "error"),
    [
        (["--walk", "dog:drum"], 1, "expected one record of class dog, got 12; .*--per-class 1"),
        (["--walk", "dog:emu", *ONE], 1, "of class emu, got 0; there are those of cat, dog"),
        (["--walk", "round=5:20", "--mean", "class"], 1, "one mean of round 5, got 0"),
        (["--walk", "dog:cat", "--mean", "round"], 1, "of several: add class to --mean"),
        (["--walk", "dog"], 2, "expected two ends such as dog:drum"),
        (["--walk", ":dog"], 2, "expected two ends such as dog:drum"),
        (["--frames", "4"], 2, "--frames goes with --walk"),
        (["--mode", "lerp"], 2, "--mode goes with --walk"),
        (["--mean", "colour"], 2, "expected some of node, round"),
        (["--walk", "dog:cat", "--frames", "1"], 2, "1 is not in the range"),
        (["--mean", "class", "--column", "t5=round:20"], 1, "column: expected records"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_line(
    flux: Path, store: EmbeddingStore, tmp_path: Path, asked: list[str], code: int, error: str
) -> None:
    where = ("--model", flux, *SIZES, "--output-dir", tmp_path / "images", "--dry-run")
    found, said = run(store, "generate", *asked, *where)
    assert found == code, said
    assert re.search(error, said), said


def test_names_with_colons_are_ends_too(flux: Path, tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    fill(store, node=0, round=1, classes="a:b b c", n=1)
    where = ("--model", flux, *SIZES, "--output-dir", tmp_path / "images", "--dry-run")
    for text, label in (("a:b:c", "a:b to c"), ("b:a:b", "b to a:b"), ("class=c:a:b", "c to a:b")):
        code, said = run(store, "generate", "--walk", text, *where)
        assert code == 0, said
        assert f"walk {label}, slerp, 9 frames" in said


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.kill
def test_a_killed_walk_goes_on_where_it_was(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    asked = ("generate", "--model", flux, *SIZES, *WALK[:-1], 60, "--batch-size", 2)
    words = ["--store", store.path, *asked, "--output-dir", folder]
    program = [sys.executable, "-m", "fedgfe_store", *map(str, words)]
    with started(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(folder.glob("*.png"))) < 5:
            time.sleep(0.01)
        process.kill()
    left = len(list(folder.glob("*.png")))
    code, said = run(store, *asked, "--output-dir", folder)
    assert (code, f"{60 - left} images rendered" in said) == (0, True), said
    assert run(store, *asked, "--output-dir", tmp_path / "straight")[0] == 0
    for path in (tmp_path / "straight").glob("*.png"):
        with Image.open(path) as first, Image.open(folder / path.name) as second:
            assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1
    lines = [line["file"] for line in read_manifest(folder)]
    assert sorted(lines) == sorted(path.name for path in folder.glob("*.png"))
