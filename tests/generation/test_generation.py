"""Images from a store: the right embeddings, the right noise, the pixels that FLUX itself gives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, fill, values
from generation_fakes import SIZE, FakePipeline, checksum, load_flux, save_random_flux
from noisy_anchors import noisy
from numpy.typing import NDArray
from pictures import accuracy, provenance_of
from PIL import Image
from processes import started

from fedgfe_store import EmbeddingStore, Metadata, Schema, Selection
from fedgfe_store.cli.main import group
from fedgfe_store.demo.anchors import class_anchor
from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.errors import (
    ConflictError,
    DamagedDataError,
    NotFoundError,
    SchemaMismatchError,
)
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import Settings, seed_of
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.offload import Swap
from fedgfe_store.models.placement import Placement
from fedgfe_store.names import image_name
from fedgfe_store.records import RecordKey

SETTINGS: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "device": "cpu"}


@pytest.fixture
def selection(store: EmbeddingStore) -> Selection:
    """Ten records of two classes at round 5."""
    fill(store, node=0, round=5, n=5)
    return store.select()


@pytest.fixture
def remarks() -> list[str]:
    return []


@pytest.fixture
def make(flux: Path, remarks: list[str]) -> Callable[..., GenerationReport]:
    """`generate` with the random FLUX, two steps and small pictures."""

    def run(selection: Selection, folder: Path, **options: Any) -> GenerationReport:
        chosen = {"model": str(flux), "report": remarks.append, **SETTINGS, **options}
        return generate(selection, folder, **chosen)

    return run


def settings_of(model: Path) -> Settings:
    return Settings(model.name, "", "float32", 2, 3.5, SIZE, SIZE)


def pixels(folder: Path, key: RecordKey) -> NDArray[np.uint8]:
    with Image.open(folder / image_name(key)) as image:
        return np.asarray(image)


def pictures(folder: Path) -> dict[str, NDArray[np.uint8]]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image)
    return found


def furthest(a: dict[str, NDArray[np.uint8]], b: dict[str, NDArray[np.uint8]]) -> int:
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name].astype(int) - b[name]).max()) for name in a)


def direct(
    pipeline: Any, selection: Selection, *, seed: int = 0, guidance: float = 3.5
) -> NDArray[np.uint8]:
    """What diffusers makes of a selection as one batch, noise drawn by itself."""
    seeds = [seed_of(seed, key) for key in selection.keys()]
    images = pipeline(
        prompt_embeds=torch.from_numpy(selection.read("t5")),
        pooled_prompt_embeds=torch.from_numpy(selection.read("clip")),
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        num_inference_steps=SETTINGS["steps"],
        guidance_scale=guidance,
        height=SIZE,
        width=SIZE,
    ).images
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pixels_are_those_of_flux_itself(
    flux: Path,
    make: Callable[..., GenerationReport],
    selection: Selection,
    tmp_path: Path,
    batch_size: int,
) -> None:
    folder = tmp_path / "images"
    report = make(selection, folder, batch_size=batch_size, seed=3, guidance=2.0)
    assert (report.done, report.skipped, report.failed) == (10, 0, ())
    reference = load_flux(flux)
    for start in range(0, 10, batch_size):
        part = selection.take(slice(start, start + batch_size))
        expected = direct(reference, part, seed=3, guidance=2.0)
        assert len(np.unique(expected)) > 50, "a picture that shows nothing proves nothing"
        for key, picture in zip(part.keys(), expected, strict=True):
            np.testing.assert_array_equal(pixels(folder, key), picture)
    mixed = selection.take([1, 0])
    swapped = direct(reference, selection.take([0]), seed=3, guidance=2.0)
    other = direct(reference, mixed, seed=3, guidance=2.0)
    assert np.abs(swapped[0].astype(int) - other[0]).max() > 20


def test_pictures_do_not_depend_on_batches_order_or_a_resume(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    shuffled = selection.take(np.random.default_rng(1).permutation(10))
    make(selection, tmp_path / "one", batch_size=1)
    make(selection, tmp_path / "four", batch_size=4)
    make(shuffled, tmp_path / "seven", batch_size=7)
    assert make(selection, tmp_path / "resumed", batch_size=2, limit=3).done == 3
    rest = make(shuffled, tmp_path / "resumed", batch_size=4)
    assert (rest.done, rest.skipped) == (7, 3)
    straight = pictures(tmp_path / "one")
    assert len(straight) == 10
    for name in ("four", "seven", "resumed"):
        assert furthest(straight, pictures(tmp_path / name)) <= 1


def test_inputs_are_identical_for_every_batch_size_and_order(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    t5, clip = selection.read("t5"), selection.read("clip")
    order = np.random.default_rng(2).permutation(10)
    seen = []
    for number, (batch_size, chosen) in enumerate(
        [(1, selection), (4, selection), (7, selection.take(order))]
    ):
        pipeline = FakePipeline(flux)
        make(chosen, tmp_path / str(number), batch_size=batch_size, pipeline=pipeline)
        seen.append(pipeline.inputs)
    for inputs in seen:
        assert len(inputs) == 10
        for row, key in enumerate(selection.keys()):
            np.testing.assert_array_equal(inputs[seed_of(0, key)][0], t5[row])
            np.testing.assert_array_equal(inputs[seed_of(0, key)][1], clip[row])


def test_each_picture_is_of_its_own_pair_and_seed(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    shuffled = selection.take(np.random.default_rng(3).permutation(10))
    pipeline = FakePipeline(flux)
    make(shuffled, tmp_path, batch_size=4, pipeline=pipeline)
    assert pipeline.batch_sizes == [4, 4, 2]
    t5, clip = selection.read("t5"), selection.read("clip")
    for row, key in enumerate(selection.keys()):
        expected = np.frombuffer(checksum(t5[row], clip[row], seed_of(0, key)), np.uint8)
        assert (pixels(tmp_path, key) == expected).all()


def test_noise_is_that_of_flux_whatever_the_batch_and_dtype(flux: Path) -> None:
    model = resolve_model(str(flux))
    seeds = [5, 2**62, 7]

    def noise(pipeline: DiffusersImages, seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline.draw(generators, SIZE, 2 * SIZE)

    alone = DiffusersImages.load(model, Placement("float32", "cpu"))
    half = DiffusersImages.load(model, Placement("bfloat16", "cpu"))
    together = noise(alone, seeds)
    for row, seed in enumerate(seeds):
        expected = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(seed))
        packed = expected.view(4, 4, 2, 8, 2).permute(1, 3, 0, 2, 4).reshape(32, 16)
        for drawn in (together[row], noise(half, [seed])[0]):
            assert drawn.dtype == torch.float32
            torch.testing.assert_close(drawn, packed, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_embeddings_are_cast_to_the_transformers_dtype(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path, dtype: str
) -> None:
    report = make(selection, tmp_path, dtype=dtype, batch_size=4)
    assert (report.done, report.failed) == (10, ())
    assert provenance_of(next(tmp_path.glob("*.png")))["settings"]["dtype"] == dtype


def test_a_bfloat16_store_gives_a_bfloat16_model_the_same_pictures(
    make: Callable[..., GenerationReport], tmp_path: Path
) -> None:
    for precision in ("float32", "bfloat16"):
        schema = Schema.flux(3, width=8, clip=(4,), precision=precision)
        store = EmbeddingStore.create(tmp_path / precision, schema)
        fill(store, node=0, round=0)
        make(store.select(), tmp_path / f"{precision} images", dtype="bfloat16")
    exact, rounded = (pictures(tmp_path / f"{p} images") for p in ("float32", "bfloat16"))
    assert len(exact) == 6
    assert furthest(exact, rounded) == 0


def test_a_sequence_keeps_its_length_since_padding_changes_the_picture(
    flux: Path, make: Callable[..., GenerationReport], tmp_path: Path
) -> None:
    short = EmbeddingStore.create(tmp_path / "short.zarr", Schema.flux(17, width=8, clip=(4,)))
    tensors = values(1, schema=short.schema)
    padded = np.zeros((1, 512, 8), np.float32)
    padded[:, :17] = tensors["t5"]
    long = EmbeddingStore.create(tmp_path / "long.zarr", Schema.flux(512, width=8, clip=(4,)))
    for store, t5 in ((short, tensors["t5"]), (long, padded)):
        with store.append(node=0, round=0) as batch:
            batch.add(split="train", class_name="dog", index=0, t5=t5[0], clip=tensors["clip"][0])
        make(store.select(), tmp_path / f"{t5.shape[1]}")
    (picture,) = pictures(tmp_path / "17").values()
    np.testing.assert_array_equal(picture, direct(load_flux(flux), short.select())[0])
    (other,) = pictures(tmp_path / "512").values()
    assert np.abs(picture.astype(int) - other).max() > 5


@pytest.mark.parametrize(
    ("t5", "clip"),
    [
        ((3, 8), (1, 4)),
        ((1, 1, 3, 8), (1, 4)),
        ((1, 3, 8), (4,)),
        ((1, 4), (1, 3, 8)),
        ((1, 3, 8), (1, 7, 4)),
        ((2, 3, 8), (1, 4)),
        ((1, 3, 8), (2, 4)),
        ((1, 3, 4), (1, 8)),
    ],
)
def test_the_model_is_given_no_wrong_shape(
    flux: Path, t5: tuple[int, ...], clip: tuple[int, ...]
) -> None:
    pipeline = DiffusersImages.load(resolve_model(str(flux)), Placement("float32", "cpu"))
    embeddings = {"prompt_embeds": torch.zeros(t5), "pooled_prompt_embeds": torch.zeros(clip)}
    with pytest.raises(
        SchemaMismatchError, match=r"expected (pooled_)?prompt_embeds \[1, (tokens, 8|4)\], got"
    ):
        pipeline.denoise(embeddings, [0], settings_of(flux))


@pytest.mark.parametrize(
    "schema",
    [
        Schema.flux(3, width=9, clip=(4,)),
        Schema.flux(3, width=8, clip=(5,)),
        Schema.flux(3, width=8, clip=(77, 5)),
        Schema.sd(77, width=4),
    ],
)
def test_a_store_that_does_not_fit_is_refused_before_weights_are_loaded(
    tmp_path: Path, make: Callable[..., GenerationReport], schema: Schema
) -> None:
    model = save_random_flux(tmp_path / "model")
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    store = EmbeddingStore.create(tmp_path / "store.zarr", schema)
    fill(store, node=0, round=0, n=1)
    with pytest.raises(SchemaMismatchError) as caught:
        make(store.select(), tmp_path / "images", model=str(model), diffusion_type="flux")
    assert "expected flux: t5 [tokens, 8], clip [4]" in str(caught.value)
    assert schema.describe() in str(caught.value)
    assert not (tmp_path / "images").exists()


def test_guidance_matters_where_the_model_takes_it(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path, remarks: list[str]
) -> None:
    make(selection, tmp_path / "low", guidance=1.0)
    make(selection, tmp_path / "high", guidance=9.0)
    assert furthest(pictures(tmp_path / "low"), pictures(tmp_path / "high")) > 0
    assert not [line for line in remarks if "guidance" in line]


def test_guidance_for_a_schnell_like_model_is_said_to_have_no_effect(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path, remarks: list[str]
) -> None:
    schnell = str(save_random_flux(tmp_path / "schnell", guidance=False))
    assert make(selection, tmp_path / "plain", model=schnell, steps=None).done == 10
    assert not [line for line in remarks if "guidance" in line]
    again = make(selection, tmp_path / "plain", model=schnell, steps=None, guidance=7.5)
    assert (again.done, again.skipped) == (0, 10), "the same settings, since guidance has no effect"
    assert [line for line in remarks if "guidance 7.5 has no effect" in line]
    settings = provenance_of(next((tmp_path / "plain").glob("*.png")))["settings"]
    assert (settings["steps"], settings["guidance"]) == (4, None)


def test_pictures_that_are_not_finite_fail_alone_and_are_never_saved(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    keys = selection.keys()
    t5, clip = selection.read("t5"), selection.read("clip")
    colour = checksum(t5[6], clip[6], seed_of(0, keys[6]))
    pipeline = FakePipeline(flux, bad_latents=[2], bad_pixels=[colour])
    heard: list[int] = []
    report = make(selection, tmp_path, batch_size=4, pipeline=pipeline, progress=heard.append)
    assert report.done == 8
    assert {failure.key for failure in report.failed} == {keys[2], keys[6]}
    assert all("not finite" in failure.reason for failure in report.failed)
    assert sum(heard) == 10
    assert not (tmp_path / image_name(keys[2])).exists()
    assert not (tmp_path / image_name(keys[6])).exists()
    assert make(selection, tmp_path, pipeline=FakePipeline(flux)).done == 2


def test_the_decoder_finds_the_picture_that_is_not_finite(flux: Path) -> None:
    pipeline = DiffusersImages.load(resolve_model(str(flux)), Placement("float32", "cpu"))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    latents, settings = pipeline.draw(generators, SIZE, SIZE), settings_of(flux)
    whole = pipeline.decode(latents, settings)
    latents[1, 3, 0] = torch.inf
    first, second, third = pipeline.decode(latents, settings)
    assert second is None
    np.testing.assert_array_equal(first, whole[0])
    np.testing.assert_array_equal(third, whole[2])


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_a_clip_sequence_is_pooled_as_asked_with_one_remark(
    flux: Path,
    make: Callable[..., GenerationReport],
    tmp_path: Path,
    remarks: list[str],
    pool: str,
) -> None:
    store = EmbeddingStore.create(tmp_path / "store.zarr", Schema.flux(3, width=8, clip=(77, 4)))
    fill(store, node=0, round=0)
    pipeline = FakePipeline(flux)
    make(store.select(), tmp_path, pool=pool, pipeline=pipeline, batch_size=4)
    sequences = store.select().read("clip")
    expected = {"last": sequences[:, 76], "first": sequences[:, 0], "mean": sequences.mean(axis=1)}
    for key, vector in zip(store.select().keys(), expected[pool], strict=True):
        np.testing.assert_allclose(pipeline.inputs[seed_of(0, key)][1], vector, atol=1e-6)
    assert len(remarks) == 1
    assert f"using pool {pool}" in remarks[0]


def test_the_guides_shapes_generate_as_they_are(tmp_path: Path, remarks: list[str]) -> None:
    model = save_random_flux(tmp_path / "model", width=4096, clip=768)
    metadata = Metadata(model=str(model))
    schema = Schema.flux(512, clip=(77, 768), metadata=metadata)
    store = EmbeddingStore.create(tmp_path / "store.zarr", schema)
    fill(store, node=0, round=5, classes="dog", n=2)
    report = generate(store.select(), tmp_path / "out", report=remarks.append, **SETTINGS)
    assert report.done == 2
    assert remarks == [
        "clip is a sequence [77, 768], which has no pooled vector: using pool last of its tokens "
        "(first or mean are the alternatives)"
    ]
    changed: dict[str, Any] = {"pool": "mean", "report": remarks.append, **SETTINGS}
    with pytest.raises(ConflictError, match="pool last -> mean"):
        generate(store.select(), tmp_path / "out", **changed)


def test_only_a_deleted_image_is_made_again(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    make(selection, tmp_path, pipeline=FakePipeline(flux))
    gone = tmp_path / image_name(selection.keys()[4])
    content = pictures(tmp_path)[gone.name]
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert make(selection, tmp_path, pipeline=FakePipeline(flux)).done == 1
    np.testing.assert_array_equal(pictures(tmp_path)[gone.name], content)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_filtered_run_makes_the_same_images_as_a_run_of_all(
    make: Callable[..., GenerationReport],
    selection: Selection,
    store: EmbeddingStore,
    tmp_path: Path,
) -> None:
    make(selection, tmp_path / "all")
    assert make(store.select(class_name="cat"), tmp_path / "some").done == 5
    assert make(store.select(class_name="dog"), tmp_path / "some").done == 5
    assert make(selection, tmp_path / "some").done == 0
    assert furthest(pictures(tmp_path / "all"), pictures(tmp_path / "some")) <= 1


def test_rounds_share_their_noise(
    flux: Path,
    make: Callable[..., GenerationReport],
    selection: Selection,
    store: EmbeddingStore,
    tmp_path: Path,
) -> None:
    fill(store, node=0, round=6, n=5)
    make(store.select(), tmp_path, pipeline=FakePipeline(flux))
    lines = list(read_manifest(tmp_path))
    seeds = [line["seed"] for line in lines]
    assert (len(seeds), len(set(seeds))) == (20, 10)
    samples = {(line["key"]["class_name"], line["key"]["index"], line["seed"]) for line in lines}
    assert len(samples) == 10


def test_a_picture_and_the_manifest_say_where_it_comes_from(
    make: Callable[..., GenerationReport], store: EmbeddingStore, tmp_path: Path
) -> None:
    with store.append(node="server", round=2) as batch:
        batch.add(
            split="val", class_name="a/b: ü", index=3, **{k: v[0] for k, v in values(1).items()}
        )
    make(store.select(), tmp_path, seed=9)
    (path,) = tmp_path.glob("*.png")
    provenance = provenance_of(path)
    assert provenance["key"] == {
        "node": "server",
        "round": 2,
        "split": "val",
        "class_name": "a/b: ü",
        "index": 3,
    }
    frame = store.select().records
    assert provenance["digests"]["t5"] == frame["t5_digest"][0]
    assert provenance["digests"]["clip"] == frame["clip_digest"][0]
    assert provenance["seed"] == seed_of(9, store.select().keys()[0])
    assert provenance["commit"] == 1
    assert provenance["image"] == 0
    assert provenance["versions"].keys() == {"fedgfe_store", "torch", "diffusers"}
    assert provenance["settings"]["seed"] == 9
    (line,) = read_manifest(tmp_path)
    assert line["file"] == path.name
    assert line["bytes"] == path.stat().st_size
    assert provenance.items() <= line.items()


def test_a_dry_run_loads_and_writes_nothing(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    model = save_random_flux(tmp_path / "model")
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    report = make(selection, tmp_path / "images", model=str(model), dry_run=True)
    assert (len(report.plan.todo), report.done) == (10, 0)
    assert not (tmp_path / "images").exists()
    with pytest.raises(NotFoundError, match="safetensors"):
        make(selection, tmp_path / "images", model=str(model))


def test_on_stale_reaches_the_files(
    make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    make(selection, tmp_path, limit=4)
    before = pictures(tmp_path)
    with pytest.raises(ConflictError, match="4 files: seed 0 -> 1"):
        make(selection, tmp_path, seed=1)
    kept = make(selection, tmp_path, seed=1, on_stale="keep")
    assert (kept.done, kept.skipped) == (6, 4)
    assert {
        name: (pictures(tmp_path)[name] == before[name]).all() for name in before
    } == dict.fromkeys(before, True)
    again = make(selection, tmp_path, seed=1, on_stale="regenerate")
    assert (again.done, again.skipped) == (4, 6)
    assert all((pictures(tmp_path)[name] != before[name]).any() for name in before)


def test_damaged_records_fail_alone(
    flux: Path,
    make: Callable[..., GenerationReport],
    selection: Selection,
    store: EmbeddingStore,
    tmp_path: Path,
) -> None:
    shard = max((store.path / "t5").rglob("*c*"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    fresh = EmbeddingStore.open(store.path).select()
    damaged = set()
    for position, key in enumerate(fresh.keys()):
        try:
            fresh.take([position]).read("t5")
        except DamagedDataError:
            damaged.add(key)
    assert 0 < len(damaged) < 10
    report = make(fresh, tmp_path / "images", batch_size=3, pipeline=FakePipeline(flux))
    assert {failure.key for failure in report.failed} == damaged
    assert report.done == 10 - len(damaged)
    assert {path.name for path in (tmp_path / "images").glob("*.png")} == {
        image_name(key) for key in fresh.keys() if key not in damaged
    }
    for failure in report.failed:
        assert f"class {failure.key.value('class_name')}" in str(failure)


def test_a_compaction_meanwhile_moves_records_and_loses_none(
    flux: Path,
    make: Callable[..., GenerationReport],
    selection: Selection,
    store: EmbeddingStore,
    tmp_path: Path,
) -> None:
    fill(store, node=7, round=1, n=50)
    seen = store.select()
    keys = seen.keys()

    class Meanwhile(FakePipeline):
        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            if not self.batch_sizes:
                other = EmbeddingStore.open(store.path)
                other.delete(node=7, index=range(2, 50))
                assert other.compact().records_moved
            return super().denoise(*args, **options)

    report = make(seen, tmp_path / "images", batch_size=1, pipeline=Meanwhile(flux))
    gone = {key for key in keys if key.node == "7" and key.index >= 2}
    failed = {failure.key for failure in report.failed}
    assert failed <= gone
    assert len(failed) > 80, "some were read before"
    assert all("has been deleted since" in failure.reason for failure in report.failed)
    assert report.done == len(keys) - len(failed)
    store.refresh()
    t5, clip = store.select(node=0).read("t5"), store.select(node=0).read("clip")
    for row, key in enumerate(store.select(node=0).keys()):
        expected = np.frombuffer(checksum(t5[row], clip[row], seed_of(0, key)), np.uint8)
        assert (pixels(tmp_path / "images", key) == expected).all()


def fail_writes(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Let the pictures of these numbers, counted as they are written, meet a full disk."""
    count = iter(range(1000))
    fsync = os.fsync

    def fail(file: int) -> None:
        if next(count) in numbers:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail)


def test_a_picture_that_cannot_be_written_fails_alone(
    flux: Path,
    make: Callable[..., GenerationReport],
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(store, node=0, round=0, n=50)
    fail_writes(monkeypatch, {1, 11, 21, 31})
    folder = tmp_path / "images"
    report = make(store.select(), folder, batch_size=2, pipeline=FakePipeline(flux))
    assert report.done == 96
    assert len(report.failed) == 4
    assert all("No space left" in failure.reason for failure in report.failed)
    assert len(os.listdir(folder)) == 96 + len(["manifest.jsonl", ".fedgfe-claims"])


def test_a_full_disk_stops_the_run(
    flux: Path,
    make: Callable[..., GenerationReport],
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(store, node=0, round=0, n=50)
    fail_writes(monkeypatch, set(range(5, 1000)))
    pipeline = FakePipeline(flux)
    report = make(store.select(), tmp_path / "images", batch_size=2, pipeline=pipeline)
    assert report.done == 5
    assert len(report.failed) == 95
    assert len(pipeline.batch_sizes) < 25, "it would be a waste to render on"
    assert "could not be written" in report.failed[-1].reason
    monkeypatch.undo()
    assert make(store.select(), tmp_path / "images", pipeline=FakePipeline(flux)).done == 95


def test_no_thread_outlives_a_run(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    class Failing(FakePipeline):
        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            if len(self.batch_sizes) == 2:
                raise RuntimeError("a fault")
            return super().denoise(*args, **options)

    before = set(threading.enumerate())
    # The exception is held on to, as a notebook would, and with it the frames of the run.
    with pytest.raises(RuntimeError, match="a fault") as caught:
        make(selection, tmp_path / "failed", batch_size=2, pipeline=Failing(flux))
    assert set(threading.enumerate()) <= before, caught
    assert len(pictures(tmp_path / "failed")) == 4, "finished images are kept"
    make(selection, tmp_path / "failed", batch_size=2, pipeline=FakePipeline(flux))
    assert set(threading.enumerate()) <= before


def test_offloaded_batches_are_denoised_together_and_decoded_together(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    pipeline = FakePipeline(flux, batches_per_swap=3)
    make(selection, tmp_path, batch_size=2, pipeline=pipeline)
    assert pipeline.calls == ["denoise"] * 3 + ["decode"] * 3 + ["denoise"] * 2 + ["decode"] * 2


def test_offload_gives_the_same_pictures(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    make(selection, tmp_path / "none", batch_size=2)
    model = resolve_model(str(flux))
    offloaded = DiffusersImages.load(model, Placement("float32", "cpu", "model"))
    make(selection, tmp_path / "model", batch_size=2, pipeline=offloaded)
    assert furthest(pictures(tmp_path / "none"), pictures(tmp_path / "model")) == 0
    assert {line["offload"] for line in read_manifest(tmp_path / "model")} == {"model"}


def test_a_swap_has_one_module_on_the_device_and_takes_it_home() -> None:
    modules = {name: torch.nn.BatchNorm1d(3) for name in ("a", "b")}
    home = {
        name: [t.data_ptr() for t in (*m.parameters(), *m.buffers())] for name, m in modules.items()
    }
    copies: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    def away(name: str) -> list[bool]:
        module = modules[name]
        tensors = (*module.parameters(), *module.buffers())
        return [t.data_ptr() != at for t, at in zip(tensors, home[name], strict=True)]

    swap = Swap(modules, put)
    swap.bring("a")
    assert (all(away("a")), any(away("b"))) == (True, False)
    swap.bring("a")
    assert len(copies) == 5
    swap.bring("b")
    assert (any(away("a")), all(away("b"))) == (False, True)


@pytest.mark.slow
def test_the_tiny_flux_draws_what_each_record_says(tmp_path: Path, remarks: list[str]) -> None:
    rng = np.random.default_rng(0)
    classes = [str(name) for name in rng.permutation(np.repeat(CLASSES, 10))]
    t5, clip = zip(*(noisy(class_anchor(name), 0.1, rng) for name in classes), strict=True)
    schema = Schema.flux(17, metadata=Metadata(model="tiny"))
    store = EmbeddingStore.create(tmp_path / "store.zarr", schema)
    with store.append(node=0, round=1) as batch:
        batch.add(
            split="train",
            class_name=classes,
            index=range(100),
            t5=np.stack(t5),
            clip=np.stack(clip),
        )
    selection = store.select().take(rng.permutation(100))
    generate(selection, tmp_path / "out", device="cpu", batch_size=7, report=remarks.append)
    shown = [pixels(tmp_path / "out", key) for key in selection.keys()]
    assert shown[0].shape == (64, 64, 3)
    assert accuracy(shown, selection.records["class_name"].tolist()) >= 0.95


KILLED_RUN = """
import os, sys, time
from fedgfe_store import EmbeddingStore
from fedgfe_store.generation.run import generate
count = 0
fsync = os.fsync
def slow(file):
    global count
    count += 1
    if count > 3:
        print("writing", flush=True)
        time.sleep(10**6)
    fsync(file)
os.fsync = slow
store, folder, model = sys.argv[1:]
generate(EmbeddingStore.open(store).select(), folder, model=model, steps=2, height=32, width=32,
         device="cpu", batch_size=2)
"""


@pytest.mark.slow
@pytest.mark.kill
def test_a_run_killed_while_it_saves_goes_on_where_it_was(
    flux: Path, make: Callable[..., GenerationReport], selection: Selection, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    command = [sys.executable, "-c", KILLED_RUN, str(selection.path), str(folder), str(flux)]
    with started(command, stderr=subprocess.DEVNULL) as process:
        assert process.line() == "writing"
        process.kill()
    left = pictures(folder)
    assert 0 < len(left) < 10
    assert list(folder.glob(".fedgfe-*.tmp"))
    written = min(left)
    manifest = folder / "manifest.jsonl"
    lines = [line for line in manifest.read_text().splitlines() if written not in line]
    manifest.write_text("".join(f"{line}\n" for line in lines))
    report = make(selection, folder, batch_size=2)
    assert (report.done, report.skipped) == (10 - len(left), len(left))
    make(selection, tmp_path / "straight", batch_size=2)
    assert furthest(pictures(folder), pictures(tmp_path / "straight")) <= 1
    assert not list(folder.glob(".fedgfe-*.tmp"))
    assert sorted(line["file"] for line in read_manifest(folder)) == sorted(pictures(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, r"height: expected a multiple of 8 pixels .*, got 30"),
        ({"width": 0}, r"width: expected a multiple of 8 pixels .*, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"guidance": float("nan")}, "guidance: expected a number from 0 up, got nan"),
        ({"pool": "max"}, "pool: expected one of last, first, mean, got 'max'"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"device": "toaster"}, "device: expected one of this machine, got 'toaster'"),
        ({"device": "meta"}, "device: expected one of this machine, got 'meta'"),
        (
            {"offload": "disk"},
            "offload: expected auto, none, model, group or sequential, got 'disk'",
        ),
    ],
)
def test_options_that_make_no_sense_are_named(
    make: Callable[..., GenerationReport],
    selection: Selection,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SchemaMismatchError, match=message):
        make(selection, tmp_path / "images", **options)


def test_an_empty_selection_and_a_file_for_a_folder_are_named(
    make: Callable[..., GenerationReport],
    selection: Selection,
    store: EmbeddingStore,
    tmp_path: Path,
) -> None:
    with pytest.raises(NotFoundError, match="at least one record"):
        make(store.select(class_name="wolf"), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConflictError, match="expected a folder"):
        make(selection, tmp_path / "file")


def run_command(store: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    result = CliRunner(env=environment).invoke(
        group, ["--store", str(store), "generate", "--device", "cpu", *arguments]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_plans_renders_and_goes_on(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--height", "32", "--width", "32", "--num_inference_steps", "2"]
    common = [*size, "--guidance_scale", "3", "--batch_size", "4"]
    environment = {"FEDGFE_MODEL": str(flux)}
    code, output = run_command(selection.path, *common, "--dry-run", **environment)
    assert code == 0
    assert "10 images: 0 done, 10 missing" in output
    assert "10 in 3 batches of 4" in output
    assert not Path("output_images").exists()
    code, output = run_command(selection.path, *common, "--class", "dog", **environment)
    assert code == 0
    assert "2 steps, guidance 3, 32x32, seed 0" in output
    assert "5 images rendered in" in output
    assert len(pictures(Path("output_images/embeddings"))) == 5
    code, output = run_command(selection.path, *common, "--quiet", **environment)
    assert "5 images rendered in" in output
    assert "5 were there already" in output
    code, output = run_command(selection.path, *size, **environment)
    assert code == 1
    assert "guidance 3.0 -> 3.5" in output


def test_the_command_exits_with_3_when_some_records_fail(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, {3})
    options = ["--model", str(flux), "--height", "32", "--width", "32", "--steps", "2"]
    code, output = run_command(selection.path, *options, "--output_dir", str(tmp_path / "out"))
    assert code == 3
    assert "failed: 1" in output
    assert "No space left" in output
    assert "9 images rendered" in output
    code, output = run_command(selection.path, *options, "--output-dir", str(tmp_path / "out"))
    assert (code, "1 image rendered" in output) == (0, True)


def test_the_folder_is_named_after_the_experiment(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = Metadata(experiment="vegas-10n", model=str(flux))
    schema = Schema.flux(3, width=8, clip=(4,), metadata=metadata)
    fill(EmbeddingStore.create(tmp_path / "e.zarr", schema), node=0, round=0, n=1)
    code, output = run_command(
        tmp_path / "e.zarr", "--steps", "1", "--height", "32", "--width", "32"
    )
    assert (code, len(pictures(tmp_path / "output_images" / "vegas-10n"))) == (0, 2), output


def test_small_is_the_schema_of_the_random_flux(flux: Path) -> None:
    found = resolve_model(str(flux)).conditioning(SMALL)
    assert found == {"prompt_embeds": "t5", "pooled_prompt_embeds": "clip"}
    assert json.loads((flux / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
