"""A reader of pickles that runs nothing: plain values, tensors and arrays; a name for all else.

Python's own machine does the stack, the memo and the framing of every protocol. Whatever would
import or call something, or change an object, is replaced here: a global is only its name, and a
call makes one of the values in `BUILDERS` or a `Placeholder`.
"""

from __future__ import annotations

import collections
import pickle
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from fedgfe_store.checkpoints.builders import (
    BUILDERS,
    Named,
    NumpyType,
    Refused,
    Storage,
    dict_key,
    fill,
)
from fedgfe_store.common.plain import Placeholder

_MOST_COPIED = 20_000_000
"""Items that calls may copy in one file: a few bytes can ask for a copy of everything before."""
_LONGEST_NAME = 100
"""Characters of a name in a message: a pickle may hold one of any length."""
_MODULES = {
    # What Python 2 called them, which protocols before 3 still do (`_compat_pickle`).
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    # numpy 1 wrote these.
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    # Python 3.13 does.
    "pathlib._local": "pathlib",
    "torch.nn": "torch.nn.parameter",
}


# Python's own, slower one: that in C lets nobody replace what an instruction does.
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
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    memo: dict[int, Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, storage: Callable[[Any], Storage] | None = None) -> None:
        super().__init__(file)
        self._file = file
        self._storage = storage
        self._left = _MOST_COPIED
        self.unknown = collections.Counter[str]()

    def load(self) -> Any:
        """Return what is pickled, as Python's own does, but without reading whole frames ahead."""
        self.read, self.readline = self._file.read, self._file.readline
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            while code := read(1):
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise EOFError

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
        """Return what a call makes: one of `BUILDERS`, else a placeholder. Nothing is called."""
        name = _name_of(function)
        build = BUILDERS.get(name)
        if build is not None and isinstance(arguments, tuple):
            try:
                return build(self, *arguments)
            # Other arguments than its own pickles have.
            except (TypeError, ValueError, AttributeError, ArithmeticError):
                if name.startswith("torch."):
                    raise Refused(f"a tensor with wrong arguments for {name}") from None
        if name == "builtins.getattr":
            name = _attribute(arguments) or name
        elif name in ("copyreg._reconstructor", "copyreg.__newobj__") and arguments:
            return self.called(arguments[0], ())
        self.unknown[name] += 1
        return Placeholder(name)

    # what would run something

    # INST and OBJ, of protocol 0 and 1, end here.
    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self.called(klass, tuple(args)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.called(self.stack[-1], None if keywords else arguments)

    # Python's would call `__setstate__`, or set attributes of any name.
    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, NumpyType):
            _set_order(made, state)
        elif type(made) is np.ndarray and not made.size and made.flags.owndata:
            fill(made, state)
        elif isinstance(made, Placeholder):
            _describe(made, state)

    def load_extension(self) -> None:
        raise Refused("an extension code, which only the program that wrote it can read")

    def load_buffer(self) -> None:
        raise Refused("a buffer outside the pickle")

    # What fills containers: Python's would call `append`, `extend`, `add` or `__setitem__` of what
    # lies on the stack, whatever it is, and hash keys that take for ever.

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
            made.update(map(dict_key, items))
        elif not isinstance(made, Placeholder):
            raise Refused(f"items added to a {type(made).__name__}")

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(dict_key, items)))

    def load_frame(self) -> None:
        self.read(8)  # how long it is, for who reads it ahead

    # Python's takes as much memory as the pickle says before it reads a byte.
    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    # All other opcodes move values about, but for GLOBAL, STACK_GLOBAL, PERSID and BINPERSID, which
    # come to `find_class` and `persistent_load`. NEWOBJ takes a class and a tuple, as REDUCE does.
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
        (pickle.FRAME, load_frame),
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
        made[dict_key(items[at])] = items[at + 1]


def _set_order(made: NumpyType, state: Any) -> None:
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
        made.order = state[1]


def _describe(made: Placeholder, state: Any) -> None:
    """Keep of a state what is plainly the object's value."""
    if not isinstance(state, Mapping):
        return
    number = state.get("int")
    if made.name == "uuid.UUID" and isinstance(number, int) and 0 <= number < 2**128:
        made.text = str(uuid.UUID(int=number))
    elif made.name in ("argparse.Namespace", "types.SimpleNamespace"):
        made.update(state)
