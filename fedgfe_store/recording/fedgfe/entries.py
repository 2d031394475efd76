"""What a host of the mixins yields: embeddings of a few samples, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from fedgfe_store.common.plain import Unusable, plain
from fedgfe_store.errors import SchemaMismatchError

_LEGACY = {
    "t5_embedding": "t5",
    "clip_embedding": "clip",
    "audio_embedding": "audio",
    "audio_embeddings": "audio",
}
_CHECKED = ("split", "node_id")
_FURTHER = ("sample_metadata", "image_path", *_CHECKED)


def is_empty(value: EmbeddingBatch | Mapping[str, Any]) -> bool:
    """Whether `value` is an entry for a sample that has no embeddings, as checkpoints have."""
    names = ("t5", "clip", "t5_embedding", "clip_embedding")
    if not isinstance(value, Mapping) or not any(name in value for name in names):
        return False
    return all(value.get(name) is None for name in names)


@dataclass(frozen=True, kw_only=True)
class EmbeddingBatch:
    """Embeddings of one sample, or of `n` samples whose tensors have a leading axis.

    Parameters
    ----------
    class_name : str or sequence of str
        Class of all samples, or of each.
    t5 : Tensor, optional
        ``[n, tokens, 4096]``; None for Stable Diffusion.
    clip : Tensor
        ``[n, 768]``, or ``[n, 77, 768]``.
    audio : Tensor, optional
        ``[n, frames, width]``, kept where the store's first records have it.
    index : int or sequence of int, optional
        Number of each sample within node, split and class; by default they are counted in the
        order in which they come, which then must be the same in every round.
    sample_id, file_id, audio_path, image_filename : str or sequence of str, optional
        What else is known.
    timestamp : datetime or sequence of datetime, optional
        By default now.
    extra : dict or sequence of dict, optional
        Any other metadata that JSON can hold.
    """

    class_name: Any
    clip: Any
    t5: Any = None
    audio: Any = None
    index: Any = None
    sample_id: Any = None
    file_id: Any = None
    audio_path: Any = None
    image_filename: Any = None
    timestamp: Any = None
    extra: Any = None

    @classmethod
    def of(cls, value: Self | Mapping[str, Any], *, node: str, split: str) -> Self:
        """Return `value` as a batch, if it is for this node and split.

        Parameters
        ----------
        value : EmbeddingBatch or mapping
            A mapping has the names of the fields as keys, or is an entry of a FedGFE checkpoint:
            with ``t5_embedding``, ``clip_embedding``, ``sample_metadata``, ``image_path``, or a
            server's with its stacks. ``split`` and ``node_id`` in it are compared.
        node, split : str
            What was asked for.

        Raises
        ------
        SchemaMismatchError
            If it is neither, or is of another node or split.
        """
        where = f"iter_embeddings({split!r}) of node {node}"
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise SchemaMismatchError(
                f"{where}: expected an EmbeddingBatch or a mapping, got a {type(value).__name__}"
            )
        for key, expected in zip(_CHECKED, (split, node), strict=True):
            if value.get(key) is not None and str(value[key]) != expected:
                raise SchemaMismatchError(
                    f"{where}: expected {key} {expected!r}, got {value[key]!r}"
                )
        given = {_LEGACY.get(key, key): item for key, item in value.items() if item is not None}
        names = [field.name for field in fields(cls)]
        for key in given:
            if key not in (*names, *_FURTHER):
                close = get_close_matches(str(key), [*names, *_LEGACY, *_FURTHER], 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise SchemaMismatchError(f"{where}: no such key {key!r}{hint}")
        missing = [name for name in ("class_name", "clip") if name not in given]
        # Either name may hold either tensor: shapes tell.
        if missing and not (missing == ["clip"] and "t5" in given):
            raise SchemaMismatchError(f"{where}: expected {' and '.join(missing)}, got none")
        further = {key: given.pop(key) for key in _FURTHER if key in given}
        return cls(**{"clip": None, **_details(given, further, where), **given})


def _details(given: Mapping[str, Any], further: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that ``sample_metadata`` and ``image_path`` of an entry give."""
    if "extra" in given and ("sample_metadata" in further or "image_path" in further):
        raise SchemaMismatchError(f"{where}: expected extra or an entry's own keys, got both")
    metadata = further.get("sample_metadata", {})
    each = [metadata] if isinstance(metadata, Mapping) else metadata
    if not isinstance(each, Sequence) or not all(isinstance(item, Mapping) for item in each):
        raise SchemaMismatchError(
            f"{where}: sample_metadata: expected a dict, or one for each sample, got {metadata!r}"
        )
    path = {"image_path": further["image_path"]} if "image_path" in further else {}
    rest = [_plain_details(dict(item) | path, where) for item in each]
    found: dict[str, list[Any]] = {}
    for key in ("sample_id", "file_id", "audio_path"):
        values = [item.pop(key, None) for item in rest]
        found[key] = [None if value is None else str(value) for value in values]
    found["extra"] = [item or None for item in rest]
    if isinstance(metadata, Mapping):
        return {key: values[0] for key, values in found.items()}
    return dict(found)


def _plain_details(details: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Return what is known in `details`, as JSON can hold it."""
    kept = {}
    for key, value in details.items():
        try:
            if value is not None:
                kept[str(key)] = plain(value)
        except Unusable as reason:
            raise SchemaMismatchError(
                f"{where}: {key}: expected a plain value, got one that cannot be kept ({reason})"
            ) from None
    return kept
