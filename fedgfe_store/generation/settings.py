"""What decides a picture besides its record: settings, their fingerprint, and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from fedgfe_store.records import RecordKey


@dataclass(frozen=True)
class Settings:
    """Everything but the record that a picture depends on.

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
        Size of the picture in pixels.
    seed : int
        Base seed; each image's own seed follows from it, see `seed_of`.
    pool : str or None
        How a CLIP sequence becomes a vector; None where the store holds vectors.
    quantization, negative : str or None
        Quantization of the weights, and digest of the negative embeddings; None for none.
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


def fingerprint(settings: Settings) -> str:
    """Give the settings' hash, the same in every process and version: 32 hex digits."""
    canonical = json.dumps(asdict(settings), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the settings that differ, as ``steps 20 -> 28, seed 0 -> 1``."""
    changed = [f for f in (*new, *(old.keys() - new.keys())) if old.get(f) != new.get(f)]
    return ", ".join(f"{f} {old.get(f)} -> {new.get(f)}" for f in changed)


def seed_of(base_seed: int, key: RecordKey, number: int = 0) -> int:
    """Derive an image's seed from its record.

    The round is left out, so that the same sample has the same noise in every round and rounds
    can be compared.

    Parameters
    ----------
    base_seed : int
        Seed of the whole run.
    key : RecordKey
        The record.
    number : int
        Which image of the record, from 0.

    Returns
    -------
    int
        From 0 to 2**63 - 1, the same in every process, order and version.
    """
    parts = [base_seed, key.node, key.split, key.class_name, key.index, number]
    return xxhash.xxh3_64_intdigest(json.dumps(parts).encode()) & (2**63 - 1)
