"""Which store and which of its embeddings an image was made from: none passes for another's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedgfe_store.images.manifest import read_manifest

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
    names = [name for name in columns if name in selection.schema.columns]
    digests = [[f"{d:016x}" for d in selection.digests(name).tolist()] for name in names]
    rows = range(len(selection))
    found = [{name: d[row] for name, d in zip(names, digests, strict=True)} for row in rows]
    for name, others in (partners or {}).items():
        for key, known in zip(selection.keys(), found, strict=True):
            digest = others.digest(key)
            if name in known and digest is None:
                del known[name]
            elif name in known and digest is not None:
                known[name] = digest
    return found
