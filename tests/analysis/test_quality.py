"""Embeddings beside a reference: each measure by its definition, written out with numpy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.analysis import nearest_classes, quality
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError

SCHEMA = Schema.flux(3, width=8, clip=(4,), granule=4)
CLASSES = ("dog", "cat", "drum")
PLACES = np.random.default_rng(1).standard_normal((3, 3, 8)) * 1.5
"""Where the classes' embeddings lie."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Nodes near the reference and far from it, nearer in round 2; eight records a class."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "embeddings.zarr", SCHEMA)
    rng = np.random.default_rng(0)

    def records(node: str, round: int, noise: float, n: int) -> None:
        with store.append(node=node, round=round) as batch:
            for place, name in zip(PLACES, CLASSES, strict=True):
                t5 = (place + noise * rng.standard_normal((n, 3, 8))).astype(np.float32)
                clip = rng.standard_normal((n, 4), dtype=np.float32)
                split = "reference" if node == "text" else "train"
                batch.add(split=split, class_name=name, index=range(n), t5=t5, clip=clip)

    records("text", 0, 0.5, 8)
    for node, noise in (("0", 1.0), ("1", 3.0)):
        for round in (1, 2):
            records(node, round, noise / round, 6)
    return store.path


def vectors(store: EmbeddingStore, **filters: Any) -> dict[str, np.ndarray]:
    """Means over tokens by class."""
    selection = store.select(**filters)
    t5 = selection.read("t5").astype(np.float64).mean(axis=1)
    names = selection.column("class_name")
    return {name: t5[names == name] for name in CLASSES if (names == name).any()}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def gaussians(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    values, axes = np.linalg.eigh(a)
    root = axes * np.sqrt(np.maximum(values, 0)) @ axes.T
    between = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * between)


def expected(own: dict[str, np.ndarray], text: dict[str, np.ndarray]) -> dict[str, float]:
    """The measures of one group, pair by pair."""
    rows = np.concatenate(list(own.values()))
    names = [name for name, values in own.items() for _ in values]
    wanted = np.stack([text[name].mean(0) for name in names])
    others = np.concatenate([text[name] for name in own])
    every = np.concatenate(list(text.values()))
    every_name = [name for name, values in text.items() for _ in values]
    closest = [every_name[int(np.argmax(unit(every) @ unit(row)))] for row in rows]
    pairs = [1 - unit(a) @ unit(b) for i, a in enumerate(rows) for b in rows[:i]]
    between = np.linalg.norm(others[:, None] - others, axis=-1)
    radii = np.sort(between, axis=1)[:, 5]
    inside = np.linalg.norm(rows[:, None] - others, axis=-1) <= radii
    return {
        "cosine": float(np.mean([unit(a) @ unit(b) for a, b in zip(rows, wanted, strict=True)])),
        "mse": float(((rows - wanted) ** 2).mean()),
        "frechet": gaussians(rows, others),
        "nearest": float(np.mean(np.array(closest) == names)),
        "diversity": float(np.mean(pairs)),
        "precision": float(inside.any(axis=1).mean()),
        "coverage": float(inside.any(axis=0).mean()),
    }


@pytest.mark.parametrize("by", [("node", "round"), ("node", "round", "class_name")])
def test_measures_are_those_of_their_definitions(path, by):
    store = EmbeddingStore.open(path)
    done: list[int] = []
    text = store.select(node="text")
    table = quality(store.select(node=["0", "1"]), text, by, progress=done.append)
    assert sum(done) == 72
    assert len(table) == (4 if len(by) == 2 else 12)
    for row in table.to_dict("records"):
        wanted = expected(vectors(store, **{name: row[name] for name in by}),
                          vectors(store, node="text"))  # fmt: skip
        assert {n: row[n] for n in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_nodes_are_compared_with_the_servers_same_round(path):
    store = EmbeddingStore.open(path)
    server, nodes = store.select(node="0"), store.select(node="1")
    table = quality(nodes, server, ["round"])
    for row in table.to_dict("records"):
        number = row["round"]
        wanted = expected(vectors(store, node="1", round=number),
                          vectors(store, node="0", round=number))  # fmt: skip
        assert row["frechet"] == pytest.approx(wanted["frechet"])
        assert row["cosine"] == pytest.approx(wanted["cosine"])
        one = nearest_classes(store.select(node="1", round=number),
                              store.select(node="0", round=number))  # fmt: skip
        both = nearest_classes(nodes, server)
        assert both[both["round"] == number]["closest"].tolist() == one["closest"].tolist()
    # Taken together, they are compared with all of it.
    (row,) = quality(nodes, server, ["node"]).to_dict("records")
    assert row["frechet"] == pytest.approx(gaussians(*(
        np.concatenate(list(vectors(store, node=node).values())) for node in "10")))  # fmt: skip


def test_what_has_no_meaning_is_not_a_number(path):
    store = EmbeddingStore.open(path)
    nodes = store.select(node="0", round=1)
    (row,) = quality(nodes, store.select(node="text", class_name="dog"), ["node"]).to_dict(
        "records"
    )
    assert np.isnan(row["nearest"])
    assert row["cosine"] <= 1
    (row,) = quality(
        nodes.take(np.arange(1)), store.select(node="text", index=[0, 1]), ["node"]
    ).to_dict("records")
    assert np.isnan([row[name] for name in ("frechet", "diversity", "coverage")]).all()
    with pytest.raises(NotFoundError, match="no record to compare with"):
        quality(nodes, store.select(node="nobody"))
    with pytest.raises(SchemaMismatchError, match="by: expected"):
        quality(nodes, store.select(node="text"), ["colour"])


def test_large_groups_are_sampled_always_the_same(path, monkeypatch):
    store = EmbeddingStore.open(path)
    monkeypatch.setattr("fedgfe_store.analysis.reference.MOST", 10)
    first, second = (
        quality(store.select(node="1"), store.select(node="text"), ["node"]) for _ in range(2)
    )
    pd.testing.assert_frame_equal(first, second)
    assert first["records"].tolist() == [36]


def test_nearest_classes_are_those_of_all_pairs(path):
    store = EmbeddingStore.open(path)
    frame = nearest_classes(store.select(node="1"), store.select(node="text"))
    text = vectors(store, node="text")
    every = unit(np.concatenate(list(text.values())))
    names = [name for name, values in text.items() for _ in values]
    rows = store.select(node="1").read("t5").astype(np.float64).mean(axis=1)
    assert frame["closest"].tolist() == [names[i] for i in np.argmax(unit(rows) @ every.T, axis=1)]
    assert len(set(frame["closest"])) > 1


def run(path: Path, *words: str) -> Any:
    return CliRunner().invoke(group, ["--store", str(path), "quality", *words])


def test_the_command_shows_the_same(path, tmp_path):
    store = EmbeddingStore.open(path)
    plot, square = tmp_path / "plot.png", tmp_path / "square.png"
    done = run(path, "--plot", str(plot))
    assert done.exit_code == 0, done.output
    assert "72 records of" in done.stdout
    assert "beside 24 records of node text" in done.stdout
    rows = [json.loads(line) for line in run(path, "--format", "json").stdout.splitlines()]
    table = quality(store.select(node=["0", "1"]), store.select(node="text"), ["node", "round"])
    assert [row["frechet"] for row in rows] == pytest.approx(table["frechet"].tolist())
    done = run(path, "--measure", "averages", "--by", "round", "--format", "csv")
    accuracy = pd.read_csv(io.StringIO(done.stdout))["accuracy"].tolist()
    frame = nearest_classes(store.select(node=["0", "1"]), store.select(node="text"))
    agrees = (frame["closest"] == frame["class_name"]).groupby(frame["round"]).mean()
    assert accuracy == pytest.approx(agrees.tolist())
    assert run(path, "--measure", "confusion", "--plot", str(square)).exit_code == 0
    for file in (plot, square):
        with Image.open(file) as image:
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 5
    done = run(path, "--to", "node=0")
    assert "beside 36 records of node 0" in done.stdout
    for wrong in (
        ["--to", "node"],
        ["--to", "round=x"],
        ["--measure", "averages", "--by", "class"],
    ):
        assert run(path, *wrong).exit_code == 2
    done = run(path, "--to", "node=nobody")
    assert done.exit_code == 1
    assert "no node nobody in" in done.stderr
    assert "there are 0, 1, text" in done.stderr
