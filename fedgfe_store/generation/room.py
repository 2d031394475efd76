"""What a run gives up where memory is short, and takes back when there is more again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedgfe_store.generation.prepare import Report, Run, footprint
from fedgfe_store.models.devices import clear_cache, is_out_of_memory, usable_bytes
from fedgfe_store.models.pipeline import ImagePipeline
from fedgfe_store.models.placement import Offload, possible_offloads

_log = logging.getLogger("fedgfe_store")

# Moving billions of weights takes as long as a batch or more. Who tried at once to come back would
# move them with each breath of a neighbour on the same card.
_BATCHES_BETWEEN = 16


class Room:
    """Decides how large batches and slices are and, where that is "auto", where weights lie.

    Parameters
    ----------
    run : Run
        What is rendered.
    pipeline : ImagePipeline
        The model.
    movable : bool
        Whether its weights may be moved at all: not those of a pipeline that a caller has placed.
    report : callable
        Gets remarks for the user.
    """

    def __init__(self, run: Run, pipeline: ImagePipeline, *, movable: bool, report: Report) -> None:
        self._run, self._pipeline, self._report = run, pipeline, report
        self.batch = run.batch_size
        """Most images to denoise at once."""
        self.slice = run.decode_size
        """Most images to decode at once."""
        self.tiled = False
        """Whether to decode tile by tile."""
        placement = pipeline.placement
        self._device = placement.device
        self._modes: Sequence[Offload] = (placement.offload,)
        if movable and run.request.offload == "auto":
            modes = possible_offloads(placement.compiled, placement.quantization)
            self._modes = modes[modes.index(placement.offload) :]
        self._since = 0
        self._short_at: int | None = None

    def batch_done(self) -> None:
        """Count a batch."""
        self._since += 1

    def give_up_denoising(self, size: int) -> bool:
        """Give something up since `size` images were too many; False where nothing is left."""
        self._note_shortage()
        if self._move_down(hopeless=True):
            return True
        if size > 1:
            self.batch = size // 2
            self._report(f"out of memory: going on in batches of {self.batch}")
            return True
        return self._move_down(hopeless=False)

    def give_up_decoding(self, size: int) -> bool:
        """Give something up since `size` images were too many; False where nothing is left."""
        self._note_shortage()
        if self._move_down(hopeless=True):
            return True
        if size > 1:
            self.slice = size // 2
            self._report(f"out of memory: decoding in slices of {self.slice}")
            return True
        if self._move_down(hopeless=False):
            return True
        if self.tiled or not self._run.request.vae_tiling:
            return False
        self.tiled = True
        self._report("out of memory: decoding tile by tile, which changes pixels")
        return True

    def take_back(self) -> None:
        """Take back what was given up, if memory has been freed and some batches have passed."""
        if self._short_at is None or self._since < _BATCHES_BETWEEN:
            return
        usable = usable_bytes(self._device)
        if usable is None or usable <= self._short_at:
            return
        self._since = 0
        mode = self._first_that_fits(self._modes, usable)
        sizes = (self._run.batch_size, self._run.decode_size)
        before = self._pipeline.placement.offload
        if self._modes.index(mode) < self._modes.index(before):
            if not self._move(mode):
                self._move(before)
                return
            self._report(f"memory is free again: going on with offload {mode}")
        elif (self.batch, self.slice) != sizes or self.tiled:
            self._report(f"memory is free again: going on in batches of {sizes[0]}")
        self.batch, self.slice = sizes
        self.tiled = False
        if mode == self._modes[0]:
            self._short_at = None

    def remedy(self) -> str:
        """Say what would help where nothing is left to give up."""
        placement = self._pipeline.placement
        modes = possible_offloads(placement.compiled, placement.quantization)
        usable = usable_bytes(self._device)
        if usable is not None:
            lower = modes[modes.index(placement.offload) + 1 :]
            fit = [mode for mode in lower if self._needed(mode) <= usable]
            modes = (placement.offload, *(fit or lower[-1:]))
        return placement.remedy(modes)

    def _note_shortage(self) -> None:
        clear_cache(self._device)
        self._short_at, self._since = usable_bytes(self._device), 0

    def _needed(self, mode: Offload) -> int:
        """Estimate what one image takes in a mode."""
        run = self._run
        return footprint(run.model, run.plan.settings, run.tokens, 1).needed(mode)

    def _first_that_fits(self, modes: Sequence[Offload], usable: int | None) -> Offload:
        if usable is None:
            return modes[0]
        return next((mode for mode in modes if self._needed(mode) <= usable), modes[-1])

    def _move_down(self, *, hopeless: bool) -> bool:
        """Move weights off the device; with `hopeless`, only if one image does not fit as it is."""
        current = self._pipeline.placement.offload
        lower = self._modes[self._modes.index(current) + 1 :]
        usable = usable_bytes(self._device) if lower else None
        if not lower or (hopeless and (usable is None or self._needed(current) <= usable)):
            return False
        if current == "group" and usable is not None and self._keep_less(usable):
            return True
        mode = self._first_that_fits(lower, usable)
        # The last mode puts nothing on the device before it works, so there is one that succeeds.
        for candidate in lower[lower.index(mode) :]:
            if self._move(candidate):
                self._report(f"out of memory: going on with offload {candidate}")
                return True
        return False

    def _keep_less(self, usable: int) -> bool:
        """Let blocks go that stay on the device while others move, if any do and that helps."""
        placement = self._pipeline.placement
        fewer = self._run.replaced(placement, "group", usable).resident
        if len(fewer) >= len(placement.resident) or not self._move("group"):
            return False
        self._report(f"out of memory: going on with {len(fewer)} blocks on the device")
        return True

    def _move(self, mode: Offload) -> bool:
        """Move weights; False where the device has no room for those that are to lie there."""
        placement = replace(self._pipeline.placement, offload=mode)
        usable = usable_bytes(self._device)
        if usable is not None:
            placement = self._run.replaced(placement, mode, usable)
        try:
            self._pipeline.place(placement)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            _log.info("weights moved: offload %s", mode)
            return True
        clear_cache(self._device)
        return False
