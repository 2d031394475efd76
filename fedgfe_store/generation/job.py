"""What a run is to do, settled before any weights are loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast, get_args

import torch

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.parts import WHOLE, Shard
from fedgfe_store.generation.plan import OnStale, Plan, plan_images
from fedgfe_store.generation.settings import Noise, Settings
from fedgfe_store.images.compare import noise_rule
from fedgfe_store.images.identity import others_in
from fedgfe_store.images.manifest import settings_of
from fedgfe_store.models.devices import DTYPES, choose_device, choose_dtype, free_bytes
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.fit import Footprint, choose_batch_size, choose_offload, estimate_footprint
from fedgfe_store.models.model import ImagePipeline, Model
from fedgfe_store.models.placement import Offload, Placement, Quantization, possible_offloads
from fedgfe_store.models.quantization import WEIGHT_SHARE, check_quantization
from fedgfe_store.schema import Kind, Schema
from fedgfe_store.text.negative import Negative, find_negative

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

Report = Callable[[str], object]

POOLS = ("last", "first", "mean")

log_remark: Report = logging.getLogger("fedgfe_store").warning


class Options(TypedDict, total=False):
    """The options of `prepare`."""

    diffusion_type: Kind | None
    model: str | None
    steps: int | None
    guidance: float | None
    negative: str | None
    height: int | None
    width: int | None
    pool: str
    seed: int
    noise: Noise | None
    images_per_record: int
    only_image: int | None
    device: str | None
    local: int | None
    offload: str
    dtype: str | None
    compiled: bool
    quantize: str | None
    batch_size: int | None
    vae_tiling: bool
    clear_cache_every: int | None
    shard: Shard
    limit: int | None
    on_stale: OnStale
    replace_others: bool
    again: bool


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
    negative : Negative or None
        Negative embeddings, where guidance needs them.
    device, offload : str
        Where to compute, and the offload mode asked for.
    compiled : bool
        Whether to compile the denoising network.
    batch_size : int
        Images of a batch.
    vae_tiling : bool
        Whether a picture that does not fit the memory may be decoded tile by tile.
    clear_cache_every : int or None
        Batches after which the device's cache is given back.
    shard : Shard
        Which part of the records is this run's.
    """

    selection: Selection
    plan: Plan
    model: Model
    device: str
    offload: str
    batch_size: int
    negative: Negative | None = None
    compiled: bool = False
    vae_tiling: bool = False
    clear_cache_every: int | None = None
    shard: Shard = WHOLE

    def place(self, report: Report) -> Placement:
        """Decide where the weights go; they have to be on disk."""
        settings = self.plan.settings
        offload, remark = choose_offload(
            self.offload,
            device_type=torch.device(self.device).type,
            free_bytes=free_bytes(self.device),
            footprint=_footprint(self.model, settings, self.selection.schema, self.batch_size),
            possible=possible_offloads(self.compiled, settings.quantization),
        )
        if remark:
            report(remark)
        quantization: Quantization | None = settings.quantization  # type: ignore[assignment]
        return Placement(settings.dtype, self.device, offload, self.compiled, quantization)


def prepare(
    selection: Selection,
    output_dir: str | Path,
    *,
    diffusion_type: Kind | None = None,
    model: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    height: int | None = None,
    width: int | None = None,
    pool: str = "last",
    seed: int = 0,
    noise: Noise | None = None,
    images_per_record: int = 1,
    only_image: int | None = None,
    device: str | None = None,
    local: int | None = None,
    offload: str = "auto",
    dtype: str | None = None,
    compiled: bool = False,
    quantize: str | None = None,
    batch_size: int | None = None,
    vae_tiling: bool = False,
    clear_cache_every: int | None = None,
    shard: Shard = WHOLE,
    limit: int | None = None,
    on_stale: OnStale = "error",
    replace_others: bool = False,
    again: bool = False,
    pipeline: ImagePipeline | None = None,
    keep_negative: bool = True,
    report: Report = log_remark,
) -> Job:
    """Settle everything about a run that can be settled without loading weights.

    Parameters
    ----------
    selection : Selection
        The records.
    output_dir : str or Path
        Folder of the images.
    diffusion_type : {"flux", "sd"}, optional
        Family of the model; by default the store's.
    model : str, optional
        ``"tiny"``, a folder or a hub id; see `resolve_model` for what counts without it.
    steps, guidance, height, width : optional
        Denoising steps, guidance scale, picture size in pixels; by default the model's own.
    negative : str, optional
        Negative prompt, or a file of negative embeddings, for models that are guided by such;
        by default the empty prompt. See `find_negative`.
    pool : {"last", "first", "mean"}
        How a CLIP sequence becomes a vector, in a store that holds sequences.
    seed : int
        Base seed.
    noise : {"index", "file_id"}, optional
        What tells a sample from the others in its seed, see `Settings`. By default the rule of
        the folder's images, and ``"file_id"`` in a new folder.
    images_per_record : int
        Images of each record.
    only_image : int, optional
        Only this image of each record, from 0.
    device : str, optional
        Such as ``"cuda:1"``; by default a GPU where there is one.
    local : int, optional
        Which GPU that is, where several processes share a machine.
    offload : {"auto", "none", "model", "group", "sequential"}
        Where weights wait while they do nothing.
    dtype : {"float32", "bfloat16", "float16"}, optional
        What to compute in; by default bfloat16 on a GPU, float32 on the CPU.
    compiled : bool
        Compile the denoising network's blocks.
    quantize : {"nf4", "fp8"}, optional
        Quantize its weights.
    batch_size : int, optional
        Images of a batch; by default as many as have the pixels of one 1024 x 1024 picture, up
        to 8, and on a GPU up to four times as many if its memory allows.
    vae_tiling : bool
        Decode a picture tile by tile if it does not fit the memory otherwise.
    clear_cache_every : int, optional
        Give the device's cache back after so many batches.
    shard : Shard
        Which part of the records is this run's.
    limit : int, optional
        Render at most so many images.
    on_stale : {"error", "regenerate", "keep"}
        What to do about images made with other settings, see `plan_images`.
    replace_others : bool
        Replace images of other experiments, too.
    again : bool
        Render images that are done, too.
    pipeline : ImagePipeline, optional
        Use this one rather than load `model`; it decides on model, dtype and device.
    keep_negative : bool
        Keep negative embeddings that had to be encoded in the store.
    report : callable
        Gets remarks for the user, one line each; by default they are logged as warnings.

    Returns
    -------
    Job
        For `render`.

    Raises
    ------
    NotFoundError
        If there are no records, no such model, or no negative embeddings where they are needed.
    SchemaMismatchError
        If the store does not fit the model, or an option is not valid or not possible here.
    ConflictError
        If the folder holds images made with other settings, or of another store.
    """
    if not len(selection):
        raise NotFoundError("selection: expected at least one record, got none")
    schema = selection.schema
    if pipeline is not None:
        chosen, device = pipeline.model, pipeline.placement.device
        dtype, compiled = pipeline.placement.dtype, pipeline.placement.compiled
    else:
        chosen = _choose_model(model, diffusion_type, schema)
        device = choose_device(device, local=local)
        dtype, remark = choose_dtype(dtype, device)
        if remark:
            report(remark)
    chosen.check_schema(schema)
    _check_speed_options(compiled, quantize, device, dtype, offload)
    guidance = _choose_guidance(guidance, chosen, report)
    found = _find_negative(chosen, guidance, negative, selection, keep=keep_negative, report=report)
    settings = Settings(
        model=chosen.name,
        revision=chosen.revision,
        dtype=dtype,
        steps=_at_least_one("steps", chosen.default_steps if steps is None else steps),
        guidance=guidance,
        height=_choose_size("height", height, chosen),
        width=_choose_size("width", width, chosen),
        seed=seed,
        pool=_choose_pool(pool, chosen, schema, report),
        quantization=quantize,
        negative=found.digest if found else None,
        noise=noise or _noise_of(Path(output_dir)),
    )
    if batch_size is None:
        batch_size = _choose_batch_size(chosen, settings, schema, device)
    plan = plan_images(
        selection,
        settings,
        Path(output_dir),
        columns=chosen.columns,
        numbers=_choose_numbers(images_per_record, only_image),
        shard=shard,
        limit=limit,
        on_stale=on_stale,
        replace_others=replace_others,
        again=again,
    )
    for other in others_in(plan.folder, plan.identity):
        report(f"{plan.folder} holds images of {other}, too: this is {plan.identity}")
    return Job(
        selection,
        plan,
        chosen,
        device,
        offload,
        _at_least_one("batch_size", batch_size),
        negative=found,
        compiled=compiled,
        vae_tiling=vae_tiling,
        clear_cache_every=clear_cache_every,
        shard=shard,
    )


def _choose_model(name: str | None, diffusion_type: Kind | None, schema: Schema) -> Model:
    """Find the model: of the type that is asked for, else of the one that the store is for."""
    kind = diffusion_type or schema.kind
    stored = schema.metadata.model if kind == schema.kind else None
    return resolve_model(name, kind=kind, stored=stored)


def _check_speed_options(
    compiled: bool, quantize: str | None, device: str, dtype: str, offload: str
) -> None:
    if quantize is not None:
        check_quantization(quantize, device=device, dtype=dtype, compiled=compiled)
    possible = ("auto", *possible_offloads(compiled, quantize))
    if offload not in possible and offload in get_args(Offload):
        name = "quantize" if quantize else "compile"
        raise SchemaMismatchError(
            f"{name}: expected offload {' or '.join(possible)}, since such weights do not move "
            f"block by block, got {offload}"
        )


def _choose_guidance(guidance: float | None, model: Model, report: Report) -> float | None:
    if guidance is None:
        return model.default_guidance
    if not math.isfinite(guidance):
        raise SchemaMismatchError(f"guidance: expected a finite number, got {guidance}")
    if not model.takes_guidance:
        report(f"guidance {guidance:g} has no effect: the model {model.name} takes none")
        return None
    return float(guidance)


def _find_negative(
    model: Model,
    guidance: float | None,
    given: str | None,
    selection: Selection,
    *,
    keep: bool,
    report: Report,
) -> Negative | None:
    if model.needs_negative(guidance):
        shape = selection.schema.columns["clip"]
        return find_negative(model, selection.path, given, shape, keep=keep, report=report)
    if given is not None:
        raise SchemaMismatchError(
            f"negative: the model {model.name} takes none under guidance {guidance}"
        )
    return None


def _choose_size(name: str, pixels: int | None, model: Model) -> int:
    pixels = model.default_size if pixels is None else pixels
    if pixels < 1 or pixels % model.size_step:
        raise SchemaMismatchError(
            f"{name}: expected a multiple of {model.size_step} pixels for the model "
            f"{model.name}, got {pixels}"
        )
    return pixels


def _noise_of(folder: Path) -> Noise:
    """Give the rule of a folder's images, whose noise stays as it is, or the one for new ones."""
    settings = settings_of(folder)
    # What no rule is, as one of a later version, is refused by `Settings`.
    return "file_id" if settings is None else cast("Noise", noise_rule(settings))


def _choose_pool(pool: str, model: Model, schema: Schema, report: Report) -> str | None:
    """Give the pooling that is needed: none where the store holds what the model takes."""
    if pool not in POOLS:
        raise SchemaMismatchError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    shape = schema.columns["clip"]
    if model.kind != "flux" or len(shape) == 1:
        return None
    others = " or ".join(p for p in POOLS if p != pool)
    report(
        f"clip is a sequence {list(shape)}, which has no pooled vector: using pool {pool} of its "
        f"tokens ({others} are the alternatives)"
    )
    return pool


def _choose_numbers(images_per_record: int, only_image: int | None) -> Sequence[int]:
    if only_image is not None:
        return (only_image,)
    return range(_at_least_one("images_per_record", images_per_record))


def _at_least_one(name: str, number: int) -> int:
    if number < 1:
        raise SchemaMismatchError(f"{name}: expected at least 1, got {number}")
    return number


def _choose_batch_size(model: Model, settings: Settings, schema: Schema, device: str) -> int:
    return choose_batch_size(
        settings.height * settings.width,
        free_bytes=free_bytes(device) if model.has_weights else None,
        footprint=lambda size: _footprint(model, settings, schema, size),
    )


def _footprint(model: Model, settings: Settings, schema: Schema, batch_size: int) -> Footprint:
    return estimate_footprint(
        model,
        item_bytes=DTYPES[settings.dtype].itemsize,
        batch_size=batch_size,
        tokens=schema.columns[model.columns[0]][0],
        height=settings.height,
        width=settings.width,
        weight_share=WEIGHT_SHARE[settings.quantization],
    )
