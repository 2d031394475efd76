"""What a run gives up where memory is short, and takes back when there is more again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedgfe_store.generation.prepare import Report, Run
from fedgfe_store.models.devices import (
    MORE_OF_HOST,
    clear_cache,
    is_of_host,
    is_out_of_memory,
    usable_bytes,
)
from fedgfe_store.models.pipeline import ImagePipeline
from fedgfe_store.models.placement import Offload, Placement, possible_offloads

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
        self._host_is_short = False

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
        mode = self._first_that_fits(self._modes, usable) or self._modes[-1]
        sizes = (self._run.batch_size, self._run.decode_size)
        before = self._pipeline.placement
        higher = self._modes.index(mode) < self._modes.index(before.offload)
        more = mode == before.offload == "group" and self._kept(usable) > len(before.resident)
        if higher or more:
            if not self._move(mode):
                self._move(before.offload)
                return
            kept = f", {len(self._pipeline.placement.resident)} blocks on the device" * more
            self._report(f"memory is free again: going on with offload {mode}{kept}")
        elif (self.batch, self.slice) != sizes or self.tiled:
            self._report(f"memory is free again: going on in batches of {sizes[0]}")
        self.batch, self.slice = sizes
        self.tiled = False
        kept_before = len(self._run.placement.resident)
        if mode == self._modes[0] and len(self._pipeline.placement.resident) >= kept_before:
            self._short_at = None

    def remedy(self) -> str:
        """Say what would help where one image is too much to denoise."""
        placement = self._pipeline.placement
        if self._host_is_short:
            return MORE_OF_HOST
        usable = usable_bytes(self._device)
        if usable is None:
            return placement.remedy()
        modes = (placement.offload, *self._lower_that_fit(usable))
        smaller = "a smaller --height and --width or a GPU with more free memory"
        return placement.remedy(modes, otherwise=smaller)

    def decoding_remedy(self) -> str:
        """Say what would help where one image is too much to decode."""
        if self._host_is_short:
            return MORE_OF_HOST
        usable = usable_bytes(self._device)
        fit = [] if usable is None else self._lower_that_fit(usable)
        ways = [f"--offload {' or '.join(fit)}"] if fit else []
        ways.append("a smaller --height and --width" if self.tiled else "--vae-tiling")
        return f"{' or '.join(ways)} may help"

    def _lower_that_fit(self, usable: int) -> list[Offload]:
        """Give the modes, asked for or not, that take less than this one and fit."""
        placement = self._pipeline.placement
        modes = possible_offloads(placement.compiled, placement.quantization)
        lower = modes[modes.index(placement.offload) + 1 :]
        return [mode for mode in lower if self._needed(mode) <= usable]

    def _note_shortage(self) -> None:
        clear_cache(self._device)
        self._short_at, self._since = usable_bytes(self._device), 0

    def _needed(self, mode: Offload) -> int:
        """Estimate what one image takes in a mode."""
        return self._run.load.footprint(1).needed(mode)

    def _first_that_fits(self, modes: Sequence[Offload], usable: int | None) -> Offload | None:
        if usable is None:
            return modes[0]
        return next((mode for mode in modes if self._needed(mode) <= usable), None)

    def _kept(self, usable: int) -> int:
        """Give how many blocks could stay on the device while others move."""
        return len(self._run.replaced(self._pipeline.placement, "group", usable).resident)

    def _move_down(self, *, hopeless: bool) -> bool:
        """Move weights off the device; with `hopeless`, only if one image does not fit as it is."""
        current = self._pipeline.placement.offload
        lower = self._modes[self._modes.index(current) + 1 :]
        usable = usable_bytes(self._device) if lower else None
        if not lower or (hopeless and (usable is None or self._needed(current) <= usable)):
            return False
        if current == "group" and usable is not None and self._keep_less(usable):
            return True
        # An estimate is the most that work may take: where none fits, one after the other is tried.
        mode = self._first_that_fits(lower, usable) or lower[0]
        # The last mode puts nothing on the device before it works, so there is one that succeeds.
        for candidate in lower[lower.index(mode) :]:
            if self._move(candidate):
                self._report(f"out of memory: going on with offload {candidate}")
                return True
        return False

    def _keep_less(self, usable: int) -> bool:
        """Let blocks go that stay on the device while others move, if any do and that helps."""
        fewer = self._kept(usable)
        if fewer >= len(self._pipeline.placement.resident) or not self._move("group"):
            return False
        self._report(f"out of memory: going on with {fewer} blocks on the device")
        return True

    def _move(self, mode: Offload) -> bool:
        """Move weights; False where the device has no room for those that are to lie there."""
        placement = replace(self._pipeline.placement, offload=mode)
        usable = usable_bytes(self._device)
        if usable is not None:
            placement = self._run.replaced(placement, mode, usable)
        if self._placed(placement):
            return True
        # Blocks wait in pinned memory; layers are pinned on their way, a few at a time.
        may_help = self._host_is_short and mode == "group" and placement.pinned
        return may_help and self._placed(replace(placement, pinned=False))

    def _placed(self, placement: Placement) -> bool:
        try:
            self._pipeline.place(placement)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._host_is_short = is_of_host(error)
        else:
            self._host_is_short = False
            _log.info("weights moved: offload %s", placement.offload)
            return True
        clear_cache(self._device)
        return False
