"""What a run needs of an image model that has been loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Picture, Placement, Sampling


class ImagePipeline(Protocol):
    """What a run needs of an image model.

    Attributes
    ----------
    model : Model
        Which model it is.
    placement : Placement
        How it was loaded.
    batches_per_swap : int
        Batches to denoise before the first of them is decoded.
    """

    @property
    def model(self) -> Model: ...  # noqa: D102
    @property
    def placement(self) -> Placement: ...  # noqa: D102
    @property
    def batches_per_swap(self) -> int: ...  # noqa: D102

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        settings: Sampling,
        *,
        on_step: Callable[[], None],
    ) -> torch.Tensor:
        """Denoise a batch under its embeddings, one row and one seed an image.

        `on_step` is called after each step; what it raises ends the batch.
        """
        ...

    def decode(
        self, latents: torch.Tensor, settings: Sampling, *, tiled: bool
    ) -> Sequence[Picture | None]:
        """Turn denoised latents into images; None for one with values that are not finite.

        Taking an item may wait for the device, and may be done in any thread.
        """
        ...

    def place(self, placement: Placement) -> None:
        """Let the weights wait elsewhere, under another offload mode.

        Only asked of a pipeline that the run has loaded itself.
        """
        ...
