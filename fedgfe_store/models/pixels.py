"""Images on their way from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from fedgfe_store.models.placement import Picture


class Pixels(Sequence["Picture | None"]):
    """Images that are rounded on the device and copied while it goes on with other work.

    Taking one waits for all of them, in whatever thread; None is one that was not finite.

    Parameters
    ----------
    values : torch.Tensor
        ``[images, height, width, 3]`` from 0 to 1.
    finite : torch.Tensor
        bool, one row an image, any shape: whether what these were made of was finite.
    """

    def __init__(self, values: torch.Tensor, finite: torch.Tensor) -> None:
        # As numpy rounds float32, to the nearest even number at halves: torch does so everywhere.
        values = torch.nan_to_num(values.float())
        self._pixels = _coming((values * 255).round().to(torch.uint8).contiguous())
        self._finite = _coming(finite.flatten(1).all(dim=1))
        self._arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def __len__(self) -> int:
        return len(self._pixels)

    @overload
    def __getitem__(self, index: int) -> Picture | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Picture | None]: ...
    def __getitem__(self, index: int | slice) -> Picture | list[Picture | None] | None:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._pixels[index].numpy() if self._finite[index] else None


def _coming(values: torch.Tensor) -> torch.Tensor:
    """Copy to the host; from CUDA without waiting, which takes pinned memory."""
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
