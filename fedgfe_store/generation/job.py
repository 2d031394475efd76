"""What a run is to do, settled before any weights are loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.models import Model, resolve_model
from fedgfe_store.generation.pipelines import ImagePipeline, choose_device, choose_dtype
from fedgfe_store.generation.plan import OnStale, Plan, plan_images
from fedgfe_store.generation.settings import Settings
from fedgfe_store.schema import Schema

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

Report = Callable[[str], object]

POOLS = ("last", "first", "mean")

_LARGEST_BATCH = 8
log_remark: Report = logging.getLogger("fedgfe_store").warning


class Options(TypedDict, total=False):
    """The options of `prepare`."""

    model: str | None
    steps: int | None
    guidance: float | None
    height: int | None
    width: int | None
    pool: str
    seed: int
    device: str | None
    offload: str
    dtype: str | None
    batch_size: int | None
    limit: int | None
    on_stale: OnStale


@dataclass(frozen=True)
class Job:
    """A run that has been planned and not yet begun.

    Parameters
    ----------
    selection : Selection
        The records.
    plan : Plan
        Their images.
    model : Model
        The model, without its weights.
    device, offload : str
        Where to compute, and the offload mode asked for.
    batch_size : int
        Records of a batch.
    """

    selection: Selection
    plan: Plan
    model: Model
    device: str
    offload: str
    batch_size: int


def prepare(
    selection: Selection,
    output_dir: str | Path,
    *,
    model: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    pool: str = "last",
    seed: int = 0,
    device: str | None = None,
    offload: str = "auto",
    dtype: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    on_stale: OnStale = "error",
    pipeline: ImagePipeline | None = None,
    report: Report = log_remark,
) -> Job:
    """Settle everything about a run that can be settled without loading weights.

    Parameters
    ----------
    selection : Selection
        The records.
    output_dir : str or Path
        Folder of the images.
    model : str, optional
        ``"tiny"``, a folder or a hub id; see `resolve_model` for what counts without it.
    steps, guidance, height, width : optional
        Denoising steps, guidance scale, picture size in pixels; by default the model's own.
    pool : {"last", "first", "mean"}
        How a CLIP sequence becomes a vector, in a store that holds sequences.
    seed : int
        Base seed.
    device : str, optional
        Such as ``"cuda:1"``; by default a GPU where there is one.
    offload : {"auto", "none", "model"}
        Whether weights wait in the host's memory.
    dtype : {"float32", "bfloat16", "float16"}, optional
        What to compute in; by default bfloat16 on a GPU, float32 on the CPU.
    batch_size : int, optional
        Records of a batch; by default as many as have the pixels of one 1024 x 1024 picture, up
        to 8.
    limit : int, optional
        Render at most so many images.
    on_stale : {"error", "regenerate", "keep"}
        What to do about images made with other settings, see `plan_images`.
    pipeline : ImagePipeline, optional
        Use this one rather than load `model`; it decides on model, dtype and device.
    report : callable
        Gets remarks for the user, one line each; by default they are logged as warnings.

    Returns
    -------
    Job
        For `render`.

    Raises
    ------
    NotFoundError
        If there are no records, or no such model.
    SchemaMismatchError
        If the store does not fit the model, or an option is not valid.
    ConflictError
        If the folder holds images made with other settings.
    """
    if not len(selection):
        raise NotFoundError("selection: expected at least one record, got none")
    if pipeline is not None:
        chosen, device, dtype = pipeline.model, pipeline.device, pipeline.dtype
    else:
        chosen = resolve_model(model, stored=selection.schema.metadata.model)
        device = choose_device(device)
    chosen.check_schema(selection.schema)
    settings = Settings(
        model=chosen.name,
        revision=chosen.revision,
        dtype=choose_dtype(dtype, device),
        steps=_at_least_one("steps", chosen.default_steps if steps is None else steps),
        guidance=_choose_guidance(guidance, chosen, report),
        height=_choose_size("height", height, chosen),
        width=_choose_size("width", width, chosen),
        seed=seed,
        pool=_choose_pool(pool, selection.schema, report),
    )
    if batch_size is None:
        batch_size = _default_batch_size(settings)
    _at_least_one("batch_size", batch_size)
    plan = plan_images(selection, settings, Path(output_dir), limit=limit, on_stale=on_stale)
    return Job(selection, plan, chosen, device, offload, batch_size)


def _choose_guidance(guidance: float | None, model: Model, report: Report) -> float | None:
    if guidance is None:
        return model.default_guidance
    if not math.isfinite(guidance):
        raise SchemaMismatchError(f"guidance: expected a finite number, got {guidance}")
    if not model.takes_guidance:
        report(f"guidance {guidance:g} has no effect: the model {model.name} takes none")
        return None
    return float(guidance)


def _choose_size(name: str, pixels: int | None, model: Model) -> int:
    pixels = model.default_size if pixels is None else pixels
    if pixels < 1 or pixels % model.pixels_per_token:
        raise SchemaMismatchError(
            f"{name}: expected a multiple of {model.pixels_per_token} pixels for the model "
            f"{model.name}, got {pixels}"
        )
    return pixels


def _choose_pool(pool: str, schema: Schema, report: Report) -> str | None:
    """Give the pooling that a store needs: none where it holds one CLIP vector a record."""
    if pool not in POOLS:
        raise SchemaMismatchError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    shape = schema.columns["clip"]
    if len(shape) == 1:
        return None
    others = " or ".join(p for p in POOLS if p != pool)
    report(
        f"clip is a sequence {list(shape)}, which has no pooled vector: using pool {pool} of its "
        f"tokens ({others} are the alternatives)"
    )
    return pool


def _at_least_one(name: str, number: int) -> int:
    if number < 1:
        raise SchemaMismatchError(f"{name}: expected at least 1, got {number}")
    return number


def _default_batch_size(settings: Settings) -> int:
    return min(_LARGEST_BATCH, max(1, 1024**2 // (settings.height * settings.width)))
