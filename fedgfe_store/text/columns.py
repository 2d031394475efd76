"""What text encoders give and what a store keeps of it: shapes, names, and one as the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.column import Column
from fedgfe_store.models.files import check_number
from fedgfe_store.models.model import Model
from fedgfe_store.schema import Metadata, Schema, TensorColumn

Values = Mapping[str, NDArray[Any]]
"""By the pipeline's argument: float32 ``[n, tokens, features]`` or ``[n, features]``, and masks as
bool ``[n, tokens]``."""

# Stores of these have the names that FedGFE gives them.
_OF_FEDGFE = ("flux", "sd")


def token_limit(model: Model) -> int:
    """Give the tokens of a sequence that the first tokenizer has; as a rule CLIP's 77."""
    return config_number(model, "tokenizer", "model_max_length", "tokenizer_config.json")


def encoder_schema(
    model: Model,
    *,
    tokens: int,
    clip_sequence: bool = False,
    columns: Mapping[str, TensorColumn] | None = None,
    metadata: Metadata | None = None,
) -> Schema:
    """Say what a model's text encoders give, from configurations.

    Parameters
    ----------
    model : Model
        A model with text encoders.
    tokens : int
        Tokens of a sequence; of Stable Diffusion the tokenizer says so instead.
    clip_sequence : bool
        FLUX: whether CLIP gives its sequence rather than the pooled vector.
    columns : mapping, optional
        Columns of a store by the pipeline's argument, whose names, data types and raggedness are
        taken over; by default arguments are the names, and masks bool.
    metadata : Metadata, optional
        Metadata of the schema.

    Raises
    ------
    NotFoundError
        If a configuration is not there.
    SchemaMismatchError
        If it does not tell the shape.
    """
    if model.kind in _OF_FEDGFE:
        width = config_number(model, "text_encoder", "hidden_size")
        length = token_limit(model)
        if model.kind == "sd":
            return Schema.sd(length, width=width, metadata=metadata)
        clip = (length, width) if clip_sequence else (width,)
        t5_width = config_number(model, "text_encoder_2", "d_model")
        return Schema.flux(tokens, width=t5_width, clip=clip, metadata=metadata)
    found = _columns(model, tokens)
    if columns is not None:
        # What the store has no column for stays, so that it is refused; but lengths of a ragged
        # sequence are a mask, too.
        is_ragged = columns[model.family.sequence.argument].ragged
        found = {
            argument: replace(columns[argument], shape=column.shape)
            if argument in columns
            else column
            for argument, column in found.items()
            if argument in columns or not (is_ragged and column.dtype == "bool")
        }
    return Schema.of(model.kind, *found.values(), metadata=metadata)


def _columns(model: Model, tokens: int) -> dict[str, TensorColumn]:
    family, found = model.family, {}
    is_ragged = any(column.kind == "lengths" for column in family.columns)
    for column in family.columns:
        name = column.argument
        if column.kind == "vector":
            found[name] = TensorColumn(name, (model.width(column),))
        elif column.kind == "mask":
            found[name] = TensorColumn(name, (tokens,), ("token",), dtype="bool")
        elif column.kind == "sequence":
            shape, axes = (tokens, model.width(column)), ("token", f"{name}_feature")
            found[name] = TensorColumn(name, shape, axes, ragged=is_ragged)
    return found


def store_columns(model: Model, schema: Schema) -> dict[str, str]:
    """Find the columns of a store that a model's text encoders fill, by the pipeline's argument.

    Columns of other widths count, too: whether they fit is another question.
    """
    if model.kind in _OF_FEDGFE:
        names = {column.argument: column.names[-1] for column in model.family.columns}
    else:
        try:
            return model.conditioning(schema)
        except SchemaMismatchError:
            names = {c.argument: c.argument for c in model.family.columns}
    return {argument: name for argument, name in names.items() if name in schema.columns}


def as_arrays(model: Model, found: Mapping[str, Any], tokens: int) -> dict[str, NDArray[Any]]:
    """Give what an encoder returned as arrays, masks among them.

    Parameters
    ----------
    model : Model
        The model.
    found : mapping
        By the pipeline's argument tensors ``[n, ...]``, lists of ``[length, features]`` or, of
        masks, None, where all tokens count.
    tokens : int
        What sequences that have a mask are padded to.

    Raises
    ------
    SchemaMismatchError
        If a value is missing or of another shape.
    """
    family, values = model.family, dict(found)
    is_masked = any(column.is_mask for column in family.columns)
    sequence = family.sequence.argument
    given = values.get(sequence)
    lengths = None
    if isinstance(given, list):
        lengths = torch.tensor([len(row) for row in given])
        given = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        values[sequence] = given
    arrays: dict[str, NDArray[Any]] = {}
    for column in family.columns:
        value = values.get(column.argument)
        if column.is_mask and isinstance(given, torch.Tensor):
            value = _mask(value, given, lengths)
        tensor = _returned(model, column, value)
        if column.is_mask or (column.argument == sequence and is_masked):
            tensor = _padded(tensor, tokens)
        tensor = tensor.bool() if column.is_mask else tensor.float()
        arrays[column.argument] = tensor.cpu().numpy()
    return arrays


def _mask(
    value: torch.Tensor | None, sequence: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    if lengths is not None:
        return torch.arange(sequence.shape[1]) < lengths[:, None]
    return sequence.new_ones(sequence.shape[:2]) if value is None else value


def _padded(value: torch.Tensor, tokens: int) -> torch.Tensor:
    missing = tokens - value.shape[1]
    if missing <= 0:
        return value
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], dim=1)


def _returned(model: Model, column: Column, value: Any) -> torch.Tensor:
    ranks = {"sequence": (3,), "vector": (2, 3)}.get(column.kind, (2,))
    if isinstance(value, torch.Tensor) and value.ndim in ranks:
        return value
    got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    raise SchemaMismatchError(
        f"text encoders of the model {model.name}: expected {column.argument} among what "
        f"encode_prompt returns, as the family {model.kind} declares, got {got}"
    )


def as_stored(values: Values, schema: Schema, names: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """Give encoded values as `AppendBatch.add` takes them.

    Parameters
    ----------
    values : mapping
        What `TextEncoders.encode` returns.
    schema : Schema
        The store's.
    names : mapping
        Name of the store's column by the pipeline's argument.
    """
    found: dict[str, NDArray[Any]] = {}
    for argument, name in names.items():
        column = schema.column(name)
        found[name] = values[argument].astype(column.dtype, copy=False)
        masks = [mask for mask in values.values() if mask.dtype == bool]
        if column.ragged and masks:
            found[f"length_{name}"] = masks[0].sum(axis=1)
    return found


def config_number(model: Model, part: str, key: str, name: str = "config.json") -> int:
    """Read a whole number of a part's configuration.

    Raises
    ------
    NotFoundError
        If there is no such configuration.
    SchemaMismatchError
        If it has no such number.
    """
    config = model.config(part, name)
    if key not in config and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # encoders of text and images have one of each
    check_number(config, key, str(model.folder / part / name))
    return int(config[key])
