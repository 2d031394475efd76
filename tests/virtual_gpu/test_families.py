"""Every family on the simulated GPU, in each offload mode: images are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_families import FAMILIES, records
from virtual_gpu.device import Cards

from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.lora import Lora
from fedgfe_store.models.placement import Offload, Placement

SEEDS = (1, 2)
SAMPLING = Settings("", "", "float32", 2, 3.0, 32, 32)
ALIKE = ("flux-schnell", "sdxl-turbo", "sdxl-lcm", "flux2-klein")
"""Models whose pipeline and parts others have, too: how they step and guide is what differs."""
CASES = [
    (name, mode)
    for mode in get_args(Offload)
    for name in FAMILIES
    if mode == "none" or name not in ALIKE
]
Images = NDArray[np.int16]
Tiny = Callable[[str], Path]


def given(name: str) -> dict[str, torch.Tensor]:
    """Draw two records of a family on the CPU, with negatives where guidance needs them."""
    values = dict(records(name, len(SEEDS), 1))
    if FAMILIES[name].negatives:
        values |= {f"negative_{c}": v for c, v in records(name, len(SEEDS), 2).items()}
    return {column: torch.from_numpy(array) for column, array in values.items()}


def make(pipeline: DiffusersImages, name: str) -> Images:
    latents = pipeline.denoise(given(name), SEEDS, SAMPLING)
    assert latents.device == torch.device(pipeline.placement.device)
    made = pipeline.decode(latents, SAMPLING)
    return np.stack([image for image in made if image is not None]).astype(np.int16)


def need_streams(offload: Offload) -> None:
    """Skip where the device is one that has no streams, with which blocks are moved."""
    if offload == "group":
        try:
            torch.cuda.Stream()
        except RuntimeError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def on_cpu(tiny_model: Tiny) -> Callable[[str], Images]:
    """What the CPU makes of a family's records, by name; each once."""

    @cache
    def images(name: str) -> Images:
        model = resolve_model(str(tiny_model(name)))
        return make(DiffusersImages.load(model, Placement("float32", "cpu")), name)

    return images


def devices(value: object) -> Iterator[torch.device]:
    """Give the device of each tensor in an argument."""
    if isinstance(value, torch.Tensor):
        yield value.device
    elif isinstance(value, Mapping):
        yield from devices(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from devices(one)


@pytest.mark.parametrize(("name", "offload"), CASES)
def test_images_are_those_of_the_cpu(
    tiny_model: Tiny,
    on_cpu: Callable[[str], Images],
    cards: Cards,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    offload: Offload,
) -> None:
    need_streams(offload)
    expected = on_cpu(name)
    model, before = resolve_model(str(tiny_model(name))), cards.taken(0)
    place = Placement("float32", "cuda:0", offload=offload)
    pipeline = DiffusersImages.load(model, place)
    kind = type(pipeline._pipeline)
    called: list[Any] = []
    real = kind.__call__

    def watched(self: Any, **arguments: Any) -> Any:
        called.extend(devices(arguments))
        return real(self, **arguments)

    monkeypatch.setattr(kind, "__call__", watched)
    made = make(pipeline, name)
    assert np.abs(expected[0] - expected[1]).max() > 4
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= 1
    # Embeddings, masks and noise alike.
    assert len(called) > len(FAMILIES[name].columns)
    assert set(called) == {torch.device("cuda:0")}
    assert cards.taken(0) > before


def save_lora(model: Path, folder: Path) -> Path:
    """Save a LoRA of random values for the tiny FLUX, as training with peft would."""
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer.add_adapter(
            LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=layers)
        )
    kept = get_peft_model_state_dict(transformer)
    diffusers.FluxPipeline.save_lora_weights(folder, transformer_lora_layers=kept)
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("offload", get_args(Offload))
def test_lora_moves_along(
    tiny_model: Tiny, on_cpu: Callable[[str], Images], tmp_path: Path, offload: Offload
) -> None:
    need_streams(offload)
    folder = tiny_model("flux-dev")
    loras = (Lora.read(f"{save_lora(folder, tmp_path)}:0.5"),)
    model = resolve_model(str(folder))
    expected = make(
        DiffusersImages.load(model, Placement("float32", "cpu", loras=loras)), "flux-dev"
    )
    assert np.abs(expected - on_cpu("flux-dev")).max() > 4
    place = Placement("float32", "cuda:0", offload=offload, loras=loras)
    pipeline = DiffusersImages.load(model, place)
    latents = pipeline.denoise(given("flux-dev"), SEEDS, SAMPLING)
    adapters = [p for n, p in pipeline._denoiser.named_parameters() if "lora" in n]
    assert adapters
    if offload in ("none", "model"):
        assert {p.device.type for p in adapters} == {"cuda"}
    images = [image for image in pipeline.decode(latents, SAMPLING) if image is not None]
    made = np.stack(images).astype(np.int16)
    assert np.abs(made - expected).max() <= 1
    if offload == "model":  # while the decoder works
        assert {p.device.type for p in adapters} == {"cpu"}
    # A second batch, for which they have to come back.
    assert np.abs(make(pipeline, "flux-dev") - expected).max() <= 1
