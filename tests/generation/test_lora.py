"""LoRA: images are those that diffusers makes with it, and say of which file they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from generation_fakes import FakePipeline, save_random_flux
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pictures import provenance_of
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, direct, load, records

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.lora import Lora, check_loras
from fedgfe_store.models.placement import Placement
from fedgfe_store.names import image_name

SIZE = 32
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
# What needs no negatives; how they go in is tested elsewhere.
GUIDANCE = {"flux-dev": 3.5, "sd": 1.0, "sdxl": 5.0, "sd3": 1.0}
OF_ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"

Families = Callable[[str], Path]


def save_lora(name: str, model: Path, file: Path, *, seed: int = 1) -> Path:
    """Save a LoRA of random values as training with peft would, the scale in the metadata."""
    family = FAMILIES[name]
    kind = getattr(diffusers, family.pipeline_class)
    pipeline = kind.from_pretrained(model, **dict.fromkeys(family.encoders))
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, part)
    torch.manual_seed(seed)
    denoiser.add_adapter(
        LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LAYERS)
    )
    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(denoiser),
        f"{part}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
    }
    kind.save_lora_weights(file.parent, weight_name=file.name, **layers)
    return file


def save_store(name: str, path: Path) -> tuple[EmbeddingStore, Mapping[str, NDArray[Any]]]:
    columns = records(name, 2, 3)
    shapes = {column: values.shape[1:] for column, values in columns.items()}
    store = EmbeddingStore.create(path, Schema.of("custom", **shapes))
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(2), **columns)
    return store, columns


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDANCE)
def test_images_are_those_of_diffusers_with_the_same_lora(
    tiny_model: Families, tmp_path: Path, name: str
) -> None:
    model = tiny_model(name)
    first, second = (save_lora(name, model, tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    store, columns = save_store(name, tmp_path / "e.zarr")
    selection = store.select()
    how: dict[str, Any] = {"steps": 2, "guidance": GUIDANCE[name]}
    seeds = [seed_of(0, key) for key in selection.keys()]
    one_by_one = {n: [values[i : i + 1] for i in range(2)] for n, values in columns.items()}

    def expected() -> NDArray[np.uint8]:
        made = [
            direct(model, name, {n: v[i] for n, v in one_by_one.items()}, [seed], size=SIZE, **how)
            for i, seed in enumerate(seeds)
        ]
        return np.stack([image for (image,) in made])

    plain, pipeline = expected(), load(model, name)
    try:
        for number, file in enumerate((first, second)):
            pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name=f"{number}")
        pipeline.set_adapters(["0", "1"], [1.0, 0.5])
        wanted = expected()
    finally:
        load.cache_clear()
    assert np.abs(wanted.astype(int) - plain).max() > 20
    for offload in ("none", "model"):
        folder = tmp_path / offload
        made = generate(
            selection,
            folder,
            model=str(model),
            lora=(str(first), f"{second}:0.5"),
            device="cpu",
            offload="none",
            height=SIZE,
            width=SIZE,
            batch_size=1,
            **how,
        )
        assert (made.done, made.failed) == (2, ())
        shown = np.stack([pixels(folder / image_name(key)) for key in selection.keys()])
        np.testing.assert_array_equal(shown, wanted)
