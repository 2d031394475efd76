"""Decoding latents to images within the memory there is, and handing them to the writer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fedgfe_store.generation.plan import PlanItem
from fedgfe_store.generation.prepare import Run
from fedgfe_store.generation.provenance import Provenance
from fedgfe_store.generation.room import Room
from fedgfe_store.generation.write import ImageWriter, Tally
from fedgfe_store.models.devices import is_out_of_memory
from fedgfe_store.models.pipeline import ImagePipeline
from fedgfe_store.models.placement import Offload, Picture

NO_MEMORY = "there is not enough memory"
"""Why a run gives up for which even one image is too much."""


@dataclass(frozen=True)
class Denoised:
    """Latents of some images, one row each, and how they were made; seconds are of one image."""

    items: tuple[PlanItem, ...]
    latents: torch.Tensor
    batch_size: int
    seconds: float
    offload: Offload


class Decoder:
    """Takes latents through the model's decoder to the writer.

    What does not fit the memory is decoded in slices, with less on the device, and tile by tile
    where that is allowed, without being denoised again: see `Room`.

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
    room : Room
        Says how much to decode at once.
    """

    def __init__(
        self,
        run: Run,
        pipeline: ImagePipeline,
        writer: ImageWriter,
        tally: Tally,
        room: Room,
    ) -> None:
        self._pipeline, self._writer, self._tally = pipeline, writer, tally
        self._settings, self._room = run.plan.settings, room
        self._provenance = Provenance(run, pipeline.placement)
        self.gave_up: str | None = None
        """Why decoding on would be of no use; None if there is no such reason."""

    def decode(self, denoised: Denoised) -> None:
        """Decode latents in as large slices as fit, and hand the images to the writer."""
        start = 0
        while start < len(denoised.items) and not (self.gave_up or self._writer.gave_up):
            rows, started = slice(start, start + self._room.slice), time.perf_counter()
            items, pictures = denoised.items[rows], self._decoded(denoised.latents[rows])
            if pictures is None:
                self._go_on_smaller(len(items), items[0])
                continue
            seconds = denoised.seconds + (time.perf_counter() - started) / len(items)
            for row, item in enumerate(items):
                text = self._provenance.of(
                    item,
                    batch_size=denoised.batch_size,
                    tiled=self._room.tiled,
                    offload=denoised.offload,
                )
                # Waited for by the thread that writes: the device goes on meanwhile.
                self._writer.submit(item, partial(pictures.__getitem__, row), text, seconds=seconds)
            start += len(items)

    def _decoded(self, latents: torch.Tensor) -> Sequence[Picture | None] | None:
        """Decode latents; None if the memory is not enough."""
        try:
            return self._pipeline.decode(latents, self._settings, tiled=self._room.tiled)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _go_on_smaller(self, size: int, item: PlanItem) -> None:
        if not self._room.give_up_decoding(size):
            reason = f"out of memory decoding one picture; {self._room.decoding_remedy()}"
            self._tally.fail(item, reason)
            self.gave_up = NO_MEMORY
