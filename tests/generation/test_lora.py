"""LoRA: images are those that diffusers makes with it, and say of which file they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import xxhash
from click.testing import CliRunner
from conftest import fill
from generation_fakes import FakePipeline, save_random_flux
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pictures import provenance_of
from PIL import Image
from safetensors import safe_open
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
    shapes: dict[str, Any] = {column: values.shape[1:] for column, values in columns.items()}
    store = EmbeddingStore.create(path, Schema.of("custom", **shapes))
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(2), **columns)
    return store, columns


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.slow
# peft's own of a second LoRA, when diffusers is called directly.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
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
    asked: dict[str, Any] = {"model": str(model), "lora": (str(first), f"{second}:0.5"), **how}
    made = generate(
        selection, tmp_path / "out", **asked, device="cpu", height=SIZE, width=SIZE, batch_size=1
    )
    assert (made.done, made.failed) == (2, ())
    shown = np.stack([pixels(tmp_path / "out" / image_name(key)) for key in selection.keys()])
    np.testing.assert_array_equal(shown, wanted)


@pytest.fixture(scope="module")
def lora(tiny_model: Families, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny FLUX."""
    folder = tmp_path_factory.mktemp("lora")
    return save_lora("flux-dev", tiny_model("flux-dev"), folder / "style.safetensors")


def with_encoder(lora: Path, file: Path) -> Path:
    """Save a LoRA with a weight of a text encoder beside the others."""
    with safe_open(lora, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({**load_file(lora), OF_ENCODER: torch.ones(4, 8)}, file, metadata=metadata)
    return file


def latents(model: Path, *loras: str, offload: Any = "none") -> torch.Tensor:
    placement = Placement(
        "float32", "cpu", offload=offload, loras=tuple(Lora.read(text) for text in loras)
    )
    pipeline = DiffusersImages.load(resolve_model(str(model)), placement)
    given = {n: torch.from_numpy(v) for n, v in records("flux-dev", 2, 3).items()}
    return pipeline.denoise(given, [1, 2], Sized())


@dataclass(frozen=True)
class Sized:
    steps: int = 1
    guidance: float | None = 3.5
    height: int = SIZE
    width: int = SIZE


def test_what_is_for_a_text_encoder_is_left_out(
    tiny_model: Families, lora: Path, tmp_path: Path
) -> None:
    model, mixed = tiny_model("flux-dev"), with_encoder(lora, tmp_path / "mixed.safetensors")
    alone = latents(model, f"{lora}:0.7")
    assert torch.equal(latents(model, f"{mixed}:0.7"), alone)
    assert not torch.equal(latents(model), alone)
    # As they wait for the decoder, weights are put elsewhere: what LoRA adds goes with them.
    assert torch.equal(latents(model, f"{lora}:0.7", offload="model"), alone)


def test_what_cannot_be_added_is_one_line(
    tiny_model: Families, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = tmp_path / "encoder.safetensors"
    save_file({OF_ENCODER: torch.ones(4, 8)}, only)
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    other = tmp_path / "other.safetensors"
    save_file({f"{key}": torch.ones(2, 2) for key in ("a", "b.alpha")}, other)
    for given, message in (
        (tmp_path / "none.safetensors", "expected a file .*none.safetensors, got none"),
        (text, "expected a .safetensors file .*text.safetensors, got another"),
        (only, "expected weights of a denoiser, got those of text encoders only"),
        (other, "expected weights of a denoiser, got none"),
        (f"{lora}:x", "expected FILE or FILE:SCALE, got"),
        (f"{lora}:nan", "expected FILE or FILE:SCALE, got"),
    ):
        with pytest.raises((NotFoundError, SchemaMismatchError), match=message):
            Lora.read(str(given))
    found = (Lora.read(str(lora)),)
    flux, pixart = (resolve_model(str(tiny_model(n))) for n in ("flux-dev", "pixart-sigma"))
    with pytest.raises(SchemaMismatchError, match="that takes one, got PixArtSigmaPipeline"):
        check_loras(found, pixart, None)
    with pytest.raises(SchemaMismatchError, match="not quantized, got quantize nf4"):
        check_loras(found, flux, "nf4")
    monkeypatch.setattr("fedgfe_store.models.lora.find_spec", lambda name: None)
    with pytest.raises(SchemaMismatchError, match=r"package peft .*\[lora\]"):
        check_loras(found, flux, None)
    check_loras((), pixart, "nf4")


def test_weights_of_layers_that_are_not_there_are_refused(
    tiny_model: Families, lora: Path, tmp_path: Path
) -> None:
    weights = load_file(lora)
    strange = {
        key.replace("transformer_blocks.0", "transformer_blocks.7"): w.clone()
        for key, w in weights.items()
    }
    deeper = tmp_path / "deeper.safetensors"
    save_file({**weights, **strange}, deeper)
    wider = tmp_path / "wider.safetensors"
    save_file({key: torch.cat([w, w], 1) for key, w in weights.items()}, wider)
    for file, message in (
        (deeper, "for layers that it does not have"),
        (wider, "cannot be loaded"),
    ):
        with pytest.raises(SchemaMismatchError, match=message) as error:
            latents(tiny_model("flux-dev"), str(file))
        assert str(error.value).startswith(f"lora {file}")
        assert "\n" not in str(error.value)


def run(store: Path, *words: str) -> tuple[int, str]:
    command = ["--store", str(store), "generate", "--device", "cpu", *words]
    result = CliRunner().invoke(group, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.slow
def test_an_image_says_which_lora_it_is_of_and_is_made_again_with_it(
    tiny_model: Families, lora: Path, tmp_path: Path
) -> None:
    store, _ = save_store("flux-dev", tmp_path / "e.zarr")
    own = tmp_path / "own.safetensors"
    own.write_bytes(lora.read_bytes())
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "1", "--batch-size", "1"]
    asked = ["--model", str(tiny_model("flux-dev")), *size, "--output-dir", str(tmp_path / "out")]
    code, output = run(store.path, *asked, "--lora", f"{own}:0.5", "--limit", "1")
    assert code == 0, output
    (path,) = (tmp_path / "out").glob("*.png")
    made, expected = provenance_of(path), pixels(path)
    digest = xxhash.xxh3_128_hexdigest(own.read_bytes())
    assert made["settings"]["lora"] == [f"{digest}:0.5"]
    assert made["loras"] == [{"file": "../own.safetensors", "digest": digest, "scale": 0.5}]
    assert "peft" in made["versions"]

    for other in ([], ["--lora", str(own)]):
        code, output = run(store.path, *asked, *other)
        assert (code, f"lora ['{digest}:0.5'] -> " in output) == (1, True), output

    code, output = run(store.path, "--from-image", str(path))
    assert code == 0, output
    np.testing.assert_array_equal(pixels(path.parent / "again" / path.name), expected)
    weights = load_file(own)
    save_file({key: w * 2 for key, w in weights.items()}, own)
    code, output = run(store.path, "--from-image", str(path), "--overwrite")
    assert (code, f"cannot be made again: lora ['{digest}:0.5']" in output) == (1, True), output
    own.unlink()
    code, output = run(store.path, "--from-image", str(path), "--overwrite")
    assert (code, output) == (1, f"error: lora: expected a file {own}, got none\n")
    code, output = run(
        store.path, "--from-image", str(path), "--overwrite", "--lora", f"{lora}:0.5"
    )
    assert code == 0, output
    np.testing.assert_array_equal(pixels(path), expected)


def test_a_pipeline_that_is_given_has_to_have_it(
    store: EmbeddingStore, lora: Path, tmp_path: Path
) -> None:
    fill(store, node=0, round=5)
    pipeline = FakePipeline(save_random_flux(tmp_path / "flux"))
    with pytest.raises(SchemaMismatchError, match="lora: expected a pipeline that was loaded with"):
        generate(store.select(), tmp_path / "out", pipeline=pipeline, lora=(str(lora),))
