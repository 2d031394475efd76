"""A column that images take from other records: of the same class and index, somewhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import FedgfeStoreError, NotFoundError, SchemaMismatchError
from fedgfe_store.records import TEXT_NODE, TEXT_ROUND, TEXT_SPLIT, RecordKey

if TYPE_CHECKING:
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.rows import Rows

_KEYS = ("node", "round", "split", "index")
_NUMBERS = ("round", "index")


@dataclass(frozen=True)
class Elsewhere:
    """Where a column is from, if not from the image's own record: ``t5=round:20``.

    What is None is as in the image's own record. References, which are the records of node
    ``text``, have a round and a split of their own, and one for each prompt as their index: those
    of a class are told apart by an index that is named.

    Parameters
    ----------
    column : str
        Tensor column.
    node, round, split, index
        Key of the record that it is from.
    """

    column: str
    node: str | None = None
    round: int | None = None
    split: str | None = None
    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``COLUMN=KEY:VALUE[,KEY:VALUE]``, such as ``clip=node:text,index:1``.

        Raises
        ------
        SchemaMismatchError
            If it is something else.
        """
        column, _, rest = text.partition("=")
        parts = [part.strip().partition(":") for part in rest.split(",")]
        known: dict[str, Any] = {key: value for key, _, value in parts if value}
        for key in _NUMBERS:
            if key in known and known[key].isdecimal():
                known[key] = int(known[key])
        numbers = all(isinstance(known.get(key, 0), int) for key in _NUMBERS)
        if not column or len(known) < len(parts) or not set(known) <= set(_KEYS) or not numbers:
            raise SchemaMismatchError(
                f"column: expected COLUMN=KEY:VALUE with the keys {', '.join(_KEYS)}, such as "
                f"t5=round:20 or clip=node:text, got {text!r}"
            )
        return cls(column.strip(), **known)

    def __str__(self) -> str:
        known = ((key, getattr(self, key)) for key in _KEYS)
        where = ",".join(f"{key}:{value}" for key, value in known if value is not None)
        return f"{self.column}={where}"

    @property
    def filters(self) -> dict[str, Any]:
        """What the records meet that it can be from, as `Selection.others` takes it."""
        known = {key: getattr(self, key) for key in _KEYS}
        said = {key: value for key, value in known.items() if value is not None}
        of_text = {"round": TEXT_ROUND, "split": TEXT_SPLIT} if self.node == TEXT_NODE else {}
        return of_text | said

    def key_of(self, own: RecordKey) -> RecordKey:
        """Give the key of the record that takes part in an image of `own`."""
        return replace(own, **self.filters)

    @property
    def by_class(self) -> bool:
        """Whether only the class of a record counts, not its index."""
        return self.node == TEXT_NODE and self.index is None


def elsewhere_of(settings: Mapping[str, Any]) -> tuple[Elsewhere, ...]:
    """Give what an image's settings say of columns from elsewhere; none where that is no such."""
    texts = settings.get("column")
    try:
        return tuple(map(Elsewhere.parse, texts)) if isinstance(texts, list) else ()
    except (FedgfeStoreError, AttributeError):
        return ()


class Partners:
    """The records of a store that a column is from, found by those that images are of.

    Parameters
    ----------
    elsewhere : Elsewhere
        Which ones.
    selection : Selection
        Records of the same store and commit.
    """

    def __init__(self, elsewhere: Elsewhere, selection: Rows | Derived) -> None:
        self._elsewhere = elsewhere
        self.selection = selection.others(**elsewhere.filters)
        self.keys = self.selection.keys()
        self._places: dict[RecordKey, list[int]] = {}
        for place, key in enumerate(self.keys):
            self._places.setdefault(self._address(key), []).append(place)

    def _address(self, key: RecordKey) -> RecordKey:
        return replace(key, index=0) if self._elsewhere.by_class else key

    def _found(self, own: Key) -> list[int]:
        if not isinstance(own, RecordKey):  # no other record is of its class and index
            return []
        return self._places.get(self._address(self._elsewhere.key_of(own)), [])

    def place(self, own: Key) -> int | None:
        """Give the position in `selection` of the one record for `own`; None if there is none."""
        found = self._found(own)
        return found[0] if len(found) == 1 else None

    def digest(self, own: Key) -> str | None:
        """Give the digest of what an image of `own` takes, 16 hex digits; None without a record."""
        place = self.place(own)
        return None if place is None else self._digests[place]

    @cached_property
    def _digests(self) -> list[str]:
        return list(self.selection.records[f"{self._elsewhere.column}_digest"])

    def check(self, keys: Sequence[RecordKey]) -> None:
        """Refuse records that have none, or several.

        Raises
        ------
        NotFoundError
            Which is the first without, and how many are.
        SchemaMismatchError
            If it is not told which of several: what there is.
        """
        lacking = [key for key in keys if not self._found(key)]
        if lacking:
            more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise NotFoundError(
                f"column {self._elsewhere}: expected a record {self._wanted(lacking[0])} in "
                f"{self.selection.location}, got none (for {lacking[0]}{more})"
            )
        for key in keys:
            found = self._found(key)
            if len(found) > 1:
                numbers = ", ".join(str(self.keys[i].index) for i in found)
                raise SchemaMismatchError(
                    f"column {self._elsewhere}: expected one record {self._wanted(key)}, got those "
                    f"of the indices {numbers}: {self._elsewhere},index:N names one"
                )

    def _wanted(self, own: RecordKey) -> str:
        wanted = str(self._elsewhere.key_of(own))
        return wanted.rpartition(", index ")[0] if self._elsewhere.by_class else wanted


def partners_of(selection: Rows | Derived, elsewhere: Iterable[Elsewhere]) -> dict[str, Partners]:
    """Give what the store's columns from elsewhere are from, by column; nothing is checked."""
    known = selection.schema.columns
    return {each.column: Partners(each, selection) for each in elsewhere if each.column in known}
