"""Values of any kind as what JSON can hold, and in the words of a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedgfe_store.common.words import is_utf8

LARGEST_BITS = 1024
_MOST_VALUES, _DEEPEST = 200_000, 32


class Unusable(Exception):
    """An entry that gives no sample; the text is the reason."""


class Placeholder(dict[Any, Any]):
    """Stands for an object of a class that is not known; holds its items if it is a dict.

    Attributes
    ----------
    name : str
        The class, or what else would have made the object.
    text : str or None
        The object in words, where they are known.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.text: str | None = None

    def __str__(self) -> str:
        return self.text or f"<{self.name}>"

    __repr__ = __str__
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def plain(value: Any) -> Any:
    """Return `value` as what JSON can hold; raise `Unusable` for what it cannot.

    That is: tensors of several values, integers of hundreds of digits, and what is nested without
    end. An object of an unknown class becomes its name.
    """
    return Plain().of(value)


class Plain:
    """Conversions that count what they make: a value can stand in a file once and be many."""

    def __init__(self, left: int = _MOST_VALUES) -> None:
        self._left = left
        self._left_of_this = 0

    def of(self, value: Any) -> Any:
        """Return `value` as what JSON can hold, or raise `Unusable`."""
        self._left_of_this = min(self._left, _MOST_VALUES)
        before = self._left_of_this
        try:
            return self._of(value, 0)
        finally:
            self._left -= before - self._left_of_this

    def _of(self, value: Any, depth: int) -> Any:
        self._left_of_this -= 1
        size = value.size if isinstance(value, np.ndarray) else 0
        if self._left_of_this < size or depth > _DEEPEST:
            raise Unusable("nested too deep, or too large")
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
            if math.prod(value.shape) != 1:
                raise Unusable("tensor")
            value = value.item()
        if isinstance(value, Placeholder) and not value:
            return str(value)
        if isinstance(value, Mapping):
            return {label(key): self._of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted((self._of(item, depth + 1) for item in value), key=repr)
        if isinstance(value, (list, tuple)):
            return [self._of(item, depth + 1) for item in value]
        return _scalar(value)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > LARGEST_BITS:
            raise Unusable(f"an integer of {value.bit_length()} bits")
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return text(value if isinstance(value, str) else str(value), "metadata")


def label(key: Any) -> str:
    """Return the key of a dict as JSON can hold it."""
    return key if isinstance(key, str) and is_clean(key) else brief(key)


def brief(value: Any) -> str:
    """Return what a message shows of a value that may be anything, and of any size."""
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
        return shown if len(shown) <= 80 else f"{shown[:80]}..."
    return what(value)


def mapping(value: Any) -> Mapping[Any, Any] | None:
    """Return `value` if it is a dict, or an object of an unknown class that held a dict's items."""
    if isinstance(value, Placeholder) and not value:
        return None
    return value if isinstance(value, Mapping) else None


def whole(value: Any) -> int | None:
    """Return a whole number from an int, numpy integer or one-element tensor, else None."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value


def what(value: Any) -> str:
    """Return what a message says of the type of a value."""
    return str(value) if isinstance(value, Placeholder) else f"a {type(value).__name__}"


def text(value: str, what: str) -> str:
    """Return `value` if a store can hold it, else raise `Unusable`."""
    if "\0" in value:
        raise Unusable(f"{what} has the character U+0000")
    if value == "\ufffd":  # the store's sign for text that was lost
        raise Unusable(f"{what} is U+FFFD, the sign for lost text")
    if not is_clean(value):
        raise Unusable(f"{what} is not valid Unicode text")
    return str(value)


def is_clean(value: str) -> bool:
    """Whether UTF-8 can hold a text, and no U+0000 is in it."""
    return "\0" not in value and is_utf8(value)
