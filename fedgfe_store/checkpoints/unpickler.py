"""A reader of pickles that runs nothing: plain values, tensors and arrays; a name for all else.

Python's own machine does the stack, the memo and the framing of every protocol. Whatever would
import or call something, or change an object, is replaced here: a global is only its name, and a
call makes one of the values in `_BUILDERS` or a `Placeholder`.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import math
import pathlib
import pickle
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from fedgfe_store.common.plain import Placeholder

_MOST_COPIED = 20_000_000
"""Items that calls may copy in one file: a few bytes can ask for a copy of everything before."""
_LONGEST_NAME = 100
_TEXT_KIND = re.compile(r"[US]\d{1,5}")
_FRACTION = re.compile(r"-?\d{1,40}(/\d{1,40})?")
_LONGEST_KEY = 16
_SCALARS = (str, int, float, bool, type(None), bytes, complex, np.generic)
_MOMENTS = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "pathlib._local": "pathlib",
    "torch.nn": "torch.nn.parameter",
}
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


class _NumpyType:
    """A numpy dtype on its way: its byte order comes after it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.order = kind, "="

    def made(self) -> np.dtype[Any]:
        return np.dtype(f"{self.order}{self.kind}" if self.kind[0] != "O" else "O")


def storage_type(value: Any) -> torch.dtype:
    """Return the type of the values in a storage class that a pickle names."""
    name = value.name if isinstance(value, Named) else ""
    dtype = _STORAGE_DTYPES.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    if dtype is None:
        raise Refused(f"a storage of an unknown type {name or type(value).__name__}")
    return dtype


class Unpickler(pickle._Unpickler):
    """Reads one pickle of a file.

    Parameters
    ----------
    file : file object
        Whose `read` never returns more than the file holds.
    storage : callable, optional
        Returns the `Storage` that a tensor's persistent id means.

    Attributes
    ----------
    unknown : dict of str to int
        How many objects became a `Placeholder`, by name.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, storage: Callable[[Any], Storage] | None = None) -> None:
        super().__init__(file)
        self._storage = storage
        self._left = _MOST_COPIED
        self.unknown = collections.Counter[str]()

    def find_class(self, module: str, name: str) -> Any:
        """Return the name; nothing is imported."""
        return Named(_clean(f"{_MODULES.get(module, module)}.{name}"))

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that `pid` means."""
        if self._storage is None:
            raise Refused("a tensor where none belongs")
        return self._storage(pid)

    def spend(self, items: Any) -> Any:
        """Return a sequence that is about to be copied, counting its items."""
        if not isinstance(items, (list, tuple, dict, set, frozenset, str, bytes, bytearray)):
            raise TypeError
        self._left -= len(items)
        if self._left < 0:
            raise Refused("copies of copies without end")
        return items

    def called(self, function: Any, arguments: Any) -> Any:
        """Return what a call makes: one of `_BUILDERS`, else a placeholder. Nothing is called."""
        name = _name_of(function)
        build = _BUILDERS.get(name)
        if build is not None and isinstance(arguments, tuple):
            try:
                return build(self, *arguments)
            except (
                TypeError,
                ValueError,
                AttributeError,
                ArithmeticError,
            ):  # other arguments than its own pickles
                if name.startswith("torch."):
                    raise Refused(f"a tensor with wrong arguments for {name}") from None
        if name == "builtins.getattr":
            name = _attribute(arguments) or name
        elif name in ("copyreg._reconstructor", "copyreg.__newobj__") and arguments:
            return self.called(arguments[0], ())
        self.unknown[name] += 1
        return Placeholder(name)

    # what would run something

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self.called(klass, tuple(args)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.called(self.stack[-1], None if keywords else arguments)

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _NumpyType):
            _set_order(made, state)
        elif type(made) is np.ndarray and not made.size and made.flags.owndata:
            _fill(made, state)
        elif isinstance(made, Placeholder):
            _describe(made, state)

    def load_extension(self) -> None:
        raise Refused("an extension code, which only the program that wrote it can read")

    def load_buffer(self) -> None:
        raise Refused("a buffer outside the pickle")

    # what fills containers

    def load_append(self) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        items = self.pop_mark()
        _extend(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _update(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _update(self.stack[-1], items)

    def load_dict(self) -> None:
        made: dict[Any, Any] = {}
        _update(made, self.pop_mark())
        self.append(made)

    def load_additems(self) -> None:
        items = self.pop_mark()
        made = self.stack[-1]
        if type(made) is set:
            made.update(map(_key, items))
        elif not isinstance(made, Placeholder):
            raise Refused(f"items added to a {type(made).__name__}")

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_key, items)))

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    for _code, _load in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_reduce),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
        (pickle.EXT1, load_extension),
        (pickle.EXT2, load_extension),
        (pickle.EXT4, load_extension),
        (pickle.NEXT_BUFFER, load_buffer),
        (pickle.READONLY_BUFFER, load_buffer),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BYTEARRAY8, load_bytearray8),
    ):
        dispatch[_code[0]] = _load


def _clean(name: str) -> str:
    """Return a name as it can be shown: printable, and not too long."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}..."


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, (Named, Placeholder)) else type(value).__name__


def _attribute(arguments: Any) -> str | None:
    """Return the name of what `getattr` would have given: how newer Pythons pickle an enum."""
    if not (isinstance(arguments, tuple) and len(arguments) == 2):
        return None
    owner, name = arguments
    known = isinstance(owner, (Named, Placeholder)) and isinstance(name, str)
    return _clean(f"{owner.name}.{name}") if known else None


def _extend(made: Any, items: list[Any]) -> None:
    if type(made) is list:
        made.extend(items)
    elif not isinstance(made, Placeholder):
        raise Refused(f"items added to a {type(made).__name__}")


def _update(made: Any, items: list[Any]) -> None:
    if type(made) is not dict and not isinstance(made, Placeholder):
        raise Refused(f"items set in a {type(made).__name__}")
    for at in range(0, len(items) - 1, 2):
        made[_key(items[at])] = items[at + 1]


def _key(value: Any, depth: int = 3) -> Any:
    """Return a key that hashes in no time; a tuple of tuples of tuples need not."""
    if isinstance(value, (*_SCALARS, *_MOMENTS)):
        return value
    if isinstance(value, (Named, Placeholder)):
        return str(value)
    if type(value) is tuple and depth and len(value) <= _LONGEST_KEY:
        return tuple(_key(item, depth - 1) for item in value)
    raise Refused(f"a {type(value).__name__} as the key of a dict")


def _set_order(made: _NumpyType, state: Any) -> None:
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
        made.order = state[1]


def _fill(made: np.ndarray, state: Any) -> None:
    """Give an array the values that stand in `state`, as `ndarray.__setstate__` takes them."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise Refused("an array without shape, type and values")
    _, shape, kind, fortran, values = state
    if isinstance(kind, _NumpyType):
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
    if not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        return None
    return math.prod(shape)


def _describe(made: Placeholder, state: Any) -> None:
    """Keep of a state what is plainly the object's value."""
    if not isinstance(state, Mapping):
        return
    number = state.get("int")
    if made.name == "uuid.UUID" and isinstance(number, int) and 0 <= number < 2**128:
        made.text = str(uuid.UUID(int=number))
    elif made.name in ("argparse.Namespace", "types.SimpleNamespace"):
        made.update(state)


# what calls make


def _numpy_type(reader: Unpickler, kind: Any, *rest: Any) -> Any:
    """``numpy.dtype("f4", False, True)``; of a kind whose values are numbers, texts or objects."""
    if isinstance(kind, str) and (kind in _NUMPY_KINDS or _TEXT_KIND.fullmatch(kind)):
        return _NumpyType(kind)
    return Placeholder("numpy.dtype")


def _scalar(reader: Unpickler, kind: Any, value: Any) -> Any:
    if not isinstance(kind, _NumpyType) or kind.kind[0] == "O":
        return Placeholder("numpy.generic")
    made = np.frombuffer(value, kind.made())
    _check_text(value, made.dtype)
    if made.shape != (1,):
        raise ValueError
    return made[0]


def _from_buffer(
    reader: Unpickler, data: Any, kind: Any, shape: Any, order: Any, *rest: Any
) -> Any:
    if not isinstance(kind, _NumpyType) or kind.kind[0] == "O":
        return Placeholder("numpy.ndarray")
    dtype = kind.made()
    _check_text(data, dtype)
    made = np.frombuffer(data, dtype).reshape(_shape(shape, dtype, data), order=order)
    return made.copy()  # torch warns of arrays that cannot be written


def _encoded(reader: Unpickler, text: Any, encoding: Any) -> bytes:
    """``bytes`` as protocols before 3 have them."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError
    return bytes(reader.spend(text).encode("latin1"))


def _dict(reader: Unpickler, items: Any = ()) -> dict[Any, Any]:
    found = reader.spend(items)
    pairs = found.items() if isinstance(found, dict) else found
    return {_key(key): value for key, value in pairs}


def _fraction(reader: Unpickler, *parts: Any) -> str:
    text = "/".join(str(part) for part in parts)
    if len(parts) > 2 or not _FRACTION.fullmatch(text):
        raise ValueError
    return text


def _moment(kind: type) -> Callable[..., Any]:
    def make(reader: Unpickler, *arguments: Any) -> Any:
        if not all(isinstance(a, (int, bytes, str, datetime.tzinfo, *_MOMENTS)) for a in arguments):
            raise TypeError
        return kind(*arguments)

    return make


def _path(kind: type[pathlib.PurePath]) -> Callable[..., str]:
    def make(reader: Unpickler, *parts: Any) -> str:
        return str(kind(*(part for part in parts if isinstance(part, str))))

    return make


def _tensor(
    reader: Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> torch.Tensor:
    """Return a tensor over a storage, in whose bounds it must lie."""
    if not isinstance(storage, Storage):
        raise TypeError
    return _strided(storage.content, storage.dtype, offset, size, stride)


def _tensor_v3(
    reader: Unpickler,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> torch.Tensor:
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


def _parameter(reader: Unpickler, data: Any, *rest: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise TypeError
    return data


def _of_a_type(reader: Unpickler, function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    """Return a tensor without the attributes of its own."""
    return reader.called(function, arguments)


def _first(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return what makes `kind` of its first argument, a container, if there is one."""
    return lambda reader, items=(), *rest: kind(reader.spend(items))


_BUILDERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda reader, factory=None, items=(): _dict(reader, items),
    "builtins.dict": _dict,
    "collections.deque": _first(list),
    "builtins.list": _first(list),
    "builtins.tuple": _first(tuple),
    "torch.Size": _first(tuple),
    "builtins.set": _first(lambda items: set(map(_key, items))),
    "builtins.frozenset": _first(lambda items: frozenset(map(_key, items))),
    "builtins.bytearray": _first(lambda items: bytearray(memoryview(items or b""))),
    "builtins.bytes": _first(lambda items: bytes(memoryview(items or b""))),
    "_codecs.encode": _encoded,
    "builtins.complex": lambda reader, real, imag: complex(float(real), float(imag)),
    "datetime.datetime": _moment(datetime.datetime),
    "datetime.date": _moment(datetime.date),
    "datetime.time": _moment(datetime.time),
    "datetime.timedelta": _moment(datetime.timedelta),
    "datetime.timezone": _moment(datetime.timezone),
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
