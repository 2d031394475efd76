"""From the dicts of a checkpoint to samples: which tensor is what, and which sample is which."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedgfe_store.common.plain import (
    LARGEST_BITS,
    Plain,
    Unusable,
    brief,
    label,
    mapping,
    plain,
    text,
    what,
    whole,
)
from fedgfe_store.schema import TensorColumn
from fedgfe_store.shapes import (
    T5_WIDTH,
    TENSOR_KEYS,
    Shape,
    any_tensor,
    as_tensor,
    column_of,
    row_shape,
    without_batch,
)

_AUDIO_KEYS = ("audio_embeddings", "audio_embedding")
_NOTES = ("sample_id", "file_id", "image_filename", "audio_path")
_SAMPLE_KEYS = ("index", "image_filename", "image_path")
"""What an entry has that is one sample; a server's stack has rows instead."""
_NAMED_KEYS = {"split", "class_name", "index", "sample_metadata", "image_filename", "node_id"}

_MOST_OF_A_FILE = 20_000_000
_LONGEST_NOTE = 60_000


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


def survey(
    entries: Sequence[Any], node: str, kind: str, columns: Sequence[TensorColumn] = ()
) -> tuple[list[Slot | Skipped], list[str]]:
    """Find the samples of a checkpoint's entries without reading a tensor's values.

    Parameters
    ----------
    entries : sequence
        The file's ``embeddings``.
    node : str
        Node of the file; an entry's own ``node_id`` is kept in ``extra`` where it differs.
    kind : {"flux", "sd"}
        Tells whether a lone ``[77, 768]`` is one sequence.
    columns : sequence of TensorColumn
        Those that entries have under their own names.

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
    values = Plain(_MOST_OF_A_FILE)
    for position, entry in enumerate(entries):
        try:
            named = _named(entry, columns)
            rest = {k: v for k, v in entry.items() if k not in named} if named else entry
            slots = _slots(position, rest, node, kind, numbers, oddities, values)
            found.extend(replace(slot, places={**slot.places, **named}) for slot in slots)
        except Unusable as reason:
            found.append(Skipped(str(reason), position, _describe(entry)))
    return found, [
        f"{what}: {count} {'entry' if count == 1 else 'entries'}"
        for what, count in oddities.items()
    ]


def _named(entry: Any, columns: Sequence[TensorColumn]) -> dict[str, tuple[str, Shape]]:
    """Return the places of the columns that an entry has under their own names."""
    found = {}
    for column in columns if mapping(entry) is not None else ():
        if entry.get(column.name) is not None:
            shape = tuple(any_tensor(entry[column.name], column.name).shape)
            while len(shape) > len(column.shape) and shape[0] == 1:
                shape = shape[1:]
            found[column.name] = (column.name, shape)
    return found


def _slots(
    position: int,
    entry: Any,
    node: str,
    kind: str,
    numbers: Counter[tuple[str, str]],
    oddities: Counter[str],
    values: Plain,
) -> Iterator[Slot]:
    if mapping(entry) is None:
        raise Unusable(f"entry is {what(entry)}, not a dict")
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


def _name(entry: Mapping[Any, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        wrong = f"{key} is {brief(value)}, expected a name"
        raise Unusable(wrong if key in entry else f"no {key}")
    return name(value, key)


def _class_name(entry: Mapping[Any, Any], oddities: Counter[str]) -> str:
    number = whole(entry.get("class_name"))
    if number is None or number.bit_length() > LARGEST_BITS:
        return _name(entry, "class_name")
    oddities["class_name is a number: taken as text"] += 1
    return str(number)


def name(value: str, what: str) -> str:
    """Return a text that can be part of a record's key, else raise `Unusable`."""
    if any(character < " " or character == "\x7f" for character in value):
        raise Unusable(f"{what} has control characters")
    if len(value) > _LONGEST_NOTE // 4:
        raise Unusable(f"{what} has {len(value):,} characters")
    return text(value, what)


def _first_index(entry: Mapping[Any, Any], following: int) -> int:
    if entry.get("index") is None:
        return following
    index = whole(entry["index"])
    if index is None or not 0 <= index < 2**63:  # the column is int64
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
    for key in TENSOR_KEYS:
        value = entry.get(key)
        if value is not None:
            yield key, as_tensor(value, key)


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


def _rest(
    entry: Mapping[Any, Any], node: str, oddities: Counter[str], values: Plain
) -> dict[str, Any]:
    """Return all other metadata, the sample's own on top, without tensors."""
    known = {*_NAMED_KEYS, *TENSOR_KEYS, *_AUDIO_KEYS}
    found = {key: value for key, value in entry.items() if key not in known}
    if entry.get("image_filename") is not None:
        found["image_filename"] = entry["image_filename"]
    if entry.get("node_id") is not None and _is_other(entry["node_id"], node):
        found["node_id"] = entry["node_id"]
    found |= mapping(entry.get("sample_metadata")) or {}
    kept = {}
    for key, value in found.items():
        try:
            kept[label(key)] = values.of(value)
        except Unusable as reason:
            oddities[f"{label(key)} left out ({reason})"] += 1
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
