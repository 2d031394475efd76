"""Build and load a simulated CUDA device (see ``device.cpp``), and give torch.cuda its answers.

torch keeps the hooks of CUDA that it finds when it is first asked: `load` comes before any import
of torch, so tests on the device have a process of their own (``make test-gpu``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

MIB = 2**20

_SOURCE = Path(__file__).with_name("device.cpp")
_CAPABILITY = (8, 9)
_SIZES = ("get_limit", "get_reserved", "get_allocated", "get_taken")


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
    for name in _SIZES:
        getattr(device, name).restype = ctypes.c_size_t
    device.set_limit.argtypes = [ctypes.c_int, ctypes.c_size_t]
    device.set_device_count(cards)
    _install(device)
    return Cards(device)


class Cards:
    """The cards, by number: how much memory they have and what is in it."""

    def __init__(self, device: ctypes.CDLL) -> None:
        self._device = device

    def reset(self) -> None:
        """Make the first card the current one, and give each 1 GiB."""
        self._device.empty_cache()
        self._device.set_device(0)
        for index in range(self._device.get_device_count()):
            self.limit(index, 1024)

    def limit(self, index: int, mib: float) -> None:
        """Give a card so much memory."""
        self._device.set_limit(index, int(mib * MIB))

    def taken(self, index: int) -> int:
        """Bytes of all tensors that were ever put on a card."""
        return self._device.get_taken(index)


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
        return limit - device.get_reserved(index_of(card)), limit

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
            name="simulated", major=major, minor=minor, total_memory=memory, multi_processor_count=1
        )

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
        "synchronize": lambda card=None: None,
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
    torch._C._cuda_getCurrentRawStream = lambda device: 0
