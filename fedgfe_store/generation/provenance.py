"""What an image says about how it was made."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

import fedgfe_store
from fedgfe_store.common.location import seen_from
from fedgfe_store.generation.plan import PlanItem
from fedgfe_store.generation.prepare import Run
from fedgfe_store.generation.settings import fingerprint, settings_json
from fedgfe_store.models.placement import Offload, Placement
from fedgfe_store.models.quantization import PACKAGES
from fedgfe_store.names import key_json


class Provenance:
    """Makes the provenance of a run's images, whose larger part they share.

    Parameters
    ----------
    run : Run
        The run.
    placement : Placement
        How its model was loaded.
    """

    def __init__(self, run: Run, placement: Placement) -> None:
        settings = run.plan.settings
        packages = ["torch", "diffusers"]
        if settings.quantization:
            packages.append(PACKAGES[settings.quantization])
        if placement.loras:
            packages.append("peft")
        # Nothing names a place of this machine: the folder may be moved, shared and published.
        folder, source = run.plan.folder, run.model.family.source
        declared = {"family": seen_from(Path(source), folder)} if source else {}
        applied = [lora.to_json(folder) for lora in placement.loras]
        loras = {"loras": applied} if applied else {}
        hub_name = run.model.from_hub or settings.model == "tiny"
        self._common = {
            "settings": settings_json(settings),
            "fingerprint": fingerprint(settings),
            "diffusion_type": run.model.kind,
            **declared,
            **loras,
            "model_folder": None if hub_name else seen_from(run.model.folder, folder),
            "store": seen_from(run.selection.location, folder),
            **run.plan.identity.to_json(),
            "commit": run.selection.commit,
            "device": placement.device,
            "offload": placement.offload,
            "compiled": placement.compiled,
            "versions": {"fedgfe_store": fedgfe_store.__version__, **_versions(tuple(packages))},
        }

    def of(
        self, item: PlanItem, *, batch_size: int, tiled: bool, offload: Offload
    ) -> dict[str, Any]:
        """Return what `item`'s file says.

        Parameters
        ----------
        item : PlanItem
            The image.
        batch_size : int
            Images of the batch that it was denoised in.
        tiled : bool
            Whether it was decoded tile by tile.
        offload : {"none", "model", "group", "sequential"}
            Where the weights waited while it was denoised; it may change during a run.

        Returns
        -------
        dict
            Key, ``file_id`` where there is one, the number of ``sources`` where it is derived,
            image number, seed, digests, settings and their fingerprint, the store with its
            identity and commit, place and library versions; for the PNG's text chunk and the
            manifest.
        """
        known: dict[str, Any] = {"file_id": item.file_id} if item.file_id else {}
        if item.sources is not None:
            known["sources"] = item.sources
        return {
            "key": key_json(item.key),
            **known,
            "image": item.number,
            "seed": item.seed,
            "digests": item.digests,
            **self._common,
            "offload": offload,
            "batch_size": batch_size,
            "tiled": tiled,
        }


@cache
def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}
