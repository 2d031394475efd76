"""Reference text embeddings: prompts about classes, encoded into a store as node ``text``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedgfe_store.common.location import Given, Location, location
from fedgfe_store.errors import ConflictError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import choose_device, choose_dtype
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.model import Model
from fedgfe_store.records import TEXT_NODE, TEXT_ROUND, TEXT_SPLIT, RecordKey
from fedgfe_store.schema import Metadata, Schema
from fedgfe_store.storage.engines import check_target
from fedgfe_store.storage.sifting import IfExists
from fedgfe_store.store import EmbeddingStore
from fedgfe_store.text.columns import encoder_schema, store_columns, token_limit
from fedgfe_store.text.encoders import (
    check_encoders,
    default_length,
    encoder_identity,
)

Status = Literal["missing", "done", "other"]
Report = Callable[[str], object]

_FLUX_TOKENS = 17
_FIELD = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Reference:
    """One reference embedding.

    Parameters
    ----------
    key : RecordKey
        Its record: node ``text``, round 0, split ``reference``; index is the prompt's number.
    prompt : str
        What is encoded.
    status : {"missing", "done", "other"}
        What the store has: nothing, this, or something else under the same key.
    reason : str
        For ``"other"``: what the store has.
    """

    key: RecordKey
    prompt: str
    status: Status = "missing"
    reason: str = ""


@dataclass(frozen=True)
class EncodingPlan:
    """What will be encoded and where it goes, decided before any weights are loaded.

    Parameters
    ----------
    path : Path or Address
        The store.
    schema : Schema
        The store's, or that of the store that will be made.
    exists : bool
        Whether the store is there.
    model : Model
        Whose text encoders are used.
    encoder : str
        Their identity, see `encoder_identity`.
    dtype : {"float32", "bfloat16", "float16"}
        What they compute in.
    device : str
        Where.
    references : tuple of Reference
        All that was asked for.
    if_exists : {"error", "replace", "skip"}
        What becomes of those whose key the store has with something else.
    columns : mapping
        Name of the store's column by the argument of the model's pipeline.
    """

    path: Location
    schema: Schema
    exists: bool
    model: Model
    encoder: str
    dtype: str
    device: str
    references: tuple[Reference, ...]
    if_exists: IfExists
    columns: Mapping[str, str]

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.schema.columns[self.columns[self.model.family.sequence.argument]][0]

    @property
    def todo(self) -> tuple[Reference, ...]:
        """References to encode."""
        wanted = ("missing", "other") if self.if_exists == "replace" else ("missing",)
        return tuple(item for item in self.references if item.status in wanted)

    def extra(self, prompt: str) -> dict[str, str]:
        """Give what a record says of its origin."""
        return {
            "prompt": prompt,
            "model": self.model.name,
            "revision": self.model.revision,
            "encoder": self.encoder,
            "dtype": self.dtype,
        }


def plan_references(
    path: Given,
    prompts: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    model: str | None = None,
    diffusion_type: str | None = None,
    family: str | Path | None = None,
    max_sequence_length: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    if_exists: IfExists = "error",
    report: Report = lambda remark: None,
) -> EncodingPlan:
    """Decide what to encode, without loading or writing anything.

    Parameters
    ----------
    path : path-like
        The store; it need not exist.
    prompts : sequence of str
        Each becomes one record a class, its position their index; ``{class}`` in it stands for
        the class.
    classes : sequence of str, optional
        By default all of the store.
    model : str, optional
        ``"tiny"`` has no text encoders; see `resolve_model` for what counts without one.
    diffusion_type : str, optional
        Family of the model, such as ``"flux"``; by default the store's, and for one that is to be
        made the model's own.
    family : path-like, optional
        File that declares a family besides those that there are.
    max_sequence_length : int, optional
        Tokens of a sequence, as the model's pipeline counts them; by default the store's, and for
        one that is to be made the pipeline's own; 17 for FLUX.
    device : str, optional
        By default a GPU where there is one.
    dtype : str, optional
        By default float32 on the CPU and bfloat16 on a GPU; stores keep either exactly as float32.
    if_exists : {"error", "replace", "skip"}
        What to do about references that the store has from another prompt, encoder or dtype.
        Those that it has from the same are never encoded again.
    report : callable
        Gets remarks for the user.

    Returns
    -------
    EncodingPlan
        The plan, for `encode_references`.

    Raises
    ------
    NotFoundError
        If there is no such model, or it has no text encoders.
    SchemaMismatchError
        If prompts or classes are of no use, or the encoders do not fit the store: their shapes,
        or the identity that its metadata names.
    ConflictError
        If the store has other references and `if_exists` is ``"error"``.
    """
    if if_exists not in get_args(IfExists):
        raise SchemaMismatchError(f"if_exists: expected error, replace or skip, got {if_exists!r}")
    path = location(path)
    check_target(path)
    store = _open_if_there(path)
    kind = diffusion_type or (store.schema.kind if store else None)
    names = _class_names(classes, store)
    keys = _keys(prompts, names)
    stored = store.schema.metadata.model if store and store.schema.kind == kind else None
    chosen = resolve_model(model, kind=None if family else kind, stored=stored, declared=family)
    check_encoders(chosen, fetch=False)
    encoder = encoder_identity(chosen)
    assert encoder is not None
    schema = _fitting(chosen, encoder, path, store, names, max_sequence_length)
    device = choose_device(device)
    dtype, remark = choose_dtype(dtype, device)
    if remark:
        report(remark)
    found = _found(store, names) if store else {}
    asked = {"encoder": encoder, "dtype": dtype}
    references = [_compared(key, text, asked, found.get(key)) for key, text in keys.items()]
    if if_exists == "error":
        _refuse_others(references, path)
    return EncodingPlan(
        path, schema, store is not None, chosen, encoder, dtype, device, tuple(references),
        if_exists, store_columns(chosen, schema),
    )  # fmt: skip


def _open_if_there(path: Location) -> EmbeddingStore | None:
    try:
        return EmbeddingStore.open(path)
    except NotFoundError:
        return None


def _class_names(classes: Sequence[str] | None, store: EmbeddingStore | None) -> list[str]:
    if classes is None:
        classes = store.schema.metadata.classes if store else ()
        if not classes:
            raise SchemaMismatchError(
                "class: expected names, since there is no store that names any, got none"
            )
    names = list(dict.fromkeys(classes))
    if not names or not all(names):
        raise SchemaMismatchError(f"class: expected names, got {list(classes)!r}")
    return names


def _keys(prompts: Sequence[str], names: list[str]) -> dict[RecordKey, str]:
    if not prompts:
        raise SchemaMismatchError("prompt: expected at least one, got none")
    for prompt in prompts:
        fields = _FIELD.findall(prompt)
        if set(fields) - {"class"}:
            raise SchemaMismatchError(f"prompt: expected no field but {{class}}, got {prompt!r}")
        if len(names) > 1 and not fields:
            raise SchemaMismatchError(
                f"prompt: expected {{class}} in it for {len(names)} classes, got {prompt!r}"
            )
    return {
        RecordKey(TEXT_NODE, TEXT_ROUND, TEXT_SPLIT, name, index): prompt.replace("{class}", name)
        for name in names
        for index, prompt in enumerate(prompts)
    }


def _fitting(
    model: Model,
    encoder: str,
    path: Location,
    store: EmbeddingStore | None,
    names: list[str],
    length: int | None,
) -> Schema:
    """Return the store's schema if the encoders fit it, or that of the store to be made."""
    named = store_columns(model, store.schema) if store else {}
    there = {argument: store.schema.column(n) for argument, n in named.items()} if store else {}
    sequence = there.get(model.family.sequence.argument)
    besides = model.family.encode.besides
    stored = sequence.shape[0] - besides if sequence else None
    if sequence is not None and length not in (None, stored):
        raise SchemaMismatchError(
            f"max_sequence_length: expected {stored}, the tokens of {sequence.name} in {path}, got "
            f"{length}"
        )
    made = encoder_schema(
        model,
        tokens=(length or stored or _own_length(model)) + besides,
        clip_sequence=len(store.schema.columns.get("clip", ())) == 2 if store else False,
        columns=there if sequence else None,
        metadata=Metadata(
            diffusion_type=model.kind,
            classes=tuple(names),
            encoder=encoder,
            model=model.name if model.from_hub else None,
        ),
    )
    if store is not None:
        store.schema.check_fits(made, f"text encoders of the model {model.name}")
        return store.schema
    found = made.columns[store_columns(model, made)[model.family.sequence.argument]][0] - besides
    if length not in (None, found):
        raise SchemaMismatchError(
            f"max_sequence_length: expected {found}, which the tokenizer of {model.name} gives, "
            f"got {length}"
        )
    return made


def _own_length(model: Model) -> int:
    """Give the tokens that nobody asked for: few for FLUX, whose adapters are trained with few."""
    if model.kind == "flux":
        return _FLUX_TOKENS
    return default_length(model) if model.family.encode.length else token_limit(model)


def _found(store: EmbeddingStore, names: list[str]) -> dict[RecordKey, dict[str, Any]]:
    """Return what the references in the store say of their origin."""
    selection = store.select(node=TEXT_NODE, round=TEXT_ROUND, split=TEXT_SPLIT, class_name=names)
    extras = [json.loads(text) if text else {} for text in selection.records["extra"]]
    return {
        key: extra if isinstance(extra, dict) else {}
        for key, extra in zip(selection.keys(), extras, strict=True)
    }


def _compared(
    key: RecordKey, prompt: str, asked: dict[str, str], extra: dict[str, Any] | None
) -> Reference:
    if extra is None:
        return Reference(key, prompt)
    for name, value in {"prompt": prompt, **asked}.items():
        if extra.get(name) != value:
            has = f"{name} {extra[name]!r}" if name in extra else f"no {name}"
            return Reference(key, prompt, "other", f"{has} there, {value!r} now")
    return Reference(key, prompt, "done")


def _refuse_others(references: list[Reference], path: Location) -> None:
    others = [item for item in references if item.status == "other"]
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConflictError(
            f"{others[0].key} is in {path} already ({others[0].reason}){more}; "
            "if_exists='replace' encodes again, 'skip' keeps what is there"
        )
