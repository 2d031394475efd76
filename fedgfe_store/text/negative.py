"""Negative embeddings: given as a file, kept in the store, or encoded once from a prompt."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement
from fedgfe_store.storage import files
from fedgfe_store.text.encoders import TextEncoders, encoder_identity

_TENSOR_FILES = (".pt", ".pth", ".npy", ".safetensors")
_DIMS = ("negative_token", "negative_feature")


@dataclass(frozen=True, eq=False)
class Negative:
    """What classifier-free guidance leads away from.

    Parameters
    ----------
    values : ndarray
        float32 ``[tokens, features]``.
    digest : str
        xxh3 of its bytes, 16 hex digits.
    source : str
        Where it is from, for people.
    """

    values: NDArray[np.float32]
    digest: str
    source: str

    @classmethod
    def of(cls, values: NDArray[np.float32], source: str) -> Self:
        """Return checked embeddings, without a batch axis of one."""
        if values.ndim == 3 and len(values) == 1:
            values = values[0]
        if values.ndim != 2 or not np.isfinite(values).all():
            raise SchemaMismatchError(
                f"negative embeddings ({source}): expected finite values [tokens, features], "
                f"got {list(values.shape)}"
            )
        values = np.ascontiguousarray(values, np.float32)
        return cls(values, xxhash.xxh3_64_hexdigest(values.data), source)


def find_negative(
    model: Model,
    store: Path,
    given: str | None,
    shape: tuple[int, ...],
    *,
    keep: bool,
    report: Callable[[str], object],
) -> Negative:
    """Find negative embeddings: a file's, else those of a prompt from the store or the encoder.

    Parameters
    ----------
    model : Model
        The model, whose own text encoder encodes the prompt if the store does not have it.
    store : Path
        The store, which keeps what was encoded.
    given : str, optional
        A file (``.pt``, ``.npy`` or ``.safetensors`` with one tensor) or a prompt; by default the
        empty prompt.
    shape : tuple of int
        Shape of a record's embeddings, which these must have too.
    keep : bool
        Whether to keep in the store what is encoded.
    report : callable
        Gets remarks for the user.

    Raises
    ------
    NotFoundError
        If there is no such file, or neither an encoder nor embeddings in the store.
    SchemaMismatchError
        If the shape is another one.
    DamagedDataError
        If what the store keeps is damaged.
    """
    if given is not None and (Path(given).suffix in _TENSOR_FILES or os.path.isfile(given)):
        negative = _read_file(Path(given))
    else:
        negative = _of_prompt(model, store, given or "", keep=keep, report=report)
    if negative.values.shape != shape:
        raise SchemaMismatchError(
            f"negative embeddings ({negative.source}): expected {list(shape)} like the records', "
            f"got {list(negative.values.shape)}"
        )
    return negative


def _read_file(path: Path) -> Negative:
    import torch

    try:
        if path.suffix == ".npy":
            found: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NotFoundError(f"negative embeddings: expected a file {path}, got none") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SchemaMismatchError(f"negative embeddings: cannot read {path}: {reason}") from error
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if not isinstance(found, torch.Tensor):
        raise SchemaMismatchError(f"negative embeddings: expected one tensor in {path}")
    return Negative.of(found.detach().float().numpy(), str(path))


def _of_prompt(
    model: Model, store: Path, prompt: str, *, keep: bool, report: Callable[[str], object]
) -> Negative:
    encoder = encoder_identity(model)
    kept = _kept(store, prompt, encoder)
    if kept is not None:
        return kept
    if encoder is None or not model.fetch(*model.encoder_parts):
        raise NotFoundError(
            f"the model {model.name} needs negative embeddings or guidance <= 1: expected them in "
            f"{store}, a text encoder in {model.folder}, or --negative FILE, got none of them"
        )
    with TextEncoders.load(model, Placement("float32", "cpu")) as encoders:
        values = encoders.encode([prompt])["clip"]
    negative = Negative.of(values, f"prompt {prompt!r}, encoded")
    if keep:
        try:
            _keep(store, negative, prompt, encoder)
        except OSError as error:
            report(f"negative embeddings are not kept in {store}: {error}")
    return negative


def _kept(store: Path, prompt: str, encoder: str | None) -> Negative | None:
    """Return what the store keeps; a model without encoder takes the only one there is."""
    if encoder is not None:
        folder = store / _array_name(prompt, encoder)
        return _read_kept(folder) if folder.is_dir() else None
    found = [_read_kept(folder) for folder in sorted(store.glob("negative_*"))]
    matching = [negative for negative in found if negative.source == _source(prompt)]
    return matching[0] if len(matching) == 1 else None


def _array_name(prompt: str, encoder: str) -> str:
    return f"negative_{xxhash.xxh3_64_hexdigest(json.dumps([prompt, encoder]).encode())}"


def _source(prompt: str) -> str:
    return f"prompt {prompt!r}, kept in the store"


def _read_kept(folder: Path) -> Negative:
    import zarr

    try:
        array = zarr.open_array(folder, mode="r")
        values, known = np.asarray(array[:], np.float32), dict(array.attrs)
        negative = Negative.of(values, _source(str(known["prompt"])))
        sound = negative.digest == known["digest"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedDataError(_damage(folder, str(error))) from error
    if not sound:
        raise DamagedDataError(_damage(folder, "its digest does not fit"))
    return negative


def _damage(folder: Path, reason: str) -> str:
    return f"{folder} is damaged ({reason}); remove it, and the prompt is encoded again"


def _keep(store: Path, negative: Negative, prompt: str, encoder: str) -> None:
    """Put the embeddings into the store as an array of their own, whole or not at all.

    Other arrays of a store's group are kept by every commit, and readers of ours never see them.
    """
    import zarr

    temporary = store.parent / f".{store.name}.{uuid.uuid4().hex}.tmp"
    try:
        array = zarr.create_array(
            temporary,
            shape=negative.values.shape,
            dtype="float32",
            dimension_names=_DIMS,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={"prompt": prompt, "encoder": encoder, "digest": negative.digest},
        )
        array[:] = negative.values
        files.sync_tree(temporary)
        try:
            os.rename(temporary, store / _array_name(prompt, encoder))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return  # another run has kept the same meanwhile
        files.sync_folder(store)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
