"""Folders of models that others wrote: odd ones are told in a line, fp16-only ones are used."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import values
from generation_fakes import SIZE, save_random_clip, save_random_flux, save_random_sd
from PIL import Image
from safetensors.torch import load_file, save_file

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.run import generate
from fedgfe_store.images.clip import Clip
from fedgfe_store.models.families import resolve_model
from fedgfe_store.selection import Selection
from fedgfe_store.text import encode_references, plan_references

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
DENOISER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_flux(tmp_path_factory.mktemp("models") / "flux", encoders=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    path = tmp_path_factory.mktemp("store") / "store.zarr"
    store = EmbeddingStore.create(path, Schema.flux(5, width=8, clip=(4,)))
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=[0], **values(1, schema=store.schema))
    return store.select()


def render(records: Selection, model: Path, folder: Path) -> list[np.ndarray]:
    options: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "device": "cpu"}
    report = generate(records, folder, model=str(model), **options)
    assert not report.failed
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def encode(model: Path, store: Path) -> dict[str, np.ndarray]:
    plan = plan_references(store, ["a {class}"], classes=["dog"], model=str(model), device="cpu")
    encode_references(plan)
    selection = EmbeddingStore.open(store).select()
    return {name: selection.read(name) for name in ("t5", "clip")}


def score(model: Path, folder: Path) -> torch.Tensor:
    loaded = Clip.load(str(model), "cpu")
    return loaded.embed_texts(["dog"]) @ loaded.embed_images([Image.new("RGB", (20, 20))]).T


def put_instead(path: Path, make: Callable[[], object]) -> None:
    path.unlink()
    make()


# What is written into a file, or done to it, and what is said of it.
JSON: dict[str, bytes | Callable[[Path], object]] = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "half a file": b'{"in_channels": 16, "a": [1,',
    "no UTF-8": bytes(range(256)),
    "a pointer": POINTER,
    "100,000 brackets": b"[" * 100_000,
    "a folder": lambda path: put_instead(path, path.mkdir),
    "no file": Path.unlink,
    "a link to itself": lambda path: put_instead(path, lambda: path.symlink_to(path.name)),
    "a pipe": lambda path: put_instead(path, lambda: os.mkfifo(path)),
}
WEIGHTS: dict[str, bytes | Callable[[Path], object]] = {
    "nothing": b"",
    "few bytes": b"torn",
    "a pointer": POINTER,
    "a web page": b"<html>" * 100,
    "an endless header": struct.pack("<Q", 2**63) + bytes(100),
    "a header of a list": struct.pack("<Q", 2) + b"[]",
    "a tensor without a place": struct.pack("<Q", 19) + b'{"a":{"dtype":"F3"}}',
    "a cut end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "other names": lambda path: save_file({"x": torch.zeros(2)}, path, {"format": "pt"}),
    "other sizes": lambda path: save_file(
        {name: torch.zeros(3, 5) for name in load_file(path)}, path, {"format": "pt"}
    ),
}


def spoilt(model: Path, copy: Path, file: str, change: bytes | Callable[[Path], object]) -> Path:
    shutil.copytree(model, copy)
    if callable(change):
        change(copy / file)
    else:
        (copy / file).write_bytes(change)
    return copy


def assert_told(copy: Path, use: Callable[[], object]) -> None:
    with pytest.raises((NotFoundError, SchemaMismatchError)) as caught:
        use()
    message = str(caught.value)
    assert str(copy) in message
    assert "\n" not in message
    assert len(message) < 1000


FILES = [
    *(("model_index.json", name) for name in JSON),
    *(("scheduler/scheduler_config.json", name) for name in JSON if name != "no UTF-8"),
    *(("vae/config.json", name) for name in ("null", "a pointer", "a pipe")),
    *((DENOISER, name) for name in WEIGHTS),
]


@pytest.mark.parametrize(("file", "content"), FILES)
def test_generate_names_the_odd_file(
    records: Selection, flux: Path, tmp_path: Path, file: str, content: str
) -> None:
    change = (JSON if file.endswith(".json") else WEIGHTS)[content]
    copy = spoilt(flux, tmp_path / "copy", file, change)
    assert_told(copy, lambda: render(records, copy, tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("text_encoder_2/model.safetensors", name) for name in WEIGHTS),
        *(("tokenizer_2/tokenizer.json", name) for name in ("nothing", "null", "a pointer")),
        ("tokenizer/tokenizer_config.json", "a list"),
        ("text_encoder/config.json", "a text"),
    ],
)
def test_encode_names_the_odd_file(flux: Path, tmp_path: Path, file: str, content: str) -> None:
    change = (JSON if file.endswith(".json") else WEIGHTS)[content]
    copy = spoilt(flux, tmp_path / "copy", file, change)
    assert_told(copy, lambda: encode(copy, tmp_path / "texts.zarr"))
    assert not (tmp_path / "texts.zarr").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("model.safetensors", name) for name in WEIGHTS),
        *(("config.json", name) for name in ("null", "a text", "100,000 brackets", "a pointer")),
        *(("tokenizer.json", name) for name in ("a list", "null", "nothing")),
        *((name, "null") for name in ("processor_config.json", "tokenizer_config.json")),
    ],
)
def test_score_names_the_odd_file(clip: Path, tmp_path: Path, file: str, content: str) -> None:
    change = (JSON if file.endswith(".json") else WEIGHTS)[content]
    copy = spoilt(clip, tmp_path / "copy", file, change)
    assert_told(copy, lambda: score(copy, tmp_path))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "in_channels", "16"),
        ("transformer/config.json", "joint_attention_dim", None),
        ("transformer/config.json", "num_layers", 10**30),
        ("transformer/config.json", "guidance_embeds", "no"),
        ("transformer/config.json", "axes_dims_rope", 8),
        ("transformer/config.json", "_class_name", ["FluxTransformer2DModel"]),
        ("vae/config.json", "block_out_channels", []),
        ("vae/config.json", "scaling_factor", float("nan")),
        ("vae/config.json", "shift_factor", None),
        ("scheduler/scheduler_config.json", "base_image_seq_len", None),
        ("model_index.json", "scheduler", "diffusers"),
        ("model_index.json", "_class_name", ["FluxPipeline"]),
    ],
)
def test_values_of_a_wrong_type_are_told(
    records: Selection, flux: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    found = {**json.loads((flux / file).read_text()), key: value}
    copy = spoilt(flux, tmp_path / "copy", file, json.dumps(found).encode())
    assert_told(copy, lambda: render(records, copy, tmp_path / "out"))


def test_a_configuration_without_a_scaling_factor_takes_the_decoders_own(tmp_path: Path) -> None:
    folder = save_random_sd(tmp_path / "sd", encoder=False)
    config = json.loads((folder / "vae/config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae/config.json").write_text(json.dumps(config))
    assert resolve_model(str(folder), kind="sd").latent_scale == 2


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_encoder/config.json", "hidden_size", True),
        ("text_encoder_2/config.json", "num_layers", [[]]),
        ("tokenizer/tokenizer_config.json", "model_max_length", True),
        ("text_encoder/config.json", "num_attention_heads", "x"),
    ],
)
def test_encoders_values_of_a_wrong_type_are_told(
    flux: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    found = {**json.loads((flux / file).read_text()), key: value}
    copy = spoilt(flux, tmp_path / "copy", file, json.dumps(found).encode())
    assert_told(copy, lambda: encode(copy, tmp_path / "texts.zarr"))


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"a": 1}, {"a": ["x"]}, {"a": "../vae/config.json"}, {"a": ".."}]
)
def test_an_index_of_weights_lists_files_beside_it(
    records: Selection, flux: Path, tmp_path: Path, weight_map: object
) -> None:
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    content = json.dumps({"weight_map": weight_map}).encode()
    copy = spoilt(flux, tmp_path / "copy", index, content)
    assert_told(copy, lambda: render(records, copy, tmp_path / "out"))


NOWHERE = ["./nope", "../nope", "nope/", "a/b/c", "~nobody-of-this-name/x", "a--b/c", "-x/y", "x"]


@pytest.mark.parametrize("name", NOWHERE)
def test_a_model_that_is_nowhere_is_one_line(
    records: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["generate"], ["encode", "--class", "dog"]):
        words = ["--store", str(records.path), *command, f"--model={name}"]
        result = CliRunner().invoke(group, words)
        assert result.exit_code == 1
        said = f"expected tiny, a folder or a hub id, got {name!r}, where there is nothing"
        assert result.stderr == f"error: model: {said}\n"
    with pytest.raises(NotFoundError, match="model .*: expected the folder of a CLIP"):
        Clip.load("./nope", "cpu")


def test_the_message_says_where_the_name_comes_from(
    records: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGFE_MODEL", "./nope")
    (tmp_path / "file").touch()
    result = CliRunner().invoke(group, ["--store", str(records.path), "generate"])
    assert result.exit_code == 1
    assert "got './nope', where there is nothing" in result.stderr
    assert "$FEDGFE_MODEL names the model ./nope; --model goes before it" in result.stderr
    with pytest.raises(NotFoundError, match="got the file .*file"):
        resolve_model(str(tmp_path / "file"))


def only_fp16(model: Path, copy: Path, *, variant: bool) -> Path:
    """Keep weights in float16, under the names of that variant or under the usual ones."""
    shutil.copytree(model, copy)
    for path in list(copy.rglob("*.safetensors")):
        weights = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        infix = ".fp16" if variant else ""
        save_file(weights, path.with_suffix(f"{infix}.safetensors"), {"format": "pt"})
    return copy


def test_weights_of_which_only_the_fp16_variant_is_there_are_used(
    records: Selection, flux: Path, clip: Path, tmp_path: Path
) -> None:
    found = []
    for variant in (False, True):
        copy = only_fp16(flux, tmp_path / f"flux-{variant}", variant=variant)
        pictures = render(records, copy, tmp_path / f"pictures-{variant}")
        texts = encode(copy, tmp_path / f"texts-{variant}.zarr")
        agreement = score(only_fp16(clip, tmp_path / f"clip-{variant}", variant=variant), tmp_path)
        found.append([*pictures, *texts.values(), agreement.numpy()])
    for usual, variant in zip(*found, strict=True):
        np.testing.assert_array_equal(usual, variant)
    model = resolve_model(str(tmp_path / "flux-True"))
    usual = resolve_model(str(flux))
    for part in ("transformer", "vae", "text_encoder"):
        assert model.parameters(part) == usual.parameters(part)


def test_the_fp16_variant_may_be_in_shards_and_the_usual_weights_go_before_it(
    flux: Path, tmp_path: Path
) -> None:
    copy = only_fp16(flux, tmp_path / "copy", variant=True)
    folder = copy / "transformer"
    (whole,) = folder.glob("*.safetensors")
    weights = load_file(whole)
    whole.unlink()
    names: dict[Any, Any] = {}
    for number, (name, tensor) in enumerate(weights.items()):
        shard = f"diffusion_pytorch_model.fp16-{number % 2 + 1:05}-of-00002.safetensors"
        names.setdefault(shard, {})[name] = tensor
    for shard, tensors in names.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    index = {"weight_map": {name: shard for shard, held in names.items() for name in held}}
    path = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    path.write_text(json.dumps({"metadata": {}, **index}))
    model = resolve_model(str(copy))
    assert len(model.weights("transformer").files) == 2
    from fedgfe_store.models.loading import load_part

    network = load_part(model, "transformer", torch.float32)
    assert torch.equal(network.x_embedder.weight, weights["x_embedder.weight"].float())
    save_file({"a": torch.zeros(1)}, copy / "vae/diffusion_pytorch_model.safetensors")
    assert model.weights("vae").variant is None
