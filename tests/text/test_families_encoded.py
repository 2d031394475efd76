"""Prompts through each family's own encoders into a store, and out of it as diffusers' images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from tiny_families import FAMILIES
from tiny_prompts import PROMPTING, encode, from_prompts, load_whole

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.models.family import read_family
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection

CLASSES = ("a dog", "rain on a roof")
ONE_A_CLASS = {family.pipeline_class: name for name, family in FAMILIES.items()}
STEPS, GUIDANCE, SIZE = 2, 3.0, 32


def run(store: Path, *arguments: str | int | Path | float) -> str:
    result = CliRunner().invoke(group, ["--store", str(store), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def encoded(folder: Path, name: str, store: Path) -> Selection:
    arguments: list[str | int | Path | float] = [
        "encode",
        "--model",
        folder,
        "--device",
        "cpu",
        "--prompt",
        "{class}",
    ]
    for each in CLASSES:
        arguments += ["--class", each]
    if PROMPTING[name].tokens:
        arguments += ["--max-sequence-length", PROMPTING[name].tokens]
    run(store, *arguments)
    return EmbeddingStore.open(store).select(node="text")


def made(folder: Path, store: Path, images: Path, *more: str) -> str:
    size = ("--height", SIZE, "--width", SIZE, "--steps", STEPS, "--guidance", GUIDANCE)
    how = ("--model", folder, "--device", "cpu", "--output-dir", images)
    return run(store, "generate", *how, *size, *more)


def shown(images: Path, selection: Selection) -> list[NDArray[np.uint8]]:
    found = []
    for key in selection.keys():
        with Image.open(images / image_name(key)) as image:
            found.append(np.asarray(image))
    return found


def apart(some: Any, others: Any) -> int:
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", ONE_A_CLASS.values())
def test_a_stores_prompts_become_the_images_that_the_pipeline_makes_of_them(
    tiny_model: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    folder, store = tiny_model(name, encoders=True), tmp_path / "s.zarr"
    selection = encoded(folder, name, store)
    assert [key.class_name for key in selection.keys()] == list(CLASSES)
    made(folder, store, tmp_path / "images")
    seeds = [seed_of(0, key) for key in selection.keys()]
    expected = from_prompts(folder, name, CLASSES, seeds, steps=STEPS, guidance=GUIDANCE, size=SIZE)
    found = shown(tmp_path / "images", selection)
    assert apart(found[:1], found[1:]) > 8
    assert apart(found, expected) <= 1
    negatives = EmbeddingStore.open(store).select(node="text", split="negative")
    assert len(negatives) == FAMILIES[name].negatives
    assert EmbeddingStore.open(store).schema.metadata.classes == CLASSES
    # The record is used, and is what the pipeline itself encodes.
    again = made(folder, store, tmp_path / "images")
    assert "2 were there already" in again
    if FAMILIES[name].negatives:
        _, unwanted = encode(folder, name, [""])
        (extra,) = map(json.loads, negatives.column("extra"))
        assert extra["prompt"] == ""
        for argument in set(extra["columns"]) - set(FAMILIES[name].masks):
            tokens = unwanted[argument].shape[1]
            values = negatives.read(argument if argument in negatives.schema.columns else "clip")
            np.testing.assert_allclose(values[:, :tokens], unwanted[argument], atol=1e-6)


DECLARED = """
[mine]
pipelines = ["PixArtSigmaPipeline"]
latents = "plain"
size = "sample_size"
features = ["num_attention_heads", "attention_head_dim"]
blocks = ["num_layers"]
[mine.columns]
prompt_embeds = { is = "sequence", width = "caption_channels" }
prompt_attention_mask = { is = "mask" }
[mine.defaults]
steps = 2
[mine.encoders]
text_encoder = "T5EncoderModel"
[mine.encode]
returns = ["prompt_embeds", RETURNED]
length = "max_sequence_length"
arguments = { clean_caption = false }
"""


def declared(tmp_path: Path, returned: str = '"prompt_attention_mask"') -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(DECLARED.replace("RETURNED", returned))
    return path


def test_a_declared_family_encodes_as_it_says(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = tiny_model("pixart-sigma", encoders=True), tmp_path / "s.zarr"
    arguments = ("encode", "--model", folder, "--family", declared(tmp_path), "--device", "cpu")
    run(store, *arguments, "--class", "A DOG", "--prompt", "{class}", "--max-sequence-length", 9)
    opened = EmbeddingStore.open(store)
    assert opened.schema.describe() == (
        "mine: prompt_embeds [9, 4096], prompt_attention_mask [9] bool"
    )
    with torch.no_grad():
        values, mask, *_ = load_whole(folder, "pixart-sigma").encode_prompt(
            "A DOG", do_classifier_free_guidance=False, max_sequence_length=9, clean_caption=False
        )
    np.testing.assert_array_equal(opened.select().read("prompt_embeds"), values.numpy())
    np.testing.assert_array_equal(
        opened.select().read("prompt_attention_mask"), mask.bool().numpy()
    )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            '"prompt_mask"',
            r"encode: expected prompt_embeds, prompt_attention_mask, negative_\.\.\.",
        ),
        ('"", "prompt_attention_mask", 3', "in returns, got 3"),
    ],
)
def test_a_declaration_of_encoding_that_is_wrong_is_named(
    tmp_path: Path, returned: str, message: str
) -> None:
    with pytest.raises(SchemaMismatchError, match=message):
        read_family(declared(tmp_path, returned))
