"""A recorder to a store of any columns: masks, numbers, ragged and optional ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from any_columns import ANY, check, given

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording import Recorder
from fedgfe_store.schema import Schema


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore.create(tmp_path / "s.zarr", ANY)


def test_what_is_recorded_is_what_was_given(store):
    with Recorder(store.path) as recorder:
        for number in (1, 2):
            with recorder.record(node=0, round=number) as batch:
                for part in (range(5), range(5, 9)):
                    tensors = given(part)
                    masks = torch.from_numpy(tensors.pop("prompt_attention_mask")).long()
                    batch.add(
                        split="train",
                        class_name="dog",
                        index=list(part),
                        prompt_attention_mask=masks,
                        **tensors,
                    )
        with recorder.record(node=0, round=3) as batch:
            optional = given([7], optional=False)
            batch.add(split="train", class_name="dog", index=7, **optional)
    store = EmbeddingStore.open(store.path)
    check(store, range(9), round=1)
    check(store, range(9), round=2)
    check(store, [7], optional=False, round=3)
    assert store.verify().sound


def test_records_with_and_without_optional_columns_in_one_block(store):
    with Recorder(store.path) as recorder, recorder.record(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=[3, 4], **given([3, 4]))
        batch.add(split="train", class_name="dog", index=[5], **given([5], optional=False))
    store = EmbeddingStore.open(store.path)
    check(store, [3, 4], index=[3, 4])
    check(store, [5], optional=False, index=5)


def test_a_record_that_is_not_finite_is_left_out_alone(store):
    tensors = given(range(4))
    tensors["prompt_embeds"][2][0] = np.nan
    with Recorder(store.path) as recorder, recorder.record(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(4), **tensors)
    assert [left.key.index for left in batch.left_out] == [2]
    check(EmbeddingStore.open(store.path), [0, 1, 3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": np.array([[0.5, 1]])}, "sizes: expected int32, got 0.5"),
        ({"prompt_embeds": [np.zeros((9, 3), np.float32)]}, r"got \[9, 3\] \(record 0 of 1\)"),
        ({"prompt_attention_mask": None}, r"prompt_attention_mask: expected a tensor \[6\], got N"),
        ({"other": torch.ones(1, 5)}, "other: expected no such tensor as in the store"),
        ({"length_prompt_embeds": 9}, "length_prompt_embeds: expected a length of at most 1"),
        ({"sizes": np.zeros((2, 2), np.int32)}, "expected as many records in every tensor"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_add(store, change, words):
    with Recorder(store.path) as recorder, recorder.record(node=0, round=1) as batch:
        with pytest.raises(SchemaMismatchError, match=words):
            batch.add(split="train", class_name="dog", index=1, **given([1]) | change)
        batch.add(split="train", class_name="dog", index=1, **given([1]))
    check(EmbeddingStore.open(store.path), [1])


def test_columns_of_embeddings_come_under_their_own_names(tmp_path):
    schema = Schema.of("flux", prompt_embeds=(5, 8), other_embeds=(5, 8))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    values = np.random.default_rng(1).standard_normal((2, 3, 5, 8), dtype=np.float32)
    with Recorder(store.path) as recorder, recorder.record(node=0, round=1) as batch:
        named = dict(zip(("other_embeds", "prompt_embeds"), values, strict=True))
        batch.add(split="train", class_name="dog", **named)
        with pytest.raises(SchemaMismatchError, match="x: expected no such tensor"):
            batch.add(split="train", class_name="dog", x=values[0], prompt_embeds=values[1])
    store.refresh()
    assert np.array_equal(store.select().read("other_embeds"), values[0])
    assert np.array_equal(store.select().read("prompt_embeds"), values[1])


def test_a_new_store_of_other_columns_is_asked_for(tmp_path):
    with Recorder(tmp_path / "new.zarr") as recorder, recorder.record(node=0, round=1) as batch:
        for column, values in given([3]).items():
            with pytest.raises(SchemaMismatchError, match="make the store first"):
                batch.add(split="train", class_name="dog", **{column: values})
