"""Rounding of pixels on the device: numpy's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgfe_store.models.pixels import Pixels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_as_numpy_does(dtype: torch.dtype) -> None:
    """All values of 16 bits from 0 to 1, or those of 32 about every border of two pixels."""
    if dtype == torch.float32:
        borders = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
        bits = borders.view(np.int32)[:, None] + np.arange(-64, 65, dtype=np.int32)
        values = torch.from_numpy(bits.view(np.float32).ravel().copy())
    else:
        every = torch.arange(2**15, dtype=torch.int16).view(dtype)
        values = every[(every >= 0) & (every <= 1)]
    values = values[: len(values) // 3 * 3].reshape(1, 1, -1, 3)
    (picture,) = Pixels(values, torch.ones(1, 1, dtype=torch.bool))
    expected = (values.float().numpy() * 255).round().astype(np.uint8)
    assert picture is not None
    assert picture.tobytes() == expected.tobytes()


def test_an_image_that_was_not_finite_is_none_and_its_neighbours_are_there() -> None:
    finite = torch.tensor([[True, True], [True, False], [True, True]])
    pictures = Pixels(torch.tensor([0.0, torch.nan, 1.0])[:, None, None, None], finite)
    assert len(pictures) == 3
    assert [None if p is None else p.item() for p in pictures] == [0, None, 255]
    assert pictures[1:2] == [None]
