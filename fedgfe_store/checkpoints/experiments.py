"""Which store a checkpoint belongs in: its experiment, and the schema that its samples fit."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from fedgfe_store.checkpoints.header import classes
from fedgfe_store.checkpoints.ledger import Ledger
from fedgfe_store.checkpoints.reading import (
    Checkpoint,
    audio_shape,
    first_shapes,
    folder_name,
    images_folder,
    own_shapes,
    read_checkpoint,
)
from fedgfe_store.common.location import Location
from fedgfe_store.errors import ConflictError, FedgfeStoreError, SchemaMismatchError
from fedgfe_store.schema import Metadata, Precision, Schema

_NO_NAMES = {"", "embeddings", "checkpoints", "checkpoint", "ckpts", "ckpt", "output_images"}
"""Folders that are called like this in every experiment."""


class Experiment:
    """The experiment of a store, by which checkpoints of another one are told.

    A checkpoint is of the experiment that the folder of its images names, or its own folder: the
    two may have different names. One without images, such as the server's, is of that of the files
    beside it.

    Parameters
    ----------
    store_path : Path or Address
        The store.
    name : str or None
        The experiment that it holds, None where nobody knows.
    new : bool
        Whether the store is still to be made, of the first file's experiment.
    ledger : Ledger
        The files that it has taken in.
    """

    def __init__(
        self, store_path: Location, name: str | None, ledger: Ledger, *, new: bool
    ) -> None:
        self._store, self._name, self._new = store_path, name, new
        lines = ledger.lines().values() if name is not None else ()
        self._folders = {ledger.path_of(line).parent for line in lines}

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another experiment; the files beside it belong to this one then.

        Raises
        ------
        ConflictError
            If it is of another one; both are named.
        """
        folder = checkpoint.path.parent.resolve()
        images = images_folder(checkpoint)
        known = {self._name, images or folder.name} & {None, *_NO_NAMES}
        beside = images is None and folder in self._folders
        if not (known or beside or self._name in (images, folder.name)):
            raise ConflictError(
                f"{checkpoint.path}: of the experiment {images or folder.name!r}, by the folder of "
                f"its {'images' if images else 'checkpoints'}, but {self._store} holds "
                f"{self._name!r}: import it into a store of its own, or say that it belongs here "
                f"with `import --other-experiment`"
            )
        self._folders.add(folder)

    def check_folders(self, files: Iterable[Path], *, new_only: bool) -> None:
        """Refuse files if the first that can be read in a folder is of another experiment.

        Raises
        ------
        ConflictError
            As for `check`.
        """
        for folder, group in groupby(files, key=lambda path: path.parent):
            if new_only and folder.resolve() in self._folders:
                continue  # each file that is new is checked when it is read
            first = next(filter(None, map(_opened, group)), None)
            if first is not None:
                self.check(first)
                if self._new:
                    self._name, self._new = experiment_name(first), False


def _opened(path: Path) -> Checkpoint | None:
    try:
        # Its experiment is asked for: that its name tells another round must not hide it here.
        return read_checkpoint(path, round_from="content")
    except (FedgfeStoreError, OSError):  # reported when the file's turn comes
        return None


def experiment_name(checkpoint: Checkpoint) -> str | None:
    """Return the experiment's name: the folder of its images, else of the checkpoint.

    Images that lie in ``output_images`` itself name no experiment.
    """
    return images_folder(checkpoint) or folder_name(checkpoint.path.resolve().parent.name)


def schema_of(
    checkpoint: Checkpoint, *, audio: bool = False, precision: Precision = "float32"
) -> Schema:
    """Return the schema of a store for this checkpoint, from its first complete sample.

    Parameters
    ----------
    checkpoint : Checkpoint
        An opened checkpoint.
    audio : bool
        Add the optional column ``audio``, where the checkpoint has any.
    precision : {"float32", "bfloat16"}
        How the store keeps values.

    Raises
    ------
    SchemaMismatchError
        If no sample has the tensors that its kind needs.
    """
    return schema_with_audio(checkpoint, audio_shape(checkpoint) if audio else None, precision)


def schema_with_audio(
    checkpoint: Checkpoint, audio: tuple[int, int] | None, precision: Precision
) -> Schema:
    """Return `schema_of` with an audio column of a shape found elsewhere."""
    metadata = Metadata(
        experiment=experiment_name(checkpoint),
        diffusion_type=checkpoint.kind,
        classes=classes(checkpoint.metadata),
    )
    if checkpoint.columns:
        return Schema.of(
            checkpoint.kind, *checkpoint.columns, precision=precision, metadata=metadata
        )
    shapes = first_shapes(checkpoint)
    clip = shapes["clip"]
    if checkpoint.kind == "sd":
        return Schema.sd(
            clip[0], width=clip[1], audio=audio, precision=precision, metadata=metadata
        )
    tokens, width = shapes["t5"]
    return Schema.flux(
        tokens, width=width, clip=clip, audio=audio, precision=precision, metadata=metadata
    )


def check_fit(checkpoint: Checkpoint, schema: Schema) -> None:
    """Refuse a file none of whose complete samples fits the store."""
    own = own_shapes(checkpoint)
    if own and not own_shapes(checkpoint, schema):
        got = ", ".join(f"{k} {list(shape)}" for k, shape in own[0].items() if k != "audio")
        raise SchemaMismatchError(
            f"{checkpoint.path}: expected tensors as in the store ({schema.describe()}), got"
            f" {checkpoint.kind}: {got}"
        )
