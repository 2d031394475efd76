"""Which store and which of its embeddings an image was made from: none passes for another's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.storage.checksums import hex_digests

if TYPE_CHECKING:
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.images.elsewhere import Partners
    from fedgfe_store.rows import Rows

# The latest lines of each manifest name the stores that a folder is shared by.
_TAIL_BYTES = 256 * 1024


@dataclass(frozen=True)
class Identity:
    """What tells a store from others, wherever it lies.

    Parameters
    ----------
    experiment : str or None
        Name of its experiment.
    store_id : str or None
        What it was given when it was made.
    """

    experiment: str | None = None
    store_id: str | None = None

    @classmethod
    def of_store(cls, selection: Rows | Derived) -> Self:
        """Give the identity of the store that records are from."""
        return cls(selection.schema.metadata.experiment or None, selection.store_id)

    @classmethod
    def of_image(cls, facts: Mapping[str, Any]) -> Self:
        """Give the identity that an image or its manifest line names; older ones name none."""
        experiment, store_id = facts.get("experiment"), facts.get("store_id")
        return cls(
            experiment if isinstance(experiment, str) and experiment else None,
            store_id if isinstance(store_id, str) and store_id else None,
        )

    def is_another(self, other: Identity) -> bool:
        """Whether two stores are known to be of different experiments."""
        if self.experiment and other.experiment:
            return self.experiment != other.experiment
        return bool(self.store_id and other.store_id) and self.store_id != other.store_id

    def is_unnamed_beside(self, other: Identity) -> bool:
        """Whether one of the two has no experiment's name, so that only their ids can differ."""
        return not (self.experiment and other.experiment)

    def to_json(self) -> dict[str, str | None]:
        """Return it as images and manifests have it."""
        return {"experiment": self.experiment, "store_id": self.store_id}

    def __str__(self) -> str:
        if self.experiment:
            return f"experiment {self.experiment}"
        return f"store {self.store_id[:12]}" if self.store_id else "a store without a name"


def others_in(folder: Path, own: Identity) -> list[Identity]:
    """Give the other stores whose images the latest lines of a folder's manifests list."""
    lines = read_manifest(folder, tail_bytes=_TAIL_BYTES)
    found = dict.fromkeys(Identity.of_image(line) for line in lines)
    return [identity for identity in found if own.is_another(identity)]


def record_digests(
    selection: Rows | Derived,
    columns: Collection[str],
    partners: Mapping[str, Partners] | None = None,
) -> list[dict[str, str]]:
    """Give the digests of each record's tensors, 16 hex digits, as images keep them.

    Parameters
    ----------
    selection : Selection or Derived
        The records; their tensors are not read.
    columns : collection of str
        Tensor columns; those that the store does not have are left out.
    partners : mapping, optional
        Other records that some of the columns are from, by column. Where a record has none, the
        column is left out.
    """
    found = digest_columns(selection, columns, partners)
    return [digests_of(found, row) for row in rows_of(found, len(selection))]


def digest_columns(
    selection: Rows | Derived,
    columns: Collection[str],
    partners: Mapping[str, Partners] | None = None,
) -> dict[str, list[str | None]]:
    """Give what `record_digests` gives by column; None where a record has no partner."""
    names = [name for name in columns if name in selection.schema.columns]
    found: dict[str, list[str | None]] = {n: [*hex_digests(selection.digests(n))] for n in names}
    for name, others in (partners or {}).items():
        if name in found:
            found[name] = [others.digest(key) for key in selection.keys()]
    return found


def rows_of(
    digests: Mapping[str, Sequence[str | None]], records: int
) -> Iterator[tuple[str | None, ...]]:
    """Yield the digests of each of many records, in the order of the columns."""
    return zip(*digests.values(), strict=True) if digests else repeat((), records)


def digests_of(names: Iterable[str], row: Iterable[str | None]) -> dict[str, str]:
    """Give the digests of one record by column, without those that it does not have."""
    return {n: digest for n, digest in zip(names, row, strict=True) if digest is not None}
