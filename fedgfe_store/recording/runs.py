"""One run of a training, as far as records are concerned: what it has recorded already."""

from __future__ import annotations

import secrets
from collections.abc import Iterable


class Run:
    """Tells what this run has recorded from what earlier ones left in the store.

    It is a few plain values: a host of the mixins that is copied or pickled takes it along.

    Attributes
    ----------
    id : str
        Random, made with the run.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self._recorded: set[tuple[str, int, str]] = set()

    @property
    def source(self) -> str:
        """What the store's commits are marked by."""
        return f"recorder {self.id}"

    def is_new(self, node: str, round: int, split: str) -> bool:
        """Whether nothing of this node, round and split was committed by this run."""
        return (node, round, split) not in self._recorded

    def keep(self, node: str, round: int, splits: Iterable[str]) -> None:
        """Note that records of these splits are committed."""
        self._recorded.update((node, round, split) for split in splits)
