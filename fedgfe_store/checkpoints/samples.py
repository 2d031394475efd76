"""One sample of a checkpoint: its tensors as a store has them, in the mapped file if they can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedgfe_store.checkpoints.columns import Columns
from fedgfe_store.checkpoints.entries import Slot
from fedgfe_store.common.plain import Unusable
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import TensorColumn
from fedgfe_store.shapes import any_tensor, as_tensor
from fedgfe_store.storage.values import exact


@dataclass(frozen=True)
class Entry:
    """One sample of a checkpoint.

    Parameters
    ----------
    split, class_name : str
        As in the file.
    index : int
        Number within node, split and class: the file's, else the position in file order.
    t5 : Tensor or None
        float32 ``[tokens, 4096]`` on the CPU, contiguous; None for Stable Diffusion.
    clip : Tensor or None
        float32 ``[768]`` or ``[tokens, 768]`` on the CPU, contiguous; None where the checkpoint
        has other columns.
    audio : Tensor or None
        float32 ``[frames, 768]`` where it was asked for and is there.
    sample_id, file_id, image_filename, audio_path : str or None
        The sample's metadata.
    extra : mapping
        All other metadata of the sample, ``image_path`` included, as JSON values.
    named : mapping of str to Tensor
        Columns that the checkpoint has under their own names, of their data types.
    """

    split: str
    class_name: str
    index: int
    t5: torch.Tensor | None
    clip: torch.Tensor | None
    audio: torch.Tensor | None
    sample_id: str | None
    file_id: str | None
    image_filename: str | None
    audio_path: str | None
    extra: Mapping[str, Any]
    named: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The sample's tensors by column, those that are there."""
        own = {"t5": self.t5, "clip": self.clip, "audio": self.audio}
        return {name: t for name, t in own.items() if t is not None} | {**self.named}

    @property
    def what(self) -> str:
        """The sample in words."""
        return f"split {self.split}, class {self.class_name}, index {self.index}"

    def copied(self) -> Entry:
        """Return the sample in memory of its own, whatever becomes of the file."""
        return replace(
            self,
            t5=None if self.t5 is None else self.t5.clone(),
            clip=None if self.clip is None else self.clip.clone(),
            audio=None if self.audio is None else self.audio.clone(),
            named={name: tensor.clone() for name, tensor in self.named.items()},
        )


def entry_of(slot: Slot, raw: Mapping[Any, Any], columns: list[str], wanted: Columns) -> Entry:
    """Return one sample of a file, of which `raw` is the entry."""
    values = {name: _values(slot, raw, name, wanted.get(name)) for name in columns}
    known = {name: values.pop(name, None) for name in ("t5", "clip", "audio")}
    return Entry(
        split=slot.split,
        class_name=slot.class_name,
        index=slot.index,
        sample_id=slot.sample_id,
        file_id=slot.file_id,
        image_filename=slot.image_filename,
        audio_path=slot.audio_path,
        extra=slot.extra,
        named=values,
        **known,
    )


def _values(
    slot: Slot, raw: Mapping[Any, Any], column: str, known: TensorColumn | None
) -> torch.Tensor:
    """Return one sample's tensor as a store has it, in the file's mapping where it is so there."""
    key, shape = slot.places[column]
    if known is not None and known.dtype != "float32":
        return _numbers(known, any_tensor(raw[key], key).detach().reshape(shape))
    stored = as_tensor(raw[key], key)
    part = (stored if slot.row is None else stored[slot.row]).reshape(shape)
    values = _float32(part)
    if not np.isfinite(values).all():
        large = bool(torch.isfinite(part).all())
        raise Unusable(
            f"{column} has values {'beyond float32' if large else 'that are not finite'}"
        )
    return torch.from_numpy(values)


def _numbers(column: TensorColumn, part: torch.Tensor) -> torch.Tensor:
    """Copy whole numbers or truth values, of the column's data type."""
    try:
        values = exact(column, (part.float() if part.is_floating_point() else part).numpy())
    except SchemaMismatchError as error:
        raise Unusable(str(error)) from None
    return torch.from_numpy(values)


def _float32(part: torch.Tensor) -> np.ndarray:
    """Return contiguous float32; by numpy, as torch's threads get in each other's way."""
    if part.dtype is torch.bfloat16:
        high = part.contiguous().view(torch.int16).numpy().view(np.uint16)
        return (high.astype(np.uint32) << 16).view(np.float32)
    if part.dtype not in (torch.float16, torch.float32, torch.float64):
        part = part.float()
    with np.errstate(over="ignore"):
        return np.asarray(part.numpy(), np.float32, order="C")
