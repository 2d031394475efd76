"""A miniature of FedGFE: a server and its clients, a configuration in JSON, and a training loop.

    python miniature.py config.json

The hook is the guide's; only the mixins are new. A run that was killed goes on after the last
round that it had finished.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch

from fedgfe_store.recording.fedgfe import EmbeddingBatch, EmbeddingClientMixin, EmbeddingServerMixin

CLASSES = {0: ["dog"], 1: ["cat"], 2: ["dog", "bird"], "server": ["dog", "cat", "bird"]}
PER_CLASS = {"train": 3, "val": 1, "test": 1}


def embeddings(
    node: object, round: int, split: str, class_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """T5 `[n, 17, 4096]` and CLIP `[n, 768]` as an adapter would have them after `round`."""
    seed = zlib.crc32(f"{node} {round} {split} {class_name}".encode())
    generator = torch.Generator().manual_seed(seed)
    n = PER_CLASS[split]
    return torch.randn(n, 17, 4096, generator=generator), torch.randn(n, 768, generator=generator)


class Node:
    """What the clients and the server do to have embeddings."""

    round = 0

    def batches(self, node, split):
        for name in CLASSES[node]:
            t5, clip = embeddings(node, self.round, split, name)
            ids = [f"{split}_{i}" for i in range(len(t5))]
            yield EmbeddingBatch(
                class_name=name, t5=t5.requires_grad_(), clip=clip, sample_id=ids,
                audio_path=[f"/data/{name}/{i}.wav" for i in ids],
            )  # fmt: skip


class Client(EmbeddingClientMixin, Node):
    def __init__(self, number):
        self.id = number

    def iter_embeddings(self, split):
        return self.batches(self.id, split)


class Server(EmbeddingServerMixin, Node):
    def __init__(self, config):
        self.config = config
        self.clients = [Client(number) for number in CLASSES if number != "server"]
        self.prepare_embeddings()

    def iter_embeddings(self, split):
        return self.batches("server", split)

    def round_ending_hook(self):
        self.save_round_embeddings()

    def train(self, state: Path):
        done = json.loads(state.read_text())["round"] if state.exists() else 0
        for number in range(done + 1, self.config.federation.global_rounds + 1):
            print("round", number, flush=True)
            self.round = number
            for client in self.clients:
                client.round = number
            self.round_ending_hook()
            new = state.with_suffix(".new")
            new.write_text(json.dumps({"round": number}))
            new.replace(state)
        print("done", flush=True)


def main(path: Path) -> None:
    text = path.read_text()
    config = json.loads(text, object_hook=lambda section: SimpleNamespace(**section))
    Server(config).train(path.with_name("state.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
