"""The demo's experiment: a small federation whose embeddings go into a store while it trains.

The nodes' clips can be heard, too, and the same embeddings can be written as the ``.pt``
checkpoints that the system before this one kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgfe_store.demo.federation import (
    NODES,
    SERVER,
    Clips,
    Round,
    embed,
    evaluate,
    federate,
    held_out_clips,
    make_clips,
    training_clips,
)
from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.demo.sounds import make_clip, save_wav
from fedgfe_store.generation.images import image_name
from fedgfe_store.records import RecordKey
from fedgfe_store.selection import Selection
from fedgfe_store.store import EmbeddingStore

ROUNDS = 20
RECORDED = (1, 5, 10, 20)
"""Rounds whose embeddings are recorded."""

TRAIN, TEST, SERVER_TEST = 2, 1, 3
"""Clips of each class that are recorded: a node's of each split, and the server's."""


@dataclass(frozen=True)
class Report:
    """How far the federation is after a round."""

    round: int
    train_loss: float
    """Mean squared distance from the anchors, T5 and CLIP added, while the nodes trained."""
    test_loss: float
    """The same of the server's adapter, on clips that nobody trained on."""
    told: float
    """Share of those clips whose embedding is nearest to its own class's anchor."""


def run(
    store: EmbeddingStore,
    *,
    audio: Path,
    seed: int = 0,
    report: Callable[[Report], None] | None = None,
) -> None:
    """Train the federation and record embeddings; nothing is done where all are recorded.

    Parameters
    ----------
    store : EmbeddingStore
        Takes 30 records of each node and of the server at each of `RECORDED`. Those that it has
        already stay as they are.
    audio : Path
        Folder for the recorded clips as WAV files.
    seed : int
        Seed of clips and training.
    report : callable, optional
        Called after every round.
    """
    if _is_complete(store):
        return
    training = [training_clips(node, seed=seed) for node in NODES]
    held_out = held_out_clips(seed=seed)
    watched = {c.node: [c.first(TRAIN), _test_clips(c.node, seed)] for c in training}
    watched[SERVER] = [held_out.first(SERVER_TEST)]
    for clips in itertools.chain(*watched.values()):
        _save_audio(clips, audio, seed)
    for step in federate(training, rounds=ROUNDS, seed=seed):
        if step.number in RECORDED:
            for node, several in watched.items():
                _record(store, step, node, several, audio)
        if report is not None:
            report(Report(step.number, step.loss, *evaluate(step.adapters[SERVER], held_out)))


def write_checkpoints(store: EmbeddingStore, folder: Path) -> list[Path]:
    """Write the experiment's records as ``.pt`` files, as the system before this one did.

    Parameters
    ----------
    store : EmbeddingStore
        What `run` has recorded.
    folder : Path
        Where the checkpoints go; made if it is not there.

    Returns
    -------
    list of Path
        One for each node and round: ``node_0_embeddings_r1.pt`` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    selection = _recorded(store)
    records = selection.records
    for node, number in dict.fromkeys((key.node, key.round) for key in selection.keys()):
        rows = np.flatnonzero((records["node"] == node) & (records["round"] == number))
        path = folder / f"{_where(node)}_embeddings_r{number}.pt"
        torch.save(
            {
                "node_id": node if node == SERVER else int(node),
                "round": number,
                "timestamp": records["timestamp"][rows[0]].isoformat(),
                "embeddings": _entries(selection.take(rows)),
                "metadata": {"diffusion_type": "flux", "selected_classes": list(CLASSES)},
            },
            path,
        )
        written.append(path)
    return written


def _is_complete(store: EmbeddingStore) -> bool:
    per_round = len(CLASSES) * ((TRAIN + TEST) * len(NODES) + SERVER_TEST)
    return len(_recorded(store)) == per_round * len(RECORDED)


def _recorded(store: EmbeddingStore) -> Selection:
    return store.select(node=[*NODES, SERVER], round=RECORDED)


def _test_clips(node: str, seed: int) -> Clips:
    return make_clips(node, "test", [TEST] * len(CLASSES), seed=seed)


def _record(
    store: EmbeddingStore, step: Round, node: str, several: list[Clips], audio: Path
) -> None:
    """Record what a node's adapter makes of clips after a round, as one commit."""
    with store.append(node=node, round=step.number, if_exists="skip") as batch:
        for clips in several:
            t5, clip = embed(step.adapters[node], clips)
            names, index = clips.class_names, clips.index.tolist()
            keys = [
                RecordKey(node, step.number, clips.split, name, i)
                for name, i in zip(names, index, strict=True)
            ]
            batch.add(
                split=clips.split,
                class_name=names,
                index=index,
                sample_id=[f"{clips.split}_{i}" for i in index],
                image_filename=[image_name(key) for key in keys],
                audio_path=[str(path) for path in _wav_paths(clips, audio)],
                timestamp=datetime.now(UTC).replace(microsecond=0),
                t5=t5,
                clip=clip,
            )


def _save_audio(clips: Clips, audio: Path, seed: int) -> None:
    numbered = zip(clips.class_names, clips.index.tolist(), _wav_paths(clips, audio), strict=True)
    for name, index, path in numbered:
        save_wav(make_clip(name, node=clips.node, split=clips.split, index=index, seed=seed), path)


def _wav_paths(clips: Clips, audio: Path) -> list[Path]:
    folder = audio / _where(clips.node) / clips.split
    numbered = zip(clips.class_names, clips.index.tolist(), strict=True)
    return [folder / f"{name}_{index}.wav" for name, index in numbered]


def _where(node: str) -> str:
    return node if node == SERVER else f"node_{node}"


def _entries(selection: Selection) -> list[dict[str, Any]]:
    records = selection.records
    experiment = selection.schema.metadata.experiment
    # A file of tensors that are slices of one would hold the whole of it for each.
    t5, clip = (
        [row[None].clone() for row in torch.from_numpy(selection.read(column))]
        for column in ("t5", "clip")
    )
    return [
        {
            "split": key.split,
            "index": key.index,
            "class_name": key.class_name,
            "image_path": f"output_images/{experiment}/{image_name(key)}",
            "image_filename": image_name(key),
            "t5_embedding": t5[n],
            "clip_embedding": clip[n],
            "sample_metadata": {
                "sample_id": records["sample_id"][n],
                "audio_path": records["audio_path"][n],
            },
        }
        for n, key in enumerate(selection.keys())
    ]
