"""Negative embeddings among records: of no class, in no count, and of all columns of a family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import fill
from PIL import Image
from safetensors.torch import save_file
from tiny_families import direct, records

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.analysis import centroids
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.models.families import resolve_model
from fedgfe_store.names import image_name
from fedgfe_store.text.negative import Negative, find_negative
from fedgfe_store.xarray_engine import FedgfeBackendEntrypoint

WIDTH = 4


def add_negative(store: EmbeddingStore, prompt: str = "", **tensors: Any) -> None:
    with store.append(node="text", round=0) as batch:
        batch.add(
            split="negative", class_name="negative", index=7, extra={"prompt": prompt}, **tensors
        )


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Two classes of node 0, references of both, and a negative."""
    schema = Schema.flux(3, width=8, clip=(WIDTH,), metadata=Metadata(classes=("dog",)))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    fill(store, node=0, round=0, n=2)
    with store.append(node="text", round=0) as batch:
        for name in ("dog", "cat"):
            batch.add(
                split="reference",
                class_name=name,
                index=0,
                t5=np.ones((3, 8), np.float32),
                clip=np.ones(WIDTH, np.float32),
            )
    add_negative(store, t5=np.full((3, 8), 9, np.float32), clip=np.full(WIDTH, 9, np.float32))
    return EmbeddingStore.open(store.path)


def run(store: EmbeddingStore, *arguments: str | Path) -> str:
    result = CliRunner().invoke(group, ["--store", str(store.path), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_negative_is_of_no_class_and_in_no_query_but_for_its_split(
    store: EmbeddingStore,
) -> None:
    assert len(store) == 7
    everything = store.select()
    assert len(everything) == 6
    assert store.schema.metadata.classes == ("dog", "cat")
    assert set(everything.column("class_name")) == {"dog", "cat"}
    assert set(everything.counts("class_name").index) == {"dog", "cat"}
    assert set(everything.counts("split").index) == {"train", "reference"}
    assert len(store.select(node="text")) == len(store.select(node="text", round=0)) == 2
    assert len(store.select(class_name="negative")) == 0
    assert len(store.select(per_class=1)) == 4
    assert len(everything.others()) == 6
    (key,) = store.select(split="negative").keys()
    assert (key.node, key.round, key.split) == ("text", 0, "negative")
    assert len(store.select(split=["negative", "reference"])) == 3
    assert set(everything.to_xarray()["class_name"].values) == {"dog", "cat"}
    opened = FedgfeBackendEntrypoint().open_dataset(store.path)
    assert opened.sizes["record"] == 6


def test_merging_and_compacting_keep_negatives(store: EmbeddingStore, tmp_path: Path) -> None:
    other = EmbeddingStore.create(tmp_path / "other.zarr", Schema.flux(3, width=8, clip=(WIDTH,)))
    other.merge(store)
    assert other.select(split="negative").keys() == store.select(split="negative").keys()
    assert set(other.schema.metadata.classes) == {"dog", "cat"}
    assert other.delete(class_name="dog") == 3
    assert other.delete(node="text") == 1
    other.compact()
    assert len(other.select(split="negative")) == 1
    assert other.verify().sound
    assert other.delete(split="negative") == 1


def test_analysis_sees_no_negative(store: EmbeddingStore) -> None:
    found = centroids(store.select(), by=("class_name",), column="clip")
    assert set(found["class_name"].values) == {"dog", "cat"}


@pytest.mark.parametrize(
    "arguments",
    [("info",), ("query",), ("stats", "--by", "class"), ("history",)],
    ids=lambda arguments: arguments[0],
)
def test_commands_name_no_negative(
    store: EmbeddingStore, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    text = run(store, *arguments).replace(str(tmp_path), "")
    assert "dog" in text or arguments == ("history",)
    assert "negative" not in text


def test_a_command_shows_the_split_that_it_is_asked_for(store: EmbeddingStore) -> None:
    assert "negative" in run(store, "query", "--split", "negative")


def test_images_sheets_and_exports_are_of_records_with_a_class(
    store: EmbeddingStore, flux: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    how = ("--model", flux, "--steps", "1", "--height", "32", "--width", "32", "--device", "cpu")
    assert "6 images rendered" in run(store, "generate", "--output-dir", images, *how)
    assert len(list(images.glob("*.png"))) == 6
    assert "negative" not in "".join(path.name for path in images.glob("*.png"))
    status = run(store, "status", "--output-dir", images, "--by", "class", "--format", "csv")
    assert [line.split(",")[0] for line in status.splitlines()[1:]] == ["cat", "dog"]
    sheet = run(store, "sheet", "--input-dir", images, "--output", tmp_path / "sheet.png")
    assert "negative" not in sheet.replace(str(tmp_path), "")
    run(store, "export", "--output-dir", tmp_path / "exported")
    for path in (tmp_path / "exported").rglob("*.pt"):
        assert "negative" not in str(torch.load(path, weights_only=True).keys())


def negative_of(folder: Path, store: EmbeddingStore, given: str | None = None) -> Negative:
    model = resolve_model(str(folder))
    selection = store.select()
    columns = model.conditioning(store.schema)
    return find_negative(model, selection, columns, given, keep=True, report=pytest.fail)


def sdxl_store(path: Path) -> tuple[EmbeddingStore, dict[str, np.ndarray]]:
    drawn = records("sdxl", 3, 0)
    shapes: dict[str, Any] = {name: values.shape[1:] for name, values in drawn.items()}
    store = EmbeddingStore.create(path, Schema.of("sdxl", **shapes))
    with store.append(node=0, round=0) as batch:
        batch.add(
            split="train",
            class_name="dog",
            index=range(2),
            **{name: values[:2] for name, values in drawn.items()},
        )
    return store, {name: values[2:] for name, values in drawn.items()}


@pytest.mark.parametrize("kept", ["safetensors", "pt", "record"])
def test_sdxl_takes_negatives_of_all_its_columns_where_they_are_given(
    tiny_model: Callable[..., Path], tmp_path: Path, kept: str
) -> None:
    folder = tiny_model("sdxl")
    store, unwanted = sdxl_store(tmp_path / "s.zarr")
    given = str(tmp_path / f"negative.{kept}")
    tensors = {f"negative_{name}": torch.from_numpy(v) for name, v in unwanted.items()}
    if kept == "safetensors":
        save_file(tensors, given)
    elif kept == "pt":
        torch.save(tensors, given)
    else:
        given = "blur"
        add_negative(store, "blur", **unwanted)
    selection = store.select()
    options: dict[str, Any] = {"model": str(folder), "steps": 2, "guidance": 3.0, "device": "cpu"}
    report = generate(
        selection, tmp_path / "images", negative=given, height=32, width=32, **options
    )
    assert (report.done, report.failed) == (2, ())
    columns = {name: selection.read(name) for name in unwanted}
    seeds = [seed_of(0, key) for key in selection.keys()]
    how: dict[str, Any] = {"steps": 2, "guidance": 3.0, "size": 32}
    expected = direct(folder, "sdxl", columns, seeds, negatives=unwanted, **how)
    zeros = direct(folder, "sdxl", columns, seeds, **how)
    for key, wanted, other in zip(selection.keys(), expected, zeros, strict=True):
        with Image.open(tmp_path / "images" / image_name(key)) as image:
            found = np.asarray(image).astype(int)
        assert np.abs(found - wanted).max() <= 1
        assert np.abs(found - other).max() > 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeds": (77, 2048)}, r"pooled_prompt_embeds \[1280\] like .*, got None"),
        (
            {"prompt_embeds": (20, 2048), "pooled_prompt_embeds": (1280,)},
            r"prompt_embeds \[77, 2048\] like the records', got \[20, 2048\]; encode the negative "
            "prompt to 77 tokens, too",
        ),
        ({"prompt_embeds": (77, 2048), "other": (1280,)}, "one tensor in .*, or tensors named"),
        ({"prompt_embeds": (2, 77, 2048)}, r"\[tokens, features\], got \[2, 77, 2048\]"),
    ],
)
def test_a_file_that_does_not_go_with_the_records_is_refused(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    tensors: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    store, _ = sdxl_store(tmp_path / "s.zarr")
    path = tmp_path / "negative.pt"
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(SchemaMismatchError, match=message):
        negative_of(tiny_model("sdxl"), store, str(path))


def test_without_encoder_record_and_file_it_is_said_what_to_do(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    store, _ = sdxl_store(tmp_path / "s.zarr")
    with pytest.raises(NotFoundError, match="guidance <= 1: .*, or --negative FILE, got none"):
        negative_of(tiny_model("sdxl"), store, "blur")


def test_what_tells_negatives_apart_is_all_of_them() -> None:
    sequence, mask = np.ones((3, 4), np.float32), np.array([True, True, False])
    found = {
        Negative.of({"prompt_embeds": sequence, "mask": each}, "").digest
        for each in (mask, ~mask, mask[::-1])
    }
    assert len(found) == 3
    one = {"prompt_embeds": sequence, "mask": mask}
    assert Negative.of(one, "").digest == Negative.of(dict(reversed(one.items())), "").digest
