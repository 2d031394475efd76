"""Records of every kind of column, of known values: masks, numbers, ragged and optional ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.schema import TensorColumn

TOKENS = 6
ANY = Schema.of(
    "custom",
    TensorColumn("prompt_embeds", (TOKENS, 3), ("token", "feature"), ragged=True),
    TensorColumn("prompt_attention_mask", (TOKENS,), ("token",), dtype="bool"),
    TensorColumn("sizes", (2,), dtype="int32"),
    TensorColumn("ids", (TOKENS,), ("token",), optional=True, dtype="int64", ragged=True),
    TensorColumn("style", (4, 2), optional=True, ragged=True),
    pooled_prompt_embeds=(5,),
    granule=4,
)


def given(numbers, *, seed: int = 0, optional: bool = True) -> dict[str, Any]:
    """What records of these numbers hold; a number always has the same."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ANY.columns}
    for number in numbers:
        rng = np.random.default_rng((seed, number))
        length = number % (TOKENS + 1)
        columns["prompt_embeds"].append(rng.standard_normal((length, 3), dtype=np.float32))
        columns["prompt_attention_mask"].append(np.arange(TOKENS) < length)
        columns["pooled_prompt_embeds"].append(rng.standard_normal(5, dtype=np.float32))
        columns["sizes"].append(rng.integers(-(2**31), 2**31, 2).astype(np.int32))
        columns["ids"].append(rng.integers(-(2**63), 2**63 - 1, length))
        columns["style"].append(rng.standard_normal((number % 5, 2), dtype=np.float32))
    if not optional:
        del columns["ids"], columns["style"]
    ragged = {t.name for t in ANY.tensors if t.ragged}
    return {name: v if name in ragged else np.stack(v) for name, v in columns.items()}


def add(store: EmbeddingStore, numbers, *, round: int = 1, **options: Any) -> Any:
    kept = {k: options.pop(k) for k in ("seed", "optional") if k in options}
    with store.append(node=0, round=round, **options) as batch:
        batch.add(split="train", class_name="dog", index=list(numbers), **given(numbers, **kept))
    return batch


def check(store: EmbeddingStore, numbers, *, seed: int = 0, optional: bool = True, **filters):
    """All values, lengths and types of the records of these numbers are those that were given."""
    selection = store.select(**filters)
    assert sorted(selection.column("index").tolist()) == sorted(numbers)
    numbers = selection.column("index").tolist()
    expected = given(numbers, seed=seed, optional=optional)
    for column in ANY.tensors:
        found = selection.read(column.name)
        assert found.dtype == column.dtype
        assert found.shape == (len(numbers), *column.shape)
        if column.optional:
            assert selection.read(f"has_{column.name}").tolist() == [optional] * len(numbers)
        if column.name not in expected:
            missing = np.isnan(found) if column.dtype == "float32" else found == 0
            assert missing.all()
            continue
        for position, values in enumerate(expected[column.name]):
            assert np.array_equal(found[position, : len(values)], values)
            assert not found[position, len(values) :].any()
        if column.ragged:
            lengths = selection.read(f"length_{column.name}")
            assert lengths.dtype == np.int32
            assert lengths.tolist() == [len(values) for values in expected[column.name]]
