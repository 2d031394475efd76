"""What a piece of the harness counted and found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Figures:
    """What was tried, what came of it, and each fault with where it was found."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def look(self, where: str, find: Callable[[], str]) -> None:
        """Count what `find` returns; an error is a fault."""
        self.counts["tried"] += 1
        try:
            self.counts[find()] += 1
        except Exception as error:  # noqa: BLE001 - whatever is raised here is what is looked for
            self.faults.append(f"{where}: {type(error).__name__}: {error}")
