"""Decoding latents to images within the memory there is, and handing them to the writer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fedgfe_store.generation.plan import PlanItem
from fedgfe_store.generation.prepare import Report, Run
from fedgfe_store.generation.provenance import Provenance
from fedgfe_store.generation.write import ImageWriter, Tally
from fedgfe_store.models.devices import clear_cache, is_out_of_memory
from fedgfe_store.models.pipeline import ImagePipeline
from fedgfe_store.models.placement import Picture

NO_MEMORY = "there is not enough memory"
"""Why a run gives up for which even one image is too much."""


@dataclass(frozen=True)
class Denoised:
    """Latents of some images, one row each, the batch that they were in, and seconds an image."""

    items: tuple[PlanItem, ...]
    latents: torch.Tensor
    batch_size: int
    seconds: float


class Decoder:
    """Takes latents through the model's decoder to the writer.

    What does not fit the memory is decoded in slices, and tile by tile where that is allowed,
    without being denoised again; slices stay small for the rest of the run.

    Parameters
    ----------
    run : Run
        What is rendered.
    pipeline : ImagePipeline
        The model.
    writer : ImageWriter
        Gets the images.
    tally : Tally
        Hears of images that fail.
    report : callable
        Gets remarks for the user.
    """

    def __init__(
        self,
        run: Run,
        pipeline: ImagePipeline,
        writer: ImageWriter,
        tally: Tally,
        *,
        report: Report,
    ) -> None:
        self._pipeline, self._writer, self._tally = pipeline, writer, tally
        self._settings, self._may_tile = run.plan.settings, run.request.vae_tiling
        self._report = report
        self._provenance = Provenance(run, pipeline.placement)
        self._largest = run.decode_size
        self._tiled = False
        self.gave_up: str | None = None
        """Why decoding on would be of no use; None if there is no such reason."""

    def decode(self, denoised: Denoised) -> None:
        """Decode latents in as large slices as fit, and hand the images to the writer."""
        start = 0
        while start < len(denoised.items) and not (self.gave_up or self._writer.gave_up):
            rows, started = slice(start, start + self._largest), time.perf_counter()
            items, pictures = denoised.items[rows], self._decoded(denoised.latents[rows])
            if pictures is None:
                self._decode_smaller(len(items), items[0])
                continue
            seconds = denoised.seconds + (time.perf_counter() - started) / len(items)
            for item, picture in zip(items, pictures, strict=True):
                self._hand_over(item, picture, denoised.batch_size, seconds)
            start += len(items)

    def _decoded(self, latents: torch.Tensor) -> list[Picture | None] | None:
        """Decode latents; None if the memory is not enough."""
        try:
            return self._pipeline.decode(latents, self._settings, tiled=self._tiled)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        clear_cache(self._pipeline.placement.device)
        return None

    def _decode_smaller(self, size: int, item: PlanItem) -> None:
        if size > 1:
            self._largest = size // 2
            self._report(f"out of memory: decoding in slices of {self._largest}")
        elif self._may_tile and not self._tiled:
            self._tiled = True
            self._report("out of memory: decoding tile by tile, which changes pixels")
        else:
            remedy = "a smaller picture" if self._tiled else "--vae-tiling"
            self._tally.fail(item, f"out of memory decoding one picture; {remedy} may help")
            self.gave_up = NO_MEMORY

    def _hand_over(
        self, item: PlanItem, picture: Picture | None, batch_size: int, seconds: float
    ) -> None:
        if picture is None:
            self._tally.fail(item, "the model gave a picture that is not finite (NaN or infinity)")
        elif not picture.any():
            self._tally.fail(item, "the model gave a picture that is black all over")
        else:
            text = self._provenance.of(item, batch_size=batch_size, tiled=self._tiled)
            self._writer.submit(item, picture, text, seconds=seconds)
