"""What trackers show of a folder, by their own readers or formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

Curves = dict[str, dict[int, float]]
"""Values by tag and step."""


def tensorboard(folder: Path) -> Any:
    """Return TensorBoard's own reader of `folder`, which has read it whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return reader


def curves(folder: Path) -> Curves:
    """Return the curves that TensorBoard shows; no step of one has two values."""
    reader = tensorboard(folder)
    found = {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}
    assert all(len({each.step for each in events}) == len(events) for events in found.values())
    return {tag: {each.step: each.value for each in events} for tag, events in found.items()}


def wandb_history(folder: Path) -> Curves:
    """Return what the one offline run below `folder` has of each step, as its file says."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found: Curves = {}
    for data in _log_records(file.read_bytes()):
        record = messages.Record.FromString(data)
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            found.setdefault(key, {})[record.history.step.num] = json.loads(item.value_json)
    return found


def _log_records(data: bytes) -> list[bytes]:
    """Return the records of a LevelDB log: blocks of 32 KiB, pieces of checksum, length, kind."""
    header, block = 7, 2**15
    records, at, parts = [], header, b""  # W&B's own header is as long as a piece's
    while at + header <= len(data):
        left = block - at % block
        if left < header:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or the last of several
            records.append(parts)
            parts = b""
    return records
