"""The models that other tests compare with are worth comparing with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_families import FAMILIES, direct, records
from tiny_prompts import encode, from_prompts

SIZE = (32, 64)
GUIDANCE = 3.0
VISIBLE = 4
Images = list[NDArray[np.uint8]]


def apart(some: Images, others: Images) -> int:
    """Return how far the images of two lists are apart where they are furthest, of 255."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_depend_on_all_that_goes_in_and_not_on_their_neighbours(tiny_model, name):
    folder, columns, others = tiny_model(name), records(name, 2, 1), records(name, 2, 5)
    guided = FAMILIES[name].negatives
    unwanted, other = (records(name, 1, seed) if guided else {} for seed in (2, 7))

    def make(given=columns, seeds=(1, 2), negatives=unwanted):
        how = {"steps": 2, "guidance": GUIDANCE, "size": SIZE, "negatives": negatives}
        return direct(folder, name, given, seeds, **how)

    first = make()
    assert [image.shape for image in first] == [(*SIZE, 3)] * 2
    assert apart(first, make(seeds=(3, 4))) > VISIBLE
    for column in columns:
        assert apart(first, make(columns | {column: others[column]})) > VISIBLE, column
    for column in unwanted:
        changed = make(negatives=unwanted | {column: other[column]})
        assert apart(first, changed) > VISIBLE, column
    second = {column: values[1:] for column, values in columns.items()}
    assert apart(first[1:], make(second, seeds=(2,))) <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_looks_like_a_checkpoint(tiny_model, name):
    folder = tiny_model(name)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == FAMILIES[name].pipeline_class
    part = "unet" if "unet" in index else "transformer"
    for made in (part, "vae"):
        assert (folder / made / "config.json").exists()
        assert (folder / made / "diffusion_pytorch_model.safetensors").exists()
    assert (folder / "scheduler" / "scheduler_config.json").exists()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.masks])
def test_masks_are_of_different_lengths_and_begin_with_ones(name):
    (mask,) = FAMILIES[name].masks
    masks = records(name, 4, 0)[mask]
    assert len(set(masks.sum(axis=1))) == 4
    assert (np.diff(masks, axis=1) <= 0).all()


ONE_A_CLASS = {family.pipeline_class: name for name, family in FAMILIES.items()}


@pytest.mark.parametrize("name", ONE_A_CLASS.values())
def test_encoded_prompts_make_the_images_that_prompts_make(tiny_model, name):
    folder, prompts = tiny_model(name, encoders=True), ["a dog", "rain on a roof"]
    wanted, unwanted = encode(folder, name, prompts)
    assert wanted.keys() == FAMILIES[name].columns.keys()
    for argument, shape in FAMILIES[name].columns.items():
        assert wanted[argument].ndim == len(shape) + 1
        assert argument in FAMILIES[name].masks or wanted[argument].shape[-1] == shape[-1]
    how: dict[str, Any] = {"steps": 2, "guidance": GUIDANCE, "size": SIZE}
    first, second = from_prompts(folder, name, prompts, (1, 1), **how)
    assert apart([first], [second]) > VISIBLE
    again = direct(folder, name, wanted, (1, 1), negatives=unwanted, **how)
    assert apart([first, second], again) <= 1
