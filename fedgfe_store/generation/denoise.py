"""Denoising batches: within the memory there is, and until a stop is asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import torch

from fedgfe_store.generation.claims import Claims
from fedgfe_store.generation.decode import NO_MEMORY, Decoder, Denoised
from fedgfe_store.generation.plan import PlanItem, shortage
from fedgfe_store.generation.prepare import Report, Run
from fedgfe_store.generation.read import Embedded, read_embeddings
from fedgfe_store.generation.room import Room
from fedgfe_store.generation.stopping import Stop, Stopped
from fedgfe_store.generation.write import ImageWriter, Tally
from fedgfe_store.models.devices import clear_cache, is_out_of_memory
from fedgfe_store.models.pipeline import ImagePipeline

_log = logging.getLogger("fedgfe_store")


class _Pace:
    """Tells from the first steps of a run that its first batch will not be finished in time."""

    def __init__(self, steps: int, size: int, stop: Stop, report: Report) -> None:
        self._steps, self._size, self._stop, self._report = steps, size, stop, report
        self._seen, self._first = 0, 0.0

    def step(self) -> None:
        """Count a step; at the second one, since the first takes longer than the others."""
        self._seen += 1
        if self._seen == 1:
            self._first = time.perf_counter()
        left = self._stop.seconds_left
        if self._seen != 2 or left is None:
            return
        seconds = (time.perf_counter() - self._first) * self._steps
        line = shortage(self._size, seconds, left)
        if line is not None:
            self._report(line)


class Renderer:
    """Takes a run's batches through the model to the writer.

    What memory does not allow is tried again smaller, or with less on the device: see `Room`.

    Parameters
    ----------
    run : Run
        What to render.
    pipeline : ImagePipeline
        The model.
    writer : ImageWriter
        Gets the images.
    tally : Tally
        Hears of images that fail, and of those that others make.
    movable : bool
        Whether the model's weights may be moved where memory is short.
    stop : Stop
        Looked at after each step.
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
        movable: bool,
        stop: Stop,
        report: Report,
    ) -> None:
        self._run, self._pipeline, self._writer, self._tally = run, pipeline, writer, tally
        self._stop, self._report = stop, report
        self._room = Room(run, pipeline, movable=movable, report=report)
        self._decoder = Decoder(run, pipeline, writer, tally, self._room)
        self._device = pipeline.placement.device
        self._batches = 0
        self._pace: _Pace | None = None
        self._gave_up: str | None = None

    @property
    def gave_up(self) -> str | None:
        """Why rendering on would be of no use; None if there is no such reason."""
        return self._gave_up or self._decoder.gave_up

    def run(self, claims: Claims) -> None:
        """Render all batches, or those until a stop or until there is no use in going on."""
        with closing(read_embeddings(self._run, claims)) as batches:
            more = True
            while more and not self._ended():
                # Usually a group is one batch. Only its latents are held, not what they were
                # made from; whatever happens to the others, they are decoded.
                group: list[Denoised] = []
                self._room.take_back()
                try:
                    more = self._denoise_group(batches, group)
                finally:
                    for denoised in group:
                        self._decoder.decode(denoised)

    def _ended(self) -> bool:
        if self._writer.gave_up:
            self._gave_up = "the pictures before it could not be written"
        return self._stop.requested or self.gave_up is not None

    def _denoise_group(self, batches: Iterator[Embedded], group: list[Denoised]) -> bool:
        """Add what becomes of some batches to `group`; whether there were any."""
        count = 0
        for count, batch in enumerate(islice(batches, self._pipeline.batches_per_swap), 1):
            for item, reason in batch.damaged.items():
                self._tally.fail(item, reason)
            for item in batch.elsewhere:
                self._tally.leave(item)
            group.extend(self._denoise(batch))
            self._batches += 1
            self._room.batch_done()
            every = self._run.request.clear_cache_every
            if every and self._batches % every == 0:
                clear_cache(self._device)
            # Where weights were moved meanwhile there may be no swap any more to wait for.
            if self._ended() or count >= self._pipeline.batches_per_swap:
                break
        return count > 0

    def _denoise(self, batch: Embedded) -> Iterator[Denoised]:
        """Denoise a batch in as large parts as fit; what a stop cuts short is not there."""
        start = 0
        while start < len(batch.items) and not self._ended():
            stop = min(start + self._room.batch, len(batch.items))
            try:
                denoised = self._denoise_part(batch, slice(start, stop))
            except Stopped:
                return
            if denoised is not None:
                yield denoised
                start = stop
            elif not self._room.give_up_denoising(stop - start):
                reason = f"out of memory denoising one picture; {self._room.remedy()}"
                self._tally.fail(batch.items[start], reason)
                self._gave_up = NO_MEMORY

    def _denoise_part(self, batch: Embedded, rows: slice) -> Denoised | None:
        """Denoise some rows of a batch; None if the memory is not enough for them."""
        items, started = batch.items[rows], time.perf_counter()
        embeddings = {name: values[rows] for name, values in batch.embeddings.items()}
        seeds = [item.seed for item in items]
        if self._pipeline.placement.compiled:
            # Another batch size would be compiled anew, which takes longer than some rows.
            missing = self._room.batch - len(items)
            embeddings = {n: _padded(values, missing) for n, values in embeddings.items()}
            seeds += seeds[-1:] * missing
        if self._pace is None:
            self._pace = _Pace(self._run.plan.settings.steps, len(seeds), self._stop, self._report)
        try:
            latents = self._pipeline.denoise(
                embeddings, seeds, self._run.plan.settings, on_step=self._on_step
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            latents = None
        if latents is None:  # past the handler, whose traceback holds on to what filled the memory
            clear_cache(self._device)
            return None
        seconds = (time.perf_counter() - started) / len(items)
        _log.info("denoised a batch of %d, %.2f s an image", len(items), seconds)
        return self._only_finite(items, latents[: len(items)], len(seeds), seconds)

    def _on_step(self) -> None:
        if self._pace is not None:
            self._pace.step()
        self._stop.check()

    def _only_finite(
        self, items: tuple[PlanItem, ...], latents: torch.Tensor, batch_size: int, seconds: float
    ) -> Denoised:
        finite = torch.isfinite(latents).flatten(1).all(dim=1)
        if not finite.all():
            for item, ok in zip(items, finite.tolist(), strict=True):
                if not ok:
                    reason = "the model gave latents that are not finite (NaN or infinity)"
                    self._tally.fail(item, reason)
            items = tuple(i for i, ok in zip(items, finite.tolist(), strict=True) if ok)
            latents = latents[finite]
        offload = self._pipeline.placement.offload
        return Denoised(items, latents, batch_size, seconds, offload)


def _padded(values: torch.Tensor, missing: int) -> torch.Tensor:
    """Repeat the last row `missing` times."""
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
