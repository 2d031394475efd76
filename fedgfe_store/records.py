"""The key of a record, and what is known of a record besides its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from fedgfe_store.common.words import numbers_first
from fedgfe_store.errors import SchemaMismatchError

KEY_COLUMNS = ("node", "round", "split", "class_name", "index")
"""The columns that together identify a record, in the order in which they are shown."""

NOTE_COLUMNS = ("sample_id", "file_id", "image_filename", "audio_path", "timestamp", "extra")
"""What is kept of a record besides its key and its tensors."""

SERVER = "server"
"""Node of the federation's server."""

TEXT_NODE, TEXT_ROUND, TEXT_SPLIT = "text", 0, "reference"
"""Where reference text embeddings are kept: what adapters are trained towards."""

NEGATIVE_SPLIT = "negative"
"""Split of node ``text`` that keeps what guidance leads away from: embeddings of no class, which a
query sees only where it asks for this split."""

EARLIEST, LATEST = -62_135_596_800_000, 253_402_300_799_999
"""The moments that a stored record can have, years 1 to 9999, in milliseconds since 1970 UTC. New
ones come in within narrower bounds: see `storage.entry.FIRST_ENTRY`."""


@dataclass(frozen=True, order=True)
class RecordKey:
    """What identifies one record of a store.

    Parameters
    ----------
    node : str
        Federated node: ``"0"``, ``"1"``, ... or ``"server"``.
    round : int
        Federated round, from 0.
    split : str
        ``"train"``, ``"val"``, ``"test"`` or any other name.
    class_name : str
        Class of the sample.
    index : int
        Number of the sample within node, split and class, from 0.
    """

    node: str
    round: int
    split: str
    class_name: str
    index: int

    def value(self, column: str) -> str | int:
        """Return the value of a key column."""
        value: str | int = getattr(self, column)
        return value

    # What a derived record has other words for, see `derived_keys`.
    shown = value

    @property
    def rank(self) -> tuple[Any, ...]:
        """Where it stands among all keys, those of derived records too."""
        return 0, self.node, self.round, self.split, self.class_name, self.index

    def __str__(self) -> str:
        return (
            f"node {self.node}, round {self.round}, split {self.split}, "
            f"class {self.class_name}, index {self.index}"
        )


@dataclass(frozen=True)
class RecordBatch:
    """Records that fit a schema: what `EmbeddingStore.append` writes.

    Parameters
    ----------
    columns : mapping of str to ndarray
        Key columns, notes and digests, each ``[n]``.
    tensors : mapping of str to ndarray
        Tensor columns, ``[n, *shape]`` of their data types, rounded to the schema's precision.
    unfinished : bool
        Whether the tensors are not rounded yet: they are in a caller's memory, which nothing may
        be changed in, and were looked through, see `storage.entry.conformed`.
    """

    columns: Mapping[str, np.ndarray]
    tensors: Mapping[str, np.ndarray]
    unfinished: bool = False

    def __len__(self) -> int:
        return len(self.columns["index"])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(array.nbytes for array in self.tensors.values())

    def key(self, position: int) -> RecordKey:
        """Return the key of the record at `position`."""
        return key_at(self.columns, position)

    def keys(self) -> list[RecordKey]:
        """Return the records' keys."""
        return keys_of(self.columns)

    def take(self, positions: np.ndarray | slice) -> RecordBatch:
        """Return the records at `positions`; a slice shares their memory."""
        return RecordBatch(
            {name: values[positions] for name, values in self.columns.items()},
            {name: values[positions] for name, values in self.tensors.items()},
            self.unfinished,
        )

    @classmethod
    def concatenate(cls, batches: Sequence[RecordBatch]) -> RecordBatch:
        """Return the records of `batches` as one; a single batch is returned as it is."""
        if len(batches) == 1:
            return batches[0]
        columns = joined([batch.columns for batch in batches])
        found = {name: values for batch in batches for name, values in batch.tensors.items()}
        tensors = {
            name: np.concatenate([batch._values(name, like) for batch in batches])
            for name, like in found.items()
        }
        return cls(columns, tensors, any(batch.unfinished for batch in batches))

    def _values(self, name: str, like: np.ndarray) -> np.ndarray:
        if name in self.tensors:
            return self.tensors[name]
        missing = np.nan if like.dtype.kind == "f" else 0
        return np.full((len(self), *like.shape[1:]), missing, like.dtype)


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the columns of `parts`, of which there is at least one, behind one another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def are_negatives(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which records, of which at least node and split are known, are of no class."""
    # Compared with plain text, numpy overlooks U+0000 at its end.
    node = columns["node"] == np.array(TEXT_NODE, np.dtypes.StringDType())
    split = columns["split"] == np.array(NEGATIVE_SPLIT, np.dtypes.StringDType())
    return np.asarray(node & split)


def check_keys(name: str, columns: Sequence[str], known: Sequence[str] = KEY_COLUMNS) -> None:
    """Refuse `columns`, the value of `name`, unless they are some of `known`, each once.

    Raises
    ------
    SchemaMismatchError
        If they are not.
    """
    listed = isinstance(columns, Sequence) and not isinstance(columns, str)
    are_known = listed and all(each in known for each in columns)
    if not are_known or not columns or len(set(columns)) < len(columns):
        got = ", ".join(map(str, columns)) if listed else f"{type(columns).__name__} {columns!r}"
        raise SchemaMismatchError(
            f"{name}: expected some of {', '.join(known)}, each once, got {got or 'none'}"
        )


def key_order(columns: Iterable[str]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """Return a key for `sorted` that puts values of key columns in order: nodes by number."""
    nodes = [name == "node" for name in columns]
    return lambda values: [
        numbers_first(value) if node else value for value, node in zip(values, nodes, strict=True)
    ]


def key_at(columns: Mapping[str, np.ndarray], position: int) -> RecordKey:
    """Return the key that stands at `position` of the key columns `columns`."""
    return RecordKey(
        node=str(columns["node"][position]),
        round=int(columns["round"][position]),
        split=str(columns["split"][position]),
        class_name=str(columns["class_name"][position]),
        index=int(columns["index"][position]),
    )


def keys_of(columns: Mapping[str, np.ndarray]) -> list[RecordKey]:
    """Return the keys that stand in the key columns `columns`, one for each row."""
    rows = zip(*(columns[name].tolist() for name in KEY_COLUMNS), strict=True)
    return [RecordKey(*row) for row in rows]


def to_milliseconds(moment: datetime) -> int:
    """Return `moment` in milliseconds since 1970 UTC; one without a time zone is taken as UTC."""
    if moment.utcoffset() is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def from_milliseconds(value: int) -> datetime:
    """Return the moment `value` milliseconds after 1970 UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=value)
