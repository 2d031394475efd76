"""Scores: the same numbers as CLIP gives by itself, in tables keyed like the store."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import fill
from curves import curves
from gallery_pages import SETTINGS, add
from generation_fakes import save_random_clip, save_random_flux
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.classification import averages, by_class, confusion
from fedgfe_store.images.scoring import Scores, class_prompts, score_pictures, selected_images
from fedgfe_store.names import image_name

CLASSES = ["dog", "cat", "water_tap"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_random_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture
def folder(store: EmbeddingStore, tmp_path: Path) -> Path:
    """Random pictures of two nodes at two rounds, two samples a class; of one sample, two."""
    path = tmp_path / "images"
    rng = np.random.default_rng(0)
    for node in ("0", "10"):
        for round in (1, 2):
            fill(store, node=node, round=round, classes=" ".join(CLASSES), n=2)
    keys = EmbeddingStore.open(store.path).select().keys()
    big = replace(SETTINGS, height=24, width=24)
    for key, image in [*((key, 0) for key in keys), (keys[0], 1)]:
        pixels = rng.integers(0, 256, (24, 24, 3)) // 8 + rng.integers(0, 224, 3)
        add(path, key, image=image, colour=pixels, settings=big)
    return path


def score(store: EmbeddingStore, folder: Path, clip: Path, **options: Any) -> Scores:
    selection = EmbeddingStore.open(store.path).select(**options.pop("filters", {}))
    return score_pictures(selected_images(selection, folder), str(clip), device="cpu", **options)


def reference(clip: Path, files: list[Path], prompts: list[str]) -> np.ndarray:
    """Cosine similarities ``[picture, prompt]`` by transformers alone, one call for all."""
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        return (model(**inputs).logits_per_image / model.logit_scale.exp()).numpy()


PROMPTS = {
    "cat": "a photo of a cat",
    "dog": "a photo of a dog",
    "water_tap": "a photo of a water tap",
}


def test_similarity_and_closest_class_are_those_of_transformers(store, folder, clip):
    done: list[int] = []
    scores = score(store, folder, clip, batch_size=4, progress=done.append)
    assert scores.prompts == PROMPTS
    frame = scores.frame
    assert len(frame) == 25
    assert done == [4] * 6 + [1]
    expected = reference(clip, [folder / name for name in frame["file"]], list(PROMPTS.values()))
    names = np.array(list(PROMPTS))
    closest = names[expected.argmax(axis=1)]
    # Random weights prefer a class, but not always the same: else this could not fail.
    assert len(set(closest)) > 1
    own = [expected[row, list(PROMPTS).index(name)] for row, name in enumerate(frame["class_name"])]
    np.testing.assert_allclose(frame["similarity"], own, atol=1e-5)
    assert frame["closest"].tolist() == closest.tolist()
    assert frame["agrees"].tolist() == (closest == frame["class_name"]).tolist()


def test_a_table_summarises_each_group(store, folder, clip):
    scores = score(store, folder, clip)
    table = scores.table(["node", "round", "class_name"])
    assert table["node"].unique().tolist() == ["0", "10"]
    assert table["pictures"].sum() == 25
    for row in table.itertuples():
        own = scores.frame[
            (scores.frame["node"] == row.node)
            & (scores.frame["round"] == row.round)
            & (scores.frame["class_name"] == row.class_name)
        ]
        assert row.pictures == len(own)
        assert row.similarity == pytest.approx(sum(own["similarity"]) / len(own))
        assert row.agreement == sum(own["agrees"]) / len(own)
        counts = own["closest"].value_counts()
        assert counts[str(row.closest)] == counts.max()
    every = scores.table(["node", "round", "split", "class_name", "index", "image"])
    assert (len(every), set(every["pictures"])) == (25, {1})
    for by in ([], ["colour"], ["node", "node"]):
        with pytest.raises(SchemaMismatchError, match="by: expected some of node, round"):
            scores.table(by)


def test_filters_change_no_score(store, folder, clip):
    every = score(store, folder, clip).frame
    some = score(store, folder, clip, filters={"class_name": "dog", "round": 2}).frame
    assert len(some) == 4
    merged = some.merge(every, on="file", suffixes=("", "_all"))
    np.testing.assert_allclose(merged["similarity"], merged["similarity_all"], atol=1e-6)
    assert merged["closest"].tolist() == merged["closest_all"].tolist()


def test_what_else_lies_in_the_folder_changes_no_score(store, folder, clip, tmp_path):
    every = score(store, folder, clip, filters={"class_name": "water_tap"}).frame
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in every["file"]:
        shutil.copy(folder / file, alone)
    pd.testing.assert_frame_equal(score(store, alone, clip).frame, every)


def test_the_classes_to_choose_from_may_be_named(store, folder, clip):
    others = ["a_bird", "cat", "dog", "water_tap"]
    scores = score(store, folder, clip, among=[*reversed(others), "cat"])
    assert list(scores.prompts) == others
    files = [folder / name for name in scores.frame["file"]]
    best = reference(clip, files, list(scores.prompts.values())).argmax(axis=1)
    assert scores.frame["closest"].tolist() == [others[place] for place in best]
    with pytest.raises(SchemaMismatchError, match="among: expected the classes .* none of cat, w"):
        score(store, folder, clip, among=["dog", "a_bird"])
    with pytest.raises(SchemaMismatchError, match="among: expected a list"):
        score(store, folder, clip, among="dog")
    result = run(store, folder, clip, "--among", "cat,dog", "--among", "water_tap,a_bird")
    assert "among 4 classes" in result.output


def test_with_one_class_there_is_no_agreement(store, folder, clip):
    filters = {"class_name": "dog"}
    scores = score(store, folder, clip, filters=filters, among=["dog"])
    assert scores.table(["class_name"])["agreement"].isna().all()
    result = run(store, folder, clip, "--class", "dog", "--among", "dog", "--by", "class")
    assert "note: dog is the only class to choose from" in result.stderr
    assert "100" not in result.stdout
    assert result.stdout.splitlines()[2].split()[3] == "-"


def counted_by_hand(true: list[str], found: list[str]) -> dict[str, tuple[float, float, float]]:
    """Precision, recall and F1 of each class, by counting."""
    measures = {}
    for name in {*true, *found}:
        hits = sum(t == f == name for t, f in zip(true, found, strict=True))
        precision = hits / found.count(name) if name in found else 0.0
        recall = hits / true.count(name) if name in true else 0.0
        total = precision + recall
        measures[name] = (precision, recall, 2 * precision * recall / total if total else 0.0)
    return measures


def test_measures_over_classes_are_those_of_counting(store, folder, clip):
    scores = score(store, folder, clip)
    table = averages(scores.frame, ["node", "round"])
    assert table[["node", "round"]].to_numpy().tolist() == [
        [node, round] for node in ("0", "10") for round in (1, 2)
    ]
    for row in table.itertuples():
        of_group = (scores.frame["node"] == row.node) & (scores.frame["round"] == row.round)
        true = scores.frame[of_group]["class_name"].tolist()
        found = scores.frame[of_group]["closest"].tolist()
        by_hand = counted_by_hand(true, found)
        precision, recall, f1 = np.mean(list(by_hand.values()), axis=0)
        assert row.pictures == len(true)
        assert row.accuracy == pytest.approx(np.mean(np.array(true) == np.array(found)))
        assert row.balanced_accuracy == pytest.approx(
            np.mean([by_hand[name][1] for name in set(true)])
        )
        assert (row.macro_precision, row.macro_recall) == pytest.approx((precision, recall))
        assert row.macro_f1 == pytest.approx(f1)
        assert row.weighted_f1 == pytest.approx(np.mean([by_hand[name][2] for name in true]))


def test_measures_of_classes_and_confusions_are_those_of_counting(store, folder, clip):
    scores = score(store, folder, clip)
    true, found = scores.frame["class_name"].tolist(), scores.frame["closest"].tolist()
    by_hand = counted_by_hand(true, found)
    table = by_class(scores.frame, []).set_index("class_name")
    assert set(table.index) == set(by_hand)
    for name, measures in by_hand.items():
        given = [table.at[name, column] for column in ("precision", "recall", "f1")]
        assert given == pytest.approx(list(measures))
        counts = [table.at[name, column] for column in ("pictures", "found")]
        assert counts == [true.count(name), found.count(name)]
    pairs_found = confusion(scores.frame, [])
    pairs = list(zip(true, found, strict=True))
    assert {(c, f): n for c, f, n in pairs_found.to_numpy().tolist()} == {
        pair: pairs.count(pair) for pair in pairs
    }
    by_round = confusion(scores.frame, ["round"])
    assert by_round["pictures"].sum() == len(pairs)
    assert set(by_round["round"]) == {1, 2}


def test_measures_of_a_class_that_is_nowhere_found_count_as_nothing():
    frame = pd.DataFrame({"class_name": ["cat", "cat", "dog"], "closest": ["cat", "tap", "tap"]})
    (row,) = averages(frame, []).itertuples()
    assert (row.accuracy, row.balanced_accuracy) == pytest.approx((1 / 3, 1 / 4))
    assert (row.macro_precision, row.macro_recall) == pytest.approx((1 / 3, 1 / 6))
    with pytest.raises(SchemaMismatchError, match="over which averages are taken"):
        averages(frame, ["class_name"])


def test_damaged_pictures_are_reported_and_left_out(store, folder, clip):
    keys = EmbeddingStore.open(store.path).select().keys()
    torn, unlisted = (image_name(key) for key in keys[1:3])
    (folder / torn).write_bytes((folder / torn).read_bytes()[:200])
    (folder / "extra.png").write_bytes(b"no picture")
    scores = score(store, folder, clip, batch_size=1)
    assert scores.left_out == {torn: "damaged", "extra.png": "damaged"}
    assert len(scores.frame) == 24
    assert unlisted in set(scores.frame["file"])


def test_mistakes_are_named(store, folder, clip, tmp_path):
    with pytest.raises(SchemaMismatchError, match=r"prompt: expected \{class\} in it, got 'a dog'"):
        score(store, folder, clip, prompt="a dog")
    with pytest.raises(SchemaMismatchError, match="batch_size: expected from 1 up, got 0"):
        score(store, folder, clip, batch_size=0)
    with pytest.raises(SchemaMismatchError, match="'a_b' and 'a b': both are called 'an a b'"):
        class_prompts(["a_b", "a b"], "an {class}")
    with pytest.raises(NotFoundError, match="no folder of pictures at .*nowhere"):
        score(store, tmp_path / "nowhere", clip)
    with pytest.raises(NotFoundError, match="no picture in .* of the 0 records selected"):
        score(store, folder, clip, filters={"round": 7})


def test_what_is_no_clip_is_refused(store, folder, clip, tmp_path):
    with pytest.raises(NotFoundError, match="model .*empty: expected the folder of a CLIP"):
        (tmp_path / "empty").mkdir()
        score(store, folder, tmp_path / "empty")
    flux = save_random_flux(tmp_path / "flux")
    with pytest.raises(SchemaMismatchError, match="expected a clip, got AutoencoderKL"):
        score(store, folder, flux / "vae")
    text_only = tmp_path / "other"
    text_only.mkdir()
    (text_only / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SchemaMismatchError, match="expected a clip, got bert"):
        score(store, folder, text_only)


def test_a_clip_that_is_not_whole_is_refused(store, folder, clip, tmp_path):
    for lost in ("config.json", "tokenizer.json", "model.safetensors"):
        copy = shutil.copytree(clip, tmp_path / lost)
        (copy / lost).unlink()
        with pytest.raises(NotFoundError, match=f"CLIP of transformers with its proc.*{lost}"):
            score(store, folder, copy)
    copy = shutil.copytree(clip, tmp_path / "headless")
    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SchemaMismatchError, match="got none of visual_projection.weight"):
        score(store, folder, copy)
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(SchemaMismatchError, match="headless/model.safetensors, got a spoilt file"):
        score(store, folder, copy)


def run(store: EmbeddingStore, folder: Path, clip: Path, *words: str) -> Result:
    common = ["--store", str(store.path), "score", "--clip-model", str(clip), "--device", "cpu"]
    return CliRunner().invoke(group, [*common, "--input-dir", str(folder), *words])


def test_the_command_prints_a_table(store, folder, clip):
    result = run(store, folder, clip, "--by", "class", "--round", "1")
    assert result.exit_code == 0, result.output
    table = score(store, folder, clip, filters={"round": 1}).table(["class_name"])
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["class", "pictures", "similarity", "agreement", "closest"]
    shown = [
        [row.class_name, str(row.pictures), f"{row.similarity:.3f}", f"{row.agreement:.1%}"]
        for row in table.itertuples()
    ]
    assert [line[:4] for line in lines[2:5]] == shown
    assert lines[-1][:2] == ["13", "pictures:"]


def test_the_command_writes_csv_and_json(store, folder, clip, tmp_path):
    (folder / "extra.png").write_bytes(b"no picture")
    expected = score(store, folder, clip).table(["node", "round", "class_name"])
    path = tmp_path / "scores.csv"
    result = run(store, folder, clip, "--output", str(path))
    assert (result.exit_code, result.stderr) == (3, "left out: extra.png: damaged\n")
    assert result.stdout == f"25 pictures scored, 12 rows in {path}\n"
    read = pd.read_csv(path, dtype={"node": "str"})
    pd.testing.assert_frame_equal(read, expected, check_exact=False)
    os.unlink(folder / "extra.png")
    result = run(store, folder, clip, "--format", "json")
    read = pd.read_json(io.StringIO(result.stdout), lines=True, dtype={"node": "str"})
    assert read["agreement"].tolist() == pytest.approx(expected["agreement"].tolist())


def test_mistakes_in_options_are_found_before_any_work(store, folder, clip, tmp_path):
    result = run(store, folder, clip, "--output", str(tmp_path / "no" / "scores.csv"))
    assert result.exit_code == 2
    assert f"no folder {tmp_path / 'no'}" in result.stderr
    result = run(store, folder, clip, "--by", "colour")
    assert result.exit_code == 2
    assert "expected some of node, round, split, class, index, image" in result.stderr


def test_the_command_shows_what_papers_report(store, folder, clip, tmp_path):
    scores = score(store, folder, clip)
    done = run(store, folder, clip, "--measure", "averages", "--by", "round", "--format", "json")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["macro_f1"] for row in rows] == pytest.approx(
        averages(scores.frame, ["round"])["macro_f1"].tolist()
    )
    plot, square = tmp_path / "plot.png", tmp_path / "square.png"
    drawn = ("--plot", str(plot), "--log", f"tensorboard:{tmp_path / 'runs'}")
    done = run(store, folder, clip, "--measure", "averages", *drawn)
    assert done.exit_code == 0, done.output
    found = averages(scores.frame, ["node", "round"]).set_index(["node", "round"])["accuracy"]
    assert curves(tmp_path / "runs")["score/accuracy/node_0"] == pytest.approx(found["0"].to_dict())
    assert "balanced accuracy" in done.stdout
    done = run(store, folder, clip, "--measure", "confusion", "--plot", str(square))
    assert done.exit_code == 0, done.output
    for file in (plot, square):
        with Image.open(file) as image:
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 5
    done = run(store, folder, clip, "--measure", "classes", "--by", "node", "--format", "csv")
    assert len(pd.read_csv(io.StringIO(done.stdout))) == len(by_class(scores.frame, ["node"]))
    done = run(store, folder, clip, "--measure", "averages", "--by", "class")
    assert done.exit_code == 2
    assert "--measure classes" in done.stderr
