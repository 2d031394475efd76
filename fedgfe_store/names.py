"""How records, stores, images and checkpoints are named: in names of files, and in JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import xxhash

from fedgfe_store.derived_keys import Key, MeanKey, Mode, WalkKey
from fedgfe_store.records import KEY_COLUMNS, SERVER, RecordKey

STORE_NAME = "embeddings.zarr"
"""The store that lies among the checkpoints of a training."""

_MAX_NAME_BYTES = 200
_PLAIN = re.compile(
    r"(?:server|node_[a-z0-9.-]+)_[a-z0-9.-]+_[a-z0-9._-]+_[0-9]+_r[0-9]+(?:_i[0-9]+)?"
)
_HASHED = re.compile(r"_h[0-9a-f]{32}\.png$")
_PLAIN_MEAN = re.compile(r"mean(?:_[a-z0-9.-]+)*")
# Class names that would be taken for another part of a mean's name.
_LIKE_ANOTHER = re.compile(r"(?:server|node-|split-|index-|r[0-9]).*|.*_(?:i[0-9]+|h[0-9a-f]{32})")
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")
_PLAIN_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHECKPOINT = re.compile(r"(?:node_(?P<node>.+)|server)_embeddings_r(?P<round>\d{1,18})\.pt")

Origin = tuple[str, int]
"""Node and round."""


def image_name(key: Key, number: int = 0) -> str:
    """Name the image file of a record, or of a derived one.

    Parameters
    ----------
    key : RecordKey, MeanKey or WalkKey
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
        case or folds Unicode takes no two for one. ``mean_r5_dog.png`` for a mean, and
        ``walk_dog_drum_r20_h..._03.png`` for a frame of a walk, whose hash is of ends, mode and
        number of frames: a record's name begins with neither.
    """
    if not isinstance(key, RecordKey):
        image = f"_i{number}" if number else ""
        name = _mean_name(key) if isinstance(key, MeanKey) else _walk_name(key)
        return f"{name}{image}.png"
    name = _plain_name(key, number)
    parts_are_plain = "_" not in key.node + key.split and _PLAIN.fullmatch(name)
    if parts_are_plain and len(name) <= _MAX_NAME_BYTES - 4:
        return f"{name}.png"
    return f"{_hashed_name(key, number)}.png"


def image_names(columns: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> Iterator[str]:
    """Name the images of many records as `image_name` does, without an object for each.

    Parameters
    ----------
    columns : mapping
        Key columns of the records.
    numbers : sequence of int
        Which images of each record.

    Yields
    ------
    str
        Names, record by record.
    """
    # Only these decide whether a name is plain, and most are the same as many others'.
    begins: dict[tuple[str, str, str], str | None] = {}
    for node, round, split, class_name, index in zip(
        *(columns[name] for name in KEY_COLUMNS), strict=True
    ):
        group = node, split, class_name
        if group not in begins:
            begins[group] = _plain_begin(*group)
        begin = begins[group]
        if begin is not None:
            for number in numbers:
                yield f"{_numbered(begin, index, round, number)}.png"
        else:
            key = RecordKey(node, round, split, class_name, index)
            yield from (image_name(key, number) for number in numbers)


def _plain_begin(node: str, split: str, class_name: str) -> str | None:
    """Return what the plain names of a group's images begin with; None where some are not plain."""
    key = RecordKey(node, 0, split, class_name, 0)
    plain = _plain_name(key, 0)
    is_plain = image_name(key) == f"{plain}.png"
    # Round, index and number have at most 19 digits.
    return _owned(key) if is_plain and len(plain) <= _MAX_NAME_BYTES - 80 else None


def older_name(key: Key, number: int = 0) -> str | None:
    """Give the name that an image with capital letters had before; None if it is the same.

    Files of such names are still found, but only where they say themselves what they show: a
    file system that ignores case may have taken two of them for one.
    """
    if not isinstance(key, RecordKey):
        return None
    if not re.search("[A-Z]", key.node + key.split + key.class_name):
        return None
    lower = {n: getattr(key, n).lower() for n in ("node", "split", "class_name")}
    would_be = image_name(replace(key, **lower), number)
    # The hash alone tells the two kinds apart: letters of the readable part stay as they are.
    return f"{_plain_name(key, number)}.png" if not _HASHED.search(would_be) else None


def may_have_older_name(name: str) -> bool:
    """Whether an `image_name` may be of a key that has an `older_name`."""
    return _HASHED.search(name) is not None


def _plain_name(key: RecordKey, number: int) -> str:
    return _numbered(_owned(key), key.index, key.round, number)


def _owned(key: RecordKey) -> str:
    owner = key.node if key.node == SERVER else f"node_{key.node}"
    return f"{owner}_{key.split}_{key.class_name}"


def _numbered(begin: str, index: int, round: int, number: int) -> str:
    name = f"{begin}_{index}_r{round}"
    return f"{name}_i{number}" if number else name


def _hashed_name(key: RecordKey, number: int) -> str:
    parts = [name_part(part, 32) for part in (key.node, key.split, key.class_name)]
    readable = f"node_{parts[0]}_{parts[1]}_{parts[2]}_{key.index}_r{key.round}"
    # The full digest: a name shared by two records would hide one of them.
    identity = json.dumps([*key_json(key).values(), number]).encode("ascii")
    return f"{readable}_h{xxhash.xxh3_128_hexdigest(identity)}"


def _mean_name(key: MeanKey) -> str:
    """Name a mean by what its records agree in, the class last: it may have anything in it."""
    parts = [_tagged(column, value) for column, value in key.fixed if column != "class_name"]
    class_name = key.value("class_name")
    plain = "_".join(["mean", *parts, *([] if class_name is None else [str(class_name)])])
    split = str(key.value("split") or "") + str(key.value("node") or "")
    is_plain = key.others == "{}" and "_" not in split and len(plain) <= _MAX_NAME_BYTES - 12
    is_alone = class_name is None or not _LIKE_ANOTHER.fullmatch(str(class_name))
    if is_plain and is_alone and _PLAIN_MEAN.fullmatch(plain):
        return plain
    readable = [name_part(str(value), 32) for _, value in key.fixed]
    return f"{'_'.join(['mean', *readable])}_h{_hash(key_json(key))}"


def _walk_name(key: WalkKey) -> str:
    ends = [key.start.shown(c) for c in key.differing] + [key.end.shown(c) for c in key.differing]
    number = key.value("round")
    parts = [name_part(str(each), 24) for each in ends[:6]]
    parts += [] if number is None else [f"r{number}"]
    # Without the frame: the frames of a walk then stand side by side, in their order.
    walk = _hash({**key_json(key), "frame": 0})
    digits = len(str(key.frames - 1))
    return f"{'_'.join(['walk', *parts])}_h{walk}_{key.frame:0{digits}}"


def _tagged(column: str, value: str | int) -> str:
    if column == "round":
        return f"r{value}"
    return SERVER if (column, value) == ("node", SERVER) else f"{column}-{value}"


def _hash(identity: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode("ascii"))


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


def key_json(key: Key) -> dict[str, Any]:
    """Give a key as JSON-ready fields, in a fixed order.

    Of a mean they are ``mean``, what its records agree in, and ``of``, what else chose them; of a
    frame of a walk ``walk``, with both ends, mode and number of frames, and ``frame``.
    """
    if isinstance(key, MeanKey):
        return {"mean": dict(key.fixed), "of": json.loads(key.others)}
    if isinstance(key, WalkKey):
        walk = {"from": key_json(key.start), "to": key_json(key.end), "mode": key.mode}
        return {"walk": {**walk, "frames": key.frames}, "frame": key.frame}
    return {name: key.value(name) for name in KEY_COLUMNS}


def read_key(fields: Any) -> Key | None:
    """Read a key back from what `key_json` gave; None if it is anything else."""
    if not isinstance(fields, dict):
        return None
    if fields.keys() == {"mean", "of"}:
        return _read_mean(fields["mean"], fields["of"])
    if fields.keys() == {"walk", "frame"}:
        return _read_walk(fields["walk"], fields["frame"])
    fits = fields.keys() == _KINDS.keys() and _fit(fields)
    return RecordKey(**fields) if fits else None


_KINDS = {"node": str, "round": int, "split": str, "class_name": str, "index": int}


def _fit(fields: dict[str, Any]) -> bool:
    return all(isinstance(value, _KINDS[name]) for name, value in fields.items())


def _read_mean(fixed: Any, others: Any) -> MeanKey | None:
    if not (isinstance(fixed, dict) and isinstance(others, dict) and fixed.keys() <= _KINDS.keys()):
        return None
    pairs = tuple((name, fixed[name]) for name in KEY_COLUMNS if name in fixed)
    return MeanKey(pairs, json.dumps(others, sort_keys=True)) if _fit(fixed) else None


def _read_walk(walk: Any, frame: Any) -> WalkKey | None:
    if not isinstance(walk, dict) or walk.keys() != {"from", "to", "mode", "frames"}:
        return None
    start, end, frames = read_key(walk["from"]), read_key(walk["to"]), walk["frames"]
    numbers = isinstance(frame, int) and isinstance(frames, int) and 0 <= frame < frames >= 2
    if not numbers or walk["mode"] not in get_args(Mode):
        return None
    if not isinstance(start, RecordKey | MeanKey) or not isinstance(end, RecordKey | MeanKey):
        return None
    return WalkKey(start, end, walk["mode"], frames, frame)
