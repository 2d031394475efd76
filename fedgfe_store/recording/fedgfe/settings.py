"""The ``feda2v`` section of a FedGFE configuration: what of it is about embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, Self

from fedgfe_store.common.words import whole_number
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.names import STORE_NAME

DEFAULT_DIR = "checkpoints/embeddings"
"""Folder of checkpoints where a configuration names none."""

_FLAGS = ("save_embeddings_instead_of_images", "generate_embeddings_only")
_DIR, _EVERY = "embeddings_checkpoint_dir", "embeddings_save_frequency"
_NODES, _SERVER = "generate_nodes_images_frequency", "generate_global_images_frequency"
_OTHER = "embeddings_other_experiment"
_KNOWN = (*_FLAGS, _DIR, _EVERY, _NODES, _SERVER, _OTHER)
_OURS = ("embedding", "save_embedding", "generate_embedding")
"""Beginnings of keys of which one that is alike is a slip."""


@dataclass(frozen=True)
class RecordingSettings:
    """Whether, where and how often embeddings are recorded at the end of a round.

    Parameters
    ----------
    enabled : bool
        ``save_embeddings_instead_of_images``, or ``generate_embeddings_only``, which means the
        same.
    checkpoint_dir : Path
        ``embeddings_checkpoint_dir``, by default ``checkpoints/embeddings``.
    nodes_every, server_every : int
        Rounds between two recordings of the nodes and of the server, 0 for never:
        ``embeddings_save_frequency`` for both. Where that is not given, the images' frequencies
        (``generate_nodes_images_frequency``, ``generate_global_images_frequency``) unless both
        are 0, and else 1.
    other_experiment : bool
        ``embeddings_other_experiment``: whether it is meant that the store that is there is of
        another experiment, see `Recorder`.
    """

    enabled: bool
    checkpoint_dir: Path
    nodes_every: int
    server_every: int
    other_experiment: bool = False

    @classmethod
    def read(cls, feda2v: Any) -> Self:
        """Read the section ``feda2v`` of a configuration.

        Parameters
        ----------
        feda2v : mapping or object
            The section as JSON gives it, or with its keys as attributes. None is an empty one,
            and a value of None is not there. Other keys are left alone.

        Raises
        ------
        SchemaMismatchError
            If a value is of the wrong type or negative, or a key about embeddings is misspelt.
        """
        values = _values(feda2v)
        _check_names(values)
        given = {key: values[key] for key in _KNOWN if values.get(key) is not None}
        flags = [_flag(key, given[key]) for key in _FLAGS if key in given]
        folder = _folder(given.get(_DIR, DEFAULT_DIR))
        numbers = {
            key: whole_number(f"feda2v.{key}", given[key])
            for key in (_EVERY, _NODES, _SERVER)
            if key in given
        }
        nodes, server = numbers.get(_NODES, 0), numbers.get(_SERVER, 0)
        if _EVERY in numbers or not (nodes or server):
            nodes = server = numbers.get(_EVERY, 1)
        other = _OTHER in given and _flag(_OTHER, given[_OTHER])
        return cls(any(flags), folder, nodes, server, other)

    @property
    def store_path(self) -> Path:
        """The store that is recorded to: ``embeddings.zarr`` in the folder of checkpoints."""
        return self.checkpoint_dir / STORE_NAME

    def describe(self, nodes: int) -> str:
        """Return in words what will be recorded of `nodes` nodes and the server."""
        count = f"{nodes} node" if nodes == 1 else f"{nodes} nodes"
        each = {count: self.nodes_every, "the server": self.server_every}
        rounds = {who: f"every {n} rounds" if n > 1 else "every round" for who, n in each.items()}
        who = [name for name, every in each.items() if every]
        if not self.enabled or not who:
            return "no embeddings are recorded"
        if len({rounds[name] for name in who}) == 1:
            what = f"{' and '.join(who)} {rounds[who[0]]}"
        else:
            what = " and ".join(f"{name} {rounds[name]}" for name in who)
        return f"embeddings of {what} to {self.store_path}"


def _values(section: Any) -> dict[str, Any]:
    if section is None:
        return {}
    if isinstance(section, Mapping):
        return dict(section)
    if callable(getattr(section, "keys", None)):  # FedGFE's own class is no Mapping
        return {key: section[key] for key in section.keys()}
    try:
        return dict(vars(section))
    except TypeError:
        raise SchemaMismatchError(
            f"feda2v: expected a mapping, or an object with its keys as attributes, got {section!r}"
        ) from None


def _check_names(values: Mapping[str, Any]) -> None:
    for key in values:
        if key in _KNOWN:
            continue
        # FedGFE's other keys are its own: a letter or two apart is a slip wherever it stands.
        alike = 0.7 if str(key).startswith(_OURS) else 0.94
        close = get_close_matches(str(key), _KNOWN, 1, alike)
        if close:
            raise SchemaMismatchError(f"feda2v.{key}: no such key; did you mean {close[0]}?")


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise SchemaMismatchError(f"feda2v.{key}: expected true or false, got {value!r}")


def _folder(value: Any) -> Path:
    if isinstance(value, PathLike) or (isinstance(value, str) and value):
        return Path(value)
    raise SchemaMismatchError(f"feda2v.{_DIR}: expected a folder, got {value!r}")
