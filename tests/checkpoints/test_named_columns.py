"""Checkpoints of any columns: declared by an export, or called as a pipeline's arguments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_columns import ANY, TOKENS, add, check, given

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import export_checkpoints, import_checkpoints, read_checkpoint
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Schema, TensorColumn

NAME = "checkpoints/node_0_embeddings_r1.pt"


def digests(store: EmbeddingStore) -> dict[str, dict[str, Any]]:
    names = [f"{name}_digest" for name in store.schema.columns]
    frame = store.select().records
    return {
        str(key): {name: frame[name][i] for name in names}
        for i, key in enumerate(store.select().keys())
    }


def write(path: Path, entries: list[dict[str, Any]], **metadata: Any) -> Path:
    known = {"split": "train", "class_name": "dog"}
    content = {
        "node_id": 0,
        "round": 1,
        "embeddings": [{**known, "index": i, **entry} for i, entry in enumerate(entries)],
        "metadata": metadata,
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", ["guide", "upstream"])
def test_masks_and_ragged_columns_there_and_back_and_there(tmp_path, layout):
    store = EmbeddingStore.create(tmp_path / "s.zarr", ANY)
    add(store, range(9))
    add(store, range(9, 12), round=2, optional=False)
    first, second = tmp_path / "first" / "checkpoints", tmp_path / "second" / "checkpoints"
    export_checkpoints(store.select(), first, layout=layout)
    assert not import_checkpoints(tmp_path / "back.zarr", first).failed
    back = EmbeddingStore.open(tmp_path / "back.zarr")
    assert back.schema.to_json()["tensors"] == ANY.to_json()["tensors"]
    assert (back.schema.kind, digests(back)) == ("custom", digests(store))
    check(back, range(9), round=1)
    check(back, range(9, 12), optional=False, round=2)
    export_checkpoints(back.select(), second, layout=layout)
    again = import_checkpoints(tmp_path / "back.zarr", second)
    assert (again.unchanged, again.records) == (12, 0)
    assert not import_checkpoints(tmp_path / "third.zarr", second).failed
    assert digests(EmbeddingStore.open(tmp_path / "third.zarr")) == digests(store)


def test_what_torch_loads_of_an_export(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", ANY)
    add(store, range(5))
    (file,) = export_checkpoints(store.select(), tmp_path / "out", layout="upstream")
    content = torch.load(file.path, weights_only=True)
    assert content["metadata"]["diffusion_type"] == "custom"
    assert list(content["metadata"]["columns"]) == list(ANY.columns)
    expected = given(range(5))
    for i, entry in enumerate(content["embeddings"]):
        assert "t5_embedding" not in entry
        for column in ANY.tensors:
            assert entry[column.name].numpy().dtype == column.dtype
            assert np.array_equal(entry[column.name].numpy(), expected[column.name][i])


def test_tensors_called_as_arguments_are_columns_with_no_further_flag(tmp_path):
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((3, 1, 7, 16), dtype=np.float32)
    pooled = rng.standard_normal((3, 1, 4), dtype=np.float32)
    mask = rng.integers(0, 2, (3, 1, 7))
    entries: list[dict[str, Any]] = [
        {
            "prompt_embeds": torch.from_numpy(embeds[i]).bfloat16(),
            "pooled_prompt_embeds": torch.from_numpy(pooled[i]),
            "prompt_attention_mask": torch.from_numpy(mask[i]),
            "note": "kept",
        }
        for i in range(3)
    ]
    file = write(tmp_path / NAME, entries, diffusion_type="sd3")
    assert not import_checkpoints(tmp_path / "s.zarr", file).failed
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert store.schema.describe() == (
        "sd3: prompt_embeds [7, 16], pooled_prompt_embeds [4], prompt_attention_mask [7] int64"
    )
    rounded = torch.from_numpy(embeds[:, 0]).bfloat16().float().numpy()
    assert np.array_equal(store.select().read("prompt_embeds"), rounded)
    assert np.array_equal(store.select().read("pooled_prompt_embeds"), pooled[:, 0])
    assert np.array_equal(store.select().read("prompt_attention_mask"), mask[:, 0])
    assert set(store.select().column("extra").tolist()) == {'{"note": "kept"}'}


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"prompt_embeds": (1, 17, 4096), "pooled_prompt_embeds": (1, 768)}, "flux"),
        ({"prompt_embeds": (77, 768)}, "sd"),
        ({"prompt_embeds": (1, 77, 2048), "pooled_prompt_embeds": (1, 1280)}, "custom"),
        ({"prompt_embeds": (1, 9, 768), "image_embeds": (1, 768)}, "custom"),
    ],
    ids=str,
)
def test_the_kind_where_nothing_says_it(tmp_path, shapes, kind):
    entry = {name: torch.ones(shape) for name, shape in shapes.items()}
    file = write(tmp_path / NAME, [entry])
    checkpoint = read_checkpoint(file)
    assert checkpoint.kind == kind
    assert [column.name for column in checkpoint.columns] == list(shapes)


def test_sequences_of_different_lengths_become_a_ragged_column(tmp_path):
    lengths = [3, 6, 1]
    entries = [{"prompt_embeds": torch.full((1, n, 4), float(n))} for n in lengths]
    file = write(tmp_path / NAME, entries)
    assert not import_checkpoints(tmp_path / "s.zarr", file).failed
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert store.schema.describe() == "custom: prompt_embeds [6, 4] ragged"
    assert store.select().read("length_prompt_embeds").tolist() == lengths
    longer = [{"prompt_embeds": torch.ones(1, 7, 4)}, {"prompt_embeds": torch.ones(1, 2, 4)}]
    file = write(tmp_path / "checkpoints/node_1_embeddings_r1.pt", longer)
    content = torch.load(file, weights_only=True) | {"node_id": 1}
    torch.save(content, file)
    (report,) = import_checkpoints(store.path, file).files
    assert report.records == 1
    assert report.skipped == {"prompt_embeds has shape [7, 4], expected at most [6, 4]": 1}


def test_what_does_not_fit_the_store_leaves_the_sample_out(tmp_path):
    columns = (TensorColumn("prompt_embeds", (5, 4)), TensorColumn("a_mask", (5,), dtype="bool"))
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema("custom", columns))
    embeds, good = torch.ones(1, 5, 4), torch.tensor([[1, 1, 0, 0, 0]])
    entries = [
        {"prompt_embeds": embeds, "a_mask": good},
        {"prompt_embeds": embeds, "a_mask": good * 2},
        {"prompt_embeds": embeds},
        {"prompt_embeds": embeds[:, :3], "a_mask": good},
        {"prompt_embeds": embeds * torch.nan, "a_mask": good},
        {"prompt_embeds": embeds, "a_mask": good.to_sparse()},
        {"prompt_embeds": embeds, "a_mask": good.float()},
    ]
    file = write(tmp_path / NAME, entries)
    (report,) = import_checkpoints(store.path, file).files
    assert report.error is None
    assert report.records == 2
    assert len(report.skipped) == 5
    assert EmbeddingStore.open(store.path).select().column("index").tolist() == [0, 6]
    assert (
        EmbeddingStore.open(store.path).select().read("a_mask").tolist()
        == [[True, True, False, False, False]] * 2
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"../x": {"shape": [4], "dims": ["a"], "optional": False}}, "the name of a folder"),
        ({"a": {"shape": [4]}}, "expected shape, dims and optional of each"),
        ({"a": {"shape": [-4], "dims": ["a"], "optional": False}}, "positive whole numbers"),
        ({"a": {"shape": [4], "dims": ["x"], "optional": False, "dtype": "O"}}, "one of float32"),
    ],
    ids=str,
)
def test_what_a_checkpoint_declares_is_checked(tmp_path, columns, words):
    entries = [{name: torch.ones(4) for name in columns}]
    file = write(tmp_path / NAME, entries, columns=columns)
    (report,) = import_checkpoints(tmp_path / "s.zarr", file).files
    assert words in (report.error or "")
    assert not (tmp_path / "s.zarr").exists()


def test_records_that_were_deleted_stay_so(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", ANY)
    add(store, range(TOKENS))
    files = tmp_path / "checkpoints"
    export_checkpoints(store.select(), files)
    import_checkpoints(tmp_path / "back.zarr", files)
    back = EmbeddingStore.open(tmp_path / "back.zarr")
    back.delete(index=[2, 3])
    again = shutil.copytree(files, tmp_path / "again" / "checkpoints")
    (report,) = import_checkpoints(back.path, again, new_only=True).files
    assert report.skipped == {"deleted from the store before": 2}
    assert len(EmbeddingStore.open(back.path)) == TOKENS - 2


def test_a_store_of_other_columns_is_told_apart(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema.of("custom", prompt_embeds=(5, 4)))
    file = write(
        tmp_path / NAME,
        [{"prompt_embeds": torch.ones(1, 6, 4)}],
    )
    (report,) = import_checkpoints(store.path, file).files
    assert report.error == (
        "expected tensors as in the store (custom: prompt_embeds [5, 4]), got custom: "
        "prompt_embeds [6, 4]"
    )
    with pytest.raises(SchemaMismatchError, match="as in the store"):
        store.merge(EmbeddingStore.create(tmp_path / "f.zarr", Schema.flux(5)))
