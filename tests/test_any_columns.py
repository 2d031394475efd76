"""Commands, analysis and readers on a store of any columns: they work, or say what they need."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from any_columns import ANY, add, check, given
from click.testing import CliRunner

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.analysis import centroids, project, summarize
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import TensorColumn


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = EmbeddingStore.create(tmp_path_factory.mktemp("any") / "s.zarr", ANY)
    add(store, range(9))
    add(store, range(4), round=2, optional=False)
    return store


def run(store: EmbeddingStore, *arguments: str) -> str:
    result = CliRunner().invoke(group, ["--store", str(store.path), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_show_it(store, tmp_path):
    assert "ids [6] int64 ragged" in run(store, "info")
    assert "sound" in run(store, "verify", "--quiet")
    lines = run(store, "query", "--format", "json").splitlines()
    frame = store.select().records
    for line, (_, expected) in zip(lines, frame.iterrows(), strict=True):
        record = json.loads(line)
        for mark in ANY.marks:
            assert record[mark] == expected[mark]
    run(store, "history")
    run(store, "backup", str(tmp_path / "copy.zarr"), "--quiet")
    run(EmbeddingStore.open(tmp_path / "copy.zarr"), "compact")
    run(store, "export", "--output-dir", str(tmp_path / "checkpoints"), "--quiet")
    back = EmbeddingStore.create(tmp_path / "b.zarr", ANY)
    run(back, "import", str(tmp_path / "checkpoints"), "--quiet")
    check(EmbeddingStore.open(back.path), range(9), round=1)
    merged = EmbeddingStore.create(tmp_path / "m.zarr", ANY)
    run(merged, "merge", str(store.path), "--quiet")
    check(EmbeddingStore.open(merged.path), range(9), round=1)


def test_means_are_over_the_tokens_that_there_are(store):
    given_ = given(range(9))["prompt_embeds"]
    means = np.stack([values.astype(np.float64).mean(0) for values in given_ if len(values)])
    by = centroids(store.select(round=1), ["round"])
    assert by.attrs["column"] == "prompt_embeds"
    assert by["count"].item() == len(means) == 7  # two are empty
    np.testing.assert_allclose(by["centroid"][0], means.mean(0), rtol=1e-12)
    table = summarize(store.select(round=1), ["round"])
    np.testing.assert_allclose(table["norm"], np.linalg.norm(means, axis=1).mean(), rtol=1e-12)
    flat = np.zeros((9, 18))
    for row, values in zip(flat, given_, strict=True):
        row[: values.size] = values.ravel()
    whole = centroids(store.select(round=1), ["round"], tokens="flat")
    np.testing.assert_allclose(
        whole["centroid"].to_numpy().ravel(), flat[flat.any(1)].mean(0), rtol=1e-12
    )


def test_stats_looks_at_the_first_column_of_embeddings(store):
    assert "prompt_embeds, mean over 6 tokens" in run(store, "stats", "--quiet")
    csv = run(store, "stats", "--quiet", "--column", "pooled_prompt_embeds", "--format", "csv")
    assert csv.splitlines()[0].startswith("round,")
    frame = pd.DataFrame([line.split(",") for line in csv.splitlines()[1:]])
    assert frame[2].tolist() == ["9", "4"]
    assert project(store.select(), column="pooled_prompt_embeds")["projection"].shape == (13, 2)


@pytest.mark.parametrize("column", ["sizes", "prompt_attention_mask", "ids"])
def test_masks_are_no_embeddings(store, column):
    words = "expected one of embeddings .prompt_embeds, style, pooled_prompt_embeds., got " + column
    with pytest.raises(SchemaMismatchError, match=words):
        summarize(store.select(), column=column)
    result = CliRunner().invoke(group, ["--store", str(store.path), "stats", "--column", column])
    assert result.exit_code == 1
    assert "expected one of embeddings" in result.stderr


def test_a_store_without_embeddings_says_so(tmp_path):
    masks = Schema.of("custom", TensorColumn("mask", (4,), dtype="bool"))
    store = EmbeddingStore.create(tmp_path / "s.zarr", masks)
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=0, mask=np.ones(4, bool))
    with pytest.raises(SchemaMismatchError, match=r"expected a column of embeddings .*mask \[4\]"):
        summarize(store.select())


DECLARED = {
    "a=5x4": TensorColumn("a", (5, 4)),
    "a=5,4:ragged": TensorColumn("a", (5, 4), ragged=True),
    "a=7:bool": TensorColumn("a", (7,), dtype="bool"),
    "a b=7:optional:int64:ragged": TensorColumn(
        "a b", (7,), optional=True, dtype="int64", ragged=True
    ),
}


@pytest.mark.parametrize("text", DECLARED)
def test_init_declares_columns(tmp_path, text):
    path = tmp_path / "s.zarr"
    arguments = ["--store", str(path), "init", "--kind", "own", "--tensor", text, "--tensor", "z=3"]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    schema = EmbeddingStore.open(path).schema
    assert schema.tensors == (DECLARED[text], TensorColumn("z", (3,)))
    assert (schema.kind, schema.metadata.diffusion_type) == ("own", "own")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor", "a"], "expected NAME=SHAPE"),
        (["--tensor", "a=x"], "expected NAME=SHAPE"),
        (["--tensor", "a=5:bool:int32"], "expected NAME=SHAPE"),
        (["--tensor", "a=5:ragged:ragged"], "expected NAME=SHAPE"),
        (["--tensor", "a=5:int8"], "a: expected one of float32, bool, int32, int64, got 'int8'"),
        (["--tensor", "a=0"], "a: expected a shape of positive whole numbers"),
        (["--tensor", "a=5", "--tensor", "a=6"], "expected each name once, got 2 times, got 'a'"),
        (["--tensor", "../a=5"], "expected the name of a folder, got '../a'"),
        (["--tensor", "a=5", "--tokens", "3"], "--tokens goes without --tensor"),
        (["--tensor", "a=5", "--clip-sequence"], "--clip-sequence goes with --kind flux"),
        (["--tensor", "a=5", "--kind", "A"], "kind: expected a name such as"),
        (["--kind", "sdxl"], "--kind sdxl needs its columns: --tensor NAME=SHAPE"),
    ],
    ids=str,
)
def test_init_refuses_in_one_line(tmp_path, arguments, words):
    result = CliRunner().invoke(group, ["--store", str(tmp_path / "s.zarr"), "init", *arguments])
    assert result.exit_code != 0
    assert words in result.stderr
    assert not (tmp_path / "s.zarr").exists()
