"""Two outputs are alike whatever their layout, and not where they say something else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from printed import near, numbers, text_of, words


def alike(one: str, other: str) -> bool:
    return words(one) == words(other) and numbers(one) == near(other)


def frame(values: np.ndarray) -> pd.DataFrame:
    names = [f"column number {k}" for k in range(values.shape[1])]
    return pd.DataFrame(values, columns=names, index=pd.Index(["dog", "drum"], name="class"))


def dataset(values: np.ndarray, seed: int) -> xr.Dataset:
    digests = np.random.default_rng(seed).integers(10**17, 2**64 - 1, 2, dtype=np.uint64)
    return xr.Dataset({"t5": (("record", "feature"), values)}, {"digest": ("record", digests)})


@pytest.mark.slow
@given(
    st.integers(0, 10_000),
    st.integers(3, 8),
    st.integers(40, 200),
    st.sampled_from([1, 1e-3, 1e3]),
)
def test_layout_makes_no_difference(seed, digits, width, scale):
    values = np.random.default_rng(seed).uniform(1, 9, (2, 2000)) * scale
    moved = (values * (1 + 1e-6)).astype(np.float32).astype(float)
    with np.printoptions(precision=digits, linewidth=width):
        printed = str(moved)
    with np.printoptions(precision=8, linewidth=75):
        assert alike(printed, str(values))
    tables = [frame(each[:, :5]) for each in (values, moved)]
    with pd.option_context("display.precision", digits, "display.width", width):
        plain, page = tables[1].to_string(), tables[1].to_html()
    assert alike(plain, tables[0].to_string())
    assert alike(text_of(page), text_of(tables[0].to_html()))
    assert alike(repr(dataset(moved, seed)), repr(dataset(values, seed + 1)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "12 images rendered in 2.0 s, 5.89 images/s",
            "12 images rendered in 1 min 3 s, 12 images/s",
        ),
        ("commit: 16, 2026-11-25 17:51 UTC", "commit: 16, 2027-01-02 03:04 UTC"),
        ("120 records, 30.3 MB", "120 records, 30.1 MB"),
        ("loss  0.50\n─────\n1  1.25", "loss   0.501\n──────\n   1   1.2"),
        ("array([[ 0.3341258 ,\n -0.02]])", "array([[ 0.33412581, -0.02]])"),
        (
            "uint64 16B 8578685371527784784 13102305358894381478",
            "uint64 16B 578685371527784784 1310...",
        ),
        ("torch 2.13.0+cpu", "torch 2.9.1"),
        ("agree 11.7%", "agree 12%"),
        ("drift nan", "drift NaN"),
        (
            '{"time":"2026-11-25T17:51:24","t5":1484062060684401452}',
            '{"time":"2027-11-25T17:51:24","t5":4484062060684401452}',
        ),
        ("1 \\\n 2", "1 2"),
    ],
)
def test_what_differs_between_machines_is_alike(one, other):
    assert alike(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12 images", "13 images"),
        ("t5 [17, 4096] float32", "t5 [17, 4096] float64"),
        ("loss 0.5", "loss 1.25"),
        ("loss -0.5", "loss 0.5"),
        ("loss 0.5", "loss nan"),
        ("loss 0.5", "loss -"),
        ("loss 0.5 0.5", "loss 0.5"),
        ("node_0_train_dog_0_r5.png", "node_0_train_dog_0_r50.png"),
        ("120 records, 30.3 MB", "120 records, 30.3 kB"),
        ("shape=(2, 4096)", "shape=(4096, 2)"),
        ("nodes 0-2, server", "nodes 0-3, server"),
        ("agree 11.7%", "agree 71.7%"),
        ("commit 16, DATE", "commit 16"),
        ("seeds: 1, 2", "seeds: [1, 2]"),
    ],
)
def test_what_says_something_else_is_not_alike(one, other):
    assert not alike(one, other)
    assert not alike(other, one)
