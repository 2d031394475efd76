"""Numbers of shards: each is given to one writer, by a file that only one can make."""

from __future__ import annotations

import random

from fedgfe_store.storage.place import Place

CLAIMS = "granules.claimed"
"""Folder of the claims within a store."""
BLOCK = 16
"""Numbers that one claim gives: a round of a node, 400 records in files of 32, takes one."""


class Granules:
    """The numbers that one writer may use.

    Parameters
    ----------
    place : Place
        The store.
    token : str
        Of the writer, for who looks at a claim.
    """

    def __init__(self, place: Place, token: str) -> None:
        self._place, self._token = place, token
        self._free: list[int] = []

    def take(self, n: int, beyond: int) -> list[int]:
        """Return `n` numbers in ascending order that nobody else ever uses.

        Parameters
        ----------
        n : int
            How many.
        beyond : int
            A number above all that commits are known to use.
        """
        while len(self._free) < n:
            block = self._claim(max([beyond, *(number + 1 for number in self._free)]))
            self._free += range(block * BLOCK, (block + 1) * BLOCK)
        taken, self._free = self._free[:n], self._free[n:]
        return taken

    def _claim(self, beyond: int) -> int:
        block, tries = -(-beyond // BLOCK), 0
        # Never overwritten, and never removed: a number is used once, whatever becomes of who has
        # it. One whose answer was lost is left aside.
        while not self._place.put_new(f"{CLAIMS}/{block}", self._token.encode()):
            # Ever farther at random, so that many who begin at once do not meet at each number.
            block += 1 + random.randrange(2 ** min(tries, 6))
            tries += 1
        return block
