"""Federated averaging in small: three nodes, each with its own sounds, and a server.

Every round the nodes train the server's adapter on their clips, towards their classes' anchors,
and the server averages what they send back, weighted by their numbers of clips (FedAvg, McMahan
et al. 2017). Clips and adapters stay where they are; only parameters travel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedgfe_store.demo.adapters import Adapter
from fedgfe_store.demo.anchors import class_anchor
from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.demo.sounds import log_mel, make_clip
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.records import SERVER

NODES = ("0", "1", "2")

COMMON, RARE = 20, 4
"""Training clips that a node has of a class: every third class is common at it."""

HELD_OUT = 10
"""Clips of each class at the server, on which nobody trains."""

_BATCH = 16
_LEARNING_RATE = 3e-3

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Clips:
    """Clips of one node and split, as adapters hear them."""

    node: str
    split: str
    features: Tensor
    """float32 [n, band, frame]"""
    classes: Tensor
    """Positions in `fedgfe_store.demo.pictograms.CLASSES`, int64 [n]."""
    index: Tensor
    """Numbers within node, split and class, int64 [n]."""

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """Name of each clip's class."""
        return [CLASSES[k] for k in self.classes.tolist()]

    def first(self, per_class: int) -> Clips:
        """Return the first clips of each class."""
        kept = self.index < per_class
        some = self.features[kept], self.classes[kept], self.index[kept]
        return Clips(self.node, self.split, *some)


@dataclass(frozen=True)
class Round:
    """What a round left behind."""

    number: int
    """Rounds count from 1."""
    adapters: Mapping[str, Adapter]
    """Of each node as it left training, and the server's average of them."""
    loss: float
    """Mean loss of the nodes' training in this round, weighted by their clips."""


def make_clips(
    node: str, split: str, counts: Sequence[int] | Mapping[int, int], *, seed: int = 0
) -> Clips:
    """Record clips at a node: ``counts[k]`` of the class number ``k``."""
    which = [(k, i) for k in range(len(CLASSES)) for i in range(counts[k])]
    sounds = [make_clip(CLASSES[k], node=node, split=split, index=i, seed=seed) for k, i in which]
    classes, index = torch.tensor(which).unbind(1)
    with one_thread():
        features = log_mel(torch.from_numpy(np.stack(sounds)))
    return Clips(node, split, features, classes, index)


def training_clips(node: str, *, seed: int = 0) -> Clips:
    """Record what a node trains on: many clips of some classes and few of the others."""
    number = NODES.index(node)
    counts = [COMMON if k % len(NODES) == number else RARE for k in range(len(CLASSES))]
    return make_clips(node, "train", counts, seed=seed)


def held_out_clips(*, seed: int = 0) -> Clips:
    """Record what the server judges adapters by."""
    return make_clips(SERVER, "test", [HELD_OUT] * len(CLASSES), seed=seed)


def federate(clips: Sequence[Clips], *, rounds: int, seed: int = 0) -> Iterator[Round]:
    """Train an adapter at nodes that keep their clips to themselves.

    Parameters
    ----------
    clips : sequence of Clips
        Each node's training clips.
    rounds : int
        How many rounds.
    seed : int
        Seed of the first adapter and of the order of clips. The same seed gives the same bits
        on the same machine, whatever its number of threads; between machines they differ by
        rounding.

    Yields
    ------
    Round
        Adapters are the caller's; the next round does not change them.
    """
    server = new_adapter(seed)
    weights = [len(c) for c in clips]
    for number in range(1, rounds + 1):
        adapters = {c.node: copy.deepcopy(server) for c in clips}
        order = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        losses = [train(adapters[c.node], c, seed=order) for c in clips]
        server = copy.deepcopy(server)
        server.load_state_dict(average([a.state_dict() for a in adapters.values()], weights))
        adapters[SERVER] = server
        yield Round(number, adapters, float(np.average(losses, weights=weights)))


def new_adapter(seed: int) -> Adapter:
    """Make an adapter that knows nothing yet; leaves torch's own random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapter()


def train(adapter: Adapter, clips: Clips, *, seed: int) -> float:
    """Train an adapter in place, once over the clips.

    Parameters
    ----------
    adapter : Adapter
        Changed in place.
    clips : Clips
        What to train on.
    seed : int
        Seed of the order of clips.

    Returns
    -------
    float
        Mean loss of the batches, each before its own step.
    """
    optimizer = torch.optim.Adam(adapter.parameters(), lr=_LEARNING_RATE, fused=True)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    losses = []
    with one_thread():
        for batch in torch.split(order, _BATCH):
            loss = _loss(adapter(clips.features[batch]), clips.classes[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))


def average(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average parameters as FedAvg does.

    Parameters
    ----------
    states : sequence of mapping
        One ``state_dict`` of each node, with the same names and shapes.
    weights : sequence of float
        How much each counts, such as its number of clips; only their ratios matter.

    Returns
    -------
    dict of Tensor
        New tensors of the states' data types.

    Raises
    ------
    SchemaMismatchError
        If there are not as many weights as states, or they do not sum to more than 0.
    """
    total = sum(weights)
    if len(states) != len(weights) or min(weights, default=-1) < 0 or not total > 0:
        raise SchemaMismatchError(
            f"weights: expected {len(states)} numbers from 0 up, not all 0, got {list(weights)}"
        )
    shares = [weight / total for weight in weights]
    with one_thread():
        return {
            name: torch.stack(
                [share * state[name] for share, state in zip(shares, states, strict=True)]
            ).sum(dim=0)
            for name in states[0]
        }


@torch.no_grad()
def embed(adapter: Adapter, clips: Clips) -> tuple[Tensor, Tensor]:
    """Embed clips: T5, float32 [n, 17, 4096], and CLIP, float32 [n, 768]."""
    with one_thread():
        t5, clip = adapter(clips.features)
    return t5, clip


@torch.no_grad()
def evaluate(adapter: Adapter, clips: Clips) -> tuple[float, float]:
    """Return the loss on clips, and the share whose T5 is nearest to their own class's anchor."""
    t5, clip = embed(adapter, clips)
    with one_thread():
        likeness = torch.einsum("ntw,ktw->nk", t5, _anchors()[0])
        told = (likeness.argmax(dim=1) == clips.classes).float().mean()
        return _loss((t5, clip), clips.classes).item(), told.item()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums split over threads are rounded by how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _anchors() -> tuple[Tensor, Tensor]:
    t5, clip = zip(*(class_anchor(name) for name in CLASSES), strict=True)
    return torch.from_numpy(np.stack(t5)), torch.from_numpy(np.stack(clip))


def _loss(embeddings: tuple[Tensor, Tensor], classes: Tensor) -> Tensor:
    """Mean squared distance to the anchors, of T5 and CLIP alike: about 4 when nothing is known."""
    t5, clip = (
        functional.mse_loss(got, anchors[classes])
        for got, anchors in zip(embeddings, _anchors(), strict=True)
    )
    return t5 + clip
