"""Which image model is meant, and which family it is of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedgfe_store.errors import FedgfeStoreError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.family import Family, families, read_family
from fedgfe_store.models.files import digest_files, read_json
from fedgfe_store.models.hub import find_on_hub
from fedgfe_store.models.model import Model
from fedgfe_store.models.tiny import TINY_FLUX

MODEL_VARIABLE = "FEDGFE_MODEL"
_INDEX = "model_index.json"


def family_named(name: str) -> Family:
    """Return the family of a name.

    Raises
    ------
    SchemaMismatchError
        If there is no such family: which there are.
    """
    known = families()
    if name not in known:
        raise SchemaMismatchError(
            f"diffusion type: expected one of {', '.join(known)}, got {name!r}"
        )
    return known[name]


def resolve_model(
    name: str | None = None,
    *,
    kind: str | None = None,
    stored: str | None = None,
    store_kind: str = "flux",
    declared: str | Path | None = None,
) -> Model:
    """Find a model and read its configuration.

    Parameters
    ----------
    name : str, optional
        ``"tiny"``, a local folder, or a hub id. Without one the environment variable
        ``FEDGFE_MODEL`` counts, then `stored`, then the family's default.
    kind : str, optional
        Family that it has to be of; by default what its ``model_index.json`` says.
    stored : str, optional
        The model that the store names.
    store_kind : str
        What the store is for: whose default counts where nothing else is said.
    declared : str or Path, optional
        File that declares a family besides those that there are.

    Returns
    -------
    Model
        The model, without its weights.

    Raises
    ------
    NotFoundError
        If there is no such model, or if it is neither cached nor reachable: how to get it.
    SchemaMismatchError
        If it is there but no text-to-image model, or not of the family that it has to be of.
    """
    own = read_family(declared) if declared is not None else None
    family = own if own is not None else family_named(kind) if kind is not None else None
    given = (
        (name, None),
        (os.environ.get(MODEL_VARIABLE), f"${MODEL_VARIABLE} names the model"),
        (stored, "the store names the model"),
    )
    default = family or families().get(store_kind)
    usual = default.model if default else None
    name, origin = next(((n, why) for n, why in given if n), (usual, None))
    if not name:
        raise NotFoundError(f"model: none is known for {store_kind}: name one with --model")
    try:
        return _resolve(name, family)
    except FedgfeStoreError as error:
        if origin:
            error.add_note(f"{origin} {name}; --model goes before it")
        raise


def _resolve(name: str, family: Family | None) -> Model:
    folder = TINY_FLUX if name == "tiny" else Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        known_as = "tiny" if folder.resolve() == TINY_FLUX.resolve() else folder.resolve().name
        found = _family_of(folder, family)
        # Configurations, and sizes and samples of the weights: cheap, and any training shows.
        revision = digest_files(folder, (found.denoiser, "vae", "scheduler"))
        return _read(found, known_as, folder, revision)
    if name == "tiny":
        raise NotFoundError(
            f"model tiny: expected a folder {folder}, got none; reinstall fedgfe-store"
        )
    if os.path.exists(folder):
        raise NotFoundError(f"model: expected tiny, a folder or a hub id, got the file {name}")
    cached = find_on_hub(name, lambda folder: _configs(_family_of(folder, family)))
    if cached is None:
        raise NotFoundError(
            f"model: expected tiny, a folder or a hub id, got {name!r}, where there is nothing"
        )
    return _read(_family_of(cached, family), name, cached, cached.name, from_hub=True)


def _configs(family: Family) -> Iterator[str]:
    for part in (family.denoiser, "vae"):
        yield f"{part}/config.json"


def _family_of(folder: Path, expected: Family | None) -> Family:
    """Tell a folder's family by the pipeline that it names."""
    found = read_json(folder / _INDEX).get("_class_name")
    if expected is not None and found in expected.pipelines:
        return expected
    others = [family for family in families().values() if found in family.pipelines]
    if expected is None and others:
        return others[0]
    if expected is None:
        known = ", ".join(f"{family.title} ({name})" for name, family in families().items())
        raise SchemaMismatchError(
            f"model {folder}: expected a pipeline of a known family, got {found}; known are "
            f"{known}. --family FILE declares another one (docs/models.md)"
        )
    hint = f"; --diffusion-type {others[0].name} takes it, where the embeddings fit"
    raise SchemaMismatchError(
        f"model {folder}: expected a {' or '.join(expected.pipelines)}, got {found}"
        f"{hint if others else ''}"
    )


def _read(
    family: Family, name: str, folder: Path, revision: str, *, from_hub: bool = False
) -> Model:
    index = read_json(folder / _INDEX)
    parts: dict[str, Any] = {
        part: read_json(folder / part / "config.json") for part in (family.denoiser, "vae")
    }
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        parts["scheduler"] = read_json(scheduler)
    model = Model(
        family=family.of({**parts, "model_index": index}),
        name=name,
        folder=folder,
        revision=revision,
        pipeline_class=index["_class_name"],
        denoiser=parts[family.denoiser],
        vae=parts["vae"],
        from_hub=from_hub,
    )
    model.check_config()
    return model
