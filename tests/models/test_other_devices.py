"""Devices that are not CUDA's, of which no machine here has one: what torch is asked, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedgfe_store.models import devices


@pytest.mark.parametrize("device", ["mps", "xpu", "xpu:1"])
def test_what_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    asked: list[Any] = []
    empty = torch.empty

    def pretending(*size: int, device: str) -> torch.Tensor:
        asked.append(device)
        return empty(*size, device="cpu")

    monkeypatch.setattr(torch, "empty", pretending)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: asked.append("mps emptied"))
    monkeypatch.setattr(torch.xpu, "empty_cache", lambda: asked.append("xpu emptied"))
    assert devices.choose_device(device) == device
    assert devices.choose_dtype(None, device) == ("float32", None)
    assert devices.choose_dtype("bfloat16", device) == ("bfloat16", None)
    assert devices.free_bytes(device) is None
    assert devices.usable_bytes(device) is None
    devices.clear_cache(device)
    assert asked == [device, f"{torch.device(device).type} emptied"]
