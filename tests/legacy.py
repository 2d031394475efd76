"""Checkpoint files as FedGFE's guide describes them and as its training code writes them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENS = 17
WHEN = "2026-01-22T12:00:00"
IMAGES = "/home/someone/fedgfe/output_images/vegas"


def tensors(n: int, seed: int = 0, *, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return T5 `[n, tokens, 4096]` and CLIP `[n, 768]`, float32."""
    generator = torch.Generator().manual_seed(seed)
    t5 = torch.randn(n, tokens, 4096, generator=generator)
    return t5, torch.randn(n, 768, generator=generator)


def entry(
    t5: Any,
    clip: Any,
    index: int = 0,
    *,
    split: Any = "train",
    class_name: Any = "dog",
    **more: Any,
) -> dict[str, Any]:
    """Return an entry as node files have it: no batch axis, sample_id and file_id."""
    made = {
        "split": split,
        "index": index,
        "class_name": class_name,
        "image_path": f"{IMAGES}/node_0_{split}_{class_name}_{index}_r5.png",
        "image_filename": f"node_0_{split}_{class_name}_{index}_r5.png",
        "t5_embedding": t5,
        "clip_embedding": clip,
        "sample_metadata": {"sample_id": f"{split}_{index}", "file_id": f"f{index}"},
    }
    return made | more


def content(entries: Sequence[Any], node: Any = 0, round: Any = 5, **more: Any) -> dict[str, Any]:
    """Return a checkpoint's top level around `entries`."""
    names = "federation_classes" if node == "server" else "selected_classes"
    made = {
        "node_id": node,
        "round": round,
        "timestamp": WHEN,
        "embeddings": list(entries),
        "metadata": {"diffusion_type": "flux", names: ["dog", "drum"]},
    }
    return made | more


def save(folder: Path, value: Any, name: str = "node_0_embeddings_r5.pt", **options: Any) -> Path:
    """Write `value` as torch does and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(value, folder / name, **options)
    return folder / name


def node_file(
    folder: Path,
    node: Any = 0,
    round: int = 5,
    *,
    n: int = 3,
    seed: int | None = None,
    classes: Iterable[str] = ("dog",),
    split: str = "train",
    tokens: int = TOKENS,
) -> tuple[Path, dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]]:
    """Write a node file of `n` samples a class; return it and its tensors by (class, index).

    Rows are views of their batch, as `.cpu()` of a batch leaves them, so that each drags the
    storage of the whole batch along.
    """
    seed = 100 * round + (node if isinstance(node, int) else 99) if seed is None else seed
    entries, expected = [], {}
    for number, name in enumerate(classes):
        t5, clip = tensors(n, 1000 * seed + number, tokens=tokens)
        for i in range(n):
            entries.append(entry(t5[i], clip[i], i, class_name=name, split=split))
            expected[name, i] = (t5[i], clip[i])
    path = save(folder, content(entries, node, round), f"node_{node}_embeddings_r{round}.pt")
    return path, expected


def guide_file(
    folder: Path, *, n: int = 2, tokens: int = 512
) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Write the layout that the guide promises: T5 [1, tokens, 4096], CLIP [1, 77, 768]."""
    generator = torch.Generator().manual_seed(1)
    t5 = torch.randn(n, 1, tokens, 4096, generator=generator)
    clip = torch.randn(n, 1, 77, 768, generator=generator)
    details = {"sample_id": "train_0", "audio_path": "/data/audio.wav"}
    entries = [entry(t5[i], clip[i], i, sample_metadata=details) for i in range(n)]
    return save(folder, content(entries)), t5[:, 0], clip[:, 0]


def stack(t5: Any, clip: Any, *, split: str = "train", class_name: str = "dog", **more: Any) -> Any:
    """Return a server's entry: one per split and class, all samples stacked."""
    made = {"split": split, "class_name": class_name, "node_id": "server", "t5": t5, "clip": clip}
    return made | more


def server_file(
    folder: Path, round: int = 5, *, n: int = 3, audio: bool = True
) -> tuple[Path, dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Write a server file: two splits of two classes, with audio embeddings [n, 4, 768]."""
    entries, expected = [], {}
    for number, (split, name) in enumerate(
        [(s, c) for s in ("train", "val") for c in ("dog", "drum")]
    ):
        t5, clip = tensors(n, 7000 + 10 * round + number)
        heard = torch.randn(n, 4, 768, generator=torch.Generator().manual_seed(number))
        more = {"audio_embeddings": heard} if audio else {}
        entries.append(stack(t5, clip, split=split, class_name=name, **more))
        expected[split, name] = (t5, clip, heard)
    value = content(entries, "server", round)
    return save(folder, value, f"server_embeddings_r{round}.pt"), expected


def sd_file(folder: Path, *, n: int = 2, t5: Any = None) -> tuple[Path, torch.Tensor]:
    """Write a Stable Diffusion node file: CLIP [77, 768], T5 None."""
    clip = torch.randn(n, 77, 768, generator=torch.Generator().manual_seed(2))
    value = content([entry(t5, clip[i], i) for i in range(n)])
    value["metadata"]["diffusion_type"] = "sd"
    return save(folder, value), clip


def text_cache(
    folder: Path,
    names: Iterable[Any] = ("Dog", "baby_cry"),
    *,
    tokens: int = TOKENS,
    name: str = "vegas_text_embs_dict.pt",
    **more: Any,
) -> tuple[Path, dict[Any, dict[str, torch.Tensor]]]:
    """Write a cache of reference text embeddings; return it and its tensors by class."""
    value, expected = dict(more), {}
    for number, class_name in enumerate(names):
        t5, pooled = tensors(1, 9000 + number, tokens=tokens)
        sequence = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(number))
        flux = {"prompt_embeds": t5, "pooled_prompt_embeds": pooled}
        value[class_name] = {"flux": flux, "sd": sequence}
        expected[class_name] = {"t5": t5[0], "clip": pooled[0], "sequence": sequence[0]}
    return save(folder, value, name), expected


def numpy_values() -> dict[str, Any]:
    """Return stray numpy values as they get into checkpoints."""
    return {
        "accuracy": np.float64(0.25),
        "count": np.int64(7),
        "losses": np.array([0.5, 1.5], np.float32),
        "name": np.str_("vegas"),
    }


def rewrite_pickle(path: Path, change: Callable[[bytes], bytes], *, compress: bool = False) -> None:
    """Change the pickle inside a zip checkpoint, or just pack it again."""
    with zipfile.ZipFile(path) as archive:
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


class Touches:
    """Unpickles by creating a file, which a safe loader must not do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")
