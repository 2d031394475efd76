"""Masks, numbers and ragged columns, of a conditioning of any name: in, kept, moved, and out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr
import xxhash
import zarr
from any_columns import ANY, TOKENS, add, check, given
from places import TESTS
from processes import started

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import ConflictError, DamagedDataError, SchemaMismatchError
from fedgfe_store.schema import TensorColumn

MASKS = ["prompt_attention_mask", "sizes", "ids"]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(tmp_path / "any.zarr", ANY)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_other_zarr_readers_see(tmp_path, precision):
    schema = Schema(ANY.kind, ANY.tensors, precision, ANY.granule)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    add(store, range(9))
    add(store, range(3), round=2, optional=False)
    selection, group = store.select(), zarr.open_group(store.path, mode="r")
    raw, ours = xr.open_zarr(store.path), xr.open_dataset(store.path, engine="fedgfe")
    for column in schema.tensors:
        values = selection.read(column.name)
        path = {"driver": "file", "path": str(store.path / column.name)}
        second = tensorstore.open({"driver": "zarr3", "kvstore": path}, read=True).result()
        assert second.dtype.numpy_dtype == values.dtype == np.dtype(column.dtype)
        assert np.array_equal(second[selection.rows].read().result(), values, equal_nan=True)
        array = group[column.name]
        assert isinstance(array, zarr.Array)
        assert array.dtype == values.dtype
        assert np.array_equal(np.asarray(array[:])[selection.rows], values, equal_nan=True)
        assert np.array_equal(ours[column.name].to_numpy(), values, equal_nan=True)
        decoded = raw[column.name].to_numpy()[selection.rows]
        assert np.array_equal(decoded, values, equal_nan=True)
    assert ours["length_ids"].to_numpy().tolist() == [*range(7), 0, 1, 0, 0, 0]
    assert ours["has_ids"].to_numpy().tolist() == [True] * 9 + [False] * 3
    assert ours.sel(round=1)["prompt_embeds"].isel(token=0).shape == (9, 3)
    embeddings = selection.read("pooled_prompt_embeds").view(np.uint32)
    assert bool((embeddings & 0xFFFF).any()) == (precision == "float32")


def test_digests_are_of_the_bytes_with_the_length_as_seed(store):
    add(store, range(5))
    selection = store.select()
    frame = selection.records
    for column in ANY.tensors:
        lengths = [0] * 5
        if column.ragged:
            lengths = frame[f"length_{column.name}"].tolist()
        values = selection.read(column.name)
        expected = [
            xxhash.xxh3_64_hexdigest(each.tobytes(), seed)
            for each, seed in zip(values, lengths, strict=True)
        ]
        assert frame[f"{column.name}_digest"].tolist() == expected


def test_a_changed_length_is_another_record(store):
    add(store, [3])
    longer = given([3])
    padded = np.zeros((1, TOKENS, 3), np.float32)
    padded[0, :3] = longer["prompt_embeds"][0]
    longer["prompt_embeds"] = padded
    with pytest.raises(ConflictError, match="with other tensors"):
        with store.append(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", index=3, length_prompt_embeds=4, **longer)
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=3, length_prompt_embeds=[3], **longer)
    assert (batch.added, batch.skipped) == (0, 1)
    check(store, [3])


def test_it_is_kept_through_replace_delete_compact_backup_and_merge(store, tmp_path):
    add(store, range(10))
    add(store, range(10, 14), round=2, optional=False)
    assert add(store, range(10), if_exists="skip").skipped == 10
    assert add(store, range(6), seed=1, if_exists="replace").replaced == 6
    check(store, range(6), seed=1, round=1, index=range(6))
    check(store, range(6, 10), round=1, index=range(6, 10))
    check(EmbeddingStore.open(store.path, as_of=2), range(10), round=1)
    store.delete(round=1, index=[0, 7, 8])
    done = store.compact()
    assert done.files_freed > 0
    store = EmbeddingStore.open(store.path)
    check(store, range(1, 6), seed=1, round=1, index=range(6))
    check(store, [6, 9], round=1, index=range(6, 10))
    check(store, range(10, 14), optional=False, round=2)
    assert store.verify().sound
    store.backup(tmp_path / "copy.zarr")
    merged = EmbeddingStore.create(tmp_path / "merged.zarr", ANY)
    assert merged.merge(EmbeddingStore.open(tmp_path / "copy.zarr")).added == 11
    assert merged.merge(store).skipped == 11
    names = [f"{name}_digest" for name in ANY.columns]
    assert merged.select().records[names].equals(store.select().records[names])
    assert merged.verify().sound


WRITER = """
import sys; sys.path[:0] = [{tests!r}, {here!r}]
from any_columns import add
from fedgfe_store import EmbeddingStore
store = EmbeddingStore.open({path!r})
print("ready", flush=True)
for number in range(2, 10_000):
    add(store, range(9), round=number)
    print(number, flush=True)
"""


@pytest.mark.kill
def test_a_killed_writer_leaves_whole_commits(store):
    add(store, range(9))
    code = WRITER.format(tests=str(TESTS), here=str(Path(__file__).parent), path=str(store.path))
    with started([sys.executable, "-c", code]) as process:
        assert process.line() == "ready"
        for _ in range(3):
            process.line()
        process.kill()
        acknowledged = max(map(int, process.lines()), default=4)
    opened = EmbeddingStore.open(store.path)
    rounds = sorted(set(opened.select().column("round").tolist()))
    assert rounds == list(range(1, len(rounds) + 1))
    assert len(rounds) >= acknowledged
    for number in (1, rounds[-1]):
        check(opened, range(9), round=number)
    add(opened, range(5), round=20_000, optional=False)
    check(EmbeddingStore.open(store.path), range(5), round=20_000, optional=False)
    assert opened.verify().sound


@pytest.mark.parametrize("column", MASKS)
def test_a_flipped_byte_of_a_mask_is_found(store, column):
    add(store, range(8))
    file = store.path / column / "c.0.0"
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 0x10
    file.write_bytes(data)
    found = EmbeddingStore.open(store.path).verify()
    assert {record.key.index for record in found.damaged} <= {0, 1, 2, 3}
    assert found.damaged or found.leftovers
    with pytest.raises(DamagedDataError, match=f"{column} of node 0, round 1"):
        store.select(index=range(4)).read(column)
    check(store, range(4, 8), index=range(4, 8))


def test_lengths_of_another_time_are_damage(store):
    """Sound by their checksums, and within their bounds, but not those that were committed."""
    add(store, range(8))
    changed = EmbeddingStore.create(store.path.parent / "third.zarr", ANY)
    with changed.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(8), **given(range(1, 9)))
    shutil.copy(changed.path / "length_ids" / "c.0", store.path / "length_ids" / "c.0")
    with pytest.raises(DamagedDataError, match="key column length_ids.*not what was committed"):
        EmbeddingStore.open(store.path).select().read("ids")
    assert not EmbeddingStore.open(store.path).verify().sound


def test_batches_hold_masks_as_they_are_and_lengths(store):
    add(store, range(7))
    names = [*ANY.columns, "has_ids"]
    batches = list(store.select().batches(3, dtype=torch.bfloat16, columns=names))
    expected = given(range(7))
    ids = torch.cat([batch["ids"] for batch in batches])
    assert ids.dtype is torch.int64
    for position, length in enumerate(torch.cat([b["length_ids"] for b in batches]).tolist()):
        assert ids[position, :length].tolist() == expected["ids"][position].tolist()
    masks = torch.cat([batch["prompt_attention_mask"] for batch in batches])
    assert masks.dtype is torch.bool
    assert masks.sum(1).tolist() == [n % (TOKENS + 1) for n in range(7)]
    assert batches[0]["prompt_embeds"].dtype is torch.bfloat16
    assert batches[0]["has_ids"].tolist() == [True] * 3
    by_default = next(iter(store.select().batches(2)))
    required = {t.name for t in ANY.tensors if not t.optional}
    assert by_default.tensors.keys() == required | {"length_prompt_embeds"}


def test_memory_to_read_into_is_of_the_columns_type(store):
    add(store, range(3))
    selection = store.select()
    out = np.empty((3, TOKENS), np.int64)
    assert selection.read("ids", out=out) is out
    lengths = np.empty(3, np.int32)
    assert selection.read("length_ids", out=lengths).tolist() == [0, 1, 2]
    with pytest.raises(SchemaMismatchError, match=r"int64 \[3, 6\], got .* float32 \[3, 6\]"):
        selection.read("ids", out=np.empty((3, TOKENS), np.float32))


ACCEPTED: list[Any] = [
    np.array([[1, 0, 1, 0, 0, 0]], np.uint8),
    torch.tensor([[1, 0, 1, 0, 0, 0]]),
    torch.tensor([1.0, 0, 1, 0, 0, 0], dtype=torch.bfloat16),
    np.array([True, False, True, False, False, False]),
]


@pytest.mark.parametrize("value", ACCEPTED, ids=lambda v: str(v.dtype))
def test_a_mask_of_any_type_is_taken_if_it_is_one(store, value):
    tensors = {**given([0], optional=False), "prompt_attention_mask": value}
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=0, **tensors)
    read = store.select().read("prompt_attention_mask")
    assert read.tolist() == [[True, False, True, False, False, False]]


def mask(*values: Any, dtype: str = "float64") -> dict[str, Any]:
    padded = np.zeros((1, TOKENS), dtype)
    padded[0, : len(values)] = values
    return {"prompt_attention_mask": padded}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "2 in a mask": (mask(0, 2, dtype="int64"), "mask: expected 0 or 1, or bool, got 2 "),
    "a fraction": (mask(0.5), "mask: expected 0 or 1, or bool, got 0.5"),
    "NaN": (mask(np.nan), "mask: expected 0 or 1, or bool, got nan"),
    "beyond int32": ({"sizes": np.array([[0, 2**31]])}, "sizes: expected int32, got 2147483648"),
    "below int32": ({"sizes": np.array([[0, -(2.0**31) - 1]])}, "sizes: expected int32, got -2147"),
    "beyond int64": ({"ids": [np.array([2.0**63])]}, "ids: expected int64, got 9.22.*e.18"),
    "unsigned": ({"ids": [np.array([2**63], np.uint64)]}, "ids: expected int64, got 92233720"),
    "infinite": ({"ids": [np.array([np.inf])]}, "ids: expected int64, got inf"),
    "complex": (mask(1, dtype="complex64"), "mask: expected numbers, got complex64"),
    "text": ({"sizes": np.array([["a", "b"]])}, "sizes: expected numbers, got str"),
    "no array": ({"sizes": [1, 2]}, "sizes: expected numbers, got list"),
    "int embeddings": (
        {"pooled_prompt_embeds": np.zeros((1, 5), np.int64)},
        "pooled_prompt_embeds: expected float32, float16 or bfloat16, got int64",
    ),
    "too long": (
        {"prompt_embeds": [np.zeros((7, 3), np.float32)]},
        r"prompt_embeds: expected \[up to 6, 3\] .* got \[7, 3\] \(record 0 of 1\)",
    ),
    "too long, padded": (
        {"prompt_embeds": np.zeros((1, 7, 3), np.float32)},
        r"prompt_embeds: expected \[n, up to 6, 3\] .* got \[1, 7, 3\]",
    ),
    "too wide": (
        {"prompt_embeds": [np.zeros((2, 4), np.float32)]},
        r"prompt_embeds: expected \[up to 6, 3\] .* got \[2, 4\]",
    ),
    "numbers, no arrays": ({"ids": [3]}, "ids: expected numbers, got int"),
    "a length beyond": ({"length_prompt_embeds": 1}, "expected a length of at most 0, as prompt"),
    "a length below": ({"length_prompt_embeds": -1}, "length_prompt_embeds: expected a whole num"),
    "lengths": ({"length_prompt_embeds": [0, 0]}, "length_prompt_embeds: expected 1 values"),
    "of no ragged column": ({"length_sizes": 1}, "got also length_sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_words(store, case):
    other, words = REFUSED[case]
    with pytest.raises(SchemaMismatchError, match=words):
        with store.append(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", index=0, **given([0]) | other)
    assert len(EmbeddingStore.open(store.path)) == 0


def test_which_record_does_not_fit_is_said(store):
    tensors = given(range(3))
    tensors["ids"][1] = np.zeros(9, np.int64)
    with pytest.raises(SchemaMismatchError, match=r"got \[9\] \(record 1 of 3\)"):
        with store.append(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", index=range(3), **tensors)


def test_values_in_the_padding_do_not_count(store):
    tensors = given([2, 4], optional=False)
    padded = np.full((2, TOKENS, 3), np.nan, np.float32)
    for position, each in enumerate(tensors["prompt_embeds"]):
        padded[position, : len(each)] = each
    tensors |= {"prompt_embeds": padded, "length_prompt_embeds": [2, 4]}
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=[2, 4], **tensors)
    check(store, [2, 4], optional=False)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int32"}, {"ragged": True}, {"shape": (8,)}],
    ids=lambda change: next(iter(change)),
)
def test_stores_of_other_columns_are_not_merged(store, tmp_path, change):
    old = ANY.column("prompt_attention_mask")
    known = {"shape": old.shape, "dtype": old.dtype, "ragged": old.ragged} | change
    changed = TensorColumn(old.name, dims=("mask_token",), **known)
    others = [t for t in ANY.tensors if t.name != old.name]
    other = EmbeddingStore.create(tmp_path / "o.zarr", Schema("custom", (changed, *others)))
    with pytest.raises(SchemaMismatchError, match=r"mask \[6\] bool.*, as in the store, got"):
        store.merge(other)


@pytest.mark.parametrize("kind", ["", "Flux", "a b", "../x", "é", "x" * 65, "-a", None, 3])
def test_a_kind_is_a_plain_name(kind):
    with pytest.raises(SchemaMismatchError, match="^kind: expected a name such as"):
        Schema.of(kind, clip=(4,))


def test_a_column_of_another_kind_is_refused_in_words():
    wrong: Any = {"dtype": "float16"}
    with pytest.raises(SchemaMismatchError, match="a: expected one of float32, bool, int32, int64"):
        Schema.of("custom", TensorColumn("a", (4,), **wrong))
    wrong = {"ragged": 1}
    with pytest.raises(SchemaMismatchError, match="a: expected ragged to be true or false, got 1"):
        Schema.of("custom", TensorColumn("a", (4,), **wrong))
    wrong = ("a", (4,))
    with pytest.raises(SchemaMismatchError, match="tensors: expected a TensorColumn, got"):
        Schema.of("custom", wrong)
    with pytest.raises(SchemaMismatchError, match="expected each name once, got 2 times, got 'a'"):
        Schema.of("custom", TensorColumn("a", (4,), dtype="bool"), a=(4,))
    with pytest.raises(SchemaMismatchError, match="at most 2,147,483,631 bytes of int64"):
        Schema.of("custom", TensorColumn("a", (2**28,), dtype="int64"))


def test_only_stores_that_need_it_ask_for_it(tmp_path):
    def features(schema: Schema) -> list[str]:
        path = EmbeddingStore.create(tmp_path / f"{schema.kind}-{id(schema)}", schema).path
        ours = json.loads((path / "zarr.json").read_bytes())["attributes"]["fedgfe_store"]
        plain = [set(column) for column in ours["tensors"].values()]
        assert ours["features"] or plain == [{"shape", "dims", "optional"}] * len(plain)
        found: list[str] = ours["features"]
        return found

    mask = TensorColumn("mask", (4,), dtype="bool")
    assert features(Schema.flux(3)) == features(Schema.of("sd", prompt_embeds=(7, 4))) == []
    assert features(Schema.of("sdxl", prompt_embeds=(7, 4))) == ["kinds"]
    assert features(Schema.of("flux", mask)) == ["dtypes"]
    assert features(ANY) == ["kinds", "dtypes", "ragged"]


def test_reading_back_what_the_schema_says(store):
    assert EmbeddingStore.open(store.path).schema == ANY
    assert store.schema.describe() == (
        "custom: prompt_embeds [6, 3] ragged, prompt_attention_mask [6] bool, sizes [2] int32, "
        "ids [6] int64 ragged, style [4, 2] ragged, pooled_prompt_embeds [5]"
    )
    html = store._repr_html_()
    assert " bool" in html
    assert " int64 ragged optional" in html
