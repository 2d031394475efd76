"""Reference text embeddings: bit for bit diffusers' own, planned first, and refused clearly."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import fill
from diffusers import FluxPipeline, StableDiffusionPipeline
from generation_fakes import load_sd, save_random_flux, save_random_sd
from processes import finished

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.fit import choose_offload
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement
from fedgfe_store.models.tiny import TINY_FLUX
from fedgfe_store.text import EncodingReport, encode_references, plan_references
from fedgfe_store.text.encoders import (
    TextEncoders,
    encoder_footprint,
    encoder_identity,
)

PHOTO = "a photo of a {class}"
GIB = 2**30


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_flux(tmp_path_factory.mktemp("models") / "flux", encoders=True)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    metadata = Metadata(classes=("dog", "cat"))
    schema = Schema.flux(24, width=8, clip=(4,), metadata=metadata)
    return EmbeddingStore.create(tmp_path / "s.zarr", schema)


def encode(
    path: Path, *prompts: str, progress: Callable[[int], object] = lambda n: None, **options: Any
):
    plan = plan_references(path, prompts or (PHOTO,), **{"device": "cpu", **options})
    return encode_references(plan, progress=progress)


def counts(report: EncodingReport) -> tuple[int, int, int]:
    return report.added, report.replaced, report.unchanged


def texts(path: Path, **filters: Any):
    return EmbeddingStore.open(path).select(node="text", **filters)


@torch.no_grad()
def reference(folder: Path, prompts: list[str], tokens: int, **options: Any):
    """What diffusers makes of each prompt alone, by the whole pipeline."""
    pipeline = FluxPipeline.from_pretrained(folder, **options)
    found = [pipeline.encode_prompt(p, max_sequence_length=tokens)[:2] for p in prompts]
    return tuple(torch.cat(values).float().numpy() for values in zip(*found, strict=True))


def same(values: np.ndarray, expected: np.ndarray) -> bool:
    return values.shape == expected.shape and values.tobytes() == expected.tobytes()


def test_flux_embeddings_are_diffusers_own_to_the_last_bit(
    flux: Path, store: EmbeddingStore
) -> None:
    done: list[int] = []
    report = encode(store.path, PHOTO, "{class}", model=str(flux), progress=done.append)
    assert counts(report) == (4, 0, 0)
    assert sum(done) == 4
    records = texts(store.path).records
    rows = zip(records["class_name"], records["index"], strict=True)
    assert set(rows) == {("dog", 0), ("dog", 1), ("cat", 0), ("cat", 1)}
    assert set(records["split"]) == {"reference"}
    assert set(records["round"]) == {0}
    prompts = ["a photo of a dog", "dog", "a photo of a cat", "cat"]
    t5, clip = reference(flux, prompts, 24)
    assert len(np.unique(t5[:, -1], axis=0)) == len(np.unique(clip, axis=0)) == 4
    assert same(texts(store.path).read("t5"), t5)
    assert same(texts(store.path).read("clip"), clip)
    model = resolve_model(str(flux))
    assert [json.loads(text) for text in records["extra"]] == [
        {
            "prompt": prompt,
            "model": "flux",
            "revision": model.revision,
            "encoder": encoder_identity(model),
            "dtype": "float32",
        }
        for prompt in prompts
    ]


def test_many_classes_go_in_bounded_batches(flux: Path, store: EmbeddingStore) -> None:
    names = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    done: list[int] = []
    encode(store.path, classes=names, model=str(flux), progress=done.append)
    assert done == [32, 32]
    t5, clip = reference(flux, [f"a photo of a {name}" for name in names], 24)
    assert same(texts(store.path).read("t5"), t5)
    assert same(texts(store.path).read("clip"), clip)
    assert EmbeddingStore.open(store.path).commit == 1


def test_bfloat16_is_kept_exactly(flux: Path, store: EmbeddingStore) -> None:
    encode(store.path, model=str(flux), dtype="bfloat16")
    t5, clip = reference(flux, ["a photo of a dog", "a photo of a cat"], 24, dtype=torch.bfloat16)
    assert same(texts(store.path).read("t5"), t5)
    assert same(texts(store.path).read("clip"), clip)


@torch.no_grad()
def test_a_store_of_clip_sequences_gets_the_last_hidden_state(flux: Path, tmp_path: Path) -> None:
    schema = Schema.flux(9, width=8, clip=(77, 4))
    store = EmbeddingStore.create(tmp_path / "guide.zarr", schema)
    encode(store.path, classes=["dog"], model=str(flux))
    pipeline = FluxPipeline.from_pretrained(flux)
    ids = pipeline.tokenizer(
        ["a photo of a dog"], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    expected = pipeline.text_encoder(ids).last_hidden_state
    assert same(texts(store.path).read("clip"), expected.numpy())
    assert same(texts(store.path).read("t5"), reference(flux, ["a photo of a dog"], 9)[0])


@torch.no_grad()
def test_stable_diffusion_embeddings_are_diffusers_own(sd: Path, tmp_path: Path) -> None:
    path = tmp_path / "sd.zarr"
    report = encode(path, classes=["dog", "cat"], model=str(sd), diffusion_type="sd")
    assert counts(report) == (2, 0, 0)
    pipeline = load_sd(sd)
    found = [
        pipeline.encode_prompt(f"a photo of a {name}", "cpu", 1, False)[0]
        for name in ("dog", "cat")
    ]
    assert same(texts(path).read("clip"), torch.cat(found).numpy())
    schema = EmbeddingStore.open(path).schema
    assert (schema.kind, schema.columns) == ("sd", {"clip": (77, 8)})
    # the store says now which family it is for
    assert counts(encode(path, "{class}", classes=["fox"], model=str(sd))) == (1, 0, 0)


def test_a_store_that_is_not_there_is_made(flux: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.zarr"
    encode(path, classes=["dog"], model=str(flux), max_sequence_length=12)
    schema = EmbeddingStore.open(path).schema
    assert (schema.kind, schema.columns) == ("flux", {"t5": (12, 8), "clip": (4,)})
    assert schema.metadata.classes == ("dog",)
    assert schema.metadata.encoder == encoder_identity(resolve_model(str(flux)))
    assert schema.metadata.diffusion_type == "flux"
    encode(tmp_path / "plain.zarr", classes=["dog"], model=str(flux))
    assert EmbeddingStore.open(tmp_path / "plain.zarr").schema.columns["t5"] == (17, 8)


def test_what_is_there_is_not_encoded_again(
    flux: Path, store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(store.path, classes=["dog"], model=str(flux))
    assert counts(encode(store.path, model=str(flux))) == (1, 0, 1)
    commit = EmbeddingStore.open(store.path).commit
    monkeypatch.setattr(TextEncoders, "load", lambda *_: pytest.fail("loaded for nothing"))
    assert counts(encode(store.path, model=str(flux))) == (0, 0, 2)
    assert counts(encode(store.path, model=str(flux), if_exists="replace")) == (0, 0, 2)
    assert EmbeddingStore.open(store.path).commit == commit


def test_other_references_are_a_conflict_before_anything_is_loaded(
    flux: Path, store: EmbeddingStore
) -> None:
    encode(store.path, model=str(flux))
    with pytest.raises(
        ConflictError,
        match=r"node text, .* class dog, index 0 is in .*\(prompt 'a photo of a dog' there, "
        r"'the dog' now\), and 1 more; if_exists='replace'",
    ):
        plan_references(store.path, ["the {class}"], model=str(flux), device="cpu")
    with pytest.raises(ConflictError, match="dtype 'float32' there, 'bfloat16' now"):
        plan_references(store.path, [PHOTO], model=str(flux), device="cpu", dtype="bfloat16")
    kept = encode(store.path, "the {class}", "{class}", model=str(flux), if_exists="skip")
    assert counts(kept) == (2, 0, 2)
    replaced = encode(store.path, "the {class}", model=str(flux), if_exists="replace")
    assert counts(replaced) == (0, 2, 0)
    t5, _ = reference(flux, ["the dog"], 24)
    assert same(texts(store.path, class_name="dog", index=0).read("t5"), t5)


def test_references_of_unknown_origin_are_a_conflict(flux: Path, store: EmbeddingStore) -> None:
    with store.append(node="text", round=0) as batch:
        tensors = {"t5": np.ones((24, 8), np.float32), "clip": np.ones(4, np.float32)}
        batch.add(split="reference", class_name="dog", index=0, **tensors)
    with pytest.raises(ConflictError, match="no prompt there, 'a photo of a dog' now"):
        encode(store.path, model=str(flux))


def test_another_encoder_than_the_stores_is_refused(flux: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    encode(path, classes=["dog"], model=str(flux))
    other = save_random_flux(tmp_path / "other", encoders=True, seed=1)
    with pytest.raises(
        SchemaMismatchError, match="model other: expected the encoder '[0-9a-f]{32}"
    ):
        encode(path, "{class}", classes=["cat"], model=str(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 512}, "expected 24, the tokens of t5 in .*s.zarr, got 512"),
        ({"prompts": []}, "at least one, got none"),
        ({"prompts": ["a dog"]}, r"expected \{class\} in it for 2 classes, got 'a dog'"),
        ({"prompts": ["a {clas}"]}, r"no field but \{class\}, got 'a \{clas\}'"),
        ({"classes": []}, r"class: expected names, got \[\]"),
        ({"classes": [""]}, "class: expected names"),
        ({"if_exists": "maybe"}, "error, replace or skip, got 'maybe'"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"diffusion_type": "sd"}, "expected a StableDiffusionPipeline, got FluxPipeline"),
    ],
)
def test_what_is_of_no_use_is_refused_by_the_plan(
    flux: Path, store: EmbeddingStore, options: dict[str, Any], message: str
) -> None:
    prompts = options.pop("prompts", [PHOTO])
    with pytest.raises(SchemaMismatchError, match=message):
        plan_references(store.path, prompts, **{"model": str(flux), "device": "cpu", **options})


def test_encoders_that_do_not_fit_are_refused_with_both_shapes(
    flux: Path, sd: Path, tmp_path: Path
) -> None:
    wide = EmbeddingStore.create(tmp_path / "wide.zarr", Schema.flux(17))
    with pytest.raises(
        SchemaMismatchError,
        match=r"text encoders of the model flux: expected flux: t5 \[17, 4096\], clip \[768\], "
        r"as in the store, got flux: t5 \[17, 8\], clip \[4\]",
    ):
        encode(wide.path, classes=["dog"], model=str(flux))
    long = EmbeddingStore.create(tmp_path / "long.zarr", Schema.sd(154, width=8))
    with pytest.raises(SchemaMismatchError, match=r"expected sd: clip \[154, 8\], .*\[77, 8\]"):
        encode(long.path, classes=["dog"], model=str(sd))
    with pytest.raises(SchemaMismatchError, match="expected 77, which the tokenizer of sd gives"):
        encode(
            tmp_path / "new.zarr",
            classes=["dog"],
            model=str(sd),
            diffusion_type="sd",
            max_sequence_length=20,
        )


def test_without_a_store_classes_have_to_be_named(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatchError, match="class: expected names, since there is no store"):
        encode(tmp_path / "none.zarr", model=str(flux))


def test_a_model_without_encoders_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        NotFoundError, match="the model tiny has no text encoders: expected text_en"
    ):
        encode(tmp_path / "s.zarr", classes=["dog"], model="tiny")
    bare = save_random_sd(tmp_path / "bare", encoder=False)
    with pytest.raises(NotFoundError, match="the model bare has no text encoders"):
        encode(tmp_path / "s.zarr", classes=["dog"], model=str(bare), diffusion_type="sd")
    assert not (tmp_path / "s.zarr").exists()


def test_missing_weights_are_told_and_leave_no_store(flux: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(flux, tmp_path / "copy"))
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="model .*copy: text_encoder_2"):
        encode(tmp_path / "s.zarr", classes=["dog"], model=str(copy))
    assert not (tmp_path / "s.zarr").exists()


def test_values_that_are_not_finite_are_refused(flux: Path, tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(flux)
    with torch.no_grad():
        pipeline.text_encoder_2.encoder.final_layer_norm.weight.fill_(torch.inf)
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises(SchemaMismatchError, match="t5 of node text, .* class dog, .* not finite"):
        encode(tmp_path / "s.zarr", classes=["dog"], model=str(tmp_path / "broken"))
    assert len(EmbeddingStore.open(tmp_path / "s.zarr")) == 0


def test_prompts_that_are_cut_are_told(flux: Path, tmp_path: Path) -> None:
    plan = plan_references(
        tmp_path / "s.zarr", ["{class}"], classes=["ab", "a" * 80], model=str(flux), device="cpu"
    )
    remarks: list[str] = []
    encode_references(plan, report=remarks.append)
    assert [line.partition(": ")[2] for line in remarks if line.startswith("prompt")] == [
        "82 tokens of CLIP, cut to 77",
        "82 tokens of T5, cut to 17",
    ]


@pytest.mark.parametrize(
    ("free", "expected"), [(24, "none"), (10, "model"), (4, "sequential"), (0.1, "sequential")]
)
def test_auto_offload_goes_by_the_encoders_sizes(
    monkeypatch: pytest.MonkeyPatch, flux: Path, free: float, expected: str
) -> None:
    sizes = {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}
    monkeypatch.setattr(Model, "parameters", lambda self, part: sizes[part])
    config = {"num_layers": 24}
    monkeypatch.setattr(Model, "config", lambda self, part, name="config.json": config)
    footprint = encoder_footprint(resolve_model(str(flux)), item_bytes=2)
    mode, remark = choose_offload(
        "auto",
        device_type="cuda",
        free_bytes=int(free * GIB),
        footprint=footprint,
        possible=("none", "model", "sequential"),
    )
    assert mode == expected
    assert ("may need" in (remark or "")) == (free < 1)


def test_parameters_of_encoders_are_counted_from_their_files(flux: Path) -> None:
    model, pipeline = resolve_model(str(flux)), FluxPipeline.from_pretrained(flux)
    for part in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        expected = sum(p.numel() for p in getattr(pipeline, part).parameters())
        assert model.parameters(part) == expected


def test_encoders_are_dropped(flux: Path) -> None:
    with TextEncoders.load(resolve_model(str(flux)), Placement("float32", "cpu")) as encoders:
        assert encoders.encode(["a"], tokens=3)["prompt_embeds"].shape == (1, 3, 8)
    assert not [
        name for name, value in vars(encoders).items()
        if isinstance(value, FluxPipeline | StableDiffusionPipeline | torch.nn.Module)
    ]  # fmt: skip


HUB = """
from fedgfe_store.errors import NotFoundError
from fedgfe_store.text.encoders import check_encoders
from fedgfe_store.models.families import resolve_model
model = resolve_model("someone/flux")
check_encoders(model, fetch=False)
try:
    check_encoders(model, fetch=True)
    print("whole")
except NotFoundError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_cached_model_with_encoders_of_configuration_only_is_fetched(
    flux: Path, tmp_path: Path
) -> None:
    """A hub model is resolved by its JSON files, which leaves folders without weights."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--flux"
    snapshot = Path(shutil.copytree(flux, cached / "snapshots" / commit))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def run() -> str:
        command = [sys.executable, "-c", HUB]
        return finished(command, env=environment).stdout

    assert run() == "whole\n"
    (snapshot / "text_encoder_2" / "model.safetensors").unlink()
    assert "hf download someone/flux" in run()


def run(store: Path, *arguments: str | int | Path) -> Result:
    return CliRunner().invoke(group, ["--store", str(store), *map(str, arguments)])


def test_the_command_plans_encodes_and_skips(flux: Path, store: EmbeddingStore) -> None:
    arguments = ("encode", "--model", flux, "--device", "cpu", "--prompt", "a {class}")
    dry = run(store.path, *arguments, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "dog         0   a dog    to encode" in dry.output
    assert "2 prompts to encode; dry run, nothing written" in dry.output
    assert EmbeddingStore.open(store.path).commit == 0
    first = run(store.path, *arguments)
    assert first.exit_code == 0, first.output
    assert "model: flux (" in first.output
    assert "2 text embeddings encoded in" in first.output
    second = run(store.path, *arguments, "--class", "dog,cow")
    assert "1 text embedding encoded in" in second.output
    assert "1 unchanged" in second.output
    assert (
        "cow         0   a cow    in the store"
        in run(store.path, *arguments, "--class", "cow", "--dry-run").output
    )
    other = run(store.path, "encode", "--model", flux, "--prompt", "{class}")
    assert other.exit_code == 1
    assert other.output.startswith("error: node text, round 0, split reference, class dog")
    kept = run(store.path, "encode", "--model", flux, "--if-exists", "skip", "--dry-run")
    assert "kept: prompt 'a dog' there, 'a photo of a dog' now" in kept.output


def test_the_command_says_what_tiny_lacks(tmp_path: Path) -> None:
    result = run(tmp_path / "s.zarr", "encode", "--class", "dog", "--model", "tiny")
    assert result.exit_code == 1
    assert "error: the model tiny has no text encoders" in result.output
    assert str(TINY_FLUX) in result.output


def test_references_are_selected_and_rendered_beside_nodes(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, n=1)
    encode(store.path, model=str(flux))
    found = EmbeddingStore.open(store.path).select(node=["0", "text"], class_name="dog")
    assert [(key.node, key.round, key.split) for key in found.keys()] == [
        ("0", 5, "train"),
        ("text", 0, "reference"),
    ]
    arguments = ("generate", "--node", "0,text", "--class", "dog", "--model", flux, "--steps", 1)
    size = ("--height", 32, "--width", 32, "--device", "cpu")
    result = run(store.path, *arguments, *size, "--output-dir", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "images").glob("*.png")} == {
        "node_0_train_dog_0_r5.png",
        "node_text_reference_dog_0_r0.png",
    }
