"""Analysis: every number against plain numpy, in bounded memory, and as people see it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
import tracemalloc
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import SMALL
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.analysis import (
    centroids,
    class_spread,
    combine,
    distance_to_server,
    drift,
    project,
    summarize,
)
from fedgfe_store.analysis.plots import check_plot, plot_summary
from fedgfe_store.cli.main import group
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError

CLASSES = ("dog", "cat", "<script>")
ROUNDS = (1, 2, 5)
NODES = ("0", "1", "10", "server")
KEYS = ("node", "round", "split", "class_name", "index")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of a few records per node, round and class, and its values as a plain dict.

    Node 1 missed round 2, and node 10 knows one class only.
    """
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    rng = np.random.default_rng(0)
    model = {}
    for node, number in itertools.product(NODES, ROUNDS):
        if (node, number) == ("1", 2):
            continue
        with store.append(node=node, round=number) as batch:
            for place, name in enumerate(CLASSES[: 1 if node == "10" else 3]):
                for index in range(3 + place):
                    t5 = (rng.standard_normal((3, 8)) / number + place).astype(np.float32)
                    clip = rng.standard_normal(4, dtype=np.float32)
                    split = "test" if index == 2 else "train"
                    batch.add(split=split, class_name=name, index=index, t5=t5, clip=clip)
                    model[node, number, split, name, index] = {"t5": t5, "clip": clip}
    return store, model


def grouped(model, by, vector):
    """Vectors of each group, float64 ``[n, d]``, by plain Python."""
    groups: dict[Any, Any] = {}
    for key, tensors in model.items():
        label = tuple(key[KEYS.index(name)] for name in by)
        groups.setdefault(label, []).append(vector(tensors))
    return {label: np.array(rows, np.float64) for label, rows in groups.items()}


def means_of(model, by):
    return {label: rows.mean(0) for label, rows in grouped(model, by, t5_mean).items()}


def t5_mean(tensors):
    return tensors["t5"].astype(np.float64).mean(axis=0)


def t5_flat(tensors):
    return tensors["t5"].astype(np.float64).ravel()


def clip(tensors):
    return tensors["clip"].astype(np.float64)


def cosine(a, b):
    return 1 - a @ b / np.sqrt((a @ a) * (b @ b))


def rms(rows, centre):
    return np.sqrt(((rows - centre) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("by", "options", "vector"),
    [
        (("round", "class_name"), {}, t5_mean),
        (("round", "class_name"), {"tokens": "flat"}, t5_flat),
        (("class_name", "node", "round"), {"column": "clip"}, clip),
        (("round",), {"column": "clip", "tokens": "flat"}, clip),
        (("split", "index"), {}, t5_mean),
        (KEYS, {"tokens": "flat"}, t5_flat),
    ],
)
@pytest.mark.parametrize("batch_bytes", [1, 700, 10**9])
def test_centroids_are_those_of_numpy(filled, by, options, vector, batch_bytes, monkeypatch):
    store, model = filled
    monkeypatch.setattr("fedgfe_store.analysis.scan._BATCH_BYTES", batch_bytes)
    read: list[Any] = []
    found = centroids(store.select(), by, progress=read.append, **options)
    expected = grouped(model, by, vector)
    labels = list(zip(*(found[name].to_numpy().tolist() for name in by), strict=True))
    assert sorted(labels) == sorted(expected)
    assert sum(read) == len(store) == found["count"].sum()
    for place, label in enumerate(labels):
        rows = expected[label]
        one = found.isel(group=place)
        assert one["count"] == len(rows)
        np.testing.assert_allclose(one["centroid"].to_numpy().ravel(), rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(one["norm"], np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)
        np.testing.assert_allclose(one["spread"], rms(rows, rows.mean(0)), rtol=1e-10, atol=1e-14)


def test_centroids_have_their_keys_and_shape(filled):
    store, _ = filled
    flat = centroids(store.select(), tokens="flat")
    assert flat["centroid"].dims == ("group", "token", "t5_feature")
    assert flat.attrs == {"column": "t5", "tokens": "flat", "commit": store.commit}
    dog = flat.sel(round=5, class_name="dog")
    assert dog["centroid"].shape == (3, 8)
    by_node = centroids(store.select(), ["node"], column="clip")
    assert by_node["node"].to_numpy().tolist() == ["0", "1", "10", "server"]
    assert by_node.attrs["tokens"] == "flat"


def test_a_small_spread_on_a_large_mean_keeps_its_digits(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    rng = np.random.default_rng(1)
    n = 1000
    clip_values = (4096 + rng.standard_normal((n, 4)) * 1e-2).astype(np.float32)
    t5 = np.zeros((n, 3, 8), np.float32)
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=range(n), t5=t5, clip=clip_values)
    found = centroids(store.select(), ["round"], column="clip")
    exact = clip_values.astype(np.longdouble)
    spread = np.sqrt(((exact - exact.mean(0)) ** 2).sum(1).mean())
    assert spread < 0.03
    np.testing.assert_allclose(float(found["spread"][0]), float(spread), rtol=1e-9)
    np.testing.assert_allclose(found["centroid"][0], exact.mean(0).astype(float), rtol=1e-15)


@pytest.mark.parametrize("by", [["round"], ["class_name", "round"], ["node"]])
def test_groups_combine_to_what_reading_again_gives(filled, by):
    store, _ = filled
    fine = centroids(store.select(), ["node", "round", "class_name"])
    direct = centroids(store.select(), by)
    combined = combine(fine, by)
    assert combined["centroid"].dims == direct["centroid"].dims
    for name in by:
        assert combined[name].to_numpy().tolist() == direct[name].to_numpy().tolist()
    for name in ("centroid", "count", "norm", "spread"):
        np.testing.assert_allclose(combined[name], direct[name], rtol=1e-12)


def test_drift_between_consecutive_rounds(filled):
    store, model = filled
    found = drift(centroids(store.select(), ["node", "class_name", "round"]))
    means = {
        k: v.mean(0) for k, v in grouped(model, ("node", "class_name", "round"), t5_mean).items()
    }
    expected = {}
    for node, name in {key[:2] for key in means}:
        rounds = [number for number in ROUNDS if (node, name, number) in means]
        for before, after in itertools.pairwise(rounds):
            a, b = means[node, name, before], means[node, name, after]
            expected[node, name, before, after] = (cosine(a, b), np.linalg.norm(a - b))
    rows = list(found.itertuples(index=False, name=None))
    assert list(found.columns) == ["node", "class_name", "previous", "round", "cosine", "l2"]
    assert sorted(row[:4] for row in rows) == sorted(expected)
    assert ("1", "dog", 1, 5) in expected
    for row in rows:
        np.testing.assert_allclose(row[4:], expected[row[:4]], rtol=1e-9, atol=1e-14)


def test_drift_between_chosen_rounds(filled):
    store, model = filled
    found = drift(centroids(store.select(), ["round"]), pairs=[(1, 5), (5, 1), (1, 99)])
    means = {k[0]: v for k, v in means_of(model, ("round",)).items()}
    assert found[["previous", "round"]].to_numpy().tolist() == [[1, 5], [5, 1]]
    np.testing.assert_allclose(found["cosine"], [cosine(means[1], means[5])] * 2, rtol=1e-9)
    np.testing.assert_allclose(found["l2"], [np.linalg.norm(means[1] - means[5])] * 2, rtol=1e-12)


def test_a_tiny_angle_keeps_its_digits_and_a_zero_has_none(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    angle = 2.0**-22
    steps = {1: (1, 0), 2: (1, angle), 3: (0, 0), 4: (1, 0)}
    for number, (x, y) in steps.items():
        with store.append(node=0, round=number) as batch:
            vector = np.array([x, y, 0, 0], np.float32)
            t5 = np.zeros((3, 8), np.float32)
            batch.add(split="train", class_name="dog", index=0, t5=t5, clip=vector)
    found = drift(centroids(store.select(), ["round"], column="clip"))
    np.testing.assert_allclose(found["cosine"][0], angle**2 / 2, rtol=1e-6)
    assert found["cosine"].isna().tolist() == [False, True, True]
    assert found["l2"].tolist() == pytest.approx([angle, 1, 1])


def test_distance_to_the_server(filled):
    store, model = filled
    found = distance_to_server(centroids(store.select(), ["round", "class_name", "node"]))
    means = {
        k: v.mean(0) for k, v in grouped(model, ("round", "class_name", "node"), t5_mean).items()
    }
    expected = {
        key: (cosine(mean, means[(*key[:2], "server")]),
              np.linalg.norm(mean - means[(*key[:2], "server")]))
        for key, mean in means.items() if key[2] != "server"
    }  # fmt: skip
    rows = list(found.itertuples(index=False, name=None))
    assert sorted(row[:3] for row in rows) == sorted(expected)
    for row in rows:
        np.testing.assert_allclose(row[3:], expected[row[:3]], rtol=1e-9)
    other = distance_to_server(centroids(store.select(), ["node"]), server="1")
    assert other["node"].tolist() == ["0", "10", "server"]
    assert distance_to_server(centroids(store.select(node=[0, 1]), ["node"])).empty


def test_spread_within_and_between_classes(filled):
    store, model = filled
    found = class_spread(centroids(store.select(), ["round", "class_name"])).set_index("round")
    for number in ROUNDS:
        here = {k: v for k, v in model.items() if k[1] == number}
        classes = grouped(here, ("class_name",), t5_mean)
        everything = np.concatenate(list(classes.values()))
        within = np.sqrt(
            sum(((v - v.mean(0)) ** 2).sum() for v in classes.values()) / len(everything)
        )
        total = rms(everything, everything.mean(0))
        row = found.loc[number]
        assert (row["classes"], row["records"]) == (3, len(here))
        np.testing.assert_allclose(row["within"], within, rtol=1e-10)
        np.testing.assert_allclose(row["between"] ** 2 + row["within"] ** 2, total**2, rtol=1e-10)
        np.testing.assert_allclose(row["separation"], row["between"] / within, rtol=1e-10)
    alone = class_spread(centroids(store.select(node=10), ["class_name", "node"]))
    assert alone["separation"].isna().all()


def principal(rows, components):
    centred = rows - rows.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    return (u * s)[:, :components], (s**2 / (s**2).sum())[:components], vt[:components]


def same_up_to_sign(found, expected, **tolerance):
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, **tolerance)


def test_projection_is_that_of_an_exact_pca(filled):
    store, model = filled
    selection = store.select(class_name=["dog", "cat"])
    read: list[Any] = []
    found = project(selection, components=3, progress=read.append)
    keys = list(zip(*(found[name].to_numpy().tolist() for name in KEYS), strict=True))
    assert keys == [(k.node, k.round, k.split, k.class_name, k.index) for k in selection.keys()]
    rows = np.array([t5_mean(model[key]) for key in keys])
    places, explained, directions = principal(rows, 3)
    same_up_to_sign(found["projection"].to_numpy(), places, rtol=1e-8, atol=1e-10)
    same_up_to_sign(found["direction"].to_numpy().T, directions.T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found["explained"], explained, rtol=1e-8)
    np.testing.assert_allclose(found["mean"], rows.mean(0), rtol=1e-10)
    assert found["component"].to_numpy().tolist() == [1, 2, 3]
    assert sum(read) == 2 * len(selection)
    assert found.sel(node="server", class_name="dog")["projection"].shape == (9, 3)


def test_projection_in_many_batches(tmp_path, monkeypatch):
    schema = Schema.flux(2, width=60, clip=(2,))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    rng = np.random.default_rng(3)
    n = 407
    strong = rng.standard_normal((n, 5)) * [9, 6, 4, 2, 1]
    t5 = (strong @ rng.standard_normal((5, 120)) + 3).astype(np.float32).reshape(n, 2, 60)
    with store.append(node=0, round=0) as batch:
        batch.add(split="train", class_name="dog", index=range(n), t5=t5,
                  clip=np.zeros((n, 2), np.float32))  # fmt: skip
    monkeypatch.setattr("fedgfe_store.analysis.projection._FIT_ROWS", 40)
    found = project(store.select(), tokens="flat", components=2)
    places, explained, _ = principal(t5.reshape(n, -1).astype(np.float64), 2)
    same_up_to_sign(found["projection"].to_numpy(), places, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["explained"], explained, rtol=1e-6)


@pytest.mark.parametrize("components", [0, 25, -1])
def test_too_many_components_are_refused(filled, components):
    with pytest.raises(SchemaMismatchError, match="components: expected 1 to 4 for"):
        project(filled[0].select(), column="clip", components=components)
    with pytest.raises(SchemaMismatchError, match="expected 1 to 0 for 0 records"):
        project(filled[0].select(round=99), column="clip", components=components)


@pytest.fixture
def with_audio(tmp_path):
    """Five records of which the second and the last have audio."""
    schema = Schema.flux(1, width=2, clip=(2,), audio=(2, 3), granule=4)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    ones = {"t5": np.ones((1, 2), np.float32), "clip": np.ones(2, np.float32)}
    with store.append(node=0) as batch:
        for number in range(5):
            sound = np.full((2, 3), number, np.float32) if number in (1, 4) else None
            batch.add(round=number // 3, split="train", class_name="dog", index=number,
                      audio=sound, **ones)  # fmt: skip
    return store


def test_records_without_audio_are_left_out(with_audio):
    read: list[Any] = []
    found = centroids(with_audio.select(), ["round"], column="audio", progress=read.append)
    assert found["count"].to_numpy().tolist() == [1, 1]
    assert found["centroid"].to_numpy().tolist() == [[1.0] * 3, [4.0] * 3]
    assert sum(read) == 5
    assert project(with_audio.select(), column="audio", components=1).sizes["record"] == 2
    table = summarize(with_audio.select(), ["round"], column="audio")
    assert table["records"].tolist() == [1, 1]
    assert table["drift_l2"].tolist()[1] == pytest.approx(3 * np.sqrt(3))
    none = summarize(with_audio.select(index=[0, 2, 3]), ["round"], column="audio")
    assert none.empty


def by_hand(model, by):
    """What `summarize` should give for t5, as a dict of label to a dict of numbers."""
    groups = grouped(model, by, t5_mean)
    table = {}
    for label, rows in groups.items():
        at = dict(zip(by, label, strict=True))
        mine = {k: v for k, v in model.items() if all(k[KEYS.index(n)] == at[n] for n in by)}
        row = {
            "records": len(rows),
            "norm": np.linalg.norm(rows, axis=1).mean(),
            "spread": rms(rows, rows.mean(0)),
        }
        if "round" in by:
            place = by.index("round")
            others = [*label[:place], *label[place + 1 :]]
            earlier = [k for k in groups if k[place] < label[place]
                       and [*k[:place], *k[place + 1 :]] == others]  # fmt: skip
            before = max(earlier, key=lambda k: k[place], default=None)
            if before:
                a, b = groups[before].mean(0), rows.mean(0)
                row |= {"drift": cosine(a, b), "drift_l2": np.linalg.norm(a - b)}
        if "class_name" not in by:
            classes = grouped(mine, ("class_name",), t5_mean)
            if len(classes) > 1:
                within = sum(((v - v.mean(0)) ** 2).sum() for v in classes.values())
                between = sum(len(v) * ((v.mean(0) - rows.mean(0)) ** 2).sum()
                              for v in classes.values())  # fmt: skip
                row["separation"] = np.sqrt(between / within)
        fine = tuple(dict.fromkeys((*by, "class_name", "node")))
        means = means_of(model, fine)
        spot = fine.index("node")
        pairs = [
            (mean, means[(*k[:spot], "server", *k[spot + 1 :])])
            for k, mean in means.items()
            if k[spot] != "server" and k[: len(by)] == label
            and (*k[:spot], "server", *k[spot + 1 :]) in means
        ]  # fmt: skip
        if pairs:
            row["to_server"] = np.mean([cosine(a, b) for a, b in pairs])
            row["to_server_l2"] = np.mean([np.linalg.norm(a - b) for a, b in pairs])
        table[label] = row
    return table


@pytest.mark.parametrize(
    "by",
    [
        ("round", "class_name"),
        ("round",),
        ("class_name",),
        ("node", "round"),
        ("class_name", "node", "round"),
        ("split",),
    ],
)
def test_the_summary_is_what_numpy_gives(filled, by):
    store, model = filled
    found = summarize(store.select(), by)
    expected = by_hand(model, by)
    assert set(found.columns) - set(by) == {n for row in expected.values() for n in row}
    labels = list(found[list(by)].itertuples(index=False, name=None))
    assert sorted(labels) == sorted(expected)
    for label, row in zip(labels, found.to_dict("records"), strict=True):
        for name in set(found.columns) - set(by):
            value = expected[label].get(name, np.nan)
            np.testing.assert_allclose(row[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_summary_is_in_order(filled):
    store, _ = filled
    found = summarize(store.select(), ["node", "round"])
    assert list(found["node"].unique()) == ["0", "1", "10", "server"]
    assert found.query("node == '0'")["round"].tolist() == [1, 2, 5]


def test_without_a_server_there_is_no_distance_to_it(filled):
    store, _ = filled
    assert "to_server" not in summarize(store.select(node=[0, 1]))
    assert "to_server" not in summarize(store.select(node="server"))
    late = summarize(store.select().take(
        [i for i, k in enumerate(store.select().keys()) if (k.node, k.round) != ("server", 1)]
    ), ["round"])  # fmt: skip
    assert late["to_server"].isna().tolist() == [True, False, False]


def test_an_empty_selection_gives_empty_results(filled):
    nothing = filled[0].select(round=99)
    found = centroids(nothing)
    assert found["centroid"].shape == (0, 8)
    assert drift(found).empty
    assert class_spread(found).empty
    assert combine(found, ["round"])["centroid"].shape == (0, 8)
    assert summarize(nothing).empty


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": ["nod"]}, "by: expected some of node, round, split, class_name, index"),
        ({"by": []}, "got none"),
        ({"by": ["node", "node"]}, "each once"),
        ({"column": "audio"}, "expected one of t5, clip, got 'audio'"),
        ({"tokens": "first"}, "tokens: expected 'mean' or 'flat', got 'first'"),
    ],
)
def test_wrong_options_are_named(filled, options, words):
    for function in (centroids, summarize):
        with pytest.raises(SchemaMismatchError, match=words):
            function(filled[0].select(), **options)


def test_functions_name_the_key_that_they_miss(filled):
    by_node = centroids(filled[0].select(), ["node"])
    by_round = centroids(filled[0].select(), ["round"])
    for function, groups, name in [(drift, by_node, "round"), (class_spread, by_node, "class_name"),
                                   (distance_to_server, by_round, "node")]:  # fmt: skip
        with pytest.raises(SchemaMismatchError, match=f"expected centroids by {name} too, got by"):
            function(groups)
    with pytest.raises(SchemaMismatchError, match="combine: expected centroids by split too"):
        combine(by_node, ["split"])
    with pytest.raises(SchemaMismatchError, match="drift: expected a result of centroids"):
        drift(filled[0].select().to_xarray())


def test_damaged_records_are_named(filled, tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", SMALL)
    ones = {"t5": np.ones((8, 3, 8), np.float32), "clip": np.ones((8, 4), np.float32)}
    with store.append(node=0, round=3) as batch:
        batch.add(split="train", class_name="dog", index=range(8), **ones)
    (store.path / "t5" / "c.1.0.0").unlink()
    selection = EmbeddingStore.open(store.path).select()
    for function in (centroids, summarize, project):
        with pytest.raises(DamagedDataError, match="t5 of node 0, round 3, split train, class dog"):
            function(selection)
    assert len(summarize(selection, column="clip")) == 1


def test_only_the_column_asked_for_is_read(filled, reads):
    centroids(EmbeddingStore.open(filled[0].path).select(round=5, node="0"), column="clip")
    assert {key.split("/")[0] for key in reads} & {"t5", "clip"} == {"clip"}


def test_memory_is_that_of_a_few_batches(tmp_path, monkeypatch):
    schema = Schema.flux(32, width=1024, clip=(2,))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    record = np.ones((32, 1024), np.float32)
    with store.append(node=0, round=0) as batch:
        for index in range(600):
            batch.add(split="train", class_name=f"c{index % 3}", index=index, t5=record * index,
                      clip=np.ones(2, np.float32))  # fmt: skip
    monkeypatch.setattr("fedgfe_store.analysis.scan._BATCH_BYTES", 2**21)
    selection = EmbeddingStore.open(store.path).select()
    summarize(selection.take(slice(2)), tokens="flat")
    tracemalloc.start()
    table = summarize(selection, tokens="flat")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table["records"].tolist() == [200] * 3
    whole = 600 * record.nbytes
    assert peak < whole / 3


# The command line


def run(store, *args):
    return CliRunner().invoke(group, ["--store", str(store.path), "stats", *map(str, args)])


def test_the_table_lines_up_and_says_what_it_means(filled):
    store, model = filled
    output = run(store).output
    lines = output.splitlines()
    head = lines[0].split()
    assert head == ["round", "class_name", "records", "norm", "spread", "drift", "drift_l2",
                    "to_server", "to_server_l2"]  # fmt: skip
    rows = [line.split() for line in lines[2 : lines.index("")]]
    expected = by_hand(model, ("round", "class_name"))
    assert [(int(r[0]), r[1]) for r in rows] == sorted(expected)
    for row in rows:
        mine = expected[int(row[0]), row[1]]
        for name, cell in zip(head[2:], row[2:], strict=True):
            if cell == "-":
                assert name not in mine
            else:
                digits = len(cell.partition(".")[2])
                assert float(cell) == pytest.approx(mine[name], abs=0.51 * 10**-digits)
    ends = {len(line) for line in lines[1 : lines.index("")]}
    assert len(ends) == 1
    for name in head[3:]:
        assert re.search(rf"^{name}: \w", output, re.MULTILINE), name
    assert (
        f"{len(model)} records of {store.path}, commit {store.commit}: t5, mean over 3 tokens"
        in output
    )


def test_csv_and_json_have_all_digits(filled):
    store, _ = filled
    table = summarize(store.select(round=[1, 2]), ["round", "node"], column="clip")
    options = ["--by", "round,node", "--column", "clip", "--round", "1,2", "--format"]
    rows = list(csv.DictReader(io.StringIO(run(store, *options, "csv").output)))
    assert [float(row["norm"]) for row in rows] == table["norm"].tolist()
    assert [row["drift"] == "" for row in rows] == table["drift"].isna().tolist()
    lines = [json.loads(line) for line in run(store, *options, "json").output.splitlines()]
    assert [line["node"] for line in lines] == table["node"].tolist()
    np.testing.assert_allclose([line["norm"] for line in lines], table["norm"], rtol=1e-13)


def test_the_past_and_nothing(filled):
    store, _ = filled
    assert "\n12 records of" in run(store, "--as-of", 1).output
    assert run(store, "--round", 99).exit_code == 1
    result = run(store, "--round", 99, "--allow-empty")
    assert result.exit_code == 0
    assert result.output.startswith("0 records of")


def test_a_store_without_t5_shows_clip(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema.sd(3, width=4, granule=4))
    with store.append(node=0, round=0) as batch:
        clip_values = np.ones((2, 3, 4), np.float32)
        batch.add(split="train", class_name="dog", index=range(2), clip=clip_values)
    assert "clip, 3 tokens as one vector" in run(store, "--tokens", "flat").output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--by", "clas"], 2, "expected some of node, round, split, class, index"),
        (["--by", "round,round"], 2, "each once"),
        (["--column", "x"], 1, "error: tensor column: expected one of t5, clip"),
        (["--by", "class", "--plot", "x.png"], 1, "error: a plot is over rounds"),
        (["--plot", "x.foo"], 1, "error: x.foo: expected a name ending in .png, .pdf or .svg"),
        (["--plot", "no/x.png"], 1, "error: no/x.png: there is no folder no"),
    ],
)
def test_mistakes_are_one_line(filled, options, code, words):
    result = run(filled[0], *options)
    assert result.exit_code == code
    assert words in result.output.splitlines()[-1]


def test_a_plot_is_written_beside_the_table(filled, tmp_path):
    result = run(filled[0], "--plot", tmp_path / "drift.png")
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"plot: {tmp_path / 'drift.png'}\n")
    with Image.open(tmp_path / "drift.png") as image:
        counted = image.convert("RGB").getcolors(10**6)
    assert counted is not None
    colours = {pixel for _, pixel in counted}
    assert {(255, 255, 255), (31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours
    result = run(filled[0], "--format", "csv", "--plot", tmp_path / "b.svg")
    assert "plot:" not in result.stdout


@pytest.mark.parametrize("by", ["round", "node,round", "round,split,class"])
def test_any_grouping_by_rounds_can_be_drawn(filled, tmp_path, by):
    result = run(filled[0], "--by", by, "--plot", tmp_path / "a.svg")
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "a.svg").read_text()


def labels_of(table, by, file):
    """Names in a picture with their height on it, from an SVG whose text is text."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_summary(table, by, file, title="a $b$ title")
    text = file.read_text()
    found = re.findall(r'<text[^>]*y="([\d.]+)"[^>]*>([^<]*)</text>', text)
    return [(float(y), label) for y, label in found], text


def numbers(names, rounds, offset=0.0):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [(name, r, 3, 1 / r + rng.random() * 1e-3 + offset) for name in names for r in rounds],
        columns=["class_name", "round", "records", "drift"],
    )


def test_names_beside_the_lines_never_overlap(tmp_path):
    names = ["<script>&", 'a"b/ü $x_2$', "日本語", "multi\nline", "x" * 80]
    names += [f"class {i}" for i in range(25)]
    by = ["class_name", "round"]
    found, text = labels_of(numbers(names, range(2, 40)), by, tmp_path / "a.svg")
    shown = {"&lt;script&gt;&amp;", "日本語", "multi line", f"{'x' * 27}…"}
    ends = sorted((y, label) for y, label in found if label in shown or label.startswith("class "))
    assert len(ends) == 29
    assert 'a"b/ü $x_2$' in text
    heights = [y for y, _ in ends]
    assert min(np.diff(heights)) >= 9  # points: the size of the letters


def test_too_many_lines_become_their_means(tmp_path):
    table = pd.concat([numbers([f"class {i}"], range(1, 5)).assign(node=str(node))
                       for i in range(12) for node in range(3)])  # fmt: skip
    by = ["class_name", "node", "round"]
    found, text = labels_of(table, by, tmp_path / "a.svg")
    labels = [label for _, label in found if label.startswith("class")]
    assert sorted(labels) == sorted(f"class {i}" for i in range(12))
    assert "(thick: mean)" in text
    with pytest.raises(SchemaMismatchError, match="room for 30 lines, got 31 values of class_name"):
        many = numbers([f"class {i}" for i in range(31)], range(1, 5))
        plot_summary(many, ["class_name", "round"], tmp_path / "b.svg")


def test_nothing_to_draw_is_said(tmp_path):
    table = numbers(["a"], [1]).assign(drift=np.nan)
    with pytest.raises(SchemaMismatchError, match="a plot needs records of two rounds"):
        plot_summary(table, ["class_name", "round"], tmp_path / "a.png")


def test_a_missing_library_is_named(filled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NotFoundError, match=r"pip install 'fedgfe-store\[analysis\]'"):
        check_plot(tmp_path / "a.png", ["round"])
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(NotFoundError, match=r"sklearn: pip install 'fedgfe-store\[analysis\]'"):
        project(filled[0].select())
