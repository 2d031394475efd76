"""A store's ``zarr.json``: schema, commit point and consolidated metadata in one file.

A checksum tells accidents, not intent: what a received store claims is checked before it is
believed, and before memory is asked for.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import xxhash

from fedgfe_store.common.words import shown
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.schema import FORMAT_VERSION, Schema
from fedgfe_store.storage.arrays import canonical, canonical_arrays, checked_arrays
from fedgfe_store.storage.checksums import UnreadableError
from fedgfe_store.storage.layout import (
    DIGEST_DIGITS,
    KEY_CHUNK,
    KeyColumn,
    array_metadata,
    key_columns,
)
from fedgfe_store.storage.place import Place
from fedgfe_store.storage.places import LocalFolder
from fedgfe_store.storage.zones import Zones

GROUP_FILE = "zarr.json"
ATTRIBUTE = "fedgfe_store"
NEGATIVES = "negatives"
"""Feature of a store that has, or had, records which are of no class."""
SHARED = "shared"
"""Feature of a store whose keys and commits are in a Delta table: see `storage.shared`."""
FEATURES = frozenset({"kinds", "dtypes", "ragged", "compression", NEGATIVES, SHARED})
"""What a store may ask of its readers beyond what the first release of format version 2 knew."""

GROUP_BYTES = 2**28
"""Longest ``zarr.json``: other people's arrays and attributes are in it, too."""
_LAST_COMMIT = 2**31 - 2
"""Commit numbers are int32, and one more is compared with."""
# The digests of one column would take 8 TiB of memory: no writer of ours has come that far.
_MOST_ROWS = 2**40
_COUNTERS = ("commit", "records", "live", "compacted")


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
    store from another, `digests` holds the digests of all chunks of each key column, one
    behind the other, and `zones` what is in each chunk.
    """

    schema: Schema
    point: CommitPoint
    arrays: Mapping[str, Mapping[str, Any]]
    document: Mapping[str, Any]
    raw: bytes = b""
    version: int = FORMAT_VERSION
    id: str | None = None
    features: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    zones: Zones = field(default_factory=Zones)

    @classmethod
    def new(cls, schema: Schema) -> Self:
        """Return the group of a store without records."""
        digests = dict.fromkeys(key_columns(schema), "")
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

    @staticmethod
    def read(place: Place | Path, known: Group | None = None) -> Group:
        """Read and check the group at `place`; `known` is one that was read before.

        Raises
        ------
        NotFoundError
            If there is no Zarr group of ours.
        SchemaMismatchError
            If it is of a newer format version.
        DamagedDataError
            If it does not parse or its checksum does not fit.
        """
        place = LocalFolder(place) if isinstance(place, Path) else place
        try:
            raw = place.read(GROUP_FILE, GROUP_BYTES)
        except FileNotFoundError:
            raise _no_store(place) from None
        except UnreadableError as error:
            if isinstance(error.__cause__, NotADirectoryError):
                raise _no_store(place) from None
            raise DamagedDataError(f"{place}/{GROUP_FILE} is damaged: {error}") from error
        # What reads the same was checked before; parsing takes longer with every key chunk.
        if known is not None and raw == known.raw:
            return known
        return _parsed(str(place), raw)

    @cached_property
    def key_columns(self) -> Mapping[str, KeyColumn]:
        """The key columns that the store has on the disk."""
        return key_columns(self.schema, self.version)

    @cached_property
    def known_columns(self) -> Mapping[str, KeyColumn]:
        """The key columns of the newest format version; older stores lack some."""
        return key_columns(self.schema)

    def rows(self, name: str) -> int:
        """Return the committed length of the array `name`."""
        column = self.known_columns.get(name)
        is_of_commits = column is not None and column.dim == "commit"
        return self.point.commit if is_of_commits else self.point.records

    def digest(self, name: str, chunk: int) -> str:
        """Return the digest of one chunk of a key column; none, ``""``, in version 1."""
        start = chunk * DIGEST_DIGITS
        return self.digests.get(name, "")[start : start + DIGEST_DIGITS]

    def shaped(self) -> dict[str, dict[str, Any]]:
        """Return the metadata of our arrays with their committed shapes."""
        return {
            name: {**metadata, "shape": [self.rows(name), *metadata["shape"][1:]]}
            for name, metadata in self.arrays.items()
        }

    def shape_files(self, path: Path) -> dict[Path, bytes]:
        """Return the arrays' own metadata, which other Zarr readers use, in the store at `path`."""
        return {
            path / name / GROUP_FILE: json.dumps(m).encode() for name, m in self.shaped().items()
        }

    @property
    def may_have_negatives(self) -> bool:
        """Whether any record may be of no class; stores of version 1 do not say."""
        return self.version == 1 or NEGATIVES in self.features

    def with_negatives(self) -> Group:
        """Return this group as that of a store with records of no class."""
        return replace(self, features=tuple(dict.fromkeys((*self.features, NEGATIVES))))

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
            ours["key_digests"] = dict(self.digests)
            ours["zones"] = self.zones.to_json()
        ours["checksum"] = _checksum(ours, canonical_arrays(self.schema, self.version, self.arrays))
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


def _parsed(place: str, raw: bytes) -> Group:
    """Return the group in the ``zarr.json`` of a store; raises as `Group.read` does."""
    where = f"{place}/{GROUP_FILE}"
    try:
        document = parsed_group(raw)
        attributes = document["attributes"]
        others = document["node_type"] == "group" and ATTRIBUTE not in attributes
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedDataError(f"{where} is damaged: it does not parse ({error})") from error
    if others:
        raise NotFoundError(f"{place} is a Zarr group, but not an embedding store of ours")
    try:
        ours = attributes[ATTRIBUTE]
        version = _known_version(place, ours)
    except (KeyError, TypeError) as error:
        raise _damaged(where, error) from error
    try:
        schema = Schema.from_json(ours)
        check_point(schema, ours["commit_point"])
        point = CommitPoint(**ours["commit_point"])
        consolidated = document["consolidated_metadata"]["metadata"]
        arrays = checked_arrays(schema, version, consolidated)
        sound = ours["checksum"] == _checksum(ours, arrays.text)
        group = Group(schema, point, arrays.metadata, document, raw, version)
        group = replace(group, **_known_of(group, ours))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(where, error) from error
    if not sound:
        raise DamagedDataError(f"{where} is damaged: its checksum does not fit")
    return group


def _no_store(place: Place) -> NotFoundError:
    return NotFoundError(
        f"no embedding store at {place}: expected a folder with a {GROUP_FILE} "
        f"(fedgfe-store init or import makes one)"
    )


def is_store(place: Place) -> bool:
    """Tell whether there is a Zarr group of ours at `place`, sound or not."""
    try:
        attributes = parsed_group(place.read(GROUP_FILE, GROUP_BYTES))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(attributes, dict) and ATTRIBUTE in attributes


def parsed_group(raw: bytes) -> dict[str, Any]:
    """Return what stands in a ``zarr.json``.

    Raises
    ------
    ValueError
        If it is not JSON, is nested too deep, or is no object.
    """
    try:
        document = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected an object, got {shown(document)}")
    return document


def check_point(schema: Schema, point: Mapping[str, Any]) -> None:
    """Refuse a commit point that no writer can have left, as it stands in ``zarr.json``.

    Raises
    ------
    ValueError
        If a type or a range is wrong.
    """
    for name in _COUNTERS:
        if type(point[name]) is not int:
            raise ValueError(f"{name}: expected a whole number, got {shown(point[name])}")
    commit, records, live, compacted = (point[name] for name in _COUNTERS)
    bounds = {
        "commit": (0, commit, _LAST_COMMIT),
        "records": (0, records, _MOST_ROWS if commit else 0),
        "live": (0, live, records),
        "compacted": (0, compacted, commit),
    }
    for name, (low, value, high) in bounds.items():
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {shown(value)}")
    if records % schema.granule:
        raise ValueError(f"records: expected whole files of {schema.granule}, got {records}")


def _known_version(place: str, ours: Mapping[str, Any]) -> int:
    """Return the format version of the store at `place`, if this release reads it."""
    version = ours["version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise SchemaMismatchError(
            f"{place} has format version {version!r}, and this release reads versions 1 to "
            f"{FORMAT_VERSION}: install a newer fedgfe-store"
        )
    unknown = sorted(set(ours["features"]) - FEATURES) if version > 1 else []
    if unknown:
        raise SchemaMismatchError(
            f"{place} needs what this release does not know ({', '.join(map(str, unknown))}): "
            f"install a newer fedgfe-store"
        )
    return version


def _known_of(group: Group, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a store says of itself, as its version does, besides schema and commit point."""
    chunks = -(-group.point.records // KEY_CHUNK)
    if group.version == 1:
        return {"zones": Zones.unknown(chunks)}
    return {
        "id": str(ours["id"]),
        "features": tuple(ours["features"]),
        "digests": _digests(group, ours["key_digests"]),
        "zones": Zones.from_json(ours["zones"], chunks)
        if "zones" in ours
        else Zones.unknown(chunks),
    }


def _digests(group: Group, found: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the chunks of every key column of `group` from its attributes."""
    digests = {}
    for name in group.key_columns:
        text, chunks = found[name], -(-group.rows(name) // KEY_CHUNK)
        if not isinstance(text, str) or len(text) != chunks * DIGEST_DIGITS:
            raise ValueError(f"key_digests: expected {chunks} of {name}")
        digests[name] = text
    return digests


def _damaged(where: str, error: Exception) -> DamagedDataError:
    return DamagedDataError(
        f"{where} is damaged: {type(error).__name__} {error} (did another tool rewrite it?)"
    )


def _checksum(ours: Mapping[str, Any], arrays: str) -> str:
    attributes = canonical({key: value for key, value in ours.items() if key != "checksum"})
    text = f'{{"arrays":{arrays},"attributes":{attributes}}}'
    return f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"
