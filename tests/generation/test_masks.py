"""Masks of stores reach the model: columns of any dtype, or the lengths of sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny_families import FAMILIES, direct, records

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name
from fedgfe_store.schema import TensorColumn

SIZE = 32
# No guidance, and so no negatives: of each family that it leads away above.
GUIDANCE = {"pixart-sigma": 1.0, "qwen-image": 1.0, "z-image": 0.0}

Columns = Mapping[str, NDArray[Any]]
Families = Callable[[str], Path]


def save(path: Path, columns: Columns, dtype: str) -> EmbeddingStore:
    """Make a store with a mask of this dtype, or with ragged sequences and none; lengths fit."""
    mask = next(name for name in columns if "mask" in name)
    sequence = TensorColumn(
        "prompt_embeds", columns["prompt_embeds"].shape[1:], ragged=dtype == "ragged"
    )
    tensors = [sequence]
    if not sequence.ragged and dtype != "none":
        kind: Any = dtype
        tensors.append(TensorColumn(mask, columns[mask].shape[1:], dtype=kind))
    store = EmbeddingStore.create(path, Schema.of("custom", *tensors))
    append(store, columns)
    return store


def append(store: EmbeddingStore, columns: Columns, **options: Any) -> None:
    mask = next(values for name, values in columns.items() if "mask" in name)
    given: dict[str, Any] = {name: columns.get(name, mask) for name in store.schema.columns}
    for tensor in store.schema.tensors:
        if tensor.dtype == "float32":
            given[tensor.name] = given[tensor.name].astype(np.float32)
    if store.schema.tensors[0].ragged:
        rows = zip(columns["prompt_embeds"], mask.sum(axis=1).astype(int).tolist(), strict=True)
        given["prompt_embeds"] = [row[:length] for row, length in rows]
    with store.append(node=0, round=1, **options) as batch:
        batch.add(split="train", class_name="dog", index=range(len(mask)), **given)


def make(store: EmbeddingStore, model: Path, name: str, folder: Path) -> GenerationReport:
    return generate(
        store.select(),
        folder,
        model=str(model),
        steps=1,
        guidance=GUIDANCE[name],
        height=SIZE,
        width=SIZE,
        batch_size=1,
        device="cpu",
    )


def shown(store: EmbeddingStore, folder: Path) -> NDArray[np.uint8]:
    images = []
    for key in store.select().keys():
        with Image.open(folder / image_name(key)) as image:
            images.append(np.asarray(image))
    return np.stack(images)


def expected(model: Path, name: str, columns: Columns, store: EmbeddingStore) -> NDArray[np.uint8]:
    seeds = [seed_of(0, key) for key in store.select().keys()]
    how: dict[str, Any] = {"steps": 1, "guidance": GUIDANCE[name], "size": SIZE}
    made = [
        direct(model, name, {n: v[i : i + 1] for n, v in columns.items()}, [seed], **how)
        for i, seed in enumerate(seeds)
    ]
    return np.stack([image for (image,) in made])


def drawn(name: str) -> dict[str, NDArray[Any]]:
    """Draw columns whose padding is zeros, as that of ragged ones is."""
    columns = records(name, 2, 3)
    (mask,) = FAMILIES[name].masks
    columns["prompt_embeds"] *= columns[mask][..., None].astype(np.float32)
    return columns


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDANCE)
def test_masks_of_any_dtype_and_lengths_make_the_images_of_diffusers(
    tiny_model: Families, tmp_path: Path, name: str
) -> None:
    model, columns = tiny_model(name), drawn(name)
    stores = {
        dtype: save(tmp_path / f"{dtype}.zarr", columns, dtype)
        for dtype in ("bool", "int64", "float32", "ragged", "none")
    }
    wanted = expected(model, name, columns, stores["bool"])
    (mask,) = FAMILIES[name].masks
    everything = {**columns, mask: np.ones_like(columns[mask])}
    unmasked = expected(model, name, everything, stores["bool"])
    assert (wanted != unmasked).any(), "a mask that has no effect proves nothing"
    for dtype, store in stores.items():
        folder = tmp_path / f"{dtype} images"
        assert make(store, model, name, folder).failed == ()
        images = unmasked if dtype == "none" else wanted
        np.testing.assert_array_equal(shown(store, folder), images, err_msg=dtype)


@pytest.mark.parametrize("dtype", ["bool", "ragged"])
def test_another_length_makes_an_image_stale(
    tiny_model: Families, tmp_path: Path, dtype: str
) -> None:
    name = "z-image"
    model, columns = tiny_model(name), drawn(name)
    (mask,) = FAMILIES[name].masks
    # A token of zeros, which is padding in one record and none in the other.
    length = int(columns[mask][0].sum())
    store = save(tmp_path / "e.zarr", columns, dtype)
    folder = tmp_path / "out"
    assert make(store, model, name, folder).done == 2
    before = shown(store, folder)
    assert make(store, model, name, folder).done == 0

    longer = {n: values[:1].copy() for n, values in columns.items()}
    longer[mask][0, length] = 1
    np.testing.assert_array_equal(longer["prompt_embeds"], columns["prompt_embeds"][:1])
    append(store, longer, if_exists="replace")
    status = image_status(store.select(), folder)
    assert status.totals == {"done": 1, "missing": 0, "stale": 1, "failed": 0, "all": 2}
    assert set(status.frame["reason"]) == {"", "embedding changed"}
    made = make(store, model, name, folder)
    assert (made.done, made.skipped) == (1, 1)
    changed = {
        item.key.value("index") for item in made.plan.items if item.reason == "embedding changed"
    }
    assert changed == {0}
    indices = [key.index for key in store.select().keys()]
    after = dict(zip(indices, shown(store, folder), strict=True))
    assert (after[0] != before[0]).any()
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.slow
def test_a_sequence_from_elsewhere_brings_its_mask(tiny_model: Families, tmp_path: Path) -> None:
    name = "pixart-sigma"
    model, columns, others = tiny_model(name), drawn(name), records(name, 2, 5)
    store = save(tmp_path / "e.zarr", columns, "int64")
    with store.append(node=0, round=9) as batch:
        batch.add(split="train", class_name="dog", index=range(2), **others)
    made = generate(
        store.select(round=1),
        tmp_path / "out",
        model=str(model),
        column=("prompt_embeds=round:9",),
        steps=1,
        guidance=1.0,
        height=SIZE,
        width=SIZE,
        batch_size=1,
        device="cpu",
    )
    assert made.plan.settings.column == (
        "prompt_attention_mask=round:9",
        "prompt_embeds=round:9",
    )
    for i, item in enumerate(made.plan.items):
        row = {n: v[i : i + 1] for n, v in others.items()}
        (wanted,) = direct(model, name, row, [item.seed], steps=1, guidance=1.0, size=SIZE)
        with Image.open(item.path) as image:
            np.testing.assert_array_equal(np.asarray(image), wanted)
