"""FedGFE's caches of reference text embeddings, read as checkpoints of the node ``text``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedgfe_store.checkpoints import torch_files
from fedgfe_store.checkpoints.entries import survey
from fedgfe_store.checkpoints.header import is_text_cache, unread
from fedgfe_store.checkpoints.reading import Checkpoint, Opened
from fedgfe_store.common.plain import mapping
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import TEXT_NODE, TEXT_ROUND, TEXT_SPLIT
from fedgfe_store.schema import Kind


def read_text_cache(
    path: str | Path, *, kind: Kind | None = None, classes: Iterable[str] = ()
) -> Checkpoint:
    """Open a ``*_text_embs_dict.pt`` file, without running anything that it contains.

    Such a file maps each class to ``{"flux": {"prompt_embeds", "pooled_prompt_embeds"},
    "sd": tensor}``. Each class becomes a sample of node ``text``, round 0, split ``reference``
    and index 0; ``extra`` names the file.

    Parameters
    ----------
    path : path-like
        The file.
    kind : {"flux", "sd"}, optional
        Which of the two to take; by default ``"flux"`` where any class has it.
    classes : iterable of str
        Known classes: a name of the file that is one of them but for its case becomes that one.

    Returns
    -------
    Checkpoint
        Its samples are read when they are asked for.

    Raises
    ------
    NotFoundError
        If there is no such file.
    DamagedDataError
        If it is damaged, see `read_checkpoint`.
    SchemaMismatchError
        If it is no such cache, or the safe reader refuses it.
    """
    return opened_text_cache(torch_files.inspect(Path(path)), kind=kind, classes=classes).checkpoint


def opened_text_cache(
    source: torch_files.Source, *, kind: Kind | None = None, classes: Iterable[str] = ()
) -> Opened:
    """Open a file that was looked at, as `read_text_cache` does, and keep what was loaded."""
    path = source.path
    loaded = torch_files.load(source)
    content = loaded.content
    if not is_text_cache(content):
        raise SchemaMismatchError(
            f"{path}: not a cache of reference text embeddings: expected a dict of classes with "
            f"'flux' or 'sd' each, got a {type(content).__name__}"
        )
    if kind is None:
        inner = [value for value in map(mapping, content.values()) if value is not None]
        kind = "flux" if any(value.get("flux") is not None for value in inner) else "sd"
    unpack = partial(_entries, kind=kind, classes=tuple(classes))
    found, notes = survey(unpack(content, path), TEXT_NODE, kind)
    checkpoint = Checkpoint(
        path=path,
        node=TEXT_NODE,
        round=TEXT_ROUND,
        timestamp=None,
        metadata={},
        kind=kind,
        columns=(),
        audio=False,
        notes=(*notes, *unread(loaded.unknown)),
        nbytes=source.stamp[1],
        _source=source,
        _found=tuple(found),
        _unpack=unpack,
    )
    return Opened(checkpoint, loaded)


def _entries(
    content: Mapping[Any, Any], path: Path, *, kind: Kind, classes: Sequence[str]
) -> list[Any]:
    """Rewrite the classes as a checkpoint's entries."""
    return [
        _entry(_class_name(name, classes), value, kind, path.name)
        if mapping(value) is not None
        else value
        for name, value in content.items()
    ]


def _entry(class_name: Any, value: Mapping[Any, Any], kind: Kind, cache: str) -> dict[str, Any]:
    given = value.get(kind)
    entry = {"split": TEXT_SPLIT, "class_name": class_name, "index": 0, "cache": cache}
    if kind == "sd":
        return {**entry, "clip": given}
    inner = given if isinstance(given, Mapping) else {}
    return {**entry, "t5": inner.get("prompt_embeds"), "clip": inner.get("pooled_prompt_embeds")}


def _class_name(name: Any, classes: Sequence[str]) -> Any:
    if not isinstance(name, str) or name in classes:
        return name
    folded = name.casefold()
    return next((known for known in classes if known.casefold() == folded), name)
