"""Reading legacy FedGFE `.pt` checkpoints: safely, lazily, whatever their layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from fedgfe_store.checkpoints import torch_files
from fedgfe_store.checkpoints.columns import (
    check_sample,
    columns_of,
    is_complete,
    named_columns,
    needed,
    shapes_of,
)
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
from fedgfe_store.checkpoints.samples import Entry, entry_of
from fedgfe_store.common.plain import Unusable, plain
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.schema import Kind, Schema, TensorColumn
from fedgfe_store.shapes import Shape

Shapes = dict[str, Shape]


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
    kind : str
        From ``diffusion_type``, else ``"flux"`` where there is a T5 tensor.
    columns : tuple of TensorColumn
        All columns of a checkpoint that declares them, or whose tensors are called as a pipeline's
        arguments; else empty.
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
    columns: tuple[TensorColumn, ...]
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

    def read(self, schema: Schema | None = None) -> Iterator[Entry | Skipped]:
        """Read the samples one at a time, in file order.

        A file in torch's zip format is mapped, and little of it stays in memory, whatever its
        size; the older format is loaded as a whole.

        Parameters
        ----------
        schema : Schema, optional
            Whose columns a sample must have. By default the checkpoint's own, and T5 and CLIP of
            any shape.

        Yields
        ------
        Entry or Skipped
            A sample, in memory of its own, or why it is left out: a tensor that is missing, of
            another shape or not finite, or a sample that came before. Audio that is missing leaves
            no sample out.

        Raises
        ------
        DamagedDataError
            If the file changed since it was opened, or is damaged.
        """
        for item in Opened(self, torch_files.load(self._source)).read(schema):
            yield item.copied() if isinstance(item, Entry) else item

    def verify(self) -> None:
        """Compare the file's bytes with the checksums that torch wrote into it.

        Raises
        ------
        DamagedDataError
            If they differ.
        """
        torch_files.verify(self._source)


@dataclass(frozen=True)
class Opened:
    """A checkpoint with what was loaded of its file, so that it is unpickled once.

    Parameters
    ----------
    checkpoint : Checkpoint
        What is known of it.
    loaded : Loaded
        What is in the file, which stays mapped as long as this is there.
    """

    checkpoint: Checkpoint
    loaded: torch_files.Loaded

    def read(self, schema: Schema | None = None) -> Iterator[Entry | Skipped]:
        """Read the samples as `Checkpoint.read` does; their tensors may lie in the mapped file.

        Raises
        ------
        DamagedDataError
            If the file changed meanwhile, at the end.
        """
        checkpoint = self.checkpoint
        wanted = (
            needed(checkpoint.kind, checkpoint.columns)
            if schema is None
            else {t.name: t for t in schema.tensors}
        )
        raw = checkpoint._unpack(self.loaded.content, checkpoint.path)
        seen = set[tuple[str, str, int]]()
        for slot in checkpoint._found:
            if isinstance(slot, Skipped):
                yield slot
                continue
            columns = columns_of(slot, wanted, audio=checkpoint.audio)
            try:
                check_sample(slot, wanted, columns, seen)
                nbytes = 4 * sum(math.prod(slot.places[name][1]) for name in columns)
                self.loaded.mapped.pass_by(nbytes)
                entry = entry_of(slot, raw[slot.position], columns, wanted)
            except Unusable as reason:
                yield Skipped(str(reason), slot.position, slot.what)
            else:
                seen.add((slot.split, slot.class_name, slot.index))
                yield entry
        self.loaded.make_sure()


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
    return opened(torch_files.inspect(Path(path)), audio=audio, round_from=round_from).checkpoint


def opened(
    source: torch_files.Source, *, audio: bool = False, round_from: RoundFrom | None = None
) -> Opened:
    """Open a file that was looked at, as `read_checkpoint` does, and keep what was loaded."""
    if round_from not in (None, *get_args(RoundFrom)):
        raise SchemaMismatchError(f"round_from: expected name or content, got {round_from!r}")
    path = source.path
    loaded = torch_files.load(source)
    content = loaded.content
    entries = embeddings(content, path)
    node, round_number, notes = origin(content, path, round_from)
    moment, late = timestamp(content.get("timestamp"))
    metadata, lost = plain_metadata(content.get("metadata"))
    columns = named_columns(metadata, entries)
    kind, found, odd = _surveyed(entries, node, kind_of(metadata, columns), columns)
    heard = sum(isinstance(item, Slot) and "audio" in item.places for item in found)
    if heard and not audio:
        odd.append(f"audio embeddings left out: {heard} records")
    checkpoint = Checkpoint(
        path=path,
        node=node,
        round=round_number,
        timestamp=moment,
        metadata=metadata,
        kind=kind,
        columns=columns,
        audio=audio,
        notes=(*notes, *late, *lost, *odd, *unread(loaded.unknown)),
        nbytes=source.stamp[1],
        _source=source,
        _found=tuple(found),
    )
    return Opened(checkpoint, loaded)


def _surveyed(
    entries: list[Any], node: str, said: Kind | None, columns: tuple[TensorColumn, ...]
) -> tuple[Kind, list[Slot | Skipped], list[str]]:
    """Return which conditioning the entries are, where nothing says so by what they hold."""
    found, odd = survey(entries, node, said or "flux", columns)
    if said is not None:
        return said, found, odd
    if any(isinstance(item, Slot) and "t5" in item.places for item in found):
        return "flux", found, odd
    return "sd", *survey(entries, node, "sd", columns)


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


def own_shapes(checkpoint: Checkpoint, schema: Schema | None = None) -> list[Shapes]:
    """Return the shapes of the samples that have all that their kind needs, or `schema` has."""
    slots = [item for item in checkpoint._found if isinstance(item, Slot)]
    wanted = needed(checkpoint.kind, checkpoint.columns)
    if schema is not None:
        wanted = {t.name: t for t in schema.tensors}
    complete = [slot for slot in slots if is_complete(slot, wanted)]
    if schema is None and checkpoint.kind == "sd" and not checkpoint.columns:
        complete = [slot for slot in complete if len(slot.places["clip"][1]) == 2]
    return [shapes_of(slot) for slot in complete]


def first_shapes(checkpoint: Checkpoint) -> Shapes:
    """Return the shapes of the first sample that has all that its kind needs.

    Raises
    ------
    SchemaMismatchError
        If there is none.
    """
    complete = own_shapes(checkpoint)
    if not complete:
        names = " and ".join(needed(checkpoint.kind, checkpoint.columns))
        raise SchemaMismatchError(
            f"{checkpoint.path}: expected a record with {names}, got none"
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
