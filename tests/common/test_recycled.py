"""Memory is given out again when nobody holds it, and never before."""

from __future__ import annotations

import random
import weakref

import numpy as np
import torch
from conftest import fill

from fedgfe_store.common.recycled import Recycled

WAYS = [
    lambda array: array,
    lambda array: array[1:, ::2],
    lambda array: array.reshape(-1).view(np.uint8)[5:],
    torch.from_numpy,
    lambda array: torch.from_numpy(array).T[::2],
    lambda array: torch.from_numpy(array).view(torch.int32).numpy()[0],
    memoryview,
    lambda array: np.from_dlpack(torch.from_numpy(array)),
]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_what_somebody_holds_keeps_its_values_however_it_is_held():
    memory, draw = Recycled(4), random.Random(0)
    held: list[tuple[object, np.ndarray]] = []
    seen: dict[int, int] = {}
    for number in range(400):
        array = memory.empty((draw.choice([2, 3]), 8), np.float32)
        seen[address(array)] = seen.get(address(array), 0) + 1
        array[:] = number
        kept = draw.choice(WAYS)(array)
        held.append((kept, np.asarray(kept).copy()))
        del array, kept
        while len(held) > draw.choice([0, 1, 3, 6]):
            held.pop(draw.randrange(len(held)))
        assert all(np.array_equal(np.asarray(kept), copy) for kept, copy in held)
    assert max(seen.values()) > 20


def test_no_more_is_kept_than_was_said():
    memory = Recycled(2)
    held = [memory.empty((4,), np.uint8) for _ in range(5)]
    places = {address(array) for array in held}
    assert len(places) == 5
    held = held[-2:]
    remembered = {address(array) for array in held}
    del held
    again = [memory.empty((4,), np.uint8) for _ in range(2)]
    assert {address(array) for array in again} == remembered


def test_large_memory_is_given_back():
    memory = Recycled(2)
    for nbytes, is_kept in ((2**26, True), (2**26 + 1, False)):
        block = memory.empty((nbytes,), np.uint8).base
        gone = weakref.ref(block)
        del block
        assert (gone() is not None) == is_kept


def test_batches_are_read_where_earlier_ones_were(store):
    fill(store, node=0, round=1, n=20)
    selection = store.select()
    expected = selection.read("t5")
    where, kept = set(), []
    for number, batch in enumerate(selection.batches(2, prefetch=1)):
        where.add(batch["t5"].data_ptr())
        if number % 7 == 0:
            kept.append((number, batch["t5"].numpy()[1:, :2]))
    assert len(where) < 20 - len(kept)
    for number, values in kept:
        assert np.array_equal(values, expected[2 * number + 1 : 2 * number + 2, :2])
    batches = list(selection.batches(2))
    assert np.array_equal(torch.cat([batch["t5"] for batch in batches]).numpy(), expected)
