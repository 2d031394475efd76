"""Distances between sets of images: torchmetrics' own, and formulas written out with numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from conftest import fill
from curves import curves
from gallery_pages import SETTINGS, add
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.common.frechet import frechet
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images import features as features_module
from fedgfe_store.images.features import load_features
from fedgfe_store.images.fidelity import fidelity, kid, pictures_below
from fedgfe_store.images.scoring import selected_images

SIZE = 16


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    """A DINOv2 of random weights, for pictures of 16 x 16."""
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=4
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"shortest_edge": SIZE}
    crop = {"height": SIZE, "width": SIZE}
    BitImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A store, a folder of its images, which change with the round, and one of real pictures."""
    root = tmp_path_factory.mktemp("experiment")
    from conftest import SMALL

    store = EmbeddingStore.create(root / "embeddings.zarr", SMALL)
    for node in ("0", "10", "server"):
        for round in (1, 2):
            fill(store, node=node, round=round, classes="dog cat", n=6)
    rng = np.random.default_rng(0)
    settings = replace(SETTINGS, height=SIZE, width=SIZE)
    for key in EmbeddingStore.open(store.path).select().keys():
        noise = rng.integers(0, 60, (SIZE, SIZE, 3))
        add(root / "images", key, image=0, colour=noise + 90 * key.round, settings=settings)
    (root / "real" / "inner").mkdir(parents=True)
    for number in range(20):
        pixels = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8) + 180
        name = f"inner/{number}.jpg" if number % 2 else f"{number}.png"
        Image.fromarray(pixels).save(root / "real" / name)
    return store.path, root / "images", root / "real"


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the squared distance, written out."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = [(kernel(a, a).sum() - np.trace(kernel(a, a))) / (n * (n - 1)) for a in (x, y)]
    return float(sum(within) - 2 * kernel(x, y).mean())


def gaussians(x: np.ndarray, y: np.ndarray) -> float:
    """The squared distance of two normal distributions, by the symmetric square root."""
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    between = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * between)


def normal(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, 6)) + shift).astype(np.float32)


def test_distances_are_those_of_the_formulas():
    first, second = normal(400, 0), normal(500, 1, 0.3)
    wide = second.astype(np.float64)
    assert frechet(first, second) == pytest.approx(
        gaussians(first.astype(np.float64), wide), rel=1e-6
    )
    long, few = normal(2_300, 2), normal(4, 3)
    assert frechet(long, few) == pytest.approx(gaussians(long.astype(np.float64), few), rel=1e-6)
    assert np.isnan(frechet(long, few[:1]))
    value, error = kid(first, second)
    whole = mmd(first.astype(np.float64), wide[:400])
    assert abs(value - whole) < 4 * error
    assert 0 < error < value


def test_sets_of_one_distribution_are_no_distance_apart():
    values = [kid(normal(60, seed), normal(60, 1000 + seed))[0] for seed in range(40)]
    errors = [kid(normal(60, seed), normal(60, 1000 + seed))[1] for seed in range(40)]
    # Unbiased: below 0 about as often as above, and as far off as the standard errors say.
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(40)
    assert 0.5 < np.std(values) / np.mean(errors) < 2
    assert np.isnan(kid(normal(9, 0), normal(60, 1))).all()


def test_they_are_torchmetrics_own_of_the_same_pictures(dino, experiment):
    store, images, real = experiment
    model = load_features(dino, "cpu")
    found = selected_images(EmbeddingStore.open(store).select(node="0", round=1), images)
    done: list[int] = []
    measured = fidelity(
        found, model, real=pictures_below(real), by=["round"], batch_size=5, progress=done.append
    )
    assert sum(done) == 12 + 20
    assert measured.name == "Frechet distance (dinov2)"
    (row,) = measured.frame.to_dict("records")
    assert (row["round"], row["pictures"], row["others"]) == (1, 12, 20)

    class Embed(torch.nn.Module):
        num_features = 8

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
            return torch.from_numpy(model.embed(pictures)).double()

    direct = FrechetInceptionDistance(Embed())
    for files, is_real in ((pictures_below(real), True), ([i.file for i in found.images], False)):
        pixels = [np.array(Image.open(file).convert("RGB")) for file in files]
        direct.update(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), real=is_real)
    assert row["frechet"] == pytest.approx(float(direct.compute()), rel=1e-4)


def test_frechet_distances_are_of_all_nodes_together_and_kid_of_each(dino, experiment):
    store, images, _ = experiment
    found = selected_images(EmbeddingStore.open(store).select(), images)
    frame = fidelity(found, load_features(dino, "cpu"), to={"node": "server"}).frame
    assert frame[["node", "round", "pictures", "others"]].to_numpy().tolist() == [
        ["0", 1, 12, 12],
        ["0", 2, 12, 12],
        ["10", 1, 12, 12],
        ["10", 2, 12, 12],
        ["all", 1, 24, 12],
        ["all", 2, 24, 12],
    ]
    assert frame["frechet"].notna().tolist() == [False] * 4 + [True] * 2
    assert frame["kid"].notna().all()
    rounds = fidelity(
        found, load_features(dino, "cpu"), to={"round": "1"}, by=["node", "round"]
    ).frame
    assert set(rounds["round"]) == {2}
    # Rounds differ by how bright they are, nodes do not.
    assert rounds["kid"].min() > frame["kid"].max()
    assert rounds.set_index("node").loc["0", "others"] == 12


def test_damaged_pictures_are_left_out_and_named(dino, experiment, tmp_path):
    store, images, real = experiment
    found = selected_images(EmbeddingStore.open(store).select(node="0", round=1), images)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    measured = fidelity(
        found, load_features(dino, "cpu"), real=[*pictures_below(real), broken], by=["node"]
    )
    assert measured.left_out == {"broken.png": "damaged"}
    assert measured.frame["others"].tolist() == [20, 20]
    assert "too large with fewer" in " ".join(measured.notes)


def test_mistakes_are_named(dino, experiment, tmp_path):
    store, images, _ = experiment
    found = selected_images(EmbeddingStore.open(store).select(), images)
    model = load_features(dino, "cpu")
    with pytest.raises(SchemaMismatchError, match="one of real and to"):
        fidelity(found, model)
    with pytest.raises(SchemaMismatchError, match="expected some of node, round"):
        fidelity(found, model, to={"nodes": 1})
    with pytest.raises(NotFoundError, match="no folder of pictures"):
        pictures_below(tmp_path / "none")
    with pytest.raises(NotFoundError, match="no picture in"):
        pictures_below(tmp_path)
    with pytest.raises(NotFoundError, match="there is nothing"):
        load_features(tmp_path / "none")
    (tmp_path / "weights.pth").write_bytes(b"1")
    with pytest.raises(SchemaMismatchError, match="Inception weights by which FID is defined"):
        load_features(tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SchemaMismatchError, match="expected a vision model"):
        load_features(tmp_path)


def test_only_the_standard_weights_are_called_fid(tmp_path, monkeypatch):
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity"
    )
    torch.manual_seed(0)
    monkeypatch.setattr(features_module, "INCEPTION", "")
    network = inception.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
        own = network("inception-v3-compat", ["2048"])
    torch.save(own.state_dict(), tmp_path / "weights.pth")
    model = load_features(tmp_path / "weights.pth", "cpu")
    assert model.frechet == "FID"
    picture = Image.fromarray(np.full((40, 40, 3), 128, np.uint8))
    pixels = torch.full((1, 3, 40, 40), 128, dtype=torch.uint8)
    assert np.allclose(model.embed([picture]), own(pixels)[0].detach().numpy(), atol=1e-5)


def test_the_command(dino, experiment, tmp_path):
    store, images, real = experiment
    words = ["--store", str(store), "fidelity", "--features", str(dino), "--device", "cpu"]
    words += ["--input-dir", str(images)]
    plot = tmp_path / "plot.png"
    drawn = ["--plot", str(plot), "--log", f"tensorboard:{tmp_path / 'runs'}"]
    done = CliRunner().invoke(group, [*words, "--real", str(real), *drawn])
    assert done.exit_code == 0, done.output
    assert "Frechet distance (dinov2)" in done.stdout
    assert "note: a set has 20 pictures" in done.stderr
    with Image.open(plot) as image:
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 5
    assert {"fidelity/kid/node_0", "fidelity/frechet/all"} <= curves(tmp_path / "runs").keys()
    done = CliRunner().invoke(group, [*words, "--to", "node=server", "--format", "json"])
    rows = pd.DataFrame([json.loads(line) for line in done.stdout.splitlines()])
    assert rows["node"].tolist() == ["0", "0", "10", "10", "all", "all"]
    for wrong in ([], ["--to", "colour=red"], ["--to", "node=server", "--real", str(real)]):
        assert CliRunner().invoke(group, [*words, *wrong]).exit_code == 2
