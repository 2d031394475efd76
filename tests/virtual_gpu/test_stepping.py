"""A card that others use, too: a run gives up what it must, takes it back, and draws the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import provenance_of
from virtual_gpu.cases import HEAVY, HEAVY_RECORDS, Case, assert_like_cpu, render
from virtual_gpu.device import MIB, Cards

from fedgfe_store.generation import room
from fedgfe_store.models import choice, fit
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.names import image_name

WORKSPACE = 24
"""What an image's work takes besides its tensors, in MiB, as kernels' workspaces do."""
RESERVE = 48
"""What the estimates leave for it, and for what of its segments the allocator cannot use."""

# Of the model's 130 MiB of weights the modes take with that 170, 130, 122 and 26 MiB of segments.
NO_ROOM_FOR_BOTH, NO_ROOM_FOR_EITHER, NO_ROOM_FOR_BLOCKS, ALL = 160, 128, 60, 1024

Shared = Callable[..., None]


@pytest.fixture
def shared(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """Leave so many MiB of the second card once so many images are denoised."""
    denoise, decode = DiffusersImages.denoise, DiffusersImages.decode

    def leave(limits: Mapping[int, float], *, at: Sequence[str] = ("denoise", "decode")) -> None:
        monkeypatch.setattr(fit, "RESERVE_BYTES", RESERVE * MIB)
        monkeypatch.setattr(choice, "RESERVE_BYTES", RESERVE * MIB)
        cards.limit(1, ALL)
        cards.empty()
        done = 0

        def work(name: str, images: int) -> None:
            if name in at:
                torch.empty(images * WORKSPACE * MIB, dtype=torch.uint8, device="cuda:1")

        def denoising(
            self: DiffusersImages, given: Any, seeds: Any, settings: Any, **how: Any
        ) -> torch.Tensor:
            nonlocal done
            torch.cuda.empty_cache()  # what torch keeps, others cannot take
            cards.limit(1, limits[max(count for count in limits if count <= done)])
            on_step = how["on_step"]

            def stepping() -> None:
                work("denoise", len(seeds))  # while the network is where it works
                on_step()

            latents = denoise(self, given, seeds, settings, on_step=stepping)
            done += len(seeds)
            return latents

        def decoding(
            self: DiffusersImages, latents: torch.Tensor, settings: Any, **how: Any
        ) -> Any:
            made = decode(self, latents, settings, **how)
            work("decode", len(latents))
            return made

        monkeypatch.setattr(DiffusersImages, "denoise", denoising)
        monkeypatch.setattr(DiffusersImages, "decode", decoding)

    return leave


def rendered(case: Case, folder: Path, **options: Any) -> list[str]:
    """Make all images, the CPU's; give what was said."""
    report, remarks = render(case, folder, device="cuda:1", **{**HEAVY, **options})
    assert (report.done, report.failed) == (HEAVY_RECORDS, ())
    assert_like_cpu(case, folder)
    return remarks


def told(case: Case, folder: Path, name: str) -> list[Any]:
    """Give what each image says of how it was made."""
    return [provenance_of(folder / image_name(key))[name] for key in case.selection.keys()]


def test_auto_steps_down_while_running_and_returns_when_memory_does(
    heavy_case: Case, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_BATCHES_BETWEEN", 4)  # of 16, for which fewer images will do
    shared(
        {0: ALL, 2: NO_ROOM_FOR_BOTH, 4: NO_ROOM_FOR_EITHER, 6: NO_ROOM_FOR_BLOCKS, 8: ALL},
        at=("denoise",),
    )
    remarks = rendered(heavy_case, tmp_path, clear_cache_every=1)
    assert remarks == [
        "out of memory: going on with offload model",
        "out of memory: going on with offload group",
        "out of memory: going on with offload sequential",
        "memory is free again: going on with offload none",
    ]
    modes = [mode for mode in ("none", "model", "group") for _ in range(2)]
    assert told(heavy_case, tmp_path, "offload") == [*modes, *["sequential"] * 4, *["none"] * 4]


def test_batches_and_slices_are_halved_while_running_and_return_when_memory_does(
    heavy_case: Case, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_BATCHES_BETWEEN", 1)
    shared({0: ALL, 4: 210, 6: ALL})
    remarks = rendered(heavy_case, tmp_path, batch_size=4, offload="none", clear_cache_every=1)
    assert remarks == [
        "out of memory: going on in batches of 2",
        "memory is free again: going on in batches of 4",
    ]
    assert told(heavy_case, tmp_path, "batch_size") == [*[4] * 4, *[2] * 4, *[4] * 4, *[2] * 2]


def test_decoding_in_slices_and_what_is_named_where_one_image_is_too_much(
    heavy_case: Case, shared: Shared, tmp_path: Path
) -> None:
    shared({0: 210}, at=("decode",))
    remarks = rendered(heavy_case, tmp_path / "slices", batch_size=4, offload="none")
    assert remarks == ["out of memory: decoding in slices of 2"]
    shared({0: 150}, at=("decode",))
    options = {**HEAVY, "device": "cuda:1", "batch_size": 1}
    report, _ = render(heavy_case, tmp_path / "asked", offload="none", **options)
    assert report.failed[0].reason == (
        "out of memory decoding one picture; --offload model or group or sequential or "
        "--vae-tiling may help"
    )
    shared({0: 150}, at=("decode",))
    rendered(heavy_case, tmp_path / "helped", offload="model")
