"""Which tensor is T5 and which CLIP, by its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedgfe_store.common.plain import Unusable, what

T5_WIDTH = 4096
CLIP_WIDTH = 768

TENSOR_KEYS = ("t5_embedding", "clip_embedding", "t5", "clip")
"""What FedGFE calls T5 and CLIP in a checkpoint's entries; shapes tell which is which."""

_LEAST_BOUND = 64 << 20

Shape = tuple[int, ...]


def as_tensor(value: Any, key: str) -> torch.Tensor:
    """Return a tensor of real numbers with values, or raise `Unusable`."""
    tensor = any_tensor(value, key, kinds="f")
    if not tensor.is_floating_point():
        raise Unusable(f"{key} is not an ordinary tensor of floating-point values")
    return tensor


def any_tensor(value: Any, key: str, *, kinds: str = "fiub") -> torch.Tensor:
    """Return a tensor with values, of numbers of any type, or raise `Unusable`."""
    if isinstance(value, np.ndarray) and value.dtype.kind in kinds:
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    if not isinstance(value, torch.Tensor):
        raise Unusable(f"{key} is {what(value)}, not a tensor")
    if value.layout is not torch.strided or value.is_meta or value.is_complex():
        raise Unusable(f"{key} is not an ordinary tensor of floating-point values")
    if value.nbytes > max(value.untyped_storage().nbytes(), _LEAST_BOUND):
        raise Unusable(f"{key} repeats its values to {value.nbytes:,} bytes")
    return value.detach()


def row_shape(key: str, shape: Sequence[int], rows: int | None) -> Shape:
    """Return the shape of one row of a stack of `rows`; the shape itself where `rows` is None."""
    if rows is None:
        return tuple(shape)
    if not shape or shape[0] != rows:
        got = shape[0] if shape else 0
        raise Unusable(f"stacks of different length: {key} has {got} rows, expected {rows}")
    return tuple(shape[1:])


def without_batch(shape: Shape) -> Shape:
    """Return a sequence's shape without leading axes of length 1."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def column_of(key: str, shape: Shape) -> tuple[str, Shape]:
    """Tell T5 from CLIP by width and rank: ``[L, 4096]``, ``[768]`` or ``[L, 768]``."""
    inner = without_batch(shape)
    if 0 in inner:
        raise Unusable(f"{key} is empty: shape {list(shape)}")
    if len(inner) > 2:
        raise Unusable(f"{key} has a batch axis longer than 1: shape {list(shape)}")
    if len(inner) == 2 and inner[1] == T5_WIDTH:
        return "t5", inner
    if inner and inner[-1] == CLIP_WIDTH:
        return "clip", inner[1:] if inner[0] == 1 else inner
    raise Unusable(
        f"{key} has shape {list(shape)}, neither T5 [tokens, {T5_WIDTH}] nor CLIP [{CLIP_WIDTH}]"
        f" or [tokens, {CLIP_WIDTH}]"
    )
