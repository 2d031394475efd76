"""The families of image models, and which model of them is meant."""

from __future__ import annotations

import os
from pathlib import Path

from fedgfe_store.errors import FedgfeStoreError, NotFoundError, SchemaMismatchError
from fedgfe_store.models.files import (
    check_number,
    check_numbers,
    check_real,
    digest_files,
    read_json,
)
from fedgfe_store.models.flux import FluxModel
from fedgfe_store.models.hub import find_on_hub
from fedgfe_store.models.model import Model
from fedgfe_store.models.sd import StableDiffusionModel
from fedgfe_store.models.tiny import TINY_FLUX
from fedgfe_store.schema import Kind

MODEL_VARIABLE = "FEDGFE_MODEL"

FAMILIES: dict[Kind, type[Model]] = {"flux": FluxModel, "sd": StableDiffusionModel}
"""The class of each family's models; a new family is a module with one and a line here."""


def family_of(kind: Kind) -> type[Model]:
    """Return the class of a family's models.

    Raises
    ------
    SchemaMismatchError
        If there is no such family.
    """
    if kind not in FAMILIES:
        raise SchemaMismatchError(f"diffusion type: expected {' or '.join(FAMILIES)}, got {kind!r}")
    return FAMILIES[kind]


def resolve_model(
    name: str | None = None, *, kind: Kind = "flux", stored: str | None = None
) -> Model:
    """Find a model and read its configuration.

    Parameters
    ----------
    name : str, optional
        ``"tiny"``, a local folder, or a hub id. Without one the environment variable
        ``FEDGFE_MODEL`` counts, then `stored`, then the family's default.
    kind : {"flux", "sd"}
        Family that it has to be of.
    stored : str, optional
        The model that the store names.

    Returns
    -------
    Model
        The model, without its weights.

    Raises
    ------
    NotFoundError
        If there is no such model, or if it is neither cached nor reachable: how to get it.
    SchemaMismatchError
        If it is there but not a text-to-image model of the family.
    """
    family = family_of(kind)
    given = (
        (name, None),
        (os.environ.get(MODEL_VARIABLE), f"${MODEL_VARIABLE} names the model"),
        (stored, "the store names the model"),
    )
    name, origin = next(((n, why) for n, why in given if n), (family.default_name, None))
    try:
        return _resolve(name, family)
    except FedgfeStoreError as error:
        if origin:
            error.add_note(f"{origin} {name}; --model goes before it")
        raise


def _resolve(name: str, family: type[Model]) -> Model:
    folder = TINY_FLUX if name == "tiny" else Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        known_as = "tiny" if folder.resolve() == TINY_FLUX.resolve() else folder.resolve().name
        _check_pipeline(folder, family)
        # Configurations, and sizes and samples of the weights: cheap, and any training shows.
        revision = digest_files(folder, (family.part, "vae", "scheduler"))
        return _read(family, known_as, folder, revision)
    if name == "tiny":
        raise NotFoundError(
            f"model tiny: expected a folder {folder}, got none; reinstall fedgfe-store"
        )
    if os.path.exists(folder):
        raise NotFoundError(f"model: expected tiny, a folder or a hub id, got the file {name}")
    found = find_on_hub(name, [f"{part}/config.json" for part in (family.part, "vae")])
    if found is None:
        raise NotFoundError(
            f"model: expected tiny, a folder or a hub id, got {name!r}, where there is nothing"
        )
    _check_pipeline(found, family)
    return _read(family, name, found, found.name, from_hub=True)


def _check_pipeline(folder: Path, family: type[Model]) -> None:
    found = read_json(folder / "model_index.json").get("_class_name")
    if found == family.pipeline_class:
        return
    kinds = [kind for kind, other in FAMILIES.items() if other.pipeline_class == found]
    hint = f"; --diffusion-type {kinds[0]} takes it, where the embeddings fit" if kinds else ""
    raise SchemaMismatchError(
        f"model {folder}: expected a {family.pipeline_class}, got {found}{hint}"
    )


def _read(
    family: type[Model], name: str, folder: Path, revision: str, *, from_hub: bool = False
) -> Model:
    denoiser = read_json(folder / family.part / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    where = str(folder / "vae" / "config.json")
    check_numbers(vae, "block_out_channels", where)
    check_number(vae, "latent_channels", where)
    if "scaling_factor" in vae:  # else the decoder's class has one
        check_real(vae, "scaling_factor", where)
    model = family(name, folder, revision, denoiser, vae, from_hub)
    model.check_config()
    return model
