"""Every family of the table: images are diffusers' own, from tensors and from a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import provenance_of
from PIL import Image
from safetensors.torch import save_file
from tiny_families import FAMILIES, direct, records

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.common.tensor_column import TensorColumn
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import Settings, seed_of
from fedgfe_store.generation.stopping import Stop, Stopped
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Placement
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection

HEIGHT, WIDTH = 32, 64
GUIDANCE, SEEDS = 3.0, (1, 2, 3)
SAMPLING = Settings("", "", "float32", 2, GUIDANCE, HEIGHT, WIDTH)
VISIBLE = 4
"""More than rounding does to a pixel of 0 to 255."""

KINDS = {"flux-dev": "flux", "flux-schnell": "flux", "sdxl-turbo": "sdxl", "sdxl-lcm": "sdxl"}
KINDS |= {"flux2-dev": "flux2", "flux2-klein-base": "flux2-klein"}
KINDS |= {"pixart-alpha": "pixart", "pixart-sigma": "pixart"}
KINDS = {name: KINDS.get(name, name) for name in FAMILIES}
"""Name in the table of each tiny model's family."""

Images = Sequence[NDArray[np.uint8]]
Columns = Mapping[str, NDArray[Any]]
Load = Callable[[str], DiffusersImages]
every_family = pytest.mark.parametrize("name", FAMILIES)
# AutoencoderKL, FLUX.2's, Sana's and Qwen-Image's.
each_decoder = pytest.mark.parametrize("name", ["flux-dev", "flux2-klein", "sana", "qwen-image"])
# Pipelines tell of their steps by one of two callbacks, and give latents or lists of them.
each_callback = pytest.mark.parametrize("name", ["sd", "pixart-alpha", "z-image"])


@pytest.fixture(scope="session")
def load(tiny_model: Callable[[str], Path]) -> Load:
    """Our adapters of the tiny models, by name; each is loaded once."""

    @cache
    def adapter(name: str) -> DiffusersImages:
        model = resolve_model(str(tiny_model(name)))
        return DiffusersImages.load(model, Placement("float32", "cpu"))

    return adapter


def apart(some: Images, others: Images) -> int:
    """Return how far the images of two lists are apart where they are furthest, of 255."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


def conditioning(columns: Columns, negatives: Columns) -> dict[str, torch.Tensor]:
    """Give columns of some records, and of one negative, as our adapter takes them."""
    images = len(next(iter(columns.values())))
    given = {name: torch.tensor(values) for name, values in columns.items()}
    for name, values in negatives.items():
        given[f"negative_{name}"] = torch.tensor(values).expand(images, *values.shape[1:])
    return given


def ours(
    pipeline: DiffusersImages,
    columns: Columns,
    negatives: Columns,
    seeds: Sequence[int] = SEEDS,
    *,
    slices: int = 99,
) -> Images:
    """Make images with our adapter, decoded so many at once."""
    latents = pipeline.denoise(conditioning(columns, negatives), seeds, SAMPLING)
    made: list[Any] = []
    for start in range(0, len(seeds), slices):
        made += pipeline.decode(latents[start : start + slices], SAMPLING)
    assert all(image is not None for image in made)
    return [image for image in made if image is not None]


def drawn(name: str) -> tuple[Columns, Columns]:
    """Draw three records of a family, and what guidance leads away from."""
    return records(name, 3, 1), records(name, 1, 2) if FAMILIES[name].negatives else {}


@every_family
def test_images_are_diffusers_own_alone_and_in_a_batch(
    tiny_model: Callable[[str], Path], load: Load, name: str
) -> None:
    columns, negatives = drawn(name)
    pipeline, size = load(name), (HEIGHT, WIDTH)
    assert pipeline.model.kind == KINDS[name]
    how: dict[str, Any] = {"steps": 2, "guidance": GUIDANCE, "size": size, "negatives": negatives}
    expected = direct(tiny_model(name), name, columns, SEEDS, **how)
    assert apart(expected[:1], expected[1:2]) > VISIBLE
    assert apart(ours(pipeline, columns, negatives), expected) <= 1
    assert apart(ours(pipeline, columns, negatives, slices=2), expected) <= 1
    for row, seed in enumerate(SEEDS):
        one = {column: values[row : row + 1] for column, values in columns.items()}
        assert apart(ours(pipeline, one, negatives, (seed,)), expected[row : row + 1]) <= 1


@every_family
def test_any_column_changes_the_image(load: Load, name: str) -> None:
    pipeline, (columns, negatives) = load(name), drawn(name)
    other, unwanted = records(name, 3, 5), records(name, 1, 7)
    before = ours(pipeline, columns, negatives)
    for column in columns:
        # One record's mask is one token longer, or another's embedding is in its place.
        changed = {**columns, column: columns[column].copy()}
        if column in FAMILIES[name].masks:
            changed[column][0, changed[column][0].sum().astype(int)] = 1
        else:
            changed[column][0] = other[column][0]
        after = ours(pipeline, changed, negatives)
        assert apart(before[:1], after[:1]) > VISIBLE, column
        assert apart(before[1:], after[1:]) <= 1, column
    for column in negatives:
        changed = {**negatives, column: unwanted[column]}
        assert apart(before, ours(pipeline, columns, changed)) > VISIBLE, column


class Cramped:
    """A model with memory for one image's denoising at once, and a stop after the first."""

    batches_per_swap = 1

    def __init__(self, real: DiffusersImages, stop: Stop) -> None:
        self._real, self.model, self.placement = real, real.model, real.placement
        self._stop = stop

    def denoise(self, embeddings: Any, seeds: Sequence[int], *args: Any, **options: Any) -> Any:
        if len(seeds) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        latents = self._real.denoise(embeddings, seeds, *args, **options)
        self._stop.request("SIGTERM")
        return latents

    def decode(self, latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        return self._real.decode(latents, *args, **options)


def store_of(name: str, columns: Columns, path: Path, masks_as: str = "bool") -> Selection:
    """Keep columns under the names of the pipeline's arguments."""
    masks, images = FAMILIES[name].masks, len(next(iter(columns.values())))
    values = {c: v.astype(masks_as) if c in masks else v for c, v in columns.items()}
    dtypes: Any = {c: v.dtype.name for c, v in values.items()}
    kept = [TensorColumn(c, v.shape[1:], dtype=dtypes[c]) for c, v in values.items()]
    store = EmbeddingStore.create(path, Schema(KINDS[name], tuple(kept)))
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(images), **values)
    return store.select()


def pictures(folder: Path, selection: Selection) -> Images:
    made = []
    for key in selection.keys():
        with Image.open(folder / image_name(key)) as image:
            made.append(np.asarray(image))
    return made


def unguided(name: str) -> float:
    """Return a guidance scale under which no negatives are needed."""
    return (0.0 if name == "z-image" else 1.0) if FAMILIES[name].negatives else GUIDANCE


@every_family
def test_a_store_of_its_columns_becomes_its_images(
    tiny_model: Callable[[str], Path], load: Load, tmp_path: Path, name: str
) -> None:
    columns = records(name, 3, 1)
    selection = store_of(name, columns, tmp_path / "store.zarr")
    seeds = [seed_of(0, key) for key in selection.keys()]
    size, guidance = (HEIGHT, WIDTH), unguided(name)
    expected = direct(tiny_model(name), name, columns, seeds, steps=2, guidance=guidance, size=size)
    remarks: list[str] = []

    def make(pipeline: Any, **more: Any) -> GenerationReport:
        how = {"steps": 2, "height": HEIGHT, "width": WIDTH, "batch_size": 3, "guidance": guidance}
        return generate(
            selection, tmp_path, pipeline=pipeline, report=remarks.append, **(how | more)
        )

    stop = Stop()
    first = make(Cramped(load(name), stop), stop=stop)
    assert (first.done, first.stopped) == (1, "SIGTERM")
    assert "out of memory: going on in batches of 1" in remarks
    rest = make(load(name))
    assert (rest.done, rest.skipped, rest.failed) == (2, 1, ())
    assert apart(pictures(tmp_path, selection), expected) <= 1
    said = provenance_of(tmp_path / image_name(selection.keys()[0]))
    assert said["diffusion_type"] == KINDS[name]
    assert said["digests"].keys() == columns.keys()
    assert said["settings"]["model"] == name
    assert said["settings"]["steps"] == 2


HOW: dict[str, Any] = {"steps": 2, "height": HEIGHT, "width": WIDTH, "batch_size": 3}


@pytest.mark.parametrize("masks_as", ["bool", "int64"])
def test_a_mask_that_would_be_miscounted_fails_its_record_alone(
    tiny_model: Callable[[str], Path], load: Load, tmp_path: Path, masks_as: str
) -> None:
    columns = records("lumina2", 3, 1)
    mask = columns["prompt_attention_mask"]
    mask[1] = mask[1, ::-1].copy()
    selection = store_of("lumina2", columns, tmp_path / "store.zarr", masks_as)
    made = generate(selection, tmp_path, pipeline=load("lumina2"), guidance=1.0, **HOW)
    (failure,) = made.failed
    assert (made.done, failure.key) == (2, selection.keys()[1])
    assert "expected a prompt_attention_mask of ones and then zeros" in failure.reason
    kept = selection.take([0, 2])
    rows = {column: values[[0, 2]] for column, values in columns.items()}
    seeds = [seed_of(0, key) for key in kept.keys()]
    how: dict[str, Any] = {"steps": 2, "guidance": 1.0, "size": (HEIGHT, WIDTH)}
    expected = direct(tiny_model("lumina2"), "lumina2", rows, seeds, **how)
    assert apart(pictures(tmp_path, kept), expected) <= 1


def negative_file(columns: Columns, path: Path) -> str:
    save_file({f"negative_{c}": torch.tensor(v) for c, v in columns.items()}, path)
    return str(path)


def test_a_negative_mask_that_would_be_miscounted_is_refused(load: Load, tmp_path: Path) -> None:
    selection = store_of("lumina2", records("lumina2", 3, 1), tmp_path / "store.zarr")
    unwanted = records("lumina2", 1, 2)
    unwanted["prompt_attention_mask"] = unwanted["prompt_attention_mask"][:, ::-1].copy()
    given = negative_file(unwanted, tmp_path / "n.safetensors")
    with pytest.raises(SchemaMismatchError, match="of ones and then zeros"):
        generate(selection, tmp_path, pipeline=load("lumina2"), guidance=3.0, negative=given, **HOW)


@pytest.mark.parametrize("name", ["chroma", "qwen-image", "flux2-klein-base"])
def test_negatives_that_are_denoised_apart_may_have_another_length(
    tiny_model: Callable[[str], Path], load: Load, tmp_path: Path, name: str
) -> None:
    columns, unwanted = records(name, 3, 1), records(name, 1, 2)
    shorter = {column: values[:, :10] for column, values in unwanted.items()}
    selection = store_of(name, columns, tmp_path / "store.zarr")
    given = negative_file(shorter, tmp_path / "n.safetensors")
    made = generate(
        selection, tmp_path, pipeline=load(name), guidance=GUIDANCE, negative=given, **HOW
    )
    assert (made.done, made.failed) == (3, ())
    seeds = [seed_of(0, key) for key in selection.keys()]
    how: dict[str, Any] = {"steps": 2, "guidance": GUIDANCE, "size": (HEIGHT, WIDTH)}
    expected = direct(tiny_model(name), name, columns, seeds, negatives=shorter, **how)
    assert apart(pictures(tmp_path, selection), expected) <= 1
    whole = direct(tiny_model(name), name, columns, seeds, negatives=unwanted, **how)
    assert apart(expected, whole) > VISIBLE


@each_callback
def test_a_stop_comes_between_two_steps(load: Load, name: str) -> None:
    pipeline, (columns, negatives) = load(name), drawn(name)
    called: list[int] = []

    def on_step() -> None:
        called.append(len(called))
        if len(called) == 2:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        pipeline.denoise(conditioning(columns, negatives), SEEDS, SAMPLING, on_step=on_step)
    assert called == [0, 1]
    pipeline.denoise(
        conditioning(columns, negatives), SEEDS, SAMPLING, on_step=lambda: called.append(2)
    )
    assert called.count(2) >= SAMPLING.steps


@each_decoder
def test_tiles_change_little_else_than_pixels(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pipeline, (columns, negatives) = load(name), drawn(name)
    vae = pipeline._pipeline.vae
    latents = pipeline.denoise(conditioning(columns, negatives), SEEDS, SAMPLING)
    calls, forward = [], vae.decoder.forward

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[0].shape)
        return forward(*args, **options)

    monkeypatch.setattr(vae.decoder, "forward", counted)
    before = {key: value for key, value in vars(vae).items() if "til" in key}
    whole = pipeline.decode(latents, SAMPLING)
    plainly = len(calls)
    tiled = pipeline.decode(latents, SAMPLING, tiled=True)
    assert len(calls) > 2 * plainly
    assert [image is not None and image.shape for image in tiled] == [(HEIGHT, WIDTH, 3)] * 3
    assert {key: value for key, value in vars(vae).items() if "til" in key} == before
    again = pipeline.decode(latents, SAMPLING)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(again))


def schema_of(shapes: Mapping[str, tuple[int, ...]]) -> Schema:
    """Return a schema of plain columns of these shapes."""
    return Schema("custom", tuple(TensorColumn(name, shape) for name, shape in shapes.items()))


@every_family
def test_columns_that_do_not_fit_are_refused_before_weights_are_loaded(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    model = resolve_model(str(tiny_model(name)))
    shapes = dict(FAMILIES[name].columns)
    found = model.conditioning(schema_of(shapes))
    assert found == {column: column for column in shapes}
    embeddings = [column for column in shapes if column not in FAMILIES[name].masks]
    # Of another width, not there, of another length than its sequence, or one in another's place.
    wrong = [{**shapes, column: (*shapes[column][:-1], 8)} for column in embeddings]
    for column in embeddings:
        left = {other: shape for other, shape in shapes.items() if other != column}
        wrong.append({"other": shapes[column], **left})
    for mask in FAMILIES[name].masks:
        wrong.append({**shapes, mask: (shapes[mask][0] + 1,)})
    if len(embeddings) == 2:
        one, two = embeddings
        wrong.append({**shapes, one: shapes[two], two: shapes[one]})
    for given in map(schema_of, wrong):
        with pytest.raises(SchemaMismatchError) as caught:
            model.conditioning(given)
        said = str(caught.value)
        assert said.startswith(f"embeddings for the model {name}: expected {KINDS[name]}: ")
        assert given.describe() in said
        assert all(f"{model.width(c)}]" in said for c in model.family.columns if not c.is_mask)
