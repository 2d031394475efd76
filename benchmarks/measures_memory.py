"""How much memory each measure takes beside its model, on stores of 1 and 2 GB.

    python -m benchmarks.measures_memory [--folder DIR] [--rounds 6,12] [--only NAME]

A round is 600 records of T5 [17, 4096] and CLIP [768], 0.17 GB of float32: of three nodes and a
server, ten classes, an image of 16 x 16 each, and a sound of one second for each sample. Each
measure is a process of its own: what it holds once its model is loaded and its store is open, and
how far above that it comes. Models are tiny; features are 2,048 numbers, as those of Inception.
Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

NODES = ("0", "1", "2", "server")
CLASSES = tuple(f"class{letter}" for letter in "abcdefghij")
EACH, WIDTH, SIZE, RATE = 15, 2048, 16, 8_000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", default="6,12")
    parser.add_argument("--only", choices=list(MEASURES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(_measured(options.folder, options.child))
        return
    rounds = [int(number) for number in options.rounds.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "models").exists():
            _make_models(folder)
        found: dict[str, list[str]] = {name: [] for name in MEASURES}
        for last in rounds:
            _add_rounds(folder, last)
            for name in [options.only] if options.only else MEASURES:
                words = [sys.executable, "-m", "benchmarks.measures_memory", "--child", name]
                done = subprocess.run(
                    [*words, "--folder", str(folder)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(done.stdout.strip())
                print(f"{last} rounds, {name}: {done.stdout.strip()} MB", file=sys.stderr)
    sizes = [f"{0.169 * last:.1f} GB" for last in rounds]
    print(f"| MB above the process with its model | {' | '.join(sizes)} |")
    print(f"|---|{'---|' * len(rounds)}")
    for name, values in found.items():
        if values:
            print(f"| {name} | {' | '.join(values)} |")


def _measured(folder: Path, name: str) -> str:
    """Run a measure, and return how far the process came above where it began, in MB."""
    import torch

    torch.set_num_threads(1)
    run = MEASURES[name](folder)
    # From here on the highest that it holds counts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _held("VmRSS")
    run()
    return f"{(_held('VmHWM') - before) / 1000:.0f}"


def _held(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1.024 for line in lines if line.startswith(what))


# What is measured: each loads what it needs, and returns what is to be run.


def _images(folder: Path) -> Any:
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.scoring import selected_images

    return selected_images(EmbeddingStore.open(folder / "s.zarr").select(), folder / "images")


def _score(folder: Path) -> Callable[[], Any]:
    from fedgfe_store.images import scoring
    from fedgfe_store.images.clip import Clip

    Clip.load(str(folder / "models/clip"), "cpu")

    def run() -> None:
        found = _images(folder)
        scores = scoring.score_pictures(found, str(folder / "models/clip"), device="cpu")
        scores.table(["node", "round"])

    return run


def _features() -> Any:
    from fedgfe_store.images.features import Features

    turn = np.random.default_rng(0).standard_normal((SIZE * SIZE * 3, WIDTH)).astype(np.float32)

    def embed(images: Sequence[Any]) -> np.ndarray:
        pixels = np.stack([np.asarray(image, np.float32).ravel() for image in images])
        values: np.ndarray = np.tanh(pixels @ turn / 10_000)
        return values

    return Features("random", embed)


def _fidelity(folder: Path, by: Sequence[str]) -> Callable[[], Any]:
    import_module("torchmetrics.image.kid")

    from fedgfe_store.images.fidelity import fidelity, pictures_below

    features = _features()

    def run() -> None:
        fidelity(_images(folder), features, real=pictures_below(folder / "real"), by=by)

    return run


def _classifier(folder: Path, by: Sequence[str]) -> Callable[[], Any]:
    import_module("sklearn.linear_model")

    from fedgfe_store.images.transfer import real_classes, train_and_test

    features = _features()

    def run() -> None:
        train_and_test(_images(folder), features, real_classes(folder / "real", CLASSES), by=by)

    return run


def _audio(folder: Path) -> Callable[[], Any]:
    import_module("scipy.signal")
    import_module("soundfile")

    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.clap import Clap
    from fedgfe_store.images.clip import Clip
    from fedgfe_store.images.hearing import class_space, compare_with_sounds
    from fedgfe_store.images.scoring import PROMPT
    from fedgfe_store.images.sound import sound_files

    clap = Clap.load(folder / "models/clap", "cpu")
    space = class_space(clap, Clip.load(str(folder / "models/clip"), "cpu"), CLASSES, PROMPT)

    def run() -> None:
        selection = EmbeddingStore.open(folder / "s.zarr").select()
        files = sound_files(selection, folder)
        compare_with_sounds(_images(folder), files, space).table(["node", "round"])

    return run


def _quality(folder: Path, by: Sequence[str]) -> Callable[[], Any]:
    import_module("sklearn.neighbors")

    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis import quality

    def run() -> None:
        store = EmbeddingStore.open(folder / "s.zarr")
        quality(store.select(node=["0", "1", "2"]), store.select(node="server"), by)

    return run


def _stats(folder: Path) -> Callable[[], Any]:
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis import summarize

    return lambda: summarize(EmbeddingStore.open(folder / "s.zarr").select(), ["round", "node"])


def _map(folder: Path, method: str) -> Callable[[], Any]:
    import_module("sklearn.decomposition")
    import_module("sklearn.manifold")

    from fedgfe_store import EmbeddingStore
    from fedgfe_store.analysis import map_records

    if method == "umap":
        import_module("umap")

    return lambda: map_records(EmbeddingStore.open(folder / "s.zarr").select(), method)


MEASURES: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "score": _score,
    "audio": _audio,
    "fidelity --by node,round": lambda folder: _fidelity(folder, ["node", "round"]),
    "fidelity --by split": lambda folder: _fidelity(folder, ["split"]),
    "fidelity --measure classifier": lambda folder: _classifier(folder, ["node", "round"]),
    "classifier --by split": lambda folder: _classifier(folder, ["split"]),
    "quality --by node,round": lambda folder: _quality(folder, ["node", "round"]),
    "quality --by split": lambda folder: _quality(folder, ["split"]),
    "stats": _stats,
    "map --method pca": lambda folder: _map(folder, "pca"),
    "map --method tsne": lambda folder: _map(folder, "tsne"),
    "map --method umap": lambda folder: _map(folder, "umap"),
}


# What it is measured on.


def _make_models(folder: Path) -> None:
    from generation_fakes import letters, save_random_clip
    from transformers import ClapFeatureExtractor

    from tools.train_tiny_clap import TOKENS, tiny_clap

    (folder / "models/clap").mkdir(parents=True)
    save_random_clip(folder / "models/clip")
    tiny_clap().save_pretrained(folder / "models/clap")
    letters(folder / "models/clap", TOKENS).save_pretrained(folder / "models/clap")
    ClapFeatureExtractor(
        feature_size=32, sampling_rate=RATE, hop_length=RATE // 64, max_length_s=1,
        fft_window_size=512, frequency_max=RATE // 2, truncation="rand_trunc",
    ).save_pretrained(folder / "models/clap")  # fmt: skip


def _add_rounds(folder: Path, last: int) -> None:
    """Bring the store, its images and sounds to `last` rounds."""
    from scipy.io import wavfile

    from fedgfe_store import EmbeddingStore, Schema

    path = folder / "s.zarr"
    rng = np.random.default_rng(last)
    if not path.exists():
        EmbeddingStore.create(path, Schema.flux(17))
        for name in CLASSES:
            (folder / "real" / name).mkdir(parents=True)
            for number in range(100):
                _picture(rng, folder / "real" / name / f"{number}.png")
        (folder / "sounds").mkdir()
        for node in NODES:
            for name in CLASSES:
                for index in range(EACH):
                    file = folder / "sounds" / f"{node}_{name}_{index}.wav"
                    wavfile.write(file, RATE, rng.integers(-9_000, 9_000, RATE).astype(np.int16))
    store = EmbeddingStore.open(path)
    there = set(store.select().column("round").tolist())
    for round in sorted(set(range(1, last + 1)) - there):
        for node in NODES:
            with store.append(node=node, round=round) as batch:
                for place, name in enumerate(CLASSES):
                    t5 = rng.standard_normal((EACH, 17, 4096), np.float32) + np.float32(place / 10)
                    batch.add(
                        split="train", class_name=name, index=range(EACH), t5=t5,
                        clip=rng.standard_normal((EACH, 768), np.float32),
                        audio_path=[f"sounds/{node}_{name}_{i}.wav" for i in range(EACH)],
                    )  # fmt: skip
    _add_images(folder, rng)


def _add_images(folder: Path, rng: np.random.Generator) -> None:
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.images.manifest import Manifest
    from fedgfe_store.names import image_name, key_json

    images = folder / "images"
    images.mkdir(exist_ok=True)
    with Manifest(images) as manifest:
        for key in EmbeddingStore.open(folder / "s.zarr").select().keys():
            name = image_name(key, 0)
            if not (images / name).exists():
                _picture(rng, images / name)
                settings = {"model": "none", "width": SIZE, "height": SIZE}
                manifest.append(
                    {"file": name, "key": key_json(key), "image": 0, "settings": settings}
                )


def _picture(rng: np.random.Generator, file: Path) -> None:
    from PIL import Image

    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file)


if __name__ == "__main__":
    main()
