"""A process that loads a store's records with workers: ``python loading.py STORE fork|spawn``."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from fedgfe_store import EmbeddingStore

Pairs = list[list[float]]


def main(path: str, how: str) -> None:
    """Print what the loader of each rank gives, and what two loaders of shuffled batches give."""
    selection = EmbeddingStore.open(path).select()
    options: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": how}
    dataset = selection.to_torch(labels=True)
    ranks = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=2, rank=rank, seed=3
        )
        ranks.append(told(DataLoader(dataset, batch_size=4, sampler=sampler, **options)))
    seeded = selection.batches(4, shuffle=True, seed=5, labels=True)
    free = DataLoader(selection.batches(4, shuffle=True, labels=True), batch_size=None, **options)
    told_of = {
        "ranks": ranks,
        "seeded": told(DataLoader(seeded, batch_size=None, **options)),
        "free": [told(free), told(free)],
    }
    print(json.dumps(told_of))


def told(loader: DataLoader[Any]) -> Pairs:
    """Say of each record its class and its first value: no two are alike."""
    return [
        [label, value]
        for batch in loader
        for label, value in zip(batch["label"].tolist(), batch["t5"][:, 0, 0].tolist(), strict=True)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
