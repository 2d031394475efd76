"""What decides an image besides its record: settings, their fingerprint, and seeds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, get_args

import xxhash

from fedgfe_store.derived_keys import Key, MeanKey, WalkKey
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.request import Noise
from fedgfe_store.images.compare import UNNAMED_NOISE

# Settings that came later, and what images without them were made with.
_LATER: dict[str, Any] = {"noise": UNNAMED_NOISE, "column": [], "lora": [], "family": None}


@dataclass(frozen=True)
class Settings:
    """Everything but the record that an image depends on.

    Batch size, offload, device and library versions are left out on purpose: they move pixels by
    rounding at most, and a run may go on under others.

    Parameters
    ----------
    model, revision : str
        Image model, and which state of it: a commit of the hub, or a digest of local files.
    dtype : str
        ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    steps : int
        Denoising steps.
    guidance : float or None
        Guidance scale; None for a model that takes none.
    height, width : int
        Size of the image in pixels.
    seed : int
        Base seed; each image's own seed follows from it, see `seed_of`.
    pool : str or None
        How a CLIP sequence becomes a vector; None where the store holds vectors.
    quantization, negative : str or None
        Quantization of the weights, and digest of the negative embeddings; None for none.
    noise : {"index", "file_id"}
        What tells a sample from the others in its seed: its index, or its ``file_id`` where it
        has one, so that it has the same noise in every round however the rounds were shuffled.
    column : tuple of str
        Columns of the store that are from other records, and from which, as `Elsewhere` says it.
    lora : tuple of str
        Digest and scale of each LoRA, in their order, as `Lora.identity`.
    family : str or None
        Digest of the file that declares the model's family; None for a family of this package.
    """

    model: str
    revision: str
    dtype: str
    steps: int
    guidance: float | None
    height: int
    width: int
    seed: int = 0
    pool: str | None = None
    quantization: str | None = None
    negative: str | None = None
    noise: Noise = UNNAMED_NOISE
    column: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    family: str | None = None

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise SchemaMismatchError(
                f"noise: expected {' or '.join(get_args(Noise))}, got {self.noise!r}"
            )


def settings_json(settings: Settings) -> dict[str, Any]:
    """Give the settings as images keep them: as they did before there were more of them."""
    known = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(settings).items()}
    return {n: v for n, v in known.items() if n not in _LATER or v != _LATER[n]}


def fingerprint(settings: Settings) -> str:
    """Give the settings' hash, the same in every process and version: 32 hex digits."""
    canonical = json.dumps(settings_json(settings), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def seed_of(base_seed: int, key: Key, number: int = 0, file_id: str = "") -> int:
    """Derive an image's seed from its record.

    The round is left out, so that the same sample has the same noise in every round and rounds
    can be compared. A `file_id` takes the place of the index, which is another sample in each
    round where a loader shuffles. All frames of a walk have the noise of its start, and a mean has
    that of what its records agree in.

    Parameters
    ----------
    base_seed : int
        Seed of the whole run.
    key : RecordKey, MeanKey or WalkKey
        The record.
    number : int
        Which image of the record, from 0.
    file_id : str
        What identifies the sample; empty where only its index does.

    Returns
    -------
    int
        From 0 to 2**63 - 1, the same in every process, order and version.
    """
    if isinstance(key, WalkKey):
        return seed_of(base_seed, key.start, number, file_id)
    if isinstance(key, MeanKey):
        fixed = [list(pair) for pair in key.fixed if pair[0] != "round"]
        parts = [base_seed, "mean", fixed, number]
    else:
        # As `json.dumps` writes such a list, of whose texts most are the same as many others'.
        node, split, name = _quoted(key.node), _quoted(key.split), _quoted(key.class_name)
        sample = json.dumps(file_id) if file_id else key.index
        return _seed(f"[{base_seed}, {node}, {split}, {name}, {sample}, {number}]")
    return _seed(json.dumps(parts))


def _seed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) & (2**63 - 1)


_quoted = lru_cache(maxsize=4096)(json.dumps)
