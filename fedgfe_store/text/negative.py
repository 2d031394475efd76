"""Negative embeddings: given as a file, kept in the store, or encoded once from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement
from fedgfe_store.text.encoders import TextEncoders, encoder_identity
from fedgfe_store.text.negative_files import is_file, read_file
from fedgfe_store.text.negative_records import append_record, kept
from fedgfe_store.text.negative_values import Negative

if TYPE_CHECKING:
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.selection import Selection

__all__ = ["Negative", "find_negative"]


def find_negative(
    model: Model,
    selection: Selection | Derived,
    columns: Mapping[str, str],
    given: str | None,
    *,
    keep: bool,
    report: Callable[[str], object],
) -> Negative:
    """Find negative embeddings: a file's, else those of a prompt from the store or the encoder.

    Parameters
    ----------
    model : Model
        The model, whose own text encoders encode the prompt if the store does not have it.
    selection : Selection
        The records, whose store keeps what was encoded, as a record of node ``text``.
    columns : mapping
        Name of the store's column by the argument of the model's pipeline.
    given : str, optional
        A file (``.pt``, ``.npy`` or ``.safetensors`` with one tensor, or several named as the
        pipeline's arguments) or a prompt; by default the empty prompt.
    keep : bool
        Whether to keep in the store what is encoded.
    report : callable
        Gets remarks for the user.

    Raises
    ------
    NotFoundError
        If there is no such file, or neither an encoder nor embeddings in the store.
    SchemaMismatchError
        If a shape is another one than the records'.
    DamagedDataError
        If what the store keeps is damaged.
    """
    if given is not None and is_file(given):
        negative = Negative.of(read_file(Path(given), model), given)
    else:
        negative = _of_prompt(model, selection, columns, given or "", keep=keep, report=report)
    _check_shapes(model, negative, selection, columns)
    return negative


def _check_shapes(
    model: Model, negative: Negative, selection: Selection | Derived, columns: Mapping[str, str]
) -> None:
    """Refuse negatives that do not go with the records: pipelines put them side by side."""
    family, schema = model.family, selection.schema
    is_list = any(column.kind == "lengths" for column in family.columns)
    tokens: int | None = schema.columns[columns[family.sequence.argument]][0]
    if (is_list or family.apart) and family.sequence.argument in negative.values:
        tokens = len(negative.values[family.sequence.argument])
    for column in family.columns:
        width = [] if column.is_mask else [model.width(column)]
        expected = [] if column.kind == "vector" else [tokens]
        value = negative.values.get(column.argument)
        if value is None and column.is_mask:
            continue
        shape = [*expected, *width]
        got = None if value is None else list(value.shape)
        if got == shape and value is not None and column.is_mask and not column.takes(value):
            raise SchemaMismatchError(
                f"negative embeddings ({negative.source}): expected a {column.argument} of ones "
                f"and then zeros, whose number {model.kind} takes as a length, got another"
            )
        if got == shape:
            continue
        is_other_length = (
            column.kind == "sequence"
            and got is not None
            and len(got) == 1 + len(width)
            and got[1:] == width
        )
        hint = f"; encode the negative prompt to {tokens} tokens, too" if is_other_length else ""
        raise SchemaMismatchError(
            f"negative embeddings ({negative.source}): expected {column.argument} {shape} like the "
            f"records', got {got}{hint}"
        )


def _of_prompt(
    model: Model,
    selection: Selection | Derived,
    columns: Mapping[str, str],
    prompt: str,
    *,
    keep: bool,
    report: Callable[[str], object],
) -> Negative:
    encoder = encoder_identity(model)
    found = kept(model, selection, columns, prompt, encoder)
    if found is not None:
        return found
    if encoder is None or not model.fetch(*model.encoder_parts):
        raise NotFoundError(
            f"the model {model.name} needs negative embeddings or guidance <= "
            f"{model.family.above:g}: expected them in {selection.location}, a text encoder in "
            f"{model.folder}, or --negative FILE, got none of them"
        )
    tokens = selection.schema.columns[columns[model.family.sequence.argument]][0]
    with TextEncoders.load(model, Placement("float32", "cpu")) as encoders:
        encoded = encoders.encode([prompt], tokens=tokens, negative=True)
    values = {argument: value[0] for argument, value in encoded.items()}
    fresh = Negative.of(values, f"prompt {prompt!r}, encoded")
    if not keep:
        return fresh
    remark = append_record(model, selection, columns, fresh, prompt, encoder)
    if remark:
        report(f"negative embeddings are not kept in {selection.location}: {remark}")
        return fresh
    # As the store rounds them, and as runs beside this one have them.
    again = kept(model, selection, columns, prompt, encoder)
    return fresh if again is None else again
