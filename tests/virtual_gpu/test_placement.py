"""Where weights and images lie: every offload mode, from one to another, and two cards."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from virtual_gpu.cases import Case, N, assert_like_cpu, render
from virtual_gpu.device import MIB, Cards

from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Offload, Placement

MODES: tuple[Offload, ...] = get_args(Offload)
# From every mode to every other once.
_NAMES = {mode[0]: mode for mode in MODES}
WALK = [_NAMES[letter] for letter in "nmngnsmgmsgsn"]
# Latents and pixels of these tests; weights of the decoders are larger.
SMALL = MIB // 16
SETTINGS = Settings("", "", "float32", 2, 3.5, 32, 32)


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_or_not_images_are_the_cpus_and_the_other_card_is_left_alone(
    case: Case, cards: Cards, tmp_path: Path, mode: Offload
) -> None:
    others, late = cards.taken(0), cards.late_copies
    report, _ = render(case, tmp_path, device="cuda:1", offload=mode)
    assert (report.done, report.failed) == (N, ())
    assert_like_cpu(case, tmp_path)
    assert cards.taken(0) == others
    assert cards.peak(1) > 0
    # The images themselves come late, too: a copy of pixels and one of flags a batch.
    copies = cards.late_copies - late
    assert copies > 4 if mode == "group" else copies == 4
    gc.collect()
    assert cards.held(1) < MIB / 4


def test_weights_move_from_every_mode_to_every_other_without_loading(
    case: Case, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = DiffusersImages.load(resolve_model(str(case.model)), Placement("float32", "cpu"))
    latents = images.denoise(case.embeddings(2), [1, 2], SETTINGS)
    expected = latents, list(images.decode(latents, SETTINGS))
    images = DiffusersImages.load(
        resolve_model(str(case.model)), Placement("float32", "cuda:1", MODES[0])
    )
    monkeypatch.setattr("fedgfe_store.models.diffusers.load_part", None)
    held: dict[Offload, int] = {}
    assert len(set(itertools.pairwise(WALK))) == len(MODES) * (len(MODES) - 1)
    for mode in WALK:
        images.place(Placement("float32", "cuda:1", mode))
        now = cards.held(1)
        assert held.setdefault(mode, now) == pytest.approx(now, abs=SMALL)
        # Two steps: from the second forward on group offload fetches blocks ahead.
        latents = images.denoise(case.embeddings(2), [1, 2], SETTINGS)
        torch.testing.assert_close(latents.cpu(), expected[0], rtol=1e-4, atol=1e-4)
        for got, wanted in zip(images.decode(latents, SETTINGS), expected[1], strict=True):
            assert got is not None
            assert abs(got.astype(int) - wanted).max() <= 1
        del latents
    assert held["none"] > held["group"] > SMALL > max(held["model"], held["sequential"])
    del images
    gc.collect()
    assert cards.held(1) < MIB / 4


def test_weights_move_after_an_error_half_way(case: Case, cards: Cards) -> None:
    expected = None
    for mode, other in itertools.pairwise((*MODES, *MODES[:1])):
        images = DiffusersImages.load(
            resolve_model(str(case.model)), Placement("float32", "cuda:1", mode)
        )

        def fail() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with pytest.raises(torch.OutOfMemoryError):
            images.denoise(case.embeddings(1), [1], SETTINGS, on_step=fail)
        images.place(Placement("float32", "cuda:1", other))
        latents = images.denoise(case.embeddings(1), [1], SETTINGS).cpu()
        expected = latents if expected is None else expected
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("mode", ["none", pytest.param("model", marks=pytest.mark.long)])
def test_blocks_are_compiled_once_a_batch_size_whatever_is_swapped(
    flux_case: Case, mode: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    case, compiled = flux_case, torch.nn.Module.compile

    def quickly(module: torch.nn.Module, **options: Any) -> None:
        compiled(module, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    # What is compiled leaves the card's random state as it was, and the simulated one has none.
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": None)
    torch._dynamo.reset()
    counters.clear()
    images = DiffusersImages.load(
        resolve_model(str(case.model)), Placement("float32", "cuda:1", mode, compiled=True)
    )
    graphs = []
    for size in (4, 4, 2, 4):
        latents = images.denoise(case.embeddings(size), list(range(size)), SETTINGS)
        images.decode(latents, SETTINGS)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 4, 4], "one for each kind of block"


def test_pinned_batches_arrive_whole(flux_case: Case, cards: Cards) -> None:
    side, got, late = torch.cuda.Stream(), [], cards.late_copies
    column = next(iter(flux_case.selection.schema.columns))
    for batch in flux_case.selection.batches(2, pin_memory=True):
        with torch.cuda.stream(side):
            got.append(batch[column].to("cuda", non_blocking=True))
    assert cards.late_copies - late == cards.pending == len(got)
    side.synchronize()
    values = torch.cat([value.cpu() for value in got]).numpy()
    assert values.tobytes() == flux_case.selection.read(column).tobytes()


def test_nothing_is_left_on_the_card_by_many_runs(case: Case, cards: Cards, tmp_path: Path) -> None:
    held = []
    for _ in range(3):
        render(case, tmp_path, device="cuda:0", offload="model", steps=1)
        gc.collect()
        held.append(cards.held(0))
    assert held[1] == held[2]
