"""Which blocks of a denoising network move between host and device, and which stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

# diffusers' group offloading moves what lies in a list of modules right below the network.
_IN_A_BLOCK = re.compile(r"(\w+\.\d+)\.")


@dataclass(frozen=True)
class Blocks:
    """The blocks of a denoising network.

    Parameters
    ----------
    tensors : mapping
        Bytes of each block's tensors, by the block's name, such as ``"transformer_blocks.0"``.
    rest : int
        Bytes of what is in no block.
    largest_tensor : int
        Bytes of the largest of all tensors.
    """

    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rest: int = 0
    largest_tensor: int = 0

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Self:
        """Tell blocks by the names of a network's tensors, whose bytes are given."""
        blocks: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            if found := _IN_A_BLOCK.match(name):
                blocks[found[1]] = (*blocks.get(found[1], ()), size)
        rest = sum(size for name, size in sizes.items() if not _IN_A_BLOCK.match(name))
        return cls(blocks, rest, max(sizes.values(), default=0))

    def with_added(self, size: int) -> Self:
        """Return them with so many bytes more, a share in each block, as LoRA adds them."""
        if not size:
            return self
        if not self.tensors:
            return replace(self, rest=self.rest + size)
        share = -(-size // len(self.tensors))
        return replace(self, tensors={n: (*sizes, share) for n, sizes in self.tensors.items()})

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each block."""
        return {name: sum(tensors) for name, tensors in self.tensors.items()}

    def moving(self, count: int) -> tuple[str, ...]:
        """Choose so many blocks that move.

        The smallest go first, since two of them are on the device at a time; among equals they
        are as far apart as can be, so that one comes while those between work.
        """
        classes: dict[int, list[str]] = {}
        for name in sorted(self.tensors, key=_natural):
            classes.setdefault(self.sizes[name], []).append(name)
        found: list[str] = []
        for _, names in sorted(classes.items()):
            taken = min(count - len(found), len(names))
            found += [names[(2 * n + 1) * len(names) // (2 * taken)] for n in range(taken)]
        return tuple(found)


def _natural(name: str) -> tuple[str, int]:
    front, _, number = name.rpartition(".")
    return front, int(number)
