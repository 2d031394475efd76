"""How records, stores, images and checkpoints are named: in names of files, and in JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import xxhash

from fedgfe_store.records import SERVER, RecordKey

STORE_NAME = "embeddings.zarr"
"""The store that lies among the checkpoints of a training."""

_MAX_NAME_BYTES = 200
_PLAIN = re.compile(
    r"(?:server|node_[a-z0-9.-]+)_[a-z0-9.-]+_[a-z0-9._-]+_[0-9]+_r[0-9]+(?:_i[0-9]+)?"
)
_HASHED = re.compile(r"_h[0-9a-f]{32}\.png$")
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")
_PLAIN_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHECKPOINT = re.compile(r"(?:node_(?P<node>.+)|server)_embeddings_r(?P<round>\d{1,18})\.pt")

Origin = tuple[str, int]
"""Node and round."""


def image_name(key: RecordKey, number: int = 0) -> str:
    """Name the image file of a record.

    Parameters
    ----------
    key : RecordKey
        The record.
    number : int
        Which image of the record, from 0.

    Returns
    -------
    str
        ``node_0_train_dog_0_r5.png`` or ``server_train_dog_0_r5.png``, with ``_i1`` before the
        dot for image number 1. A key that cannot be read back from such a name, or has capital
        letters, gets its parts with unsafe characters replaced and a hash of the key at the end,
        so that two keys never share a name, every file system takes it, and one that ignores
        case or folds Unicode takes no two for one.
    """
    name = _plain_name(key, number)
    parts_are_plain = "_" not in key.node + key.split and _PLAIN.fullmatch(name)
    if parts_are_plain and len(name) <= _MAX_NAME_BYTES - 4:
        return f"{name}.png"
    return f"{_hashed_name(key, number)}.png"


def older_name(key: RecordKey, number: int = 0) -> str | None:
    """Give the name that an image with capital letters had before; None if it is the same.

    Files of such names are still found, but only where they say themselves what they show: a
    file system that ignores case may have taken two of them for one.
    """
    if not re.search("[A-Z]", key.node + key.split + key.class_name):
        return None
    lower = {n: getattr(key, n).lower() for n in ("node", "split", "class_name")}
    would_be = image_name(replace(key, **lower), number)
    # The hash alone tells the two kinds apart: letters of the readable part stay as they are.
    return f"{_plain_name(key, number)}.png" if not _HASHED.search(would_be) else None


def _plain_name(key: RecordKey, number: int) -> str:
    owner = key.node if key.node == SERVER else f"node_{key.node}"
    name = f"{owner}_{key.split}_{key.class_name}_{key.index}_r{key.round}"
    return f"{name}_i{number}" if number else name


def _hashed_name(key: RecordKey, number: int) -> str:
    parts = [name_part(part, 32) for part in (key.node, key.split, key.class_name)]
    readable = f"node_{parts[0]}_{parts[1]}_{parts[2]}_{key.index}_r{key.round}"
    # The full digest: a name shared by two records would hide one of them.
    identity = json.dumps([*key_json(key).values(), number]).encode("ascii")
    return f"{readable}_h{xxhash.xxh3_128_hexdigest(identity)}"


def name_part(text: str, most: int | None = None) -> str:
    """Return what every file system takes of a text; it may be the same of two texts."""
    return _UNSAFE.sub("-", text)[:most]


def checkpoint_name(node: str, round: int) -> str:
    """Name the checkpoint that training would have written: ``node_0_embeddings_r5.pt``."""
    owner = node if node == SERVER else f"node_{node}"
    return f"{owner}_embeddings_r{round}.pt"


def checkpoint_origin(name: str) -> Origin | None:
    """Return node and round that a checkpoint's name tells, None where it tells none."""
    match = _CHECKPOINT.fullmatch(name)
    return (match["node"] or SERVER, int(match["round"])) if match else None


def checkpoint_names(origins: Iterable[Origin]) -> dict[Origin, str]:
    """Name checkpoints that are written into one folder, on any file system.

    Parameters
    ----------
    origins : iterable of (str, int)
        Node and round of each.

    Returns
    -------
    dict of (str, int) to str
        `checkpoint_name`; where that does not do for a name, or differs from another one in case
        only, unsafe characters of the node are replaced and a hash of it stands behind.
    """
    names = {(node, round): _safe_name(node, round) for node, round in origins}
    counts = Counter(name.casefold() for name in names.values())
    alone = {origin for origin, name in names.items() if counts[name.casefold()] == 1}
    return {origin: _safe_name(*origin, plain=origin in alone) for origin in names}


def _safe_name(node: str, round: int, *, plain: bool = True) -> str:
    if not (plain and _PLAIN_NODE.fullmatch(node)):
        node = f"{name_part(node, 60)}_h{xxhash.xxh3_64_hexdigest(node.encode())}"
    return checkpoint_name(node, round)


def key_json(key: RecordKey) -> dict[str, Any]:
    """Give a key as JSON-ready fields, in a fixed order."""
    return {
        "node": key.node,
        "round": key.round,
        "split": key.split,
        "class_name": key.class_name,
        "index": key.index,
    }


def read_key(fields: Any) -> RecordKey | None:
    """Read a key back from what `key_json` gave; None if it is anything else."""
    kinds = {"node": str, "round": int, "split": str, "class_name": str, "index": int}
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        return None
    fits = all(isinstance(fields[name], kind) for name, kind in kinds.items())
    return RecordKey(**fields) if fits else None
