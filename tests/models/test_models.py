"""Which model is meant, what is known of it without its weights, and whether it fits a GPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from generation_fakes import load_flux, save_random_flux
from processes import finished
from safetensors.torch import save_file

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models import devices
from fedgfe_store.models.families import family_named, resolve_model
from fedgfe_store.models.fit import Footprint, choose_offload, estimate_footprint
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement
from fedgfe_store.models.tiny import TINY_FLUX, TINY_GUIDANCE, TINY_SIZE, TINY_STEPS

GIB = 2**30
FLUX_DEV = Model(
    family=family_named("flux"),
    name="black-forest-labs/FLUX.1-dev",
    folder=Path("nowhere"),
    revision="",
    pipeline_class="FluxPipeline",
    denoiser={
        "in_channels": 64,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "num_layers": 19,
        "num_single_layers": 38,
    },
    vae={"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
)


def change_config(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_name_counts_before_the_environment_before_the_store(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDGFE_MODEL", raising=False)
    folders = [str(shutil.copytree(flux, tmp_path / name)) for name in ("one", "two", "three")]
    assert resolve_model(stored=folders[2]).name == "three"
    monkeypatch.setenv("FEDGFE_MODEL", folders[1])
    assert resolve_model(stored=folders[2]).name == "two"
    assert resolve_model(folders[0], stored=folders[2]).name == "one"


def test_a_folders_revision_is_that_of_its_content(flux: Path, tmp_path: Path) -> None:
    first = resolve_model(str(flux)).revision
    copy = shutil.copytree(flux, tmp_path / "copy")
    assert resolve_model(str(copy)).revision == first
    other = save_random_flux(tmp_path / "other", seed=1)
    assert resolve_model(str(other)).revision != first
    change_config(copy, "scheduler/scheduler_config.json", shift=2.0)
    assert resolve_model(str(copy)).revision != first


def test_the_defaults_are_those_of_dev_schnell_and_tiny(flux: Path, tmp_path: Path) -> None:
    assert (FLUX_DEV.default_steps, FLUX_DEV.default_guidance) == (28, 3.5)
    assert (FLUX_DEV.default_size, FLUX_DEV.size_step) == (1024, 16)
    schnell = resolve_model(str(save_random_flux(tmp_path / "schnell", guidance=False)))
    assert (schnell.default_steps, schnell.default_guidance) == (4, None)
    tiny = resolve_model("tiny")
    assert tiny.name == resolve_model(str(TINY_FLUX)).name == "tiny"
    assert (tiny.default_steps, tiny.default_guidance) == (TINY_STEPS, TINY_GUIDANCE)
    assert tiny.default_size == TINY_SIZE


def test_what_is_known_of_a_model_agrees_with_diffusers(flux: Path) -> None:
    model, pipeline = resolve_model(str(flux)), load_flux(flux)
    assert model.default_size == pipeline.default_sample_size * pipeline.vae_scale_factor
    assert model.latent_scale == pipeline.vae_scale_factor
    for part in ("transformer", "vae"):
        expected = sum(p.numel() for p in getattr(pipeline, part).parameters())
        assert model.parameters(part) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_counted_over_shards_and_dtypes(
    flux: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    pipeline = load_flux(flux, dtype=dtype)
    pipeline.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    model = resolve_model(str(tmp_path))
    assert model.parameters("transformer") == resolve_model(str(flux)).parameters("transformer")
    next((tmp_path / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(NotFoundError, match="safetensors"):
        model.fetch_weights()


def test_parameters_are_counted_whatever_their_dtype(flux: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(flux, tmp_path / "copy")
    tensors = {
        "bytes": torch.zeros(3, 4, dtype=torch.uint8),
        "shorts": torch.zeros(6, dtype=torch.int16),
        "a number": torch.zeros((), dtype=torch.bool),
        "none": torch.zeros(0, 5),
    }
    save_file(tensors, copy / "vae" / "diffusion_pytorch_model.safetensors")
    assert resolve_model(str(copy)).parameters("vae") == sum(t.numel() for t in tensors.values())


def test_what_is_not_a_flux_model_is_refused(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"model_index\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(NotFoundError, match="expected tiny, a folder or a hub id"):
        resolve_model("no such model")
    copy = shutil.copytree(flux, tmp_path / "copy")
    change_config(copy, "transformer/config.json", in_channels=384)
    with pytest.raises(SchemaMismatchError, match="16 input channels, got 384"):
        resolve_model(str(copy))
    change_config(copy, "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(SchemaMismatchError, match="expected a FluxPipeline, got StableDiffusion"):
        resolve_model(str(copy), kind="flux")
    change_config(copy, "model_index.json", _class_name="WanPipeline")
    with pytest.raises(SchemaMismatchError, match=r"got WanPipeline.*\(sdxl\).*--family FILE"):
        resolve_model(str(copy))
    (copy / "model_index.json").write_text("<html>")
    with pytest.raises(SchemaMismatchError, match="expected JSON"):
        resolve_model(str(copy))


# A connection that is tried, and waited for, ends the process.
RESOLVE = """
import os, sys
sys.addaudithook(lambda event, _: event in ("socket.connect", "socket.getaddrinfo") and os._exit(9))
from fedgfe_store.errors import NotFoundError
from fedgfe_store.models.families import family_named, resolve_model
try:
    model = resolve_model(sys.argv[1])
    print(model.name, model.revision, model.folder)
except NotFoundError as error:
    print(error)
"""


def resolve_offline(name: str, cache: Path) -> str:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", RESOLVE, name]
    result = finished(command, env=environment)
    return result.stdout


@pytest.mark.slow
def test_a_hub_model_that_is_not_at_hand_says_at_once_how_to_get_it(tmp_path: Path) -> None:
    message = resolve_offline("black-forest-labs/FLUX.1-dev", tmp_path)
    assert "hf download black-forest-labs/FLUX.1-dev" in message
    assert "licence" in message
    assert "HF_HOME" in message
    assert "--model tiny" in message


def test_a_cached_hub_model_is_used_without_a_network(flux: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--flux"
    shutil.copytree(flux, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    name, revision, folder = resolve_offline("someone/flux", tmp_path).split()
    assert (name, revision) == ("someone/flux", commit)
    assert Path(folder) == cached / "snapshots" / commit


def test_the_footprint_follows_from_weights_and_size(flux: Path) -> None:
    model = resolve_model(str(flux))
    options = {"item_bytes": 2, "tokens": 17, "height": 64, "width": 64}
    one = estimate_footprint(model, batch_size=1, **options)
    four = estimate_footprint(model, batch_size=4, **options)
    assert one.denoiser == 2 * model.parameters("transformer")
    assert one.vae == 2 * model.parameters("vae")
    assert (four.denoising, four.decoding) == (4 * one.denoising, 4 * one.decoding)


@pytest.mark.parametrize(
    ("free", "batch_size", "expected"),
    [
        (79, 1, "none"),
        (79, 8, "none"),
        (31, 1, "none"),
        (23.5, 1, "model"),
        (11.5, 1, "group"),
        (2.8, 1, "sequential"),
        (1, 1, "sequential"),
    ],
)
def test_auto_is_the_first_mode_that_fits(
    monkeypatch: pytest.MonkeyPatch, free: float, batch_size: int, expected: str
) -> None:
    counts = {"transformer": 11_901_408_320, "vae": 83_819_683}
    monkeypatch.setattr(Model, "parameters", lambda self, part: counts[part])
    footprint = estimate_footprint(
        FLUX_DEV, item_bytes=2, batch_size=batch_size, tokens=17, height=1024, width=1024
    )
    mode, remark = choose_offload(
        "auto", device_type="cuda", free_bytes=int(free * GIB), footprint=footprint
    )
    assert mode == expected
    assert ("may need" in (remark or "")) == (free < 2)


def test_offload_does_as_it_is_told_except_on_the_cpu() -> None:
    huge = Footprint(denoiser=10**15, vae=0, block=10**15, denoising=0, decoding=0)

    def choose(wanted: str, device_type: str, free: int | None) -> tuple[str, str | None]:
        return choose_offload(wanted, device_type=device_type, free_bytes=free, footprint=huge)

    assert choose("none", "cuda", 1) == ("none", None)
    assert choose("model", "cuda", 10**16) == ("model", None)
    assert choose("model", "cpu", None) == ("none", "offload: model is ignored on the CPU")
    assert choose("none", "cpu", None) == ("none", None)
    assert choose("auto", "mps", None) == ("none", None)
    with pytest.raises(SchemaMismatchError, match="expected auto, .* or sequential, got 'disk'"):
        choose("disk", "cuda", 1)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement("float32", "cpu"), "a machine with more memory or --dtype bfloat16"),
        (Placement("bfloat16", "cpu"), "a machine with more memory"),
        (Placement("bfloat16", "cuda:0"), "--offload model or group or sequential"),
        (Placement("bfloat16", "cuda:0", "group"), "--offload sequential"),
        (Placement("bfloat16", "cuda:0", "sequential"), "a GPU with more free memory"),
        (Placement("bfloat16", "cuda:0", "none", compiled=True), "--offload model"),
        (Placement("bfloat16", "cuda:0", "model", compiled=True), "a GPU with more free memory"),
        (Placement("bfloat16", "cuda:0", quantization="nf4"), "a GPU with more free memory"),
    ],
)
def test_what_takes_less_memory_is_said_where_there_is_anything(
    placement: Placement, expected: str
) -> None:
    assert placement.remedy() == f"{expected} may help"


def test_the_dtype_is_bfloat16_where_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.choose_dtype(None, "cpu") == ("float32", None)
    for supported, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported
        )
        assert devices.choose_dtype(None, "cuda:0")[0] == expected
        dtype, remark = devices.choose_dtype("bfloat16", "cuda:0")
        assert dtype == expected
        assert (remark is None) == supported
    assert devices.choose_dtype("float32", "cuda:0") == ("float32", None)
