"""What a checkpoint says of itself: node, round, time, kind; and where its entries are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from fedgfe_store.checkpoints._entries import Slot, Unusable, plain, survey, whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import SERVER
from fedgfe_store.schema import Kind

_FILE_NAME = re.compile(r"(?:node_(?P<node>.+)|server)_embeddings_r(?P<round>\d+)\.pt")


def embeddings(content: Any, path: Path) -> list[Any]:
    if isinstance(content, Mapping) and isinstance(content.get("embeddings"), (list, tuple)):
        return list(content["embeddings"])
    what = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        if is_text_cache(content):
            what = "a cache of reference text embeddings; its name must end in _text_embs_dict.pt"
        else:
            what = f"a dict of {', '.join(repr(key) for key in list(content)[:5]) or 'nothing'}"
    raise SchemaMismatchError(
        f"{path}: not a FedGFE checkpoint: expected a dict with a list `embeddings`, got {what}"
    )


def file_name(node: str, round_number: int) -> str:
    """Return the name of the file that training would have written: ``node_0_embeddings_r5.pt``."""
    owner = node if node == SERVER else f"node_{node}"
    return f"{owner}_embeddings_r{round_number}.pt"


def named_origin(name: str) -> tuple[str, int] | None:
    """Return node and round by a file's name, None where it tells none."""
    match = _FILE_NAME.fullmatch(name)
    return (match["node"] or SERVER, int(match["round"])) if match else None


def is_text_cache(content: Any) -> bool:
    """Whether content maps classes to text embeddings by diffusion type."""
    inner = content.values() if isinstance(content, Mapping) else ()
    found = [value for value in inner if isinstance(value, Mapping)]
    return bool(found) and all({"flux", "sd"} & set(value) for value in found)


def origin(content: Mapping[Any, Any], path: Path) -> tuple[str, int, list[str]]:
    """Return node and round, the file's own before those of its name, and notes."""
    named = named_origin(path.name)
    named_node, named_round = named or (None, None)
    node = _node(content.get("node_id")) or named_node
    own = whole(content.get("round"))
    round_number = named_round if own is None or own < 0 else own
    if node is None or round_number is None:
        name = "node_id" if node is None else "round"
        raise SchemaMismatchError(
            f"{path}: {name} is {content.get(name)!r}, and the file name tells none either;"
            " expected a name such as node_0_embeddings_r5.pt"
        )
    notes = []
    if named and named_node != node:
        notes.append(f"node {node} by content, {named_node} by file name: content counts")
    if named and named_round != round_number:
        notes.append(f"round {own} by content, {named_round} by file name: content counts")
    if round_number != own:
        notes.append(f"round {content.get('round')} by content: {round_number} from file name")
    return node, round_number, notes


def _node(value: Any) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    number = whole(value)
    return None if number is None else str(number)


def timestamp(value: Any) -> tuple[datetime | None, list[str]]:
    if value is None:
        return None, []
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
        else:
            moment = datetime.fromtimestamp(float(value), UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return None, [f"timestamp {value!r} is not a time: left out"]
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC), []


def plain_metadata(value: Any) -> tuple[dict[str, Any], list[str]]:
    kept, notes = {}, []
    for key, item in value.items() if isinstance(value, Mapping) else ():
        try:
            kept[str(key)] = plain(item)
        except Unusable as reason:
            notes.append(f"metadata {key} left out ({reason})")
    return kept, notes


def kind_of(metadata: Mapping[str, Any], embeddings: list[Any]) -> Kind:
    said = str(metadata.get("diffusion_type")).lower()
    if said in ("flux", "sd"):
        return cast("Kind", said)
    found, _ = survey(embeddings, "", "flux")
    return "flux" if any(isinstance(s, Slot) and "t5" in s.places for s in found) else "sd"


def classes(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    for key in ("selected_classes", "federation_classes"):
        names = metadata.get(key)
        if isinstance(names, list) and names:
            return tuple(str(name) for name in names)
    return ()
