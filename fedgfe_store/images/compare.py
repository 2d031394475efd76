"""Whether an image is what it should be: of this record, this store, and these settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import xxhash

from fedgfe_store.derived_keys import Key
from fedgfe_store.images.identity import Identity, digests_of, rows_of
from fedgfe_store.images.png import FileState
from fedgfe_store.names import key_json

Status = Literal["done", "missing", "stale"]

UNNAMED_NOISE: Literal["index"] = "index"
"""The rule of noise of images that name none: all that were made before there was another."""


def noise_rule(settings: Mapping[str, Any]) -> str:
    """Give the rule of noise that an image's settings name."""
    return str(settings.get("noise", UNNAMED_NOISE))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the settings that differ, as ``steps 20 -> 28, seed 0 -> 1``."""
    old, new = ({**each, "noise": noise_rule(each)} for each in (old, new))
    changed = [f for f in (*new, *(old.keys() - new.keys())) if old.get(f) != new.get(f)]
    return ", ".join(f"{f} {old.get(f)} -> {new.get(f)}" for f in changed)


@dataclass(frozen=True, slots=True)
class Expected:
    """What an image should be.

    Parameters
    ----------
    key : RecordKey, MeanKey or WalkKey
        The record that it is to show.
    number : int
        Which image of the record.
    digests : mapping
        Digests of the record's tensors that it depends on, as images keep them.
    """

    key: Key
    number: int
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look at an image's file says.

    Parameters
    ----------
    status : {"done", "missing", "stale"}
        ``"stale"`` is a sound image of another embedding, of other settings, or not ours.
    reason : str
        Why it is not done.
    conflict : str
        What only the user can decide; empty where the image may be made again.
    keepable : bool
        Whether a stale image may stay as it is.
    of_another : bool
        Whether it is an image of another store.
    """

    status: Status = "missing"
    reason: str = ""
    conflict: str = ""
    keepable: bool = False
    of_another: bool = False


@dataclass(frozen=True)
class Comparer:
    """Compares what images say about themselves with what they should be.

    Parameters
    ----------
    settings : mapping
        What they should be made with.
    fingerprint : str
        The settings' fingerprint.
    identity : Identity
        The store that they should be of.
    """

    settings: Mapping[str, Any]
    fingerprint: str
    identity: Identity

    @cached_property
    def _made_for(self) -> str:
        return json.dumps([self.fingerprint, self.identity.to_json()])

    def mark(self, digests: Mapping[str, str]) -> str:
        """Say in 16 hex digits what an image has to be, but for its record, which its name says.

        `compare` says of the same file the same, as long as this is the same.
        """
        text = "|".join((self._made_for, *digests, *digests.values()))
        return _marked(text)

    def marks(self, digests: Mapping[str, Sequence[str | None]], records: int) -> Iterator[str]:
        """Yield the `mark` of each of many records, of whose digests some may be None."""
        begin = "|".join((self._made_for, *digests))
        for row in rows_of(digests, records):
            if None in row:
                yield self.mark(digests_of(digests, row))
            else:
                text = "|".join((begin, *cast("tuple[str, ...]", row)))
                yield _marked(text)

    def compare(
        self, expected: Expected, state: FileState, provenance: Mapping[str, Any] | None
    ) -> Verdict:
        """Tell what an image is.

        Parameters
        ----------
        expected : Expected
            What it should be.
        state, provenance
            What `inspect_image` says of its file.
        """
        if state == "damaged":
            return Verdict(reason="damaged file")
        if provenance is None:
            return _conflict("not made by fedgfe-store")
        theirs = Identity.of_image(provenance)
        same_settings = provenance.get("fingerprint") == self.fingerprint
        same_tensors = provenance.get("digests") == expected.digests
        another = self.identity.is_another(theirs)
        # A store without a name that was made again from the same files has another id only.
        again = same_settings and same_tensors and self.identity.is_unnamed_beside(theirs)
        if another and not again:
            return _conflict(f"images of {theirs}, not of {self.identity}", of_another=True)
        if not is_of(provenance, expected.key, expected.number):
            return _conflict("image of another record")
        conflict = "" if same_settings else difference(provenance["settings"], self.settings)
        # Columns from elsewhere are another embedding because that was asked for.
        same_source = provenance["settings"].get("column") == self.settings.get("column")
        if not same_tensors and same_source:
            return Verdict("stale", "embedding changed", conflict)
        return _conflict(conflict) if conflict else Verdict("done")


def _marked(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))


def is_of(provenance: Mapping[str, Any], key: Key, number: int) -> bool:
    """Whether an image says that it is that one of that record."""
    return (provenance.get("key"), provenance.get("image")) == (key_json(key), number)


def _conflict(reason: str, *, of_another: bool = False) -> Verdict:
    return Verdict("stale", reason, reason, keepable=True, of_another=of_another)
