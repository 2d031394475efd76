"""Stable Diffusion from stored embeddings: pixels, negative embeddings, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zarr
from click.testing import CliRunner
from conftest import fill
from diffusers import DDPMScheduler
from generation_fakes import load_sd, save_random_flux, save_random_sd
from numpy.typing import NDArray
from pictures import provenance_of
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import Settings, fingerprint, seed_of
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Placement
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection
from fedgfe_store.text.encoders import encoder_identity
from fedgfe_store.text.negative import Negative

SIZE = 32
SETTINGS = {"steps": 3, "height": SIZE, "width": SIZE, "device": "cpu", "offload": "none"}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore.create(tmp_path / "sd.zarr", Schema.sd(77, width=8))
    fill(store, node=0, round=1, n=3)
    return store


@pytest.fixture
def selection(store: EmbeddingStore) -> Selection:
    return store.select()


@pytest.fixture
def make(sd: Path) -> Callable[..., GenerationReport]:
    def run(selection: Selection, folder: Path, **options: Any) -> GenerationReport:
        return generate(selection, folder, **{"model": str(sd), **SETTINGS, **options})

    return run


def pixels(folder: Path, selection: Selection) -> NDArray[np.uint8]:
    shown = []
    for key in selection.keys():
        with Image.open(folder / image_name(key)) as image:
            shown.append(np.asarray(image))
    return np.stack(shown)


def direct(
    folder: Path, selection: Selection, *, guidance: float = 7.5, negative: str = ""
) -> NDArray[np.uint8]:
    """What diffusers makes of each record, noise drawn and negative prompt encoded by itself."""
    pipeline = load_sd(folder)
    shown = []
    for clip, key in zip(selection.read("clip"), selection.keys(), strict=True):
        guided = {}
        if guidance > 1:
            # The pipeline refuses a prompt of one kind beside embeddings of the other.
            _, encoded = pipeline.encode_prompt(["x"], "cpu", 1, True, [negative])
            guided = {"negative_prompt_embeds": encoded}
        image = pipeline(
            prompt_embeds=torch.from_numpy(clip[None]),
            generator=[torch.Generator().manual_seed(seed_of(0, key))],
            num_inference_steps=3,
            guidance_scale=guidance,
            height=SIZE,
            width=SIZE,
            **guided,
        ).images[0]
        shown.append(np.asarray(image))
    return np.stack(shown)


def far(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_pixels_are_those_of_stable_diffusion_itself(
    sd: Path,
    make: Callable[..., GenerationReport],
    selection: Selection,
    tmp_path: Path,
    guidance: float,
) -> None:
    report = make(selection, tmp_path / "one", guidance=guidance, batch_size=1)
    assert (report.done, report.failed) == (6, ())
    expected = direct(sd, selection, guidance=guidance)
    assert len(np.unique(expected)) > 50, "a picture that shows nothing proves nothing"
    assert far(expected[0], expected[1]) > 20
    np.testing.assert_array_equal(pixels(tmp_path / "one", selection), expected)
    make(selection, tmp_path / "four", guidance=guidance, batch_size=4)
    assert far(pixels(tmp_path / "four", selection), expected) <= 1


def test_a_scheduler_that_adds_noise_draws_it_from_each_images_own_seed(
    sd: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    noisy = Path(shutil.copytree(sd, tmp_path / "noisy"))
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    scheduler.save_pretrained(noisy / "scheduler")
    index = json.loads((noisy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (noisy / "model_index.json").write_text(json.dumps(index))
    expected = direct(noisy, selection)
    for batch_size in (1, 4):
        folder = tmp_path / f"{batch_size}"
        make(selection, folder, model=str(noisy), batch_size=batch_size)
        assert far(pixels(folder, selection), expected) <= 1


def kept(store: EmbeddingStore) -> Selection:
    return EmbeddingStore.open(store.path).select(node="text", split="negative")


def test_the_negative_embedding_is_encoded_once_and_kept_in_the_store(
    sd: Path,
    make: Callable[..., GenerationReport],
    store: EmbeddingStore,
    tmp_path: Path,
) -> None:
    model = Path(shutil.copytree(sd, tmp_path / "model"))
    make(store.select(), tmp_path / "first", model=str(model))
    (values,) = kept(store).read("clip")
    encoded, _ = load_sd(sd).encode_prompt([""], "cpu", 1, False)
    np.testing.assert_array_equal(values, encoded[0].detach().numpy())
    settings = provenance_of(next((tmp_path / "first").glob("*.png")))["settings"]
    assert settings["negative"] == xxhash.xxh3_64_hexdigest(values.tobytes())
    (extra,) = map(json.loads, kept(store).column("extra"))
    assert (extra["prompt"], extra["dtype"]) == ("", "float32")
    commit = EmbeddingStore.open(store.path).commit
    again = make(store.select(), tmp_path / "first", model=str(model))
    assert (again.done, again.skipped) == (0, 6)
    assert EmbeddingStore.open(store.path).commit == commit
    assert not list(store.path.glob("negative_*"))


def test_a_store_that_rounds_gives_every_run_the_same_negative(
    make: Callable[..., GenerationReport], tmp_path: Path
) -> None:
    schema = Schema.sd(77, width=8, precision="bfloat16")
    store = EmbeddingStore.create(tmp_path / "rounded.zarr", schema)
    fill(store, node=0, round=1, n=1)
    make(store.select(), tmp_path / "first")
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").glob("*.png")}
    make(store.select(), tmp_path / "second")
    assert [
        provenance_of(path)["fingerprint"] for path in sorted((tmp_path / "second").glob("*.png"))
    ] == [provenance_of(path)["fingerprint"] for path in sorted((tmp_path / "first").glob("*.png"))]
    assert make(store.select(), tmp_path / "first").skipped == len(before) == 2
    for name in before:
        with (
            Image.open(tmp_path / "first" / name) as a,
            Image.open(tmp_path / "second" / name) as b,
        ):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_store_that_cannot_be_written_gets_a_remark(
    make: Callable[..., GenerationReport], store: EmbeddingStore, tmp_path: Path
) -> None:
    remarks: list[str] = []
    past = EmbeddingStore.open(store.path, as_of=store.commit).select()
    assert make(past, tmp_path / "images", report=remarks.append).done == 6
    assert [line for line in remarks if "not kept" in line] == [
        f"negative embeddings are not kept in {store.path}: it was opened as of commit "
        f"{store.commit}"
    ]
    assert len(kept(store)) == 0
    make(store.select(), tmp_path / "images")
    assert len(kept(store)) == 1
    assert make(past, tmp_path / "images").skipped == 6


def old_array(store: EmbeddingStore, values: NDArray[np.float32], model: Path) -> Path:
    """Keep a negative embedding as release 0.2 did."""
    encoder = encoder_identity(resolve_model(str(model)))
    name = xxhash.xxh3_64_hexdigest(json.dumps(["", encoder]).encode())
    array = zarr.create_array(
        store.path / f"negative_{name}",
        shape=values.shape,
        dtype="float32",
        attributes={
            "prompt": "",
            "encoder": encoder,
            "digest": xxhash.xxh3_64_hexdigest(values.tobytes()),
        },
    )
    array[:] = values
    return store.path / f"negative_{name}"


def test_arrays_of_earlier_releases_are_read_and_their_images_stay(
    sd: Path, make: Callable[..., GenerationReport], store: EmbeddingStore, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).standard_normal((77, 8), dtype=np.float32)
    array = old_array(store, values, sd)
    commit = EmbeddingStore.open(store.path).commit
    make(store.select(), tmp_path / "images")
    settings = provenance_of(next((tmp_path / "images").glob("*.png")))["settings"]
    assert settings["negative"] == xxhash.xxh3_64_hexdigest(values.tobytes())
    assert EmbeddingStore.open(store.path).commit == commit, "nothing is written"
    bare = save_random_sd(tmp_path / "bare", encoder=False)
    assert make(store.select(), tmp_path / "bare images", model=str(bare)).done == 6
    zarr.open_array(array, mode="r+")[3, 4] = 1.5
    with pytest.raises(DamagedDataError, match="its digest does not fit"):
        make(store.select(), tmp_path / "second")


def test_an_image_has_the_fingerprint_that_release_0_2_gave_it() -> None:
    values = np.arange(77 * 8, dtype=np.float32).reshape(77, 8) / 64
    negative = Negative.of({"prompt_embeds": values}, "a test")
    settings = Settings("m", "r", "float32", 3, 7.5, 32, 32, negative=negative.digest)
    # Both are what 0.2.0 says of these values.
    assert (negative.digest, fingerprint(settings)) == (
        "9c33ddf40e850c87",
        "3e4c024b2f3ebab61206238f34f1be4a",
    )


def test_a_model_without_encoder_takes_what_the_store_keeps(
    make: Callable[..., GenerationReport], store: EmbeddingStore, tmp_path: Path
) -> None:
    bare = save_random_sd(tmp_path / "bare", encoder=False)
    with pytest.raises(NotFoundError, match="needs negative embeddings or guidance <= 1") as caught:
        make(store.select(), tmp_path / "images", model=str(bare))
    assert "--negative FILE" in str(caught.value)
    assert not (tmp_path / "images").exists()
    assert make(store.select(), tmp_path / "free", model=str(bare), guidance=1.0).done == 6
    make(store.select(per_class=1), tmp_path / "other")
    assert make(store.select(), tmp_path / "images", model=str(bare)).done == 6


@pytest.mark.slow
def test_a_negative_prompt_or_file_changes_the_pictures(
    sd: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    make(selection, tmp_path / "plain")
    make(selection, tmp_path / "prompt", negative="blur", batch_size=1)
    long = "a very long list of what should not be there, " * 10
    assert make(selection, tmp_path / "long", negative=long).done == 6
    np.testing.assert_array_equal(
        pixels(tmp_path / "prompt", selection), direct(sd, selection, negative="blur")
    )
    assert far(pixels(tmp_path / "prompt", selection), pixels(tmp_path / "plain", selection)) > 5
    _, encoded = load_sd(sd).encode_prompt(["x"], "cpu", 1, True, ["blur"])
    torch.save(encoded.detach(), tmp_path / "blur.pt")
    np.save(tmp_path / "blur.npy", encoded[0].detach().numpy())
    for name in ("blur.pt", "blur.npy"):
        make(selection, tmp_path / name[5:], negative=str(tmp_path / name), batch_size=1)
        np.testing.assert_array_equal(
            pixels(tmp_path / name[5:], selection), pixels(tmp_path / "prompt", selection)
        )


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (torch.zeros(154, 8), SchemaMismatchError, r"prompt_embeds \[77, 8\] .*, got \[154, 8\]"),
        (torch.zeros(2, 77, 8), SchemaMismatchError, r"got \[2, 77, 8\]"),
        (torch.full((77, 8), torch.nan), SchemaMismatchError, "expected finite values"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, SchemaMismatchError, "one tensor in"),
        (None, NotFoundError, "expected a file"),
        (b"<html>", SchemaMismatchError, "cannot read"),
    ],
)
def test_a_negative_file_that_does_not_fit_is_refused_before_loading(
    make: Callable[..., GenerationReport],
    selection: Selection,
    tmp_path: Path,
    content: object,
    error: type[Exception],
    message: str,
) -> None:
    path = tmp_path / "negative.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=message):
        make(selection, tmp_path / "images", negative=str(path))
    assert not (tmp_path / "images").exists()


def test_records_of_another_length_than_the_encoders_are_refused_before_loading(
    make: Callable[..., GenerationReport], tmp_path: Path
) -> None:
    store = EmbeddingStore.create(tmp_path / "long.zarr", Schema.sd(154, width=8))
    fill(store, node=0, round=0, n=1)
    with pytest.raises(SchemaMismatchError, match=r"embeds \[154, 8\] .*, got \[77, 8\]; encode"):
        make(store.select(), tmp_path / "images")
    assert make(store.select(), tmp_path / "images", guidance=1.0).done == 2


def test_a_flux_store_with_sequences_renders_either_way(
    sd: Path, tmp_path: Path, make: Callable[..., GenerationReport]
) -> None:
    schema = Schema.flux(3, width=8, clip=(77, 8))
    store = EmbeddingStore.create(tmp_path / "guide.zarr", schema)
    fill(store, node=0, round=1, n=2)
    selection = store.select()
    assert make(selection, tmp_path / "sd", batch_size=1).done == 4
    np.testing.assert_array_equal(pixels(tmp_path / "sd", selection), direct(sd, selection))
    provenance = provenance_of(next((tmp_path / "sd").glob("*.png")))
    assert provenance["digests"].keys() == {"clip"}
    assert (provenance["diffusion_type"], provenance["settings"]["pool"]) == ("sd", None)
    flux = save_random_flux(tmp_path / "flux", clip=8)
    report = make(selection, tmp_path / "flux images", model=str(flux), steps=1)
    assert report.done == 4
    with pytest.raises(SchemaMismatchError, match="expected a FluxPipeline, got StableDiffusion"):
        make(selection, tmp_path / "wrong", diffusion_type="flux")


@pytest.mark.parametrize(
    "schema", [Schema.sd(77, width=9), Schema.flux(3, width=8, clip=(8,))], ids=["width", "vector"]
)
def test_embeddings_that_do_not_fit_are_refused_before_loading(
    make: Callable[..., GenerationReport], tmp_path: Path, schema: Schema
) -> None:
    store = EmbeddingStore.create(tmp_path / "other.zarr", schema)
    fill(store, node=0, round=0, n=1)
    with pytest.raises(
        SchemaMismatchError, match=r"expected sd: clip \[tokens, 8\], got"
    ) as caught:
        make(store.select(), tmp_path / "images", diffusion_type="sd")
    assert schema.describe() in str(caught.value)


def test_flux_takes_no_negative(tmp_path: Path, make: Callable[..., GenerationReport]) -> None:
    store = EmbeddingStore.create(tmp_path / "f.zarr", Schema.flux(3, width=8, clip=(4,)))
    fill(store, node=0, round=0, n=1)
    flux = str(save_random_flux(tmp_path / "flux"))
    with pytest.raises(SchemaMismatchError, match="takes none"):
        make(store.select(), tmp_path / "images", model=flux, negative="blur")


def test_what_is_known_of_a_model_agrees_with_diffusers(sd: Path) -> None:
    model, pipeline = resolve_model(str(sd), kind="sd"), load_sd(sd)
    assert model.default_size == pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    assert model.latent_scale == pipeline.vae_scale_factor
    assert (model.default_steps, model.default_guidance) == (50, 7.5)
    for part in ("unet", "vae"):
        expected = sum(p.numel() for p in getattr(pipeline, part).parameters())
        assert model.parameters(part) == expected


@pytest.mark.parametrize(
    ("clip", "negative", "guidance"),
    [
        ((2, 77, 8), (1, 77, 8), 7.5),
        ((2, 77, 8), (2, 154, 8), 7.5),
        ((2, 77, 8), None, 7.5),
        ((2, 77, 8), (2, 77, 8), 1.0),
        ((77, 8), None, 1.0),
        ((1, 1, 77, 8), None, 1.0),
        ((2, 77, 9), None, 1.0),
        ((1, 77, 8), None, 1.0),
    ],
)
def test_the_model_is_given_no_wrong_shape(
    sd: Path, clip: tuple[int, ...], negative: tuple[int, ...] | None, guidance: float
) -> None:
    pipeline = DiffusersImages.load(resolve_model(str(sd)), Placement("float32", "cpu"))
    embeddings = {"prompt_embeds": torch.zeros(clip)}
    if negative:
        embeddings["negative_prompt_embeds"] = torch.zeros(negative)
    settings = Settings("", "", "float32", 1, guidance, SIZE, SIZE)
    with pytest.raises(SchemaMismatchError, match=r"embeddings.*: expected"):
        pipeline.denoise(embeddings, [0, 1], settings, on_step=lambda: None)


def test_models_for_filling_are_refused(sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd, tmp_path / "copy"))
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(SchemaMismatchError, match="4 input channels, got 9"):
        resolve_model(str(copy), kind="sd")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_works(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path, dtype: str
) -> None:
    assert make(selection, tmp_path / "images", dtype=dtype, batch_size=4).done == 6


def test_the_command_infers_the_type_and_shows_the_negative(
    sd: Path, selection: Selection, tmp_path: Path
) -> None:
    arguments = ["--store", str(selection.path), "generate", "--model", str(sd), "--steps", "2"]
    arguments += ["--device", "cpu", "--height", "32", "--width", "32"]
    arguments += ["--output-dir", str(tmp_path / "out")]
    first = CliRunner().invoke(group, [*arguments, "--dry-run"])
    assert first.exit_code == 0, first.output
    assert "negative: prompt '', encoded" in first.output
    assert EmbeddingStore.open(selection.path).commit == selection.commit, "a dry run writes"
    assert CliRunner().invoke(group, arguments).exit_code == 0
    second = CliRunner().invoke(group, arguments)
    assert "negative: prompt '', kept in the store" in second.output
    assert "6 were there already" in second.output
