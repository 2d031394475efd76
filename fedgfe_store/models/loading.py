"""Loading models: quietly, whole, and with one line where that does not work."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import ERROR
from typing import Any

import torch

from fedgfe_store.errors import FedgfeStoreError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import first_line, is_out_of_memory
from fedgfe_store.models.model import Model

# What pipelines do to images besides making them, where a package for it is installed.
_SWITCHES = ("requires_safety_checker", "add_watermarker")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep loading bars, remarks on components left out and tries of a hub off the terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        from diffusers.utils import logging
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging

    logs = (logging, transformers_logging)
    before = [(log, log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    of_hub = hub_logging.get_verbosity()
    hub_logging.set_verbosity(ERROR)
    for log in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(of_hub)
        for log, shown, level in before:
            log.set_verbosity(level)
            if shown:
                log.enable_progress_bar()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Name a model in whatever diffusers, transformers and torch raise of it.

    Files that anybody may have written make them raise anything. What is said on purpose, and that
    memory is not enough, is left as it is.

    Parameters
    ----------
    what : str
        The model and what is not possible, such as ``"model /a/b: vae cannot be loaded"``.

    Raises
    ------
    NotFoundError
        If a file is not there or not to be read.
    SchemaMismatchError
        If it is not what is expected.
    """
    try:
        yield
    except FedgfeStoreError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = NotFoundError if isinstance(error, OSError) else SchemaMismatchError
        raise kind(f"{what}: {first_line(error)}") from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Load quietly; say of what cannot be loaded which it is, see `naming`."""
    with naming(f"{what} cannot be loaded"), quiet_loading():
        yield


def load_part(model: Model, part: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load a denoising network, a decoder or a text encoder.

    A pipeline that loads its parts itself makes up weights that are missing.

    Parameters
    ----------
    model : Model
        The model, weights on disk.
    part : str
        Such as ``"vae"``.
    dtype : torch.dtype
        What to cast the weights to.
    **options
        More of ``from_pretrained``.

    Returns
    -------
    torch.nn.Module
        Of the class that the family names for an encoder, and the configuration for a network.

    Raises
    ------
    NotFoundError, SchemaMismatchError
        If a file is missing or not what is expected, or weights are missing.
    """
    with loading(f"model {model.folder}: {part}"):
        loaded, found = _class_of(model, part).from_pretrained(
            os.fspath(model.folder),
            subfolder=part,
            variant=model.weights(part).variant,
            dtype=dtype,
            local_files_only=True,
            # They are told below; those of quantized weights are diffusers' own business.
            ignore_mismatched_sizes="quantization_config" not in options,
            output_loading_info=True,
            **options,
        )
        refuse_incomplete(f"model {model.folder}: {part}", found)
    return loaded


def _class_of(model: Model, part: str) -> Any:
    import diffusers
    import transformers

    if part in model.family.encoders:
        return getattr(transformers, model.family.encoders[part])
    name = model.config(part).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    raise SchemaMismatchError(
        f"model {model.folder}: expected a network of diffusers as _class_name in "
        f"{part}/config.json, got {name!r}"
    )


def load_pipeline(
    model: Model,
    dtype: torch.dtype,
    parts: Mapping[str, Any],
    *,
    keep: Sequence[str] = (),
    rest: str,
) -> Any:
    """Put loaded parts together to a pipeline of diffusers.

    Parameters
    ----------
    model : Model
        The model.
    dtype : torch.dtype
        What the pipeline computes in.
    parts : mapping
        Loaded parts by name.
    keep : sequence of str
        Parts that diffusers loads itself; it loads no others.
    rest : str
        What these others are, for errors.

    Raises
    ------
    NotFoundError, SchemaMismatchError
        If one of the others cannot be loaded.
    """
    with loading(f"model {model.folder}{rest}"):
        import diffusers

        kind = getattr(diffusers, model.pipeline_class)
        index = model.config("", "model_index.json")
        listed = (name for name, of in index.items() if isinstance(of, list))
        left_out = dict.fromkeys(n for n in listed if n not in parts and n not in keep)
        switches = {n: False for n in _SWITCHES if n in inspect.signature(kind.__init__).parameters}
        return kind.from_pretrained(
            os.fspath(model.folder),
            **{**left_out, **parts, **switches},
            dtype=dtype,
            local_files_only=True,
        )


def refuse_incomplete(what: str, found: dict[str, Any]) -> None:
    """Refuse a network of which weights were missing, or of other sizes, and so made up.

    Raises
    ------
    SchemaMismatchError
        The first of them.
    """
    if missing := sorted(found["missing_keys"]):
        raise SchemaMismatchError(f"{what}: expected all weights, got none of {missing[0]}")
    if other := sorted(found["mismatched_keys"], key=str):
        name, got, expected = other[0]
        raise SchemaMismatchError(
            f"{what}: expected {name} {list(expected)} as its config.json says, got {list(got)}"
        )
