"""Kill a run of ``generate`` at random moments, resume it once, and look at what is there.

    python tools/kill_runs.py [--kills 30] [--images 200]

Each trial renders into a fresh folder with a tiny random FLUX, is killed by SIGKILL at a random
moment of its rendering, and is run again once. The folder has to hold what an undisturbed run
makes, no picture that was there before may have been touched, and none may be torn.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.generation.run import GenerationReport, generate

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from generation_fakes import save_random_flux

SIZE = 64
BATCH = 4

RUN = """
import sys
from fedgfe_store import EmbeddingStore
from fedgfe_store.generation.run import generate
store, folder, model, size, batch = sys.argv[1:]
selection = EmbeddingStore.open(store).select()
generate(selection, folder, model=model, steps=4, height=int(size), width=int(size), device="cpu",
         offload="none", batch_size=int(batch))
"""


def main() -> None:
    """Run the trials and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        model = save_random_flux(base / "model")
        store = make_store(base / "embeddings.zarr", options.images)
        resume(store, base / "straight", model)
        expected = pictures(base / "straight")
        lost = [
            trial(base / f"{n}", base, model, expected, rng=rng, number=n)
            for n in range(options.kills)
        ]
    print(
        f"{options.kills} kills of a {options.images}-image run, one resume each: folders "
        f"identical, nothing touched, nothing torn; killed after "
        f"{min(lost)} to {max(lost)} pictures"
    )


def make_store(path: Path, images: int) -> EmbeddingStore:
    """Make a store of random embeddings."""
    store = EmbeddingStore.create(path, Schema.flux(3, width=8, clip=(4,)))
    values = np.random.default_rng(0)
    with store.append(node=0, round=1) as batch:
        batch.add(
            split="train",
            class_name="dog",
            index=range(images),
            t5=values.standard_normal((images, 3, 8), np.float32),
            clip=values.standard_normal((images, 4), np.float32),
        )
    return store


def resume(store: EmbeddingStore, folder: Path, model: Path) -> GenerationReport:
    """Render what is missing, in this process."""
    return generate(
        store.select(),
        folder,
        model=str(model),
        device="cpu",
        offload="none",
        height=SIZE,
        width=SIZE,
        steps=4,
        batch_size=BATCH,
    )


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Read all pictures whole."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image)
    return found


def trial(
    folder: Path,
    base: Path,
    model: Path,
    expected: dict[str, np.ndarray],
    *,
    rng: random.Random,
    number: int,
) -> int:
    """Kill one run and resume it; give the pictures that it had made."""
    store = base / "embeddings.zarr"
    arguments = [str(store), str(folder), str(model), str(SIZE), str(BATCH)]
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stderr=subprocess.DEVNULL)
    target = rng.randrange(len(expected))
    while process.poll() is None and len(list(folder.glob("*.png"))) < target:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    torn = set(before) - {folder / name for name in pictures(folder)}
    report = resume(EmbeddingStore.open(store), folder, model)
    after = pictures(folder)
    assert not torn
    assert report.done == len(expected) - len(before), (report.done, len(before))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "made twice"
    assert after.keys() == expected.keys()
    furthest = max(np.abs(after[n].astype(int) - expected[n]).max() for n in expected)
    assert furthest <= 1, furthest
    assert not list(folder.glob(".fedgfe-*.tmp"))
    print(f"trial {number}: killed after {len(before)}, resumed {report.done}", flush=True)
    return len(before)


if __name__ == "__main__":
    main()
