"""Negative embeddings in files of their own: one tensor, or several by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.column import Column
from fedgfe_store.models.model import Model

_TENSOR_FILES = (".pt", ".pth", ".npy", ".safetensors")


def is_file(given: str) -> bool:
    """Whether what was given is a file rather than a prompt."""
    return Path(given).suffix in _TENSOR_FILES or os.path.isfile(given)


def read_file(path: Path, model: Model) -> dict[str, NDArray[Any]]:
    """Read negative embeddings, without a batch axis of one.

    Parameters
    ----------
    path : Path
        A file with one tensor, or with several named as the pipeline's arguments, with or
        without ``negative_``.
    model : Model
        Whose pipeline takes them.

    Returns
    -------
    dict
        By the pipeline's argument, without ``negative_``: float32, masks bool.

    Raises
    ------
    NotFoundError
        If there is no such file.
    SchemaMismatchError
        If it holds something else.
    """
    found = _read(path)
    family = model.family
    if isinstance(found, dict) and len(found) == 1:
        (name,) = found
        alone = _named(model, str(name)) is None
        found = found[name] if alone else found
    if isinstance(found, torch.Tensor):
        found = {family.sequence.argument: found}
    named: dict[str, NDArray[Any]] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        column = _named(model, str(name))
        if column is None or not isinstance(value, torch.Tensor):
            named = {}
            break
        named[column.argument] = _array(value, column, path)
    if not named:
        wanted = ", ".join(column.argument for column in family.columns)
        raise SchemaMismatchError(
            f"negative embeddings: expected one tensor in {path}, or tensors named {wanted}"
        )
    return named


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NotFoundError(f"negative embeddings: expected a file {path}, got none") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SchemaMismatchError(f"negative embeddings: cannot read {path}: {reason}") from error


def _named(model: Model, name: str) -> Column | None:
    plain = name.removeprefix("negative_")
    return next((column for column in model.family.columns if plain in column.names), None)


def _array(value: torch.Tensor, column: Column, path: Path) -> NDArray[Any]:
    rank = 2 if column.kind == "sequence" else 1
    if value.ndim == rank + 1 and len(value) == 1:
        value = value[0]
    if value.ndim != rank:
        axes = {"sequence": "[tokens, features]", "vector": "[features]"}
        raise SchemaMismatchError(
            f"negative embeddings ({path}): expected {column.argument} "
            f"{axes.get(column.kind, '[tokens]')}, got {list(value.shape)}"
        )
    value = value.detach()
    return (value.bool() if column.is_mask else value.float()).contiguous().numpy()
