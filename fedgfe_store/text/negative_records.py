"""Negative embeddings that a store keeps: records of node ``text``, and arrays of earlier days."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fedgfe_store.errors import BusyError, ConflictError, DamagedDataError, SchemaMismatchError
from fedgfe_store.models.model import Model
from fedgfe_store.records import NEGATIVE_SPLIT, TEXT_NODE, TEXT_ROUND
from fedgfe_store.store import EmbeddingStore
from fedgfe_store.text.columns import as_stored
from fedgfe_store.text.negative_values import Negative, digest_of

if TYPE_CHECKING:
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.selection import Selection

# Of no class: the name says what it is where a list of records shows it.
_CLASS = "negative"
# A store that is being written all the time should not hold up who only wants to remember.
_PATIENCE = 60.0
_BITS = 31


def kept(
    model: Model,
    selection: Selection | Derived,
    columns: Mapping[str, str],
    prompt: str,
    encoder: str | None,
) -> Negative | None:
    """Return what the store keeps of a prompt; a model without encoder takes the only one.

    Raises
    ------
    DamagedDataError
        If it is damaged.
    """
    found = None
    folder = selection.location
    if len(columns) == 1 and isinstance(folder, Path):  # releases of those arrays knew no URL
        found = _array(folder, prompt, encoder)
    if found is not None:
        (argument,) = columns
        return Negative.of({argument: found}, _source(prompt))
    # What was kept since the selection was made counts, too.
    records = EmbeddingStore.open(selection.location).select(
        node=TEXT_NODE, round=TEXT_ROUND, split=NEGATIVE_SPLIT
    )
    wanted = {"prompt": prompt} | ({"encoder": encoder} if encoder else {})
    extras = [_said(text) for text in records.column("extra").tolist()]
    matching = [
        position
        for position, extra in enumerate(extras)
        if all(extra.get(name) == value for name, value in wanted.items())
        and set(extra.get("columns", columns)) >= set(columns)
    ]
    if not matching or (encoder is None and len(matching) > 1):
        return None
    return _read(model, records.take(matching[:1]), columns, extras[matching[0]])


def _said(text: str) -> dict[str, Any]:
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}


def _read(
    model: Model, record: Selection, columns: Mapping[str, str], extra: Mapping[str, Any]
) -> Negative:
    values: dict[str, NDArray[Any]] = {}
    for argument, name in columns.items():
        values[argument] = record.read(name)[0]
    for column in model.family.columns:
        if column.is_mask and column.argument in values:
            values[column.argument] = values[column.argument].astype(bool)
        elif column.is_mask:
            sequence = columns[model.family.sequence.argument]
            if record.schema.column(sequence).ragged:
                length = int(record.read(f"length_{sequence}")[0])
                tokens = record.schema.columns[sequence][0]
                values[column.argument] = np.arange(tokens) < length
    digest = extra.get("digest")  # none of a record that somebody added by hand
    known = digest if isinstance(digest, str) else None
    return Negative.of(values, _source(str(extra["prompt"])), known)


def append_record(
    model: Model,
    selection: Selection | Derived,
    columns: Mapping[str, str],
    fresh: Negative,
    prompt: str,
    encoder: str,
) -> str | None:
    """Append what was encoded to the store, as one record and one commit.

    Returns
    -------
    str or None
        Why it is not there, where it is not.
    """
    schema = selection.schema
    if selection.as_of is not None:
        return f"it was opened as of commit {selection.as_of}"
    extra = {
        "prompt": prompt,
        "model": model.name,
        "revision": model.revision,
        "encoder": encoder,
        "dtype": "float32",
        "digest": fresh.digest,
        "columns": sorted(columns),
    }
    batched = {argument: value[np.newaxis] for argument, value in fresh.values.items()}
    try:
        given = as_stored(batched, schema, columns)
        for column in schema.tensors:  # columns of other models, which say nothing here
            if column.name not in given and not column.optional:
                given[column.name] = np.zeros((1, *column.shape), column.dtype)
        store = EmbeddingStore.open(selection.location)
        source = f"negative embeddings of {model.name}"
        with store.append(
            node=TEXT_NODE, round=TEXT_ROUND, source=source, timeout=_PATIENCE
        ) as batch:
            # The number tells prompts and encoders apart, so that runs side by side keep one.
            index = _hash(prompt, encoder) >> (64 - _BITS)
            batch.add(
                split=NEGATIVE_SPLIT, class_name=[_CLASS], index=[index], extra=[extra], **given
            )
    except ConflictError:
        return None  # another run has kept the same meanwhile
    except (OSError, BusyError, SchemaMismatchError) as error:
        return str(error)
    return None


def _hash(prompt: str, encoder: str) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps([prompt, encoder]).encode())


def _source(prompt: str) -> str:
    return f"prompt {prompt!r}, kept in the store"


def _array(store: Path, prompt: str, encoder: str | None) -> NDArray[np.float32] | None:
    """Return what a release up to 0.2 kept: an array of its own in the store's folder."""
    if encoder is not None:
        folder = store / f"negative_{_hash(prompt, encoder):016x}"
        return _read_array(folder)[1] if folder.is_dir() else None
    found = [_read_array(folder) for folder in sorted(store.glob("negative_*"))]
    matching = [values for known, values in found if known == prompt]
    return matching[0] if len(matching) == 1 else None


def _read_array(folder: Path) -> tuple[str, NDArray[np.float32]]:
    import zarr

    try:
        array = zarr.open_array(folder, mode="r")
        values, known = np.ascontiguousarray(array[:], np.float32), dict(array.attrs)
        prompt, sound = str(known["prompt"]), digest_of({"": values}) == known["digest"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedDataError(_damage(folder, str(error))) from error
    if not sound:
        raise DamagedDataError(_damage(folder, "its digest does not fit"))
    return prompt, values


def _damage(folder: Path, reason: str) -> str:
    return f"{folder} is damaged ({reason}); remove it, and the prompt is encoded again"
