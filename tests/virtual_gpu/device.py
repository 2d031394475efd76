"""Build and load a simulated CUDA device (see ``device.cpp``), and give torch.cuda its answers.

torch keeps the hooks of CUDA that it finds when it is first asked: `load` comes before any import
of torch, so tests on the device have a process of their own (``make test-gpu``).
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MIB = 2**20

_SOURCE = Path(__file__).with_name("device.cpp")
_CAPABILITY = (8, 9)
_SIZES = (
    *("get_limit", "get_reserved", "get_allocated", "get_taken", "get_refused"),
    *("get_peak_reserved", "get_peak_allocated"),
)
_COUNTS = ("get_late_copies", "get_pending")
_PINNED_COPY = 2**20


def missing() -> str | None:
    """Say what keeps the device from being built here; None where nothing does."""
    if not sys.platform.startswith("linux"):
        return "it is written for Linux"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "torch has CUDA of its own here"
    if _compiler() is None:
        return "there is no C++ compiler"
    return None


def build(folder: Path) -> Path:
    """Compile the device where that has not been done for this source and torch; some seconds."""
    made_from = _SOURCE.read_bytes() + version("torch").encode()
    library = folder / f"device-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
    if library.exists():
        return library
    torch, temporary = _torch(), library.with_suffix(f".{os.getpid()}")
    compiler = _compiler()
    assert compiler is not None
    command: list[str | Path] = [
        *(compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-w"),
        *("-isystem", torch / "include", _SOURCE, "-o", temporary),
        *(f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the simulated GPU does not build:\n{done.stderr}")
    temporary.rename(library)
    return library


def load(library: Path, *, cards: int) -> Cards:
    """Put so many cards into this process, before it has imported torch."""
    assert "torch" not in sys.modules, "the device has to be there before torch"
    device = ctypes.CDLL(os.fspath(library))
    for name in _SIZES + _COUNTS:
        getattr(device, name).restype = ctypes.c_size_t
    device.set_limit.argtypes = [ctypes.c_int, ctypes.c_size_t]
    device.set_skipping.argtypes = [ctypes.c_bool, ctypes.c_size_t]
    for name in ("new_stream", "get_stream"):
        getattr(device, name).restype = ctypes.c_int64
    for name in ("set_stream", "synchronize_stream"):
        getattr(device, name).argtypes = [ctypes.c_int, ctypes.c_int64]
    device.set_device_count(cards)
    _install(device)
    return Cards(device)


class Cards:
    """The cards, by number: how much memory they have and what is in it; sizes in bytes."""

    def __init__(self, device: ctypes.CDLL) -> None:
        self._device, self._count = device, device.get_device_count()

    def show(self, count: int) -> None:
        """Show the first cards alone, as CUDA_VISIBLE_DEVICES does before a process begins."""
        self._device.set_device_count(count)

    def reset(self) -> None:
        """Make the first card the current one, give each 1 GiB, and forget what was in them."""
        gc.collect()
        self.show(self._count)
        for index in range(self._device.get_device_count()):
            self._device.synchronize(index)
            self._device.set_stream(index, 0)
            self.limit(index, 1024)
        self._device.empty_cache()
        self._device.set_device(0)
        for index in range(self._device.get_device_count()):
            self._device.reset_peak(index)

    def limit(self, index: int, mib: float) -> None:
        """Give a card so much memory; what holds more already keeps it."""
        self._device.set_limit(index, int(mib * MIB))

    def empty(self) -> None:
        """Give back what nobody uses, as a new process would find it, and count peaks anew."""
        gc.collect()
        self._device.empty_cache()
        for index in range(self._device.get_device_count()):
            self._device.reset_peak(index)

    def taken(self, index: int) -> int:
        """All tensors that were ever put on a card."""
        return self._device.get_taken(index)

    def held(self, index: int) -> int:
        """What lies on a card now."""
        return self._device.get_allocated(index)

    def peak(self, index: int, *, reserved: bool = False) -> int:
        """The most that tensors, or torch's segments, have had since `reset` or `empty`."""
        if reserved:
            return self._device.get_peak_reserved(index)
        return self._device.get_peak_allocated(index)

    def refusals(self, index: int) -> int:
        """How often a card had no room."""
        return self._device.get_refused(index)

    @property
    def late_copies(self) -> int:
        """How many copies were put off."""
        return self._device.get_late_copies()

    @property
    def pending(self) -> int:
        """How many of them nobody has waited for yet."""
        return self._device.get_pending()

    def drop_pending(self) -> None:
        """Forget copies that nobody has waited for."""
        self._device.drop_pending()

    @contextmanager
    def skipping(self, *, scratch: int = 0) -> Iterator[None]:
        """Compute nothing that is large; convolutions need so many per cent of scratch."""
        import torch

        pin = torch.Tensor.pin_memory

        def pin_memory(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            if tensor.nbytes < _PINNED_COPY:
                return pin(tensor, *arguments, **options)
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

        torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
        self._device.set_skipping(True, scratch)
        try:
            yield
        finally:
            self.empty()  # while nothing is filled: it may be more than there is memory
            self._device.set_skipping(False, 0)
            torch.Tensor.pin_memory = pin  # type: ignore[method-assign]


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def _install(device: ctypes.CDLL) -> None:
    """Replace what torch.cuda asks of a library that is not there; the checks are torch's own."""
    import torch
    from torch import cuda
    from torch.cuda._utils import _get_device_index

    # Functions of Python: dynamo keeps torch.cuda's in a dictionary.
    def count() -> int:
        return device.get_device_count()

    def current() -> int:
        return device.get_device()

    def empty_cache() -> None:
        device.empty_cache()

    def index_of(card: object = None) -> int:
        return _get_device_index(card, optional=True)

    def set_device(card: object) -> None:
        index = _get_device_index(card)
        if index >= 0:
            torch._C._cuda_setDevice(index)

    def mem_get_info(card: object = None) -> tuple[int, int]:
        limit = device.get_limit(index_of(card))
        return max(0, limit - device.get_reserved(index_of(card))), limit

    def exchange(device: int) -> int:
        before = current()
        if device >= 0:
            checked(device)
        return before

    choose = device.set_device

    # The name of the parameter is torch's.
    def checked(device: int) -> None:
        if device >= count():
            raise RuntimeError("CUDA error: invalid device ordinal")
        choose(device)

    def properties(card: object = None) -> SimpleNamespace:
        major, minor = _CAPABILITY
        memory = device.get_limit(index_of(card))
        return SimpleNamespace(
            name="simulated",
            major=major,
            minor=minor,
            total_memory=memory,
            multi_processor_count=1,
            warp_size=32,
            is_integrated=0,
            regs_per_multiprocessor=65_536,
            max_threads_per_multi_processor=1536,
            max_threads_per_block=1024,
            shared_memory_per_block=49_152,
            L2_cache_size=2**25,
            gcnArchName="",
            uuid="0",
        )

    class Stream:
        def __init__(self, device: object = None, priority: int = 0, number: int | None = None):
            self.device = torch.device("cuda", index_of(device))
            self.number = new_stream() if number is None else number

        def synchronize(self) -> None:
            synchronize_stream(self.device.index, self.number)

        def wait_stream(self, other: Stream) -> None:
            other.synchronize()

        def wait_event(self, event: Event) -> None:
            event.synchronize()

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def query(self) -> bool:
            return True

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and hash(self) == hash(other)

        def __hash__(self) -> int:
            return hash((self.device.index, self.number))

    class Event:
        def __init__(self, *arguments: object, **options: object) -> None:
            self._stream: Stream | None = None

        def record(self, stream: Stream | None = None) -> None:
            self._stream = stream or current_stream()

        def synchronize(self) -> None:
            if self._stream is not None:
                self._stream.synchronize()

        def wait(self, stream: Stream | None = None) -> None:
            self.synchronize()

        def query(self) -> bool:
            return True

    def raw_stream(device: int) -> int:
        return stream_of(device)

    new_stream, synchronize_stream = device.new_stream, device.synchronize_stream
    stream_of = device.get_stream

    def current_stream(card: object = None) -> Stream:
        return Stream(card, number=device.get_stream(index_of(card)))

    @contextmanager
    def in_stream(stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        index, card = stream.device.index, current()
        before = device.get_stream(index)
        choose(index)
        device.set_stream(index, stream.number)
        try:
            yield
        finally:
            device.set_stream(index, before)
            choose(card)

    class On:
        """torch.cuda.device."""

        def __init__(self, card: object) -> None:
            self.idx, self.prev_idx = index_of(card), -1

        def __enter__(self) -> None:
            self.prev_idx = exchange(self.idx)

        def __exit__(self, *error: object) -> None:
            choose(self.prev_idx)

    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device_count": count,
        "current_device": current,
        "set_device": set_device,
        "get_device_properties": properties,
        "get_device_capability": lambda card=None: _CAPABILITY,
        "get_device_name": lambda card=None: "simulated",
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda card=None: device.get_allocated(index_of(card)),
        "memory_reserved": lambda card=None: device.get_reserved(index_of(card)),
        "empty_cache": empty_cache,
        "ipc_collect": lambda: None,
        "max_memory_allocated": lambda card=None: device.get_peak_allocated(index_of(card)),
        "max_memory_reserved": lambda card=None: device.get_peak_reserved(index_of(card)),
        "reset_peak_memory_stats": lambda card=None: device.reset_peak(index_of(card)),
        "synchronize": lambda card=None: device.synchronize(index_of(card)),
        "Stream": Stream,
        "Event": Event,
        "stream": in_stream,
        "current_stream": current_stream,
        "default_stream": lambda card=None: Stream(card, number=0),
        "device": On,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    torch._C._cuda_getDevice = current
    torch._C._cuda_setDevice = checked
    torch._C._cuda_getDeviceCount = count
    torch._C._cuda_exchangeDevice = exchange
    torch._C._cuda_maybeExchangeDevice = exchange
    torch._C._cuda_getCurrentRawStream = raw_stream
