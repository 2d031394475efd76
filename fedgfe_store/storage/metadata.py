"""A store's ``zarr.json``: schema, commit point and consolidated metadata in one file."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import xxhash

from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.schema import FORMAT_VERSION, Schema
from fedgfe_store.storage.bounds import GROUP_BYTES, check_group_values, parsed_group
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.files import read_regular
from fedgfe_store.storage.layout import (
    DIGEST_DIGITS,
    KEY_CHUNK,
    KeyColumn,
    array_metadata,
    key_columns,
)

GROUP_FILE = "zarr.json"
ATTRIBUTE = "fedgfe_store"
FEATURES = frozenset({"kinds", "dtypes", "ragged"})
"""What a store may ask of its readers beyond what the first release of format version 2 knew."""


@dataclass(frozen=True)
class CommitPoint:
    """What the latest commit left: its number, rows on disk, live records, last compaction."""

    commit: int = 0
    records: int = 0
    live: int = 0
    compacted: int = 0


@dataclass(frozen=True)
class Group:
    """A parsed and checked ``zarr.json``.

    `raw` holds the bytes as read, empty for a group that was never written; `document` holds
    other people's attributes and arrays, which publishing keeps. From version 2 on `id` tells one
    store from another, and `digests` holds one digest for each chunk of each key column.
    """

    schema: Schema
    point: CommitPoint
    arrays: Mapping[str, Mapping[str, Any]]
    document: Mapping[str, Any]
    raw: bytes = b""
    version: int = FORMAT_VERSION
    id: str | None = None
    features: tuple[str, ...] = ()
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def new(cls, schema: Schema) -> Self:
        """Return the group of a store without records."""
        digests = dict.fromkeys(key_columns(schema), ())
        arrays = array_metadata(schema)
        return cls(
            schema,
            CommitPoint(),
            arrays,
            {},
            id=uuid.uuid4().hex,
            features=schema.features,
            digests=digests,
        )

    @classmethod
    def read(cls, path: Path, known: Self | None = None) -> Self:
        """Read and check the group at the folder `path`; `known` is one that was read before.

        Raises
        ------
        NotFoundError
            If there is no Zarr group of ours at `path`.
        SchemaMismatchError
            If it is of a newer format version.
        DamagedDataError
            If it does not parse or its checksum does not fit.
        """
        try:
            raw = read_regular(path / GROUP_FILE, GROUP_BYTES)
        except UnreadableError as error:
            raise DamagedDataError(f"{path / GROUP_FILE} is damaged: {error}") from error
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"no embedding store at {path}: expected a folder with a {GROUP_FILE} "
                f"(fedgfe-store init or import makes one)"
            ) from None
        # What reads the same was checked before; parsing takes longer with every key chunk.
        return known if known is not None and raw == known.raw else cls._parse(path, raw)

    @classmethod
    def _parse(cls, path: Path, raw: bytes) -> Self:
        where = path / GROUP_FILE
        try:
            document = parsed_group(raw)
            attributes = document["attributes"]
            others = document["node_type"] == "group" and ATTRIBUTE not in attributes
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedDataError(f"{where} is damaged: it does not parse ({error})") from error
        if others:
            raise NotFoundError(f"{path} is a Zarr group, but not an embedding store of ours")
        try:
            ours = attributes[ATTRIBUTE]
            version = _known_version(path, ours)
        except (KeyError, TypeError) as error:
            raise _damaged(where, error) from error
        try:
            schema = Schema.from_json(ours)
            names = array_metadata(schema, version)
            consolidated = document["consolidated_metadata"]["metadata"]
            arrays = {name: consolidated[name] for name in names}
            check_group_values(schema, ours["commit_point"], arrays, names)
            point = CommitPoint(**ours["commit_point"])
            sound = ours["checksum"] == _checksum(ours, arrays)
            group = cls(schema, point, arrays, document, raw, version)
            if version > 1:
                group = replace(
                    group,
                    id=str(ours["id"]),
                    features=tuple(ours["features"]),
                    digests=_digests(group, ours["key_digests"]),
                )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _damaged(where, error) from error
        if not sound:
            raise DamagedDataError(f"{where} is damaged: its checksum does not fit")
        return group

    @cached_property
    def key_columns(self) -> dict[str, KeyColumn]:
        """The key columns that the store has on the disk."""
        return {n: c for n, c in self.known_columns.items() if c.since <= self.version}

    @cached_property
    def known_columns(self) -> dict[str, KeyColumn]:
        """The key columns of the newest format version; older stores lack some."""
        return key_columns(self.schema)

    def rows(self, name: str) -> int:
        """Return the committed length of the array `name`."""
        column = self.known_columns.get(name)
        is_of_commits = column is not None and column.dim == "commit"
        return self.point.commit if is_of_commits else self.point.records

    def shaped(self) -> dict[str, dict[str, Any]]:
        """Return the metadata of our arrays with their committed shapes."""
        return {
            name: {**metadata, "shape": [self.rows(name), *metadata["shape"][1:]]}
            for name, metadata in self.arrays.items()
        }

    def at(self, point: CommitPoint, schema: Schema) -> Group:
        """Return this group with another commit point, and `schema` where its classes grew."""
        return replace(self, point=point, schema=schema)

    def upgraded(self) -> Group:
        """Return this group in the format version that new stores have, still without digests."""
        arrays = array_metadata(self.schema)
        return replace(self, arrays=arrays, version=FORMAT_VERSION, id=uuid.uuid4().hex)

    def encode(self) -> bytes:
        """Return the ``zarr.json`` that publishes this group."""
        ours: dict[str, Any] = {"version": self.version, **self.schema.to_json()}
        ours["commit_point"] = asdict(self.point)
        if self.version > 1:
            ours["features"] = list(self.features)
            ours["id"] = self.id
            ours["key_digests"] = {name: "".join(each) for name, each in self.digests.items()}
        ours["checksum"] = _checksum(ours, self.arrays)
        kept = self.document.get("consolidated_metadata") or {}
        document = {
            "zarr_format": 3,
            "node_type": "group",
            **self.document,
            "attributes": {**self.document.get("attributes", {}), ATTRIBUTE: ours},
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                "metadata": {**kept.get("metadata", {}), **self.shaped()},
            },
        }
        # Without line breaks: with them json encodes in Python, which took a third of an append.
        return json.dumps(document, ensure_ascii=False).encode()

    @property
    def key_names(self) -> list[str]:
        """Names of the key columns with one row per record, those of newer formats included."""
        return [c.name for c in self.known_columns.values() if c.dim == "record"]


def is_store(path: Path) -> bool:
    """Tell whether the folder `path` is a Zarr group of ours, sound or not."""
    try:
        attributes = parsed_group(read_regular(path / GROUP_FILE, GROUP_BYTES))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(attributes, dict) and ATTRIBUTE in attributes


def _known_version(path: Path, ours: Mapping[str, Any]) -> int:
    """Return the format version of the store at `path`, if this release reads it."""
    version = ours["version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise SchemaMismatchError(
            f"{path} has format version {version!r}, and this release reads versions 1 to "
            f"{FORMAT_VERSION}: install a newer fedgfe-store"
        )
    unknown = sorted(set(ours["features"]) - FEATURES) if version > 1 else []
    if unknown:
        raise SchemaMismatchError(
            f"{path} needs what this release does not know ({', '.join(map(str, unknown))}): "
            f"install a newer fedgfe-store"
        )
    return version


def _digests(group: Group, found: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the digests of the chunks of every key column of `group` from its attributes."""
    digests = {}
    for name in group.key_columns:
        text, chunks = found[name], -(-group.rows(name) // KEY_CHUNK)
        if len(text) != chunks * DIGEST_DIGITS:
            raise ValueError(f"key_digests: expected {chunks} of {name}")
        starts = range(0, len(text), DIGEST_DIGITS)
        digests[name] = tuple(text[start : start + DIGEST_DIGITS] for start in starts)
    return digests


def _damaged(where: Path, error: Exception) -> DamagedDataError:
    return DamagedDataError(
        f"{where} is damaged: {type(error).__name__} {error} (did another tool rewrite it?)"
    )


def _checksum(ours: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Any]]) -> str:
    covered = {
        "attributes": {key: value for key, value in ours.items() if key != "checksum"},
        "arrays": {
            name: {**metadata, "shape": metadata["shape"][1:]} for name, metadata in arrays.items()
        },
    }
    text = json.dumps(covered, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"
