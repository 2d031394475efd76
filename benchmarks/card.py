"""Measuring on a card: seconds, the share of them in which it idles, and its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fedgfe_store.models.devices import clear_cache

GIB = 2**30
WARM_UP_STEPS = 2  # blocks are fetched ahead from the second step on
NOT_SEEN = "not seen"


def is_card(device: str) -> bool:
    """Whether a device is a card, if only a simulated one."""
    return torch.device(device).type == "cuda"


def is_simulated() -> bool:
    """Whether the card is the tests': torch was built without CUDA and yet names one."""
    built = torch.version.cuda or torch.version.hip
    return torch.cuda.is_available() and built is None


def give_back(device: str) -> None:
    """Give back what torch keeps of the card, and of pinned memory of the host."""
    clear_cache(device)
    if empty := getattr(torch._C, "_host_emptyCache", None):  # not in a torch without CUDA
        empty()


def figures(make: Callable[[int], int], steps: int, device: str) -> tuple[str, str, str, str]:
    """Warm up and measure; give images a second, idle share, allocated and reserved GiB."""
    make(WARM_UP_STEPS)
    count, seconds = timed(make, steps, device)
    if not is_card(device):
        return (f"{count / seconds:.3f}", "-", "-", "-")
    peaks = (
        f"{torch.cuda.max_memory_allocated(device) / GIB:.3f}",
        f"{torch.cuda.max_memory_reserved(device) / GIB:.3f}",
    )
    if is_simulated():
        return (NOT_SEEN, NOT_SEEN, *peaks)
    idle = idle_share(make, steps, device)
    return (f"{count / seconds:.3f}", "unknown" if idle is None else f"{idle:.1%}", *peaks)


def timed(make: Callable[[int], int], steps: int, device: str) -> tuple[int, float]:
    """Give images and seconds, the device's work included."""
    wait: Callable[[str], None] = torch.cuda.synchronize if is_card(device) else lambda _: None
    wait(device)
    started = time.perf_counter()
    count = make(steps)
    wait(device)
    return count, time.perf_counter() - started


def idle_share(make: Callable[[int], int], steps: int, device: str) -> float | None:
    """Give the share of wall time in which no kernel runs; None where the profiler saw none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _, seconds = timed(make, steps, device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    busy = busy_microseconds(events)
    return 1 - busy / 1e6 / seconds if busy else None


def busy_microseconds(events: Iterable[dict[str, Any]]) -> float:
    """Give the time in which at least one kernel runs, of the events of a Chrome trace."""
    kernels = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
    busy, until = 0.0, float("-inf")
    for start, end in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def driver(device: str) -> str:
    """Give the version of the card's driver."""
    command = shutil.which("nvidia-smi")
    if not is_card(device) or is_simulated() or command is None:
        return "none" if command is None else "not used"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
