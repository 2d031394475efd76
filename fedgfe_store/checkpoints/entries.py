"""From the dicts of a checkpoint to samples: which tensor is what, and which sample is which."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedgfe_store.checkpoints.unpickler import Placeholder

T5_WIDTH = 4096
CLIP_WIDTH = 768
_TENSOR_KEYS = ("t5_embedding", "clip_embedding", "t5", "clip")
_AUDIO_KEYS = ("audio_embeddings", "audio_embedding")
_NOTES = ("sample_id", "file_id", "image_filename", "audio_path")
_SAMPLE_KEYS = ("index", "image_filename", "image_path")
_NAMED_KEYS = {"split", "class_name", "index", "sample_metadata", "image_filename", "node_id"}

_MOST_VALUES, _DEEPEST = 200_000, 32
_MOST_OF_A_FILE = 20_000_000
_LONGEST_NOTE = 60_000
_LARGEST_BITS = 1024
_LEAST_BOUND = 64 << 20

Shape = tuple[int, ...]


class Unusable(Exception):
    """An entry that gives no sample; the text is the reason."""


@dataclass(frozen=True)
class Skipped:
    """A sample, or a whole entry, that was left out.

    Parameters
    ----------
    reason : str
        Why, in words that are the same for the same cause, so that they can be counted.
    position : int
        Number of the entry in the file, from 0.
    what : str
        Which sample: split, class and index as far as they are known.
    """

    reason: str
    position: int
    what: str


@dataclass(frozen=True)
class Slot:
    """Where one sample lies in the file: everything but its values.

    ``places`` maps a column to the entry's key and the shape without batch axes; ``row`` is the
    sample's row in a stack, None where the entry is the sample.
    """

    position: int
    row: int | None
    split: str
    class_name: str
    index: int
    places: Mapping[str, tuple[str, Shape]]
    sample_id: str | None = None
    file_id: str | None = None
    image_filename: str | None = None
    audio_path: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The sample in words."""
        return f"split {self.split}, class {self.class_name}, index {self.index}"


def survey(entries: Sequence[Any], node: str, kind: str) -> tuple[list[Slot | Skipped], list[str]]:
    """Find the samples of a checkpoint's entries without reading a tensor's values.

    Parameters
    ----------
    entries : sequence
        The file's ``embeddings``.
    node : str
        Node of the file; an entry's own ``node_id`` is kept in ``extra`` where it differs.
    kind : {"flux", "sd"}
        Tells whether a lone ``[77, 768]`` is one sequence.

    Returns
    -------
    found : list of Slot or Skipped
        In file order.
    notes : list of str
        What is odd about the file, with counts.
    """
    found: list[Slot | Skipped] = []
    oddities: Counter[str] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    values = _Plain(_MOST_OF_A_FILE)
    for position, entry in enumerate(entries):
        try:
            found.extend(_slots(position, entry, node, kind, numbers, oddities, values))
        except Unusable as reason:
            found.append(Skipped(str(reason), position, _describe(entry)))
    return found, [
        f"{what}: {count} {'entry' if count == 1 else 'entries'}"
        for what, count in oddities.items()
    ]


def plain(value: Any) -> Any:
    """Return `value` as what JSON can hold; raise `Unusable` for what it cannot.

    That is: tensors of several values, integers of hundreds of digits, and what is nested without
    end. An object of an unknown class becomes its name.
    """
    return _Plain().of(value)


class _Plain:
    """Conversions that count what they make: a value can stand in a file once and be many."""

    def __init__(self, left: int = _MOST_VALUES) -> None:
        self._left = left
        self._left_of_this = 0

    def of(self, value: Any) -> Any:
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
            return {_label(key): self._of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted((self._of(item, depth + 1) for item in value), key=repr)
        if isinstance(value, (list, tuple)):
            return [self._of(item, depth + 1) for item in value]
        return _scalar(value)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > _LARGEST_BITS:
            raise Unusable(f"an integer of {value.bit_length()} bits")
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _text(value if isinstance(value, str) else str(value), "metadata")


def _label(key: Any) -> str:
    """Return the key of a dict as JSON can hold it."""
    return key if isinstance(key, str) and _is_clean(key) else brief(key)


def brief(value: Any) -> str:
    """Return what a message shows of a value that may be anything, and of any size."""
    if isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
        return shown if len(shown) <= 80 else f"{shown[:80]}..."
    return str(value) if isinstance(value, Placeholder) else f"a {type(value).__name__}"


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


def _slots(
    position: int,
    entry: Any,
    node: str,
    kind: str,
    numbers: Counter[tuple[str, str]],
    oddities: Counter[str],
    values: _Plain,
) -> Iterator[Slot]:
    if mapping(entry) is None:
        raise Unusable(f"entry is {_what(entry)}, not a dict")
    split, class_name = _name(entry, "split"), _class_name(entry, oddities)
    rows = _stack_rows(entry, kind)
    first = _first_index(entry, numbers[split, class_name])
    if rows == 0:
        raise Unusable("stack without rows")
    count = rows or 1
    numbers[split, class_name] = max(numbers[split, class_name], first + count)
    places = _places(entry, rows) | _audio_place(entry, rows, oddities)
    if any(not key.startswith(column) for column, (key, _) in places.items()):
        oddities["t5 and clip under each other's name"] += 1
    if any(tensor.dtype is torch.float64 for _, tensor in _tensors(entry)):
        oddities["float64 rounded to float32"] += 1
    rest = _rest(entry, node, oddities, values)
    for row in range(count):
        details = rest if rows is None else {k: _of_row(v, row, rows) for k, v in rest.items()}
        details = _shortened(details, oddities)
        place = None if rows is None else row
        yield Slot(
            position, place, split, class_name, first + row, places, **_identity(entry, details)
        )


def _what(value: Any) -> str:
    return str(value) if isinstance(value, Placeholder) else f"a {type(value).__name__}"


def _name(entry: Mapping[Any, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        wrong = f"{key} is {brief(value)}, expected a name"
        raise Unusable(wrong if key in entry else f"no {key}")
    return name(value, key)


def _class_name(entry: Mapping[Any, Any], oddities: Counter[str]) -> str:
    number = whole(entry.get("class_name"))
    if number is None or number.bit_length() > _LARGEST_BITS:
        return _name(entry, "class_name")
    oddities["class_name is a number: taken as text"] += 1
    return str(number)


def name(value: str, what: str) -> str:
    """Return a text that can be part of a record's key, else raise `Unusable`."""
    if any(character < " " or character == "\x7f" for character in value):
        raise Unusable(f"{what} has control characters")
    if len(value) > _LONGEST_NOTE // 4:
        raise Unusable(f"{what} has {len(value):,} characters")
    return _text(value, what)


def _text(value: str, what: str) -> str:
    if "\0" in value:
        raise Unusable(f"{what} has the character U+0000")
    if value == "\ufffd":  # the store's sign for text that was lost
        raise Unusable(f"{what} is U+FFFD, the sign for lost text")
    if not _is_clean(value):
        raise Unusable(f"{what} is not valid Unicode text")
    return str(value)


def _is_clean(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _first_index(entry: Mapping[Any, Any], following: int) -> int:
    if entry.get("index") is None:
        return following
    index = whole(entry["index"])
    if index is None or not 0 <= index < 2**63:
        raise Unusable("index is not a whole number from 0")
    return index


def _stack_rows(entry: Mapping[Any, Any], kind: str) -> int | None:
    """Rows of a server's stack; None for an entry that is one sample, whatever its batch axes."""
    details = entry.get("sample_metadata")
    own = mapping(details) or {}
    marks = [entry.get(key) for key in _SAMPLE_KEYS] + [own.get("sample_id"), own.get("audio_path")]
    if any(isinstance(mark, (str, int)) for mark in marks):
        return None
    shapes = [tuple(tensor.shape) for _, tensor in _tensors(entry)]
    wide = [shape for shape in shapes if shape[-1:] == (T5_WIDTH,)]
    for shape in wide or shapes:
        least = 2 if not wide and kind == "flux" else 3
        if len(shape) >= least and shape[0] != 1:
            return shape[0]
    return None


def _tensors(entry: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key in _TENSOR_KEYS:
        value = entry.get(key)
        if value is not None:
            yield key, as_tensor(value, key)


def as_tensor(value: Any, key: str) -> torch.Tensor:
    """Return a tensor of real numbers with values, or raise `Unusable`."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    if not isinstance(value, torch.Tensor):
        raise Unusable(f"{key} is {_what(value)}, not a tensor")
    if value.layout is not torch.strided or value.is_meta or not value.is_floating_point():
        raise Unusable(f"{key} is not an ordinary tensor of floating-point values")
    if value.nbytes > max(value.untyped_storage().nbytes(), _LEAST_BOUND):
        raise Unusable(f"{key} repeats its values to {value.nbytes:,} bytes")
    return value.detach()


def _places(entry: Mapping[Any, Any], rows: int | None) -> dict[str, tuple[str, Shape]]:
    places: dict[str, tuple[str, Shape]] = {}
    for key, tensor in _tensors(entry):
        column, shape = column_of(key, row_shape(key, tensor.shape, rows))
        if column in places:
            raise Unusable(f"ambiguous: {places[column][0]} and {key} both look like {column}")
        places[column] = (key, shape)
    return places


def _audio_place(
    entry: Mapping[Any, Any], rows: int | None, oddities: Counter[str]
) -> dict[str, tuple[str, Shape]]:
    for key in _AUDIO_KEYS:
        if entry.get(key) is not None:
            try:
                shape = row_shape(key, as_tensor(entry[key], key).shape, rows)
            except Unusable as reason:
                oddities[f"audio left out ({reason})"] += 1
            else:
                return {"audio": (key, without_batch(shape))}
    return {}


def row_shape(key: str, shape: Sequence[int], rows: int | None) -> Shape:
    """Return the shape of one row of a stack of `rows`; the shape itself where `rows` is None."""
    if rows is None:
        return tuple(shape)
    if not shape or shape[0] != rows:
        got = shape[0] if shape else 0
        raise Unusable(f"stacks of different length: {key} has {got} rows, expected {rows}")
    return tuple(shape[1:])


def without_batch(shape: Shape) -> Shape:
    """Return a sequence's shape without leading axes of length 1."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def column_of(key: str, shape: Shape) -> tuple[str, Shape]:
    """Tell T5 from CLIP by width and rank: ``[L, 4096]``, ``[768]`` or ``[L, 768]``."""
    inner = without_batch(shape)
    if 0 in inner:
        raise Unusable(f"{key} is empty: shape {list(shape)}")
    if len(inner) > 2:
        raise Unusable(f"{key} has a batch axis longer than 1: shape {list(shape)}")
    if len(inner) == 2 and inner[1] == T5_WIDTH:
        return "t5", inner
    if inner and inner[-1] == CLIP_WIDTH:
        return "clip", inner[1:] if inner[0] == 1 else inner
    raise Unusable(
        f"{key} has shape {list(shape)}, neither T5 [tokens, {T5_WIDTH}] nor CLIP [{CLIP_WIDTH}]"
        f" or [tokens, {CLIP_WIDTH}]"
    )


def _rest(
    entry: Mapping[Any, Any], node: str, oddities: Counter[str], values: _Plain
) -> dict[str, Any]:
    """Return all other metadata, the sample's own on top, without tensors."""
    known = {*_NAMED_KEYS, *_TENSOR_KEYS, *_AUDIO_KEYS}
    found = {key: value for key, value in entry.items() if key not in known}
    if entry.get("image_filename") is not None:
        found["image_filename"] = entry["image_filename"]
    if entry.get("node_id") is not None and _is_other(entry["node_id"], node):
        found["node_id"] = entry["node_id"]
    found |= mapping(entry.get("sample_metadata")) or {}
    kept = {}
    for key, value in found.items():
        try:
            kept[_label(key)] = values.of(value)
        except Unusable as reason:
            oddities[f"{_label(key)} left out ({reason})"] += 1
    return kept


def _shortened(details: dict[str, Any], oddities: Counter[str]) -> dict[str, Any]:
    """Return a sample's metadata without the longest of it, where it is too long for a store."""
    while _length(details) > _LONGEST_NOTE:
        longest = max(details, key=lambda key: _length(details[key]))
        details = {key: value for key, value in details.items() if key != longest}
        oddities[f"{longest} left out (longer than {_LONGEST_NOTE:,} bytes)"] += 1
    return details


def _is_other(value: Any, node: str) -> bool:
    try:
        return str(plain(value)) != node
    except Unusable:  # counted with the other metadata
        return True


def _length(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())


def _of_row(value: Any, row: int, rows: int | None) -> Any:
    return value[row] if isinstance(value, list) and len(value) == rows else value


def _identity(entry: Mapping[Any, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    extra = {key: value for key, value in details.items() if value is not None}
    names = {key: extra.pop(key, None) for key in _NOTES}
    path = extra.get("image_path")
    if names["image_filename"] is None and isinstance(path, str):
        names["image_filename"] = path.replace("\\", "/").rsplit("/", 1)[-1]
    texts = {key: None if value is None else str(value) for key, value in names.items()}
    return {**texts, "extra": extra}


def _describe(entry: Any) -> str:
    found = mapping(entry) or {}
    known = ("split", "class_name", "index")
    return ", ".join(f"{key} {_shown(found[key])}" for key in known if key in found) or "unknown"


def _shown(value: Any) -> str:
    return (
        value
        if isinstance(value, str) and value.isprintable() and len(value) < 80
        else brief(value)
    )
