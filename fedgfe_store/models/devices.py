"""Where to compute, in what, and with how much memory."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from fedgfe_store.errors import SchemaMismatchError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What torch's allocators, C++, Level Zero, cuBLAS and cuDNN say, in errors without a class of their
# own.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# Of these the host's memory is meant, and where memory cannot be pinned, too: what CUDA's devices
# lack has a class of its own.
_OF_HOST = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "OUT_OF_HOST_MEMORY",
    "CUDA error: out of memory",
)
# What cuBLAS and cuDNN say where they find no room for their handles and workspaces, and also where
# something else is wrong.
_NO_MEMORY_IF_SHORT = ("CUBLAS_STATUS_NOT_INITIALIZED", "unable to find an engine")
# More than a decoder's largest convolution wants as its workspace.
_SHORT_BYTES = 2 * 2**30

MORE_OF_HOST = "more memory of the host (--mem under SLURM) or fewer processes on it may help"
"""What to do where the host's memory is not enough."""


def choose_device(device: str | None, *, local: int | None = None) -> str:
    """Check a device's name; without one, give a GPU where there is one, else ``"cpu"``.

    Parameters
    ----------
    device : str, optional
        Such as ``"cuda:1"``; ``"cuda"`` is the process's own.
    local : int, optional
        Which GPU is this process's own, where several processes share a machine.

    Returns
    -------
    str
        The device; a GPU with its number, since torch does not take it without one everywhere.

    Raises
    ------
    SchemaMismatchError
        If it is not a device of this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local is not None:
        device = f"cuda:{local}"
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SchemaMismatchError(
            f"device: expected one of this machine, got {device!r} ({reason})"
        ) from None
    if found.type != "cuda":
        return device
    # Streams, and what torch says of bfloat16, are the current device's.
    torch.cuda.set_device(found)
    return str(found)


def choose_dtype(dtype: str | None, device: str) -> tuple[str, str | None]:
    """Check a dtype's name; without one, take bfloat16 on CUDA, else float32.

    Returns
    -------
    dtype : str
        float16 in bfloat16's place on a card that computes in the one and not in the other.
    remark : str or None
        One line for the user where it is not what was asked for.

    Raises
    ------
    SchemaMismatchError
        If it is none of float32, bfloat16 and float16.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SchemaMismatchError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if torch.device(device).type != "cuda":
        return dtype or "float32", None
    # torch also counts cards that only imitate bfloat16, many times slower.
    if torch.cuda.is_bf16_supported(including_emulation=False) or dtype not in (None, "bfloat16"):
        return dtype or "bfloat16", None
    return "float16", f"dtype: float16, since {device} does not compute in bfloat16"


def free_bytes(device: str) -> int | None:
    """Give the free memory of a CUDA device; None for others, where it is not known."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.mem_get_info(torch.device(device))[0]


def usable_bytes(device: str) -> int | None:
    """Give what this process may have of a CUDA device, its own included; None where unknown."""
    free = free_bytes(device)
    return None if free is None else free + torch.cuda.memory_reserved(torch.device(device))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory, of a GPU or of the host, is not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError | SafetensorError):
        return False
    if any(text in str(error) for text in _NO_MEMORY):
        return True
    return any(text in str(error) for text in _NO_MEMORY_IF_SHORT) and _is_short()


def _is_short() -> bool:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    return torch.cuda.mem_get_info()[0] < _SHORT_BYTES


def is_of_host(error: Exception) -> bool:
    """Whether the memory that is not enough is the host's."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, MemoryError | OSError) or any(t in str(error) for t in _OF_HOST)


def first_line(error: Exception) -> str:
    """Say in one line what an error of another library is."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, KeyError | AttributeError | TypeError):
        return ": ".join([type(error).__name__, *lines[:1]])
    return lines[0]


@contextmanager
def enough_memory(doing: str, remedy: str, on_host: str = MORE_OF_HOST) -> Iterator[None]:
    """Say in one line what was tried, and what to do, where memory is not enough for it.

    Parameters
    ----------
    doing : str
        What is tried.
    remedy, on_host : str
        What would help where the device's memory is not enough, and where the host's is not.

    Raises
    ------
    SchemaMismatchError
        If the block runs out of memory, of a GPU or of the host.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason, hosts = first_line(error), is_of_host(error)
    else:
        return
    # Past the handler, whose traceback holds on to what filled the memory.
    raise SchemaMismatchError(f"out of memory {doing} ({reason}); {on_host if hosts else remedy}")


def less_memory(device: str, smaller: str = "") -> str:
    """Say what takes less memory of a device: `smaller`, if that is not empty, or another place."""
    elsewhere = "a machine with more memory" if device == "cpu" else "--device cpu"
    return f"{' or '.join(filter(None, (smaller, elsewhere)))} may help"


def clear_cache(device: str) -> None:
    """Give the memory that torch keeps for later back to the device."""
    gc.collect()
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
    elif kind == "xpu":
        torch.xpu.empty_cache()
