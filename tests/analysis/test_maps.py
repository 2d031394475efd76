"""Maps of records: scikit-learn's and UMAP's own of the same vectors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.decomposition import PCA  # type: ignore[import-untyped]
from sklearn.manifold import TSNE  # type: ignore[import-untyped]

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.analysis import map_records, maps, project
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError

CLASSES = ("dog", "cat", "drum")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Two rounds of two nodes: three classes far apart, ten records each."""
    schema = Schema.flux(3, width=8, clip=(4,), granule=4)
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "embeddings.zarr", schema)
    rng = np.random.default_rng(0)
    for round in (1, 2):
        with store.append(node="0", round=round) as batch:
            for place, name in enumerate(CLASSES):
                t5 = rng.standard_normal((10, 3, 8), np.float32) + 8 * np.eye(8)[place]
                clip = rng.standard_normal((10, 4), np.float32)
                t5 = t5.astype(np.float32)
                batch.add(split="train", class_name=name, index=range(10), t5=t5, clip=clip)
    return store.path


def near_of_their_class(frame: pd.DataFrame) -> float:
    """Share of records whose nearest point is of their class."""
    places = frame[["x", "y"]].to_numpy()
    distances = np.linalg.norm(places[:, None] - places, axis=-1) + np.diag([np.inf] * len(places))
    classes = frame["class_name"].to_numpy()
    return float((classes[distances.argmin(axis=1)] == classes).mean())


def test_a_map_by_pca_is_scikit_learns(path):
    selection = EmbeddingStore.open(path).select()
    done: list[int] = []
    found = map_records(selection, "pca", progress=done.append)
    assert (sum(done), found.title) == (120, "PCA of t5, 60 of 60 records")
    vectors = selection.read("t5").astype(np.float64).mean(axis=1)
    expected = PCA(2, svd_solver="full").fit_transform(vectors)
    assert np.allclose(np.abs(found.frame[["x", "y"]]), np.abs(expected), atol=1e-6)
    assert found.frame["class_name"].tolist() == selection.column("class_name").tolist()


@pytest.mark.slow
def test_a_map_by_tsne_is_scikit_learns(path):
    selection = EmbeddingStore.open(path).select()
    frame = map_records(selection, "tsne").frame
    components = project(selection, components=8)["projection"].to_numpy()
    expected = TSNE(perplexity=59 / 3, random_state=0).fit_transform(components)
    assert np.allclose(frame[["x", "y"]], expected, rtol=1e-4, atol=1e-4)
    assert near_of_their_class(frame) > 0.9


@pytest.mark.long
def test_a_map_by_umap_is_its_own(path):
    umap = pytest.importorskip("umap", reason="needs umap-learn (extra map)")
    selection = EmbeddingStore.open(path).select()
    frame = map_records(selection, "umap").frame
    components = project(selection, components=8)["projection"].to_numpy()
    own = umap.UMAP(n_neighbors=15, init="pca", random_state=0, n_jobs=1)
    assert np.allclose(frame[["x", "y"]], own.fit_transform(components))
    assert near_of_their_class(frame) > 0.9


def test_of_many_records_as_many_as_there_is_room_for_are_drawn(path, monkeypatch):
    monkeypatch.setattr(maps, "MOST", 20)
    selection = EmbeddingStore.open(path).select()
    found = map_records(selection, "pca", column="clip")
    assert found.title == "PCA of clip, 20 of 60 records"
    assert map_records(selection, "pca", column="clip").frame.equals(found.frame)
    keys = found.frame.drop(columns=["x", "y"])
    assert len(keys.drop_duplicates()) == 20


def test_mistakes_are_named(path):
    selection = EmbeddingStore.open(path).select()
    with pytest.raises(SchemaMismatchError, match="expected one of pca, umap, tsne, got 'mds'"):
        map_records(selection, "mds")
    with pytest.raises(SchemaMismatchError, match="needs 10 records with a value in t5, got 3"):
        map_records(selection.take(slice(3)), "pca")


def test_the_command(path, tmp_path):
    words = ["--store", str(path), "map", "--method", "pca"]
    plot = tmp_path / "map.png"
    done = CliRunner().invoke(group, [*words, "--by", "round", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"PCA of t5, 60 of 60 records\nplot: {plot}\n"
    with Image.open(plot) as image:
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 5
    done = CliRunner().invoke(group, [*words, "--round", "1", "--format", "csv"])
    frame = pd.read_csv(io.StringIO(done.stdout))
    assert list(frame) == ["node", "round", "split", "class_name", "index", "x", "y"]
    assert (len(frame), set(frame["round"])) == (30, {1})
    assert CliRunner().invoke(group, words).exit_code == 2
