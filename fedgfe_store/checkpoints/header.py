"""What a checkpoint says of itself: node, round, time, kind; and where its entries are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedgfe_store.checkpoints import entries
from fedgfe_store.checkpoints.columns import kind_of_columns
from fedgfe_store.common.plain import Placeholder, Unusable, brief, mapping, plain, what, whole
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.names import checkpoint_origin
from fedgfe_store.schema import Kind, TensorColumn

RoundFrom = Literal["name", "content"]
"""Which round counts where a file's name and its content differ."""

_LARGEST_ROUND = 2**31 - 1
"""The column of rounds is int32."""
_MOST_NAMED = 10
"""Classes of objects that notes name, of what may be any number."""
_EARLIEST, _LATEST = datetime(1678, 1, 1, tzinfo=UTC), datetime(2262, 1, 1, tzinfo=UTC)
"""Between them xarray and pandas can hold a time."""


def embeddings(content: Any, path: Path) -> list[Any]:
    """Return the entries of a checkpoint's content, or raise `SchemaMismatchError`."""
    top = mapping(content)
    if top is not None and isinstance(top.get("embeddings"), (list, tuple)):
        return list(top["embeddings"])
    got = what(content)
    if isinstance(content, Placeholder) and top is None:
        got += ": load it where it was written and `torch.save` a dict"
    elif top is not None:
        if is_text_cache(content):
            got = "a cache of reference text embeddings; its name must end in _text_embs_dict.pt"
        else:
            got = f"a dict of {', '.join(map(brief, list(top)[:5])) or 'nothing'}"
    raise SchemaMismatchError(
        f"{path}: not a FedGFE checkpoint: expected a dict with a list `embeddings`, got {got}"
    )


def is_text_cache(content: Any) -> bool:
    """Whether content maps classes to text embeddings by diffusion type."""
    inner = (mapping(content) or {}).values()
    found = [value for value in map(mapping, inner) if value is not None]
    return bool(found) and all({"flux", "sd"} & set(value) for value in found)


def origin(
    content: Mapping[Any, Any], path: Path, round_from: RoundFrom | None
) -> tuple[str, int, list[str]]:
    """Return node and round, the file's own before those of its name, and notes."""
    named = checkpoint_origin(path.name)
    named_node, named_round = named or (None, None)
    node = _node(content.get("node_id"), path) or named_node
    own = whole(content.get("round"))
    own = None if own is not None and own < 0 else own
    differ = named_round is not None and own is not None and named_round != own
    if differ and round_from is None:
        raise SchemaMismatchError(
            f"{path}: round {brief(own)} by content, {named_round} by file name: say which counts "
            f"with `import --round-from content` or `--round-from name`"
        )
    round_number = named_round if own is None or (differ and round_from == "name") else own
    if node is None or round_number is None:
        name = "node_id" if node is None else "round"
        raise SchemaMismatchError(
            f"{path}: {name} is {brief(content.get(name))}, and the file name tells none either;"
            " expected a name such as node_0_embeddings_r5.pt"
        )
    if round_number > _LARGEST_ROUND:
        raise SchemaMismatchError(
            f"{path}: round: expected 0 to {_LARGEST_ROUND}, got {brief(round_number)}"
        )
    notes = []
    if named and named_node != node:
        notes.append(f"node {node} by content, {named_node} by file name: content counts")
    if differ:
        which = "file name" if round_from == "name" else "content"
        notes.append(f"round {own} by content, {named_round} by file name: {which} counts")
    if own is None:
        given = brief(content.get("round"))
        notes.append(f"round {given} by content: {round_number} from file name")
    return node, round_number, notes


def _node(value: Any, path: Path) -> str | None:
    if not isinstance(value, str):
        number = whole(value)
        return None if number is None or number.bit_length() > 64 else str(number)
    try:
        return entries.name(value.strip(), "node_id") or None
    except Unusable as reason:
        raise SchemaMismatchError(f"{path}: {reason}") from None


def timestamp(value: Any) -> tuple[datetime | None, list[str]]:
    """Return the moment that a checkpoint names, if one can be read, and remarks about it."""
    if value is None:
        return None, []
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
        elif isinstance(value, datetime):
            moment = value
        else:
            moment = datetime.fromtimestamp(float(value), UTC)
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return None, [f"timestamp {brief(value)} is not a time: left out"]
    if not is_a_time(moment):
        return None, [f"timestamp {brief(value)} is not of the years 1678 to 2261: left out"]
    return moment, []


def is_a_time(moment: datetime) -> bool:
    """Whether a time can be kept: what xarray and pandas cannot hold, nobody could open."""
    return _EARLIEST <= moment < _LATEST


def unread(unknown: Mapping[str, int]) -> list[str]:
    """Return notes on the objects of unknown classes in a file."""
    return [
        f"{name}: not a plain value, not run, only its name is kept: {count} "
        f"{'object' if count == 1 else 'objects'}"
        for name, count in list(unknown.items())[:_MOST_NAMED]
    ] + ([f"and {len(unknown) - _MOST_NAMED} more classes"] if len(unknown) > _MOST_NAMED else [])


def plain_metadata(value: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what JSON can hold of a checkpoint's metadata, and remarks about the rest."""
    kept: dict[str, Any] = {}
    notes = []
    for key, item in (mapping(value) or {}).items():
        shown = key if isinstance(key, str) and key.isprintable() else brief(key)
        try:
            kept[shown] = plain(item)
        except Unusable as reason:
            notes.append(f"metadata {shown} left out ({reason})")
    return kept, notes


def kind_of(metadata: Mapping[str, Any], columns: Sequence[TensorColumn] = ()) -> Kind | None:
    """Return which conditioning the entries are, as the metadata or their columns say, if so."""
    said = str(metadata.get("diffusion_type")).lower()
    if said in ("flux", "sd") or (columns and metadata.get("diffusion_type") is not None):
        return said
    return kind_of_columns(columns) if columns else None


def classes(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of classes that the metadata lists."""
    for key in ("selected_classes", "federation_classes"):
        names = metadata.get(key)
        if isinstance(names, list) and names:
            return tuple(dict.fromkeys(str(name) for name in names if _is_class(name)))
    return ()


def _is_class(value: Any) -> bool:
    try:
        return isinstance(value, (str, int)) and bool(entries.name(str(value), "class"))
    except Unusable:
        return False
