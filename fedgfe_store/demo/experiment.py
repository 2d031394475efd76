"""A small federated experiment as the training that we replace left it: ``.pt`` checkpoints.

Its embeddings are made, not learnt: each is a class's anchor under noise that falls with the
rounds, as training would bring it down.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgfe_store.demo.anchors import class_anchor, noisy
from fedgfe_store.demo.pictograms import CLASSES

NODES = ("0", "1", "2", "server")
SPLITS = ("train", "train", "test")
"""Splits of the samples of one class, in order."""

NOISE = {1: 0.97, 3: 0.8, 5: 0.55, 10: 0.1}
"""Share of noise in the embeddings at each recorded round."""

_STARTED = datetime(2026, 1, 22, 12, tzinfo=UTC)


def write_checkpoints(folder: Path, *, experiment: str = "demo", seed: int = 0) -> list[Path]:
    """Write one checkpoint per node and round in the guide's layout.

    Parameters
    ----------
    folder : Path
        Where the checkpoints go; made if it is not there.
    experiment : str
        Folder below ``output_images/`` that the records' image paths name.
    seed : int
        Seed of the noise.

    Returns
    -------
    list of Path
        ``node_0_embeddings_r1.pt`` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for round_number in NOISE:
        for node in NODES:
            name = node if node == "server" else f"node_{node}"
            path = folder / f"{name}_embeddings_r{round_number}.pt"
            torch.save(_checkpoint(node, round_number, experiment, seed), path)
            written.append(path)
    return written


def _checkpoint(node: str, round_number: int, experiment: str, seed: int) -> dict[str, Any]:
    return {
        "node_id": node if node == "server" else int(node),
        "round": round_number,
        "timestamp": (_STARTED + timedelta(minutes=6 * round_number)).isoformat(),
        "embeddings": list(_entries(node, round_number, experiment, seed)),
        "metadata": {"diffusion_type": "flux", "selected_classes": list(CLASSES)},
    }


def _entries(node: str, round_number: int, experiment: str, seed: int) -> Iterator[dict[str, Any]]:
    # The same noise in every round, of which less and less is left.
    rng = np.random.default_rng([seed, NODES.index(node)])
    for class_name in CLASSES:
        counts: dict[str, int] = {}
        for split in SPLITS:
            index = counts.get(split, 0)
            counts[split] = index + 1
            t5, clip = noisy(class_anchor(class_name), NOISE[round_number], rng)
            where = node if node == "server" else f"node_{node}"
            image = f"{where}_{split}_{class_name}_{index}_r{round_number}.png"
            yield {
                "split": split,
                "index": index,
                "class_name": class_name,
                "image_path": f"/home/user/fedgfe/output_images/{experiment}/{image}",
                "image_filename": image,
                "t5_embedding": torch.from_numpy(t5)[None],
                "clip_embedding": torch.from_numpy(clip)[None],
                "sample_metadata": {
                    "sample_id": f"{split}_{index}",
                    "audio_path": f"/home/user/audio/{class_name}/{split}_{index}.wav",
                },
            }
