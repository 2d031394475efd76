"""A classifier between generated images and real ones: scikit-learn's own of the same features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill
from gallery_pages import SETTINGS, add
from PIL import Image
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.features import Features
from fedgfe_store.images.scoring import Found, selected_images
from fedgfe_store.images.transfer import real_classes, train_and_test

CLASSES = ("cat", "dog", "drum")
SIZE = 16


def means(images: Sequence[Image.Image]) -> np.ndarray:
    """Features of a picture: the means of its colours, and of its left half."""
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    return np.concatenate([pixels.mean((1, 2)), pixels[:, :, :4].mean((1, 2))], axis=1)


FEATURES = Features("means", means)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Images of three colours, noisy in round 1, and real ones; node 10 has one class only."""
    root = tmp_path_factory.mktemp("experiment")
    store = EmbeddingStore.create(root / "embeddings.zarr", SMALL)
    for round in (1, 2):
        fill(store, node="0", round=round, classes="cat dog drum", n=6)
        fill(store, node="10", round=round, classes="dog", n=6)
    rng = np.random.default_rng(0)

    def picture(name: str, spread: float) -> np.ndarray:
        colour = 128 + 60 * np.eye(3)[CLASSES.index(name)] + rng.normal(0, spread, 3)
        return np.clip(colour + rng.normal(0, 20, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)

    settings = replace(SETTINGS, height=SIZE, width=SIZE)
    for key in EmbeddingStore.open(store.path).select().keys():
        colour = picture(key.class_name, 80 / key.round**3)
        add(root / "images", key, colour=colour, settings=settings)
    for name in (*CLASSES, "owl"):
        (root / "real" / name / "more").mkdir(parents=True)
        for number in range(9):
            shown = Image.fromarray(picture("cat" if name == "owl" else name, 30))
            shown.save(root / "real" / name / ("more" if number % 2 else "") / f"{number}.png")
    Image.new("RGB", (SIZE, SIZE)).save(root / "real" / "beside.png")
    return store.path, root / "images", root / "real"


def read(files: Sequence[Path]) -> np.ndarray:
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    return means(images)


def test_accuracies_are_scikit_learns_of_the_same_features(experiment):
    store, images, real = experiment
    found = selected_images(EmbeddingStore.open(store).select(), images)
    pictures = real_classes(real, CLASSES)
    done: list[int] = []
    frame = train_and_test(found, FEATURES, pictures, batch_size=5, progress=done.append).frame
    assert sum(done) == 48 + 27
    assert frame[["node", "round", "pictures", "others", "classes"]].to_numpy().tolist() == [
        ["0", 1, 18, 27, 3],
        ["0", 2, 18, 27, 3],
        ["10", 1, 6, 9, 1],
        ["10", 2, 6, 9, 1],
    ]

    def model():
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))

    real_values, real_names = read(list(pictures)), list(pictures.values())
    for row in frame.to_dict("records"):
        own = [i for i in found.images if all(i.key.value(n) == row[n] for n in ("node", "round"))]
        values, names = (
            read([image.file for image in own]),
            [i.key.value("class_name") for i in own],
        )
        taught = model().fit(real_values, real_names)
        assert row["trts"] == pytest.approx(taught.score(values, names))
        if row["classes"] > 1:
            score = model().fit(values, names).score(real_values, real_names)
            assert row["tstr"] == pytest.approx(score)
            assert row["tstr"] > 0.5
        else:
            assert np.isnan(row["tstr"])
    together = train_and_test(found, FEATURES, pictures, by=["round"]).frame
    assert together["pictures"].tolist() == [24, 24]
    assert together["others"].tolist() == [27, 27]


def test_mistakes_are_named(experiment, tmp_path):
    store, images, real = experiment
    found = selected_images(EmbeddingStore.open(store).select(), images)
    with pytest.raises(NotFoundError, match="subfolder with pictures for each class.*got none"):
        real_classes(real / "cat", CLASSES)
    with pytest.raises(NotFoundError, match="no folder of pictures"):
        real_classes(tmp_path / "none", CLASSES)
    pictures = real_classes(real, CLASSES)
    with pytest.raises(SchemaMismatchError, match="expected some of node, round, split, index"):
        train_and_test(found, FEATURES, pictures, by=["class_name"])
    none = Found(found.images, found.classes, {})
    with pytest.raises(NotFoundError, match="no image is of one of the classes owl"):
        train_and_test(none, FEATURES, dict.fromkeys(pictures, "owl"))


@pytest.mark.model
def test_the_command(experiment, tmp_path):
    store, images, real = experiment
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=4
    )
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    crop = {"height": SIZE, "width": SIZE}
    BitImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=crop).save_pretrained(
        tmp_path / "model"
    )
    words = ["--store", str(store), "fidelity", "--features", str(tmp_path / "model")]
    words += ["--device", "cpu", "--input-dir", str(images), "--measure", "classifier"]
    plot = tmp_path / "plot.png"
    done = CliRunner().invoke(
        group, [*words, "--real", str(real), "--by", "round", "--plot", str(plot)]
    )
    assert done.exit_code == 0, done.output
    assert "tstr: accuracy on real pictures" in done.stdout
    assert plot.is_file()
    done = CliRunner().invoke(group, [*words, "--real", str(real), "--format", "json"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["pictures"] for row in rows] == [18, 18, 6, 6]
    for wrong in (["--to", "round=1"], ["--real", str(real), "--by", "class"]):
        assert CliRunner().invoke(group, [*words, *wrong]).exit_code == 2
