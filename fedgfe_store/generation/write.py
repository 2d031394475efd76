"""Writing images beside the device's work, and keeping count of what became of each image."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeAlias

from fedgfe_store.derived_keys import Key
from fedgfe_store.generation.plan import PlanItem
from fedgfe_store.images.manifest import Manifest, timestamp
from fedgfe_store.images.png import Stamp, write_png
from fedgfe_store.models.placement import Picture

# The GIL is free while a picture is compressed: one thread's work hides behind the device's. The
# others hide a disk that is slow to sync, and share what a batch leaves at the end.
_THREADS = 4
# So many of 1024 x 1024 pixels are 48 MiB: a slow disk holds rendering up rather than fill memory.
_WAITING_PICTURES = 16
# One or two may be bad luck with a network disk, three in a row are a full or a lost one.
_FAILURES_TO_GIVE_UP = 3

Progress = Callable[[int], object]
Fetch: TypeAlias = "Callable[[], Picture | None]"


@dataclass(frozen=True)
class Failure:
    """An image that was not made, and why."""

    key: Key
    number: int
    reason: str

    def __str__(self) -> str:
        image = f", image {self.number}" if self.number else ""
        return f"{self.key}{image}: {self.reason}"


@dataclass
class Tally:
    """What became of the images so far.

    Parameters
    ----------
    progress : callable
        Called with 1 for each image that is settled: made, failed, or another process's.
    settled : callable
        Called with each image that was made or has failed, and with the reason or None.
    """

    progress: Progress
    settled: Callable[[PlanItem, str | None], object]
    done: dict[PlanItem, Stamp] = field(default_factory=dict)
    elsewhere: set[PlanItem] = field(default_factory=set)
    failed: dict[PlanItem, str] = field(default_factory=dict)

    def succeed(self, item: PlanItem, stamp: Stamp) -> None:
        """Count an image as made, of which this state of its file was written."""
        self.done[item] = stamp
        self.settled(item, None)
        self.progress(1)

    def leave(self, item: PlanItem) -> None:
        """Count an image that another process has made meanwhile, or is making."""
        self.elsewhere.add(item)
        self.progress(1)

    def fail(self, item: PlanItem, reason: str) -> None:
        """Count an image as failed."""
        self.failed[item] = reason
        self.settled(item, reason)
        self.progress(1)

    def give_up(self, items: Iterable[PlanItem], reason: str) -> None:
        """Count the images that nothing has become of as failed without having been tried."""
        settled = self.done.keys() | self.elsewhere
        for item in items:
            if item not in settled:
                self.failed.setdefault(item, reason)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The failed images."""
        return tuple(Failure(i.key, i.number, reason) for i, reason in self.failed.items())


class ImageWriter:
    """Encodes and writes images in a few threads, with a bounded number waiting.

    An image that cannot be written fails alone. After three in a row, as on a full disk, the
    writer has `gave_up`: rendering on would only cost hours.

    Parameters
    ----------
    manifest : Manifest
        Gets a line for each image.
    tally : Tally
        Hears what became of each; only from the thread that calls.
    """

    def __init__(self, manifest: Manifest, tally: Tally) -> None:
        self._manifest, self._tally = manifest, tally
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fedgfe-writer")
        self._waiting: deque[tuple[PlanItem, Future[Stamp | str]]] = deque()
        self._failed_in_a_row = 0

    @property
    def gave_up(self) -> bool:
        """Whether the latest images could not be written."""
        return self._failed_in_a_row >= _FAILURES_TO_GIVE_UP

    def submit(
        self,
        item: PlanItem,
        fetch: Fetch,
        provenance: Mapping[str, Any],
        *,
        seconds: float,
    ) -> None:
        """Write an image soon; waits while too many others do.

        An image that is not finite, black all over, or of another size fails.

        Parameters
        ----------
        item : PlanItem
            The image.
        fetch : callable
            Gives the pixels, uint8 ``[height, width, 3]``, or None where they were not finite; it
            may wait for the device.
        provenance : mapping
            What the file says about itself.
        seconds : float
            Rendering time of the image, for the manifest.
        """
        self._settle(_WAITING_PICTURES - 1)
        self._waiting.append(
            (item, self._pool.submit(self._write, item, fetch, provenance, seconds))
        )

    def _write(
        self,
        item: PlanItem,
        fetch: Fetch,
        provenance: Mapping[str, Any],
        seconds: float,
    ) -> Stamp | str:
        """Write an image; give the reason if it is not worth writing."""
        pixels = fetch()
        if pixels is None:
            return "the model gave a picture that is not finite (NaN or infinity)"
        # Of most pictures the first row tells; all of them is a byte a pixel to convert.
        if not (pixels[0].any() or pixels.any()):
            return "the model gave a picture that is black all over"
        asked = tuple(provenance["settings"][side] for side in ("height", "width"))
        if pixels.shape[:2] != asked:  # it would be taken for damaged, and made again in each run
            height, width = pixels.shape[:2]
            return f"expected a picture of {asked[1]}x{asked[0]}, the model gave {width}x{height}"
        stamp = write_png(item.path, pixels, provenance)
        facts = {"bytes": stamp[1], "seconds": round(seconds, 4), "created": timestamp()}
        self._manifest.append({"file": item.path.name, **provenance, **facts})
        return stamp

    def _settle(self, leave: int) -> None:
        """Count the oldest images that are written, and wait until at most `leave` are not."""
        while self._waiting and (len(self._waiting) > leave or self._waiting[0][1].done()):
            item, future = self._waiting.popleft()
            try:
                outcome = future.result()
            except OSError as error:
                self._failed_in_a_row += 1
                self._tally.fail(item, f"cannot write {item.path.name}: {error}")
            else:
                self._failed_in_a_row = 0
                if isinstance(outcome, str):
                    self._tally.fail(item, outcome)
                else:
                    self._tally.succeed(item, outcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._settle(0)
        finally:
            self._pool.shutdown(wait=True)
