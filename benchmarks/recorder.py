"""What recording costs training, beside torch.save of the same records.

    python benchmarks/recorder.py [--records 400] [--rounds 12]

Figures of one run on one machine: compare the ratios, not the seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch

from fedgfe_store.recording import Recorder

BATCH = 50
"""Samples that the model gives at a time."""


class Samples:
    """Embeddings of one node at one round, batch by batch, as a model leaves them."""

    def __init__(self, records: int) -> None:
        self.t5 = torch.randn(records, 17, 4096)
        self.clip = torch.randn(records, 768)
        self.names = [f"class_{i % 10}" for i in range(records)]
        self.index = [i // 10 for i in range(records)]

    def record(self, recorder: Recorder, number: int) -> None:
        with recorder.record(node=0, round=number) as batch:
            for start in range(0, len(self.index), BATCH):
                part = slice(start, start + BATCH)
                batch.add(
                    split="train",
                    class_name=self.names[part],
                    index=self.index[part],
                    t5=self.t5[part],
                    clip=self.clip[part],
                )

    def save(self, folder: Path, number: int) -> None:
        entries = [
            {
                "split": "train",
                "index": self.index[i],
                "class_name": self.names[i],
                "t5_embedding": self.t5[i],
                "clip_embedding": self.clip[i],
            }
            for i in range(len(self.index))
        ]
        content = {"node_id": 0, "round": number, "embeddings": entries}
        torch.save(content, folder / f"node_0_embeddings_r{number}.pt")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def train(steps: int, weights: torch.Tensor) -> None:
    """A round of training: so many steps that take time and one thread."""
    for _ in range(steps):
        weights = torch.tanh(weights @ weights)


def loop(rounds: int, steps: int, save: Callable[[int], object]) -> None:
    weights = torch.randn(512, 512)
    for number in range(rounds):
        train(steps, weights)
        save(number)


def inside(samples: Samples, folder: Path, rounds: int) -> None:
    recorded, saved = [], []
    with Recorder(folder / "inside.zarr") as recorder:
        for number in range(rounds):
            recorded.append(seconds(lambda: samples.record(recorder, number)))  # noqa: B023
            recorder.flush()
            saved.append(seconds(lambda: samples.save(folder, number)))  # noqa: B023
    ours, theirs = median(recorded[1:]), median(saved[1:])
    click.echo(f"{'in the training thread, a round':<38}{'ms':>10}")
    click.echo(f"{'torch.save':<38}{theirs * 1e3:>10.1f}")
    click.echo(f"{'recorder':<38}{ours * 1e3:>10.1f}  ratio {ours / theirs:.3f}")
    first = recorded[0]
    click.echo(f"{'recorder, first round':<38}{first * 1e3:>10.1f}  ratio {first / theirs:.3f}")


def whole(samples: Samples, folder: Path, rounds: int, steps: int) -> None:
    click.echo(f"\n{'whole training, ' + str(rounds) + ' rounds':<38}{'s':>10}")
    plain = seconds(lambda: loop(rounds, steps, lambda number: None))
    report("nothing recorded", plain, plain)
    for background in (True, False):

        def recording(background: bool = background) -> None:
            path = folder / f"background {background}.zarr"
            with Recorder(path, background=background) as recorder:
                loop(rounds, steps, lambda number: samples.record(recorder, number))

        report(f"recorder, background={background}", seconds(recording), plain)
    saving = seconds(lambda: loop(rounds, steps, lambda number: samples.save(folder, number)))
    report("torch.save", saving, plain)


def report(name: str, took: float, plain: float) -> None:
    more = "" if took == plain else f"  {100 * (took / plain - 1):+.0f} %"
    click.echo(f"{name:<38}{took:>10.2f}{more}")


@click.command()
@click.option("--records", default=400, show_default=True, help="Of [17, 4096] and [768], a round.")
@click.option("--rounds", default=12, show_default=True)
@click.option("--round-seconds", default=1.0, show_default=True, help="Length of a toy round.")
def main(records: int, rounds: int, round_seconds: float) -> None:
    torch.set_num_threads(1)  # the writer needs a core, too
    samples = Samples(records)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        inside(samples, folder, rounds)
        weights = torch.randn(512, 512)
        train(20, weights)
        steps = max(1, round(round_seconds / seconds(lambda: train(100, weights)) * 100))
        whole(samples, folder, rounds, steps)


if __name__ == "__main__":
    click.echo(f"python {sys.version.split()[0]}, torch {torch.__version__}")
    main()
