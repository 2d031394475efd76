"""Reading legacy FedGFE `.pt` checkpoints: safely, lazily, whatever their layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from fedgfe_store.checkpoints import torch_files
from fedgfe_store.checkpoints.entries import Skipped, Slot, survey
from fedgfe_store.checkpoints.header import (
    RoundFrom,
    embeddings,
    kind_of,
    origin,
    plain_metadata,
    timestamp,
    unread,
)
from fedgfe_store.common.plain import Unusable, plain
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Kind
from fedgfe_store.shapes import Shape, as_tensor

_WINDOW_BYTES = 128 << 20
"""Values that are read before a file is mapped anew: pages of a mapping stay until it goes."""
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Entry:
    """One sample of a checkpoint, in memory of its own.

    Parameters
    ----------
    split, class_name : str
        As in the file.
    index : int
        Number within node, split and class: the file's, else the position in file order.
    t5 : Tensor or None
        float32 ``[tokens, 4096]`` on the CPU, contiguous; None for Stable Diffusion.
    clip : Tensor
        float32 ``[768]`` or ``[tokens, 768]`` on the CPU, contiguous.
    audio : Tensor or None
        float32 ``[frames, 768]`` where it was asked for and is there.
    sample_id, file_id, image_filename, audio_path : str or None
        The sample's metadata.
    extra : mapping
        All other metadata of the sample, ``image_path`` included, as JSON values.
    """

    split: str
    class_name: str
    index: int
    t5: torch.Tensor | None
    clip: torch.Tensor
    audio: torch.Tensor | None
    sample_id: str | None
    file_id: str | None
    image_filename: str | None
    audio_path: str | None
    extra: Mapping[str, Any]

    @property
    def what(self) -> str:
        """The sample in words."""
        return f"split {self.split}, class {self.class_name}, index {self.index}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose samples are known and whose values are read when they are asked for.

    Parameters
    ----------
    path : Path
        The file.
    node : str
        ``"0"``, ``"1"``, ... or ``"server"``.
    round : int
        Federated round; the file name's where the file holds none or -1.
    timestamp : datetime or None
        When it was written, in UTC; a time without zone is taken as UTC.
    metadata : mapping
        The file's ``metadata`` as JSON values.
    kind : {"flux", "sd"}
        From ``diffusion_type``, else ``"flux"`` where there is a T5 tensor.
    audio : bool
        Whether entries carry audio embeddings.
    notes : tuple of str
        What is odd about the file, one line each.
    nbytes : int
        Size of the file.
    """

    path: Path
    node: str
    round: int
    timestamp: datetime | None
    metadata: Mapping[str, Any]
    kind: Kind
    audio: bool
    notes: tuple[str, ...]
    nbytes: int
    _source: torch_files.Source
    _found: tuple[Slot | Skipped, ...]
    _unpack: Callable[[Any, Path], list[Any]] = embeddings

    @property
    def entries(self) -> Iterator[Entry]:
        """The complete samples in file order, read one at a time."""
        return (item for item in self.read() if isinstance(item, Entry))

    @property
    def skipped(self) -> list[Skipped]:
        """What `entries` leaves out; finding non-finite values reads the whole file."""
        return [item for item in self.read() if isinstance(item, Skipped)]

    def read(self, shapes: Mapping[str, Shape] | None = None) -> Iterator[Entry | Skipped]:
        """Read the samples one at a time, in file order.

        A file in torch's zip format is mapped, and mapped anew every 128 MiB, so that memory stays
        bounded whatever its size; the older format is loaded as a whole.

        Parameters
        ----------
        shapes : mapping, optional
            Shape of each column that a sample must have, as `Schema.columns`. By default the
            columns of the checkpoint's own kind, of any shape.

        Yields
        ------
        Entry or Skipped
            A sample, or why it is left out: a tensor that is missing, of another shape or not
            finite, or a sample that came before. Audio that is missing leaves no sample out.

        Raises
        ------
        DamagedDataError
            If the file changed since it was opened, or is damaged.
        """
        wanted = _needed(self.kind) if shapes is None else shapes
        opened: Any = None
        used, seen = 0, set[tuple[str, str, int]]()
        for slot in self._found:
            if isinstance(slot, Skipped):
                yield slot
                continue
            if opened is None or (self._source.mapped and used >= _WINDOW_BYTES):
                opened = None  # unmaps the file before it is mapped again
                opened, used = self._unpack(torch_files.load(self._source).content, self.path), 0
            columns = _columns(slot, wanted, self.audio)
            try:
                _check(slot, wanted, columns, seen)
                used += 4 * sum(math.prod(slot.places[name][1]) for name in columns)
                entry = _entry(slot, opened[slot.position], columns)
            except Unusable as reason:
                yield Skipped(str(reason), slot.position, slot.what)
            else:
                seen.add((slot.split, slot.class_name, slot.index))
                yield entry

    def verify(self) -> None:
        """Compare the file's bytes with the checksums that torch wrote into it.

        Raises
        ------
        DamagedDataError
            If they differ.
        """
        torch_files.verify(self._source)


def read_checkpoint(
    path: str | Path, *, audio: bool = False, round_from: RoundFrom | None = None
) -> Checkpoint:
    """Open a `.pt` file written by FedGFE, without running anything that it contains.

    Parameters
    ----------
    path : path-like
        A node's or the server's checkpoint; for caches of text embeddings see `read_text_cache`.
    audio : bool
        Also read audio embeddings, ``[1214, 768]`` a sample.
    round_from : {"name", "content"}, optional
        Which round counts where the file's name and its content differ.

    Returns
    -------
    Checkpoint
        Its samples are read when they are asked for.

    Raises
    ------
    NotFoundError
        If there is no such file.
    DamagedDataError
        If it is empty, cut short, no regular file, an HTML page or a Git LFS pointer.
    SchemaMismatchError
        If it is no FedGFE checkpoint, if the safe reader refuses it, or if name and content tell
        different rounds and `round_from` does not say which counts.

    Notes
    -----
    Of objects whose class is neither a plain value nor a tensor only the class's name is kept.
    """
    path = Path(path)
    if round_from not in (None, *get_args(RoundFrom)):
        raise SchemaMismatchError(f"round_from: expected name or content, got {round_from!r}")
    source = torch_files.inspect(path)
    loaded = torch_files.load(source)
    content = loaded.content
    entries = embeddings(content, path)
    node, round_number, notes = origin(content, path, round_from)
    moment, late = timestamp(content.get("timestamp"))
    metadata, lost = plain_metadata(content.get("metadata"))
    kind = kind_of(metadata, entries)
    found, odd = survey(entries, node, kind)
    heard = sum(isinstance(item, Slot) and "audio" in item.places for item in found)
    if heard and not audio:
        odd.append(f"audio embeddings left out: {heard} records")
    return Checkpoint(
        path=path,
        node=node,
        round=round_number,
        timestamp=moment,
        metadata=metadata,
        kind=kind,
        audio=audio,
        notes=(*notes, *late, *lost, *odd, *unread(loaded.unknown)),
        nbytes=source.stamp[1],
        _source=source,
        _found=tuple(found),
    )


def images_folder(checkpoint: Checkpoint) -> str | None:
    """Return the name of the folder of the checkpoint's images, None where it tells none."""
    for slot in checkpoint._found:
        path = slot.extra.get("image_path") if isinstance(slot, Slot) else None
        if isinstance(path, str):
            folders = path.replace("\\", "/").split("/")[:-1]
            named = bool(folders) and folders[-1] not in ("", ".", "..", "output_images")
            return folder_name(folders[-1]) if named else None
    return None


def folder_name(name: str) -> str | None:
    """Return a folder's name, None for one that cannot be an experiment's."""
    try:
        return plain(name) if name.isprintable() and name else None
    except Unusable:
        return None


def own_shapes(checkpoint: Checkpoint, columns: Mapping[str, Shape] | None = None) -> list[Shapes]:
    """Return the shapes of the samples that have all that their kind needs, or just `columns`."""
    slots = [item for item in checkpoint._found if isinstance(item, Slot)]
    if columns is None:
        return [_shapes(slot) for slot in slots if _fits(slot, checkpoint.kind)]
    needed = {name: shape for name, shape in columns.items() if name != "audio"}
    return [shapes for slot in slots if needed.items() <= (shapes := _shapes(slot)).items()]


def first_shapes(checkpoint: Checkpoint) -> Shapes:
    """Return the shapes of the first sample that has all that its kind needs.

    Raises
    ------
    SchemaMismatchError
        If there is none.
    """
    complete = own_shapes(checkpoint)
    if not complete:
        needed = " and ".join(_needed(checkpoint.kind))
        raise SchemaMismatchError(
            f"{checkpoint.path}: expected a record with {needed}, got none"
            f" ({len(checkpoint._found)} records)"
        )
    return complete[0]


def audio_shape(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return the shape of the checkpoint's first audio embedding ``[frames, width]``."""
    for slot in checkpoint._found:
        if isinstance(slot, Slot) and len(slot.places.get("audio", ("", ()))[1]) == 2:
            frames, width = slot.places["audio"][1]
            return frames, width
    return None


def _needed(kind: str) -> dict[str, Shape]:
    return {"clip": ()} if kind == "sd" else {"t5": (), "clip": ()}


def _shapes(slot: Slot) -> Shapes:
    return {column: shape for column, (_, shape) in slot.places.items()}


def _fits(slot: Slot, kind: str) -> bool:
    shapes = _shapes(slot)
    return set(_needed(kind)) <= set(shapes) and (kind == "flux" or len(shapes["clip"]) == 2)


def _columns(slot: Slot, wanted: Mapping[str, Shape], audio: bool) -> list[str]:
    """Return the columns to read of a sample; audio is optional in every store."""
    names = [name for name in wanted if name != "audio"]
    return [*names, "audio"] if audio and "audio" in slot.places else names


def _check(
    slot: Slot,
    wanted: Mapping[str, Shape],
    columns: list[str],
    seen: set[tuple[str, str, int]],
) -> None:
    """Raise `Unusable` for a sample that cannot be taken; no value is read for that."""
    shapes = _shapes(slot)
    missing = [name for name in columns if name not in shapes]
    if missing:
        raise Unusable(f"no {' and no '.join(missing)}")
    for name in columns:
        if wanted.get(name) and shapes[name] != wanted[name]:
            got, expected = list(shapes[name]), list(wanted[name])
            raise Unusable(f"{name} has shape {got}, expected {expected}")
    if (slot.split, slot.class_name, slot.index) in seen:
        raise Unusable("same split, class and index as an entry before")


def _entry(slot: Slot, raw: Mapping[Any, Any], columns: list[str]) -> Entry:
    values = {name: _values(slot, raw, name) for name in columns}
    return Entry(
        split=slot.split,
        class_name=slot.class_name,
        index=slot.index,
        t5=values.get("t5"),
        clip=values["clip"],
        audio=values.get("audio"),
        sample_id=slot.sample_id,
        file_id=slot.file_id,
        image_filename=slot.image_filename,
        audio_path=slot.audio_path,
        extra=slot.extra,
    )


def _values(slot: Slot, raw: Mapping[Any, Any], column: str) -> torch.Tensor:
    """Copy one sample's tensor out of the file: float32, so that the mapping can go."""
    key, shape = slot.places[column]
    stored = as_tensor(raw[key], key)
    part = (stored if slot.row is None else stored[slot.row]).reshape(shape)
    values = _float32(part)
    if not np.isfinite(values).all():
        large = bool(torch.isfinite(part).all())
        raise Unusable(
            f"{column} has values {'beyond float32' if large else 'that are not finite'}"
        )
    return torch.from_numpy(values)


def _float32(part: torch.Tensor) -> np.ndarray:
    """Return a contiguous float32 copy; by numpy, as torch's threads get in each other's way."""
    if part.dtype is torch.bfloat16:
        high = part.contiguous().view(torch.int16).numpy().view(np.uint16)
        return (high.astype(np.uint32) << 16).view(np.float32)
    if part.dtype not in (torch.float16, torch.float32, torch.float64):
        part = part.float()
    with np.errstate(over="ignore"):
        return np.array(part.numpy(), np.float32, order="C")
