"""The demo's experiment: a small federation whose embeddings go into a store while it trains.

The nodes' clips can be heard, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedgfe_store.demo.federation import (
    NODES,
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
from fedgfe_store.recording import Recorder
from fedgfe_store.records import SERVER
from fedgfe_store.schema import Metadata
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
    experiment: str | None = None,
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
    experiment : str, optional
        Its name; a store of an experiment of another name is refused.
    report : callable, optional
        Called after every round.
    """
    images = f"output_images/{store.schema.metadata.experiment}"
    recorder = Recorder(
        store, if_exists="skip", metadata=Metadata(experiment=experiment), images_dir=images
    )
    if _is_complete(store):
        return
    training = [training_clips(node, seed=seed) for node in NODES]
    held_out = held_out_clips(seed=seed)
    watched = {c.node: [c.first(TRAIN), _test_clips(c.node, seed)] for c in training}
    watched[SERVER] = [held_out.first(SERVER_TEST)]
    for clips in itertools.chain(*watched.values()):
        _save_audio(clips, audio, seed)
    try:
        with recorder:
            for step in federate(training, rounds=ROUNDS, seed=seed):
                if step.number in RECORDED:
                    for node, several in watched.items():
                        _record(recorder, step, node, several, audio)
                if report is not None:
                    tested = evaluate(step.adapters[SERVER], held_out)
                    report(Report(step.number, step.loss, *tested))
    finally:
        store.refresh()


def _is_complete(store: EmbeddingStore) -> bool:
    per_round = len(CLASSES) * ((TRAIN + TEST) * len(NODES) + SERVER_TEST)
    return len(_recorded(store)) == per_round * len(RECORDED)


def _recorded(store: EmbeddingStore) -> Selection:
    return store.select(node=[*NODES, SERVER], round=RECORDED)


def _test_clips(node: str, seed: int) -> Clips:
    return make_clips(node, "test", [TEST] * len(CLASSES), seed=seed)


def _record(recorder: Recorder, step: Round, node: str, several: list[Clips], audio: Path) -> None:
    """Record what a node's adapter makes of clips after a round, as one commit."""
    with recorder.record(node=node, round=step.number) as batch:
        for clips in several:
            t5, clip = embed(step.adapters[node], clips)
            batch.add(
                split=clips.split,
                class_name=clips.class_names,
                index=clips.index,
                sample_id=[f"{clips.split}_{i}" for i in clips.index.tolist()],
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
