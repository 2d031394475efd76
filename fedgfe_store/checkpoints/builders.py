"""What the calls in a pickle make: plain values, arrays and tensors, each checked, and no more."""

from __future__ import annotations

import datetime
import decimal
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fedgfe_store.common.plain import Placeholder

_TEXT_KIND = re.compile(r"[US]\d{1,5}")
_FRACTION = re.compile(r"-?\d{1,40}(/\d{1,40})?")
_LONGEST_KEY = 16
"""Items of a tuple that is a key."""
_SCALARS = (str, int, float, bool, type(None), bytes, complex, np.generic)
_MOMENTS = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
# Pickles name a storage's type by its class of old (torch.storage._dtype_to_storage_type_map); a
# type that has none stands beside an UntypedStorage, see `_tensor_v3`.
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_NUMPY_KINDS = {
    *("b1", "f2", "f4", "f8", "c8", "c16", "O", "O8"),
    *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)),
}


class Refused(Exception):
    """A pickle that asks for what this reader does not do; the text says what."""


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names; nothing of it is imported."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Storage:
    """Bytes of a file, and the type of what is in them."""

    content: torch.UntypedStorage
    dtype: torch.dtype


class NumpyType:
    """A numpy dtype on its way: its byte order comes after it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.order = kind, "="

    def made(self) -> np.dtype[Any]:
        """Return the dtype, in the byte order that is known by now."""
        return np.dtype(f"{self.order}{self.kind}" if self.kind[0] != "O" else "O")


def storage_type(value: Any) -> torch.dtype:
    """Return the type of the values in a storage class that a pickle names."""
    name = value.name if isinstance(value, Named) else ""
    dtype = _STORAGE_DTYPES.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    if dtype is None:
        raise Refused(f"a storage of an unknown type {name or type(value).__name__}")
    return dtype


class Reader(Protocol):
    """The reader of a pickle, as far as what is made in it needs one."""

    def spend(self, items: Any) -> Any:
        """Return a sequence that is about to be copied, counting its items."""

    def called(self, function: Any, arguments: Any) -> Any:
        """Return what a call makes. Nothing is called."""


def dict_key(value: Any, depth: int = 3) -> Any:
    """Return a key that hashes in no time; a tuple of tuples of tuples need not."""
    if isinstance(value, (*_SCALARS, *_MOMENTS)):
        return value
    if isinstance(value, (Named, Placeholder)):
        return str(value)
    if type(value) is tuple and depth and len(value) <= _LONGEST_KEY:
        return tuple(dict_key(item, depth - 1) for item in value)
    raise Refused(f"a {type(value).__name__} as the key of a dict")


def fill(made: np.ndarray, state: Any) -> None:
    """Give an array the values that stand in `state`, as `ndarray.__setstate__` takes them."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise Refused("an array without shape, type and values")
    _, shape, kind, fortran, values = state
    if isinstance(kind, NumpyType):
        dtype = kind.made()
        state = (1, _shape(shape, dtype, values), dtype, fortran is True, values)
        _check_text(values, dtype)
        made.__setstate__(state)


def _shape(shape: Any, dtype: np.dtype[Any], values: Any) -> tuple[int, ...]:
    """Return the shape of an array if `values`, its bytes or objects, are as many."""
    wanted = list if dtype.hasobject else (bytes, bytearray)
    count = _count(shape)
    if not isinstance(values, wanted) or count is None:
        raise Refused("an array whose values do not fit its type")
    if len(values) != count * (1 if dtype.hasobject else dtype.itemsize):
        raise Refused("an array with more or fewer values than its shape holds")
    return tuple(shape)


def _check_text(values: Any, dtype: np.dtype[Any]) -> None:
    """Refuse bytes that are no Unicode text: numpy fails on them only when they are looked at."""
    if dtype.kind != "U" or not values:
        return
    if int(np.frombuffer(values, f"{dtype.byteorder}u4").max()) > sys.maxunicode:
        raise Refused("an array of texts that are none")


def _count(shape: Any) -> int | None:
    """Return the values in `shape`, None if it is no shape."""
    if not isinstance(shape, tuple) or len(shape) > 16:
        return None
    # Sizes and strides of torch and numpy are signed 64-bit numbers; and True is an int.
    if not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        return None
    return math.prod(shape)


def _numpy_type(reader: Reader, kind: Any, *rest: Any) -> Any:
    """``numpy.dtype("f4", False, True)``; of a kind whose values are numbers, texts or objects."""
    if isinstance(kind, str) and (kind in _NUMPY_KINDS or _TEXT_KIND.fullmatch(kind)):
        return NumpyType(kind)
    return Placeholder("numpy.dtype")


def _scalar(reader: Reader, kind: Any, value: Any) -> Any:
    if not isinstance(kind, NumpyType) or kind.kind[0] == "O":
        return Placeholder("numpy.generic")
    made = np.frombuffer(value, kind.made())
    _check_text(value, made.dtype)
    if made.shape != (1,):
        raise ValueError
    return made[0]


def _from_buffer(reader: Reader, data: Any, kind: Any, shape: Any, order: Any, *rest: Any) -> Any:
    if not isinstance(kind, NumpyType) or kind.kind[0] == "O":
        return Placeholder("numpy.ndarray")
    dtype = kind.made()
    _check_text(data, dtype)
    made = np.frombuffer(data, dtype).reshape(_shape(shape, dtype, data), order=order)
    return made.copy()  # torch warns of arrays that cannot be written


def _encoded(reader: Reader, text: Any, encoding: Any) -> bytes:
    """``bytes`` as protocols before 3 have them."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError
    return bytes(reader.spend(text).encode("latin1"))


def _dict(reader: Reader, items: Any = ()) -> dict[Any, Any]:
    found = reader.spend(items)
    pairs = found.items() if isinstance(found, dict) else found
    return {dict_key(key): value for key, value in pairs}


def _fraction(reader: Reader, *parts: Any) -> str:
    text = "/".join(str(part) for part in parts)
    if len(parts) > 2 or not _FRACTION.fullmatch(text):
        raise ValueError
    return text


def _moment(kind: type) -> Callable[..., Any]:
    def make(reader: Reader, *arguments: Any) -> Any:
        if not all(isinstance(a, (int, bytes, str, datetime.tzinfo, *_MOMENTS)) for a in arguments):
            raise TypeError
        return kind(*arguments)

    return make


def _path(kind: type[pathlib.PurePath]) -> Callable[..., str]:
    def make(reader: Reader, *parts: Any) -> str:
        return str(kind(*(part for part in parts if isinstance(part, str))))

    return make


def _tensor(
    reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> torch.Tensor:
    """Return a tensor over a storage, in whose bounds it must lie."""
    if not isinstance(storage, Storage):
        raise TypeError
    return _strided(storage.content, storage.dtype, offset, size, stride)


def _tensor_v3(
    reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> torch.Tensor:
    """Return a tensor whose type stands beside its storage: that has bytes only."""
    _grad, _hooks, dtype, *_ = rest  # as torch._utils._rebuild_tensor_v3 takes them
    found = _dtype(dtype)
    if not isinstance(storage, Storage) or found is None:
        raise TypeError
    return _strided(storage.content, found, offset, size, stride)


def _strided(
    content: torch.UntypedStorage, dtype: torch.dtype, offset: Any, size: Any, stride: Any
) -> torch.Tensor:
    count, steps = _count(size), _count(stride)
    if count is None or steps is None or len(size) != len(stride) or _count((offset,)) is None:
        raise ValueError
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if count and end * dtype.itemsize > content.nbytes():
        raise Refused("a tensor that is larger than its storage")
    if not count:
        return torch.empty(size, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(content, offset, size, stride)


def _dtype(value: Any) -> torch.dtype | None:
    name = value.name.removeprefix("torch.") if isinstance(value, Named) else ""
    found = getattr(torch, name, None) if name.isidentifier() else None
    return found if isinstance(found, torch.dtype) else None


def _parameter(reader: Reader, data: Any, *rest: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise TypeError
    return data


def _of_a_type(reader: Reader, function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    """Return a tensor without the attributes of its own."""
    return reader.called(function, arguments)


def _first(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return what makes `kind` of its first argument, a container, if there is one."""
    return lambda reader, items=(), *rest: kind(reader.spend(items))


BUILDERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda reader, factory=None, items=(): _dict(reader, items),
    "builtins.dict": _dict,
    "collections.deque": _first(list),
    "builtins.list": _first(list),
    "builtins.tuple": _first(tuple),
    "torch.Size": _first(tuple),
    "builtins.set": _first(lambda items: set(map(dict_key, items))),
    "builtins.frozenset": _first(lambda items: frozenset(map(dict_key, items))),
    "builtins.bytearray": _first(lambda items: bytearray(memoryview(items or b""))),
    "builtins.bytes": _first(lambda items: bytes(memoryview(items or b""))),
    "_codecs.encode": _encoded,
    "builtins.complex": lambda reader, real, imag: complex(float(real), float(imag)),
    "datetime.datetime": _moment(datetime.datetime),
    "datetime.date": _moment(datetime.date),
    "datetime.time": _moment(datetime.time),
    "datetime.timedelta": _moment(datetime.timedelta),
    "datetime.timezone": _moment(datetime.timezone),
    # A text alone can be added to one: a tuple of digits would be taken, too.
    "decimal.Decimal": lambda reader, text: str(decimal.Decimal(text + "")),
    "fractions.Fraction": _fraction,
    **{
        f"pathlib.{name}": _path(pathlib.PurePosixPath)
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")
    },
    "pathlib.WindowsPath": _path(pathlib.PureWindowsPath),
    "pathlib.PureWindowsPath": _path(pathlib.PureWindowsPath),
    "uuid.UUID": lambda reader: Placeholder("uuid.UUID"),
    "argparse.Namespace": lambda reader: Placeholder("argparse.Namespace"),
    "types.SimpleNamespace": lambda reader, *rest: Placeholder("types.SimpleNamespace"),
    "numpy.dtype": _numpy_type,
    "numpy._core.multiarray.scalar": _scalar,
    # An array without values: BUILD gives it shape, type and values, by `fill`.
    "numpy._core.multiarray._reconstruct": lambda reader, *rest: np.empty(0, np.uint8),
    "numpy._core.numeric._frombuffer": _from_buffer,
    "torch.device": lambda reader, *parts: ":".join(str(part) for part in parts),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_a_type,
}
