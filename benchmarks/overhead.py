"""What a run costs besides the model: wall time against the pipeline's own.

    python benchmarks/overhead.py [--images 64] [--seconds 0.5] [--batch-size 4] [--size 1024]

The model is a stand-in that sleeps a known time an image, as the device of a real one would be
busy, and returns pictures of 1024 x 1024. Beside `generate`: a naive loop that takes the same
batches and saves each picture before the next batch, and one like the script that this package
replaces, which loads the whole `.pt` file and takes records one by one. Loading is left out. Where
the processor is shared, look at the column `CPU ms`: what an image takes of it, all threads
together. Then what a picture costs as PNG: as `generate` writes it, with `isal` and without, and at
Pillow's levels of compression, of which Pillow itself uses 6.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.common.igzip import isal_zlib
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.settings import Settings
from fedgfe_store.images import png
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Picture, Placement, Sampling
from fedgfe_store.models.tiny import TINY_FLUX

DECODING = 0.1


class Sleeper:
    """Takes `seconds` an image, a tenth of it for decoding, and keeps count of its own time."""

    batches_per_swap = 1

    def __init__(self, seconds: float, size: int) -> None:
        self.model = resolve_model(str(TINY_FLUX))
        self.placement = Placement("float32", "cpu")
        self.busy = 0.0
        self._seconds = seconds
        self._picture = photograph(size)

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        settings: Sampling,
        *,
        on_step: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Sleep for the most part of the time, step by step."""
        for _ in range(settings.steps):
            self._sleep(self._seconds * (1 - DECODING) * len(seeds) / settings.steps)
            on_step()
        return torch.zeros(len(seeds), 1)

    def decode(
        self, latents: torch.Tensor, settings: Sampling, *, tiled: bool = False
    ) -> list[Picture | None]:
        """Sleep for the rest, and return pictures, which take the pipeline's own time to make."""
        started = time.perf_counter()
        pictures: list[Picture | None] = [self._picture.copy() for _ in latents]
        made = time.perf_counter() - started
        self.busy += made
        self._sleep(max(0, self._seconds * DECODING * len(latents) - made))
        return pictures

    def place(self, placement: Placement) -> None:
        """Be somewhere else."""
        self.placement = placement

    def _sleep(self, seconds: float) -> None:
        started = time.perf_counter()
        time.sleep(seconds)
        self.busy += time.perf_counter() - started


def photograph(size: int) -> np.ndarray:
    """Make a picture that compresses like a photograph: smooth parts and some grain."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sin(9 * x * y)]
    grain = np.random.default_rng(0).normal(0, 3, (size, size, 3))
    return np.clip(127 + 90 * np.stack(waves, -1) + grain, 0, 255).astype(np.uint8)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--alone", action="store_true", help="Leave the other loops out.")
    options = parser.parse_args()
    loops = {"generate": ours}
    if not options.alone:
        loops |= {"naive batched loop": naive, "one by one, whole .pt": legacy}
    with tempfile.TemporaryDirectory() as temporary:
        store, checkpoint = make_records(Path(temporary), options.images)
        print(
            f"{'':24}{'wall s':>10}{'model s':>10}{'ratio':>8}{'idle':>8}{'images/s':>10}"
            f"{'CPU ms':>8}"
        )
        for name, loop in loops.items():
            pipeline = Sleeper(options.seconds, options.size)
            folder = Path(temporary) / name
            folder.mkdir()
            started, cpu = time.perf_counter(), time.process_time()
            loop(store, checkpoint, folder, pipeline, options)
            wall = time.perf_counter() - started
            cpu = (time.process_time() - cpu) / options.images
            assert len(list(folder.glob("*.png"))) == options.images
            print(
                f"{name:24}{wall:10.2f}{pipeline.busy:10.2f}{wall / pipeline.busy:8.3f}"
                f"{1 - pipeline.busy / wall:8.1%}{options.images / wall:10.3f}"
                f"{cpu * 1e3:8.1f}",
                flush=True,
            )

    print()
    print_png(photograph(options.size))


def print_png(picture: np.ndarray) -> None:
    """Print milliseconds of one processor, and size, of a picture as PNG."""
    encoders: dict[str, Callable[[], bytes]] = {"generate": lambda: png.png_bytes(picture, {})}
    if isal_zlib is not None:
        encoders["generate, without isal"] = lambda: without_isal(picture)
    for level in (0, 1, 3, 6, 9):
        encoders[f"Pillow, level {level}"] = partial(pillow, picture, level)
    print(f"{'PNG':24}{'ms':>10}{'MB':>10}")
    for name, encode in encoders.items():
        seconds, nbytes = min(timed(encode) for _ in range(3))
        print(f"{name:24}{seconds * 1e3:10.0f}{nbytes / 1e6:10.2f}")


def timed(encode: Callable[[], bytes]) -> tuple[float, int]:
    """Return a call's seconds of this thread's processor time, and the bytes it gives."""
    started = time.thread_time()
    data = encode()
    return time.thread_time() - started, len(data)


def without_isal(picture: np.ndarray) -> bytes:
    """Encode a picture as `generate` does where there is no isal."""
    with mock.patch.object(png, "isal_zlib", None):
        return png.png_bytes(picture, {})


def pillow(picture: np.ndarray, level: int) -> bytes:
    """Encode a picture with Pillow."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=level)
    return file.getvalue()


def make_records(folder: Path, images: int) -> tuple[EmbeddingStore, Path]:
    """Make records as a store and as a legacy file."""
    rng = np.random.default_rng(1)
    t5 = rng.standard_normal((images, 17, 4096), np.float32)
    clip = rng.standard_normal((images, 768), np.float32)
    store = EmbeddingStore.create(folder / "embeddings.zarr", Schema.flux(17))
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(images), t5=t5, clip=clip)
    entries = [
        {"t5_embedding": torch.from_numpy(a), "clip_embedding": torch.from_numpy(b)}
        for a, b in zip(t5, clip, strict=True)
    ]
    torch.save({"embeddings": entries}, folder / "node_0_embeddings_r1.pt")
    return store, folder / "node_0_embeddings_r1.pt"


def ours(
    store: EmbeddingStore,
    checkpoint: Path,
    folder: Path,
    pipeline: Sleeper,
    options: argparse.Namespace,
) -> None:
    """Render with `generate`."""
    report = generate(
        store.select(),
        folder,
        pipeline=pipeline,
        height=options.size,
        width=options.size,
        batch_size=options.batch_size,
        steps=28,
    )
    assert not report.failed


def naive(
    store: EmbeddingStore,
    checkpoint: Path,
    folder: Path,
    pipeline: Sleeper,
    options: argparse.Namespace,
) -> None:
    """Read a batch, render it, save it, and only then go on."""
    for number, batch in enumerate(store.select().batches(options.batch_size, prefetch=0)):
        pair = {"prompt_embeds": batch["t5"], "pooled_prompt_embeds": batch["clip"]}
        save(pipeline, pair, folder, number * options.batch_size)


def legacy(
    store: EmbeddingStore,
    checkpoint: Path,
    folder: Path,
    pipeline: Sleeper,
    options: argparse.Namespace,
) -> None:
    """Load everything, then render one record after the other."""
    for number, entry in enumerate(torch.load(checkpoint)["embeddings"]):
        pair = {
            "prompt_embeds": entry["t5_embedding"][None],
            "pooled_prompt_embeds": entry["clip_embedding"][None],
        }
        save(pipeline, pair, folder, number)


def save(
    pipeline: Sleeper, embeddings: Mapping[str, torch.Tensor], folder: Path, first: int
) -> None:
    """Render a batch and save it as Pillow does by itself."""
    settings = Settings("", "", "float32", 28, 3.5, 0, 0)
    latents = pipeline.denoise(embeddings, range(len(embeddings["prompt_embeds"])), settings)
    for offset, picture in enumerate(pipeline.decode(latents, settings)):
        assert picture is not None
        Image.fromarray(picture).save(folder / f"{first + offset}.png")


if __name__ == "__main__":
    main()
