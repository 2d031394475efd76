"""docs/models.md says what the table of families says, and its example works; old stores, too."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_parts as parts
import torch
from conftest import Demo
from numpy.typing import NDArray
from PIL import Image
from places import ROOT
from tiny_families import direct, generators, pixels

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.family import families
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection

PAGE = (ROOT / "docs/models.md").read_text("utf-8")
SMALL: dict[str, Any] = {"steps": 2, "height": 32, "width": 64, "device": "cpu", "guidance": 1.0}


def made(folder: Path, selection: Selection) -> NDArray[np.int16]:
    shown = []
    for key in selection.keys():
        with Image.open(folder / image_name(key)) as image:
            shown.append(np.asarray(image, np.int16))
    return np.stack(shown)


def test_the_page_has_every_family_with_its_columns() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \| (.+) \| (\w+) \|$", PAGE, re.MULTILINE)
    assert [row[0] for row in rows] == list(families())
    for name, title, columns, negatives in rows:
        family = families()[name]
        assert (title, negatives) == (family.title, family.negatives)
        for column, said in zip(family.columns, re.split(r"(?<=\]), ", columns), strict=True):
            names = re.findall(r"`(\w+)`", said)
            assert tuple(names) == column.names
            tokens = column.kind != "vector"
            assert bool(re.search(r"\[L\b", said)) == tokens
            assert bool(re.search(r"\d\]", said)) == (not column.is_mask)


def auraflow(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pos_embed_max_size=256,
        )
        diffusers.AuraFlowPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=parts.kl(),
            transformer=parts.lively(transformer),
            scheduler=parts.flow(),
        ).save_pretrained(folder)
    return folder


@pytest.mark.model
@pytest.mark.parametrize("latents", ["plain", "own"])
def test_a_pipeline_that_is_not_in_the_table_is_declared(tmp_path: Path, latents: str) -> None:
    folder = auraflow(tmp_path / "auraflow")
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    declared = tmp_path / "auraflow.toml"
    declared.write_text(example.replace('"plain"', f'"{latents}"'))
    store = EmbeddingStore.create(tmp_path / "a.zarr", Schema.of("auraflow", prompt_embeds=(5, 32)))
    embeds = np.random.default_rng(0).standard_normal((3, 5, 32), dtype=np.float32)
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(3), prompt_embeds=embeds)
    selection = store.select()
    with pytest.raises(SchemaMismatchError, match=r"got AuraFlowPipeline.*--family FILE"):
        resolve_model(str(folder))
    how = {**SMALL, "model": str(folder), "family": str(declared)}
    assert generate(selection, tmp_path, **how, batch_size=3).done == 3
    pipeline = diffusers.AuraFlowPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    expected = pixels(
        pipeline(
            prompt_embeds=torch.from_numpy(embeds),
            prompt_attention_mask=torch.ones(3, 5, dtype=torch.int64),
            generator=generators([seed_of(0, key) for key in selection.keys()]),
            num_inference_steps=2,
            guidance_scale=1.0,
            height=32,
            width=64,
            output_type="np",
        ).images
    )
    assert np.ptp(np.stack(expected)) > 50
    assert np.abs(made(tmp_path, selection) - np.stack(expected)).max() <= 1


# Where a class builds the real model by default, its value; else the number with its source.
DEFAULTS: dict[str, tuple[str, dict[str | int, tuple[int, ...]]]] = {
    "flux": ("FluxTransformer2DModel", {}),
    "sd": ("UNet2DConditionModel", {"cross_attention_dim": (768, 1024)}),
    "sdxl": ("UNet2DConditionModel", {"cross_attention_dim": (2048,)}),
    "sd3": ("SD3Transformer2DModel", {}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "flux2-klein": ("Flux2Transformer2DModel", {"joint_attention_dim": (7680, 12288)}),
    "pixart": ("PixArtTransformer2DModel", {"caption_channels": (4096,)}),
    "chroma": ("ChromaTransformer2DModel", {}),
    "sana": ("SanaTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {"cap_feat_dim": (2304,)}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
}
"""The denoiser of each family, and widths of its encoders that are not the class's default.

CLIP ViT-L/14 768, OpenCLIP ViT-H/14 1024, ViT-L and ViT-bigG side by side 768 + 1280; T5 XXL 4096;
three layers of Qwen3 4B and 8B, 3 x 2560 and 3 x 4096; Gemma 2 2B 2304.
"""


@pytest.mark.parametrize("name", families())
def test_the_page_has_the_widths_that_the_real_models_have(name: str) -> None:
    kind, others = DEFAULTS[name]
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
    for column in families()[name].columns:
        if column.is_mask:
            continue
        said = re.search(rf"`{column.argument}`[^\[]*\[(?:L, )?([\d or]+)\]", row)
        assert said is not None
        widths = tuple(int(number) for number in said[1].split(" or "))
        if isinstance(column.width, int):  # no key says it: that of OpenCLIP ViT-bigG
            assert widths == (column.width,) == (1280,)
        else:
            assert column.width in known
            assert widths == others.get(column.width, (known[column.width].default,))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["pixart-sigma", "chroma"])
def test_the_demos_t5_conditions_other_models_of_that_encoder(
    demo: Demo, tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    store = EmbeddingStore.open(demo.folder / "embeddings.zarr")
    selection = store.select().take([0, 1])
    folder = tiny_model(name)
    how = {**SMALL, "model": str(folder), "batch_size": 2}
    assert generate(selection, tmp_path, **how).done == 2
    t5 = np.asarray(selection.read("t5"), np.float32)
    tokens = t5.shape[1]
    assert t5.shape == (2, tokens, 4096)
    columns = {
        "prompt_embeds": t5,
        "prompt_attention_mask": np.ones((2, tokens), "float32" if name == "chroma" else "int64"),
    }
    seeds = [seed_of(0, key) for key in selection.keys()]
    expected = direct(folder, name, columns, seeds, steps=2, guidance=1.0, size=(32, 64))
    assert np.ptp(np.stack(expected)) > 50
    assert np.abs(made(tmp_path, selection) - np.stack(expected)).max() <= 1
