"""What `--offload auto` chooses for machines of many sizes, and what that takes of a simulated GPU.

    python -m benchmarks.memory [--peaks] [--output table.md]

The first table is the plan alone, from sizes: FLUX.1-dev, Stable Diffusion XL and 1.5 at full size
on every card and host. With `--peaks` each different plan runs on the simulated GPU of the tests,
under the limit of the smallest card that has it, two steps and one decoding, twice; large
operations are not computed, so that it shows memory and placement and no seconds. It takes a minute
a plan.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
CARDS = (8, 12, 16, 20, 22.5, 24, 32, 48, 80)
HOSTS = (16, 32, 64, 128)
SCRATCH_PERCENT = 50
"""Of a convolution's tensors, for cuDNN."""


@dataclass(frozen=True)
class Case:
    """A model and its usual image."""

    name: str
    pixels: int
    tokens: int
    steps: int
    guidance: float
    columns: tuple[tuple[str, int], ...]


CASES = (
    Case("flux-dev", 1024, 512, 28, 3.5, (("prompt_embeds", 4096), ("pooled_prompt_embeds", 768))),
    Case("sdxl", 1024, 77, 50, 5.0, (("prompt_embeds", 2048), ("pooled_prompt_embeds", 1280))),
    Case("sd15", 512, 77, 50, 7.5, (("prompt_embeds", 768), ("negative_prompt_embeds", 768))),
)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peaks", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cards: Any = _simulated() if options.peaks else None
    with tempfile.TemporaryDirectory() as folder:
        lines = list(_lines(Path(folder), cards))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


def _simulated() -> Any:
    """Load the device of the tests, which has to be there before torch."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from virtual_gpu import device

    if (reason := device.missing()) is not None:
        sys.exit(f"not run: no simulated GPU, since {reason}")
    return device.load(device.build(Path(tempfile.gettempdir()) / "simulated_gpu"), cards=1)


def _lines(folder: Path, cards: Any) -> Iterator[str]:
    def said(line: str) -> str:
        print(line, flush=True)
        return line

    yield said(f"| GiB free on the card | {' | '.join(f'{host} GiB of host' for host in HOSTS)} |")
    yield said(f"|{'---|' * (len(HOSTS) + 1)}")
    plans: dict[Any, tuple[Case, float, Any]] = {}
    for case in CASES:
        yield said(f"| **{case.name}** |{' |' * len(HOSTS)}")
        load = _load(case, folder)
        rows: dict[tuple[str, ...], list[float]] = {}
        for card in CARDS:
            found = [_choice(load, card, host) for host in HOSTS]
            rows.setdefault(tuple(_cell(load, each) for each in found), []).append(card)
            for each in found:
                if each is not None:
                    same = (case, each.offload, each.batch_size, each.moving, each.pinned)
                    plans.setdefault(same, (case, card, each))
        for cells, same_cards in rows.items():
            many = f"{same_cards[0]} to {same_cards[-1]}" if same_cards[1:] else same_cards[0]
            yield said(f"| {many} | {' | '.join(cells)} |")
    if cards is None:
        return
    yield said("\n| model | card | plan | GiB planned | GiB of tensors | GiB of segments | |")
    yield said("|---|---|---|---|---|---|---|")
    for case, card, choice in plans.values():
        load = _load(case, folder)
        took = _run(cards, case, folder, card, load, choice)
        plan = f"{choice.device / GIB:.1f}"
        yield said(f"| {case.name} | {card} | {_cell(load, choice)} | {plan} | {took} |")


def _load(case: Case, folder: Path) -> Any:
    from benchmarks.full_size import save
    from fedgfe_store.generation.placing import load_of
    from fedgfe_store.models.families import resolve_model

    if not (folder / case.name).exists():
        save(case.name, folder / case.name)
    return load_of(resolve_model(str(folder / case.name)), _settings(case, case.steps), case.tokens)


def _settings(case: Case, steps: int) -> Any:
    from fedgfe_store.generation.settings import Settings

    size = (case.pixels, case.pixels)
    return Settings(case.name, "", "bfloat16", steps, case.guidance, *size)


def _choice(load: Any, card: float, host: float) -> Any:
    from fedgfe_store.models.choice import Memory, choose
    from fedgfe_store.models.placement import possible_offloads

    memory = Memory(int(card * GIB), int(host * GIB), exact=True)
    return choose(load, memory, modes=possible_offloads(compiled=False, quantization=None))


def _cell(load: Any, choice: Any) -> str:
    if choice is None:
        return "refused"
    words = [choice.offload]
    if choice.offload == "group":
        count = len(load.blocks.tensors)
        how = "pinned" if choice.pinned else "layers"
        words = [f"group, {count - len(choice.moving)} of {count} stay, {how}"]
    return f"{words[0]}, {choice.batch_size} a batch"


def _run(cards: Any, case: Case, folder: Path, card: float, load: Any, choice: Any) -> str:
    """Run a plan on the simulated card; say what it took."""
    import torch

    from fedgfe_store.models.diffusers import DiffusersImages
    from fedgfe_store.models.families import resolve_model
    from fedgfe_store.models.placement import Placement

    stay = tuple(name for name in load.blocks.tensors if name not in choice.moving)
    placement = Placement(
        "bfloat16",
        "cuda:0",
        choice.offload,
        resident=stay if choice.offload == "group" else (),
        pinned=choice.pinned,
    )
    size, settings = choice.batch_size, _settings(case, 2)
    embeddings = {
        name: torch.zeros(size, *([] if name.startswith("pooled") else [case.tokens]), width)
        for name, width in case.columns
    }
    cards.limit(0, card * 1024)
    cards.empty()
    images = latents = None
    refused = cards.refusals(0)
    try:
        with cards.skipping(scratch=SCRATCH_PERCENT):
            images = DiffusersImages.load(resolve_model(str(folder / case.name)), placement)
            for _ in range(2):
                latents = images.denoise(embeddings, list(range(size)), settings)
                images.decode(latents[: choice.decode_size], settings)
            peaks = [cards.peak(0, reserved=reserved) / GIB for reserved in (False, True)]
            images = latents = None
            gc.collect()
    except torch.OutOfMemoryError:
        images = latents = None
        gc.collect()
        return "- | - | out of memory"
    ended = f"{cards.refusals(0) - refused} refusals"
    return f"{peaks[0]:.1f} | {peaks[1]:.1f} | {ended}"


if __name__ == "__main__":
    main()
