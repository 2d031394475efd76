"""From a request to a run: what can be settled before any weights are loaded, step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from fedgfe_store.derived.record import Derived
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.placing import batch_beside, load_of, place, place_in
from fedgfe_store.generation.plan import Plan, plan_images
from fedgfe_store.generation.request import DEFAULTS, Noise, Pool, Request
from fedgfe_store.generation.settings import Settings
from fedgfe_store.images.compare import noise_rule
from fedgfe_store.images.elsewhere import Elsewhere, Partners, partners_of
from fedgfe_store.images.identity import others_in
from fedgfe_store.images.manifest import settings_of
from fedgfe_store.models.choice import Load, decode_size
from fedgfe_store.models.devices import choose_device, choose_dtype
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.lora import Lora, check_loras
from fedgfe_store.models.model import Model
from fedgfe_store.models.pipeline import ImagePipeline
from fedgfe_store.models.placement import Offload, Placement, possible_offloads
from fedgfe_store.models.quantization import check_quantization
from fedgfe_store.records import RecordKey
from fedgfe_store.schema import Schema
from fedgfe_store.text.negative import Negative, find_negative

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

Report = Callable[[str], object]

log_remark: Report = logging.getLogger("fedgfe_store").warning


@dataclass(frozen=True)
class Run:
    """A run that has been planned and not yet begun.

    Parameters
    ----------
    selection : Selection or Derived
        The records.
    request : Request
        What was asked.
    plan : Plan
        Their images.
    model : Model
        The model, without its weights.
    placement : Placement
        Where and in what to compute; its offload mode is decided by `placed`.
    batch_size : int
        Images of a batch, which `placed` may change.
    columns : mapping
        Name of the store's column by the argument of the model's pipeline.
    negative : Negative or None
        Negative embeddings, where guidance needs them.
    partners : mapping
        Other records that some of the store's columns are from, by column.
    """

    selection: Selection | Derived
    request: Request
    plan: Plan
    model: Model
    placement: Placement
    batch_size: int
    columns: Mapping[str, str]
    negative: Negative | None = None
    partners: Mapping[str, Partners] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of a record's sequence."""
        return _tokens(self.model, self.selection.schema, self.columns)

    @property
    def decode_size(self) -> int:
        """Images that are decoded at a time."""
        settings = self.plan.settings
        return min(self.batch_size, decode_size(settings.height * settings.width))

    @cached_property
    def load(self) -> Load:
        """What the run asks of a machine, by the headers of its weights, which have to be here."""
        return load_of(self.model, self.plan.settings, self.tokens, self.placement.loras)

    def placed(self, report: Report) -> Run:
        """Return the run with what the machine's memory decides; weights have to be on disk."""
        placement, size, remark = place(
            self.request, self.model, self.plan.settings, self.tokens, self.placement
        )
        if size != self.batch_size:
            remark = f"{remark or f'offload: {placement.offload}'}, batches of {size}"
        if remark:
            report(remark)
        return replace(self, placement=placement, batch_size=size)

    def replaced(self, placement: Placement, mode: Offload, usable: int) -> Placement:
        """Return a placement in another mode, with what it keeps where in that much memory."""
        return place_in(self.load, replace(placement, offload=mode), usable)


def prepare(
    selection: Selection | Derived,
    output_dir: str | Path,
    request: Request = DEFAULTS,
    *,
    pipeline: ImagePipeline | None = None,
    keep_negative: bool = True,
    report: Report = log_remark,
) -> Run:
    """Settle everything about a run that can be settled without loading weights.

    Parameters
    ----------
    selection : Selection or Derived
        The records.
    output_dir : str or Path
        Folder of the images.
    request : Request
        What is asked.
    pipeline : ImagePipeline, optional
        Use this one rather than load a model; it decides on model, dtype and device.
    keep_negative : bool
        Keep negative embeddings that had to be encoded in the store.
    report : callable
        Gets remarks for the user, one line each; by default they are logged as warnings.

    Returns
    -------
    Run
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
    folder, schema = Path(output_dir), selection.schema
    model, placement = resolve(request, schema, pipeline=pipeline, report=report)
    if request.vae_tiling and model.family.latents == "own":
        raise SchemaMismatchError(
            f"vae_tiling: expected a family whose latents are decoded here, got {model.kind}, "
            "whose pipeline decodes itself"
        )
    columns = model.conditioning(schema)
    settings = choose_settings(request, model, placement, report=report)
    settings = replace(settings, pool=_choose_pool(request.pool, model, schema, columns, report))
    negative = None
    if _takes_negative(model, settings.guidance, request.negative):
        negative = find_negative(
            model, selection, columns, request.negative, keep=keep_negative, report=report
        )
        settings = replace(settings, negative=negative.digest)
    settings = replace(settings, noise=request.noise or _noise_of(folder))
    elsewhere = _choose_elsewhere(request.column, model, columns)
    settings = replace(settings, column=tuple(map(str, elsewhere)))
    if elsewhere and isinstance(selection, Derived):
        raise SchemaMismatchError(
            f"column: expected records, of whose class and index there are others, got "
            f"{selection.describe()}"
        )
    partners = partners_of(selection, elsewhere)
    for each in partners.values():
        each.check([key for key in selection.keys() if isinstance(key, RecordKey)])
    if isinstance(selection, Derived):
        for name in columns.values():
            selection.check(name)
    tokens = _tokens(model, schema, columns)
    if pipeline is not None:  # its weights have their place
        batch_size = request.batch_size or batch_beside(model, settings, tokens, placement.device)
    else:
        batch_size = _batch_size(request, model, settings, tokens, placement)
    plan = plan_images(
        selection, settings, folder, request, columns=tuple(columns.values()), partners=partners
    )
    for other in others_in(plan.folder, plan.identity):
        report(f"{plan.folder} holds images of {other}, too: this is {plan.identity}")
    return Run(selection, request, plan, model, placement, batch_size, columns, negative, partners)


def resolve(
    request: Request, schema: Schema, *, pipeline: ImagePipeline | None, report: Report
) -> tuple[Model, Placement]:
    """Find the model that is asked for, and where and in what this machine computes with it."""
    if pipeline is not None:
        model, placement = pipeline.model, pipeline.placement
    else:
        model = _find_model(request, schema)
        device = choose_device(request.device, local=request.local)
        dtype, remark = choose_dtype(request.dtype, device)
        if remark:
            report(remark)
        if request.clear_cache_every and device.startswith("cpu"):
            report("there is no GPU whose cache clear_cache_every could give back")
        placement = Placement(dtype, device, compiled=request.compiled)
    loras = tuple(map(Lora.read, request.lora))
    if pipeline is not None and loras != placement.loras:
        raise SchemaMismatchError("lora: expected a pipeline that was loaded with the same")
    check_loras(loras, model, request.quantize)
    placement = replace(placement, quantization=request.quantize, loras=loras)
    _check_speed(placement, request.offload)
    return model, placement


def _find_model(request: Request, schema: Schema) -> Model:
    """Find the model: of the type that is asked for, else of the one that the store is for."""
    kind = request.diffusion_type
    return resolve_model(
        request.model,
        kind=kind,
        stored=schema.metadata.model if kind in (None, schema.kind) else None,
        store_kind=kind or schema.kind,
        declared=request.family,
    )


def _check_speed(placement: Placement, offload: str) -> None:
    """Refuse what makes a run faster where this machine cannot do it, or not with the others."""
    compiled, quantization = placement.compiled, placement.quantization
    if quantization is not None:
        check_quantization(
            quantization, device=placement.device, dtype=placement.dtype, compiled=compiled
        )
    possible = ("auto", *possible_offloads(compiled, quantization))
    if offload not in possible and offload in get_args(Offload):
        name = "quantize" if quantization else "compile"
        raise SchemaMismatchError(
            f"{name}: expected offload {' or '.join(possible)}, since such weights do not move "
            f"block by block, got {offload}"
        )


def choose_settings(
    request: Request, model: Model, placement: Placement, *, report: Report
) -> Settings:
    """Settle what an image depends on, but for what the folder and negative embeddings decide."""
    return Settings(
        model=model.name,
        revision=model.revision,
        dtype=placement.dtype,
        steps=request.steps or model.default_steps,
        guidance=_choose_guidance(request.guidance, model, report),
        height=_choose_size("height", request.height, model),
        width=_choose_size("width", request.width, model),
        seed=request.seed,
        quantization=placement.quantization,
        lora=tuple(lora.identity for lora in placement.loras),
        family=model.family.digest,
    )


def _choose_guidance(guidance: float | None, model: Model, report: Report) -> float | None:
    if guidance is None:
        return model.default_guidance
    if not model.takes_guidance:
        report(f"guidance {guidance:g} has no effect: the model {model.name} takes none")
        return None
    return float(guidance)


def _takes_negative(model: Model, guidance: float | None, given: str | None) -> bool:
    if given is not None and not model.takes_negative(guidance):
        raise SchemaMismatchError(
            f"negative: the model {model.name} takes none under guidance {guidance}"
        )
    return given is not None or model.needs_negative(guidance)


def _choose_size(name: str, pixels: int | None, model: Model) -> int:
    pixels = model.default_size if pixels is None else pixels
    if pixels < 1 or pixels % model.size_step:
        raise SchemaMismatchError(
            f"{name}: expected a multiple of {model.size_step} pixels for the model "
            f"{model.name}, got {pixels}"
        )
    return pixels


def _choose_elsewhere(
    texts: Sequence[str], model: Model, columns: Mapping[str, str]
) -> list[Elsewhere]:
    """Settle which of the store's columns are from elsewhere; masks go with their sequence."""
    asked: dict[str, Elsewhere] = {}
    for each in map(Elsewhere.parse, texts):
        name = columns.get(each.column, each.column)
        if name not in columns.values() or name in asked:
            got = f"{name} twice" if name in asked else repr(each.column)
            known = ", ".join(dict.fromkeys([*columns.values(), *columns]))
            raise SchemaMismatchError(f"column: expected one of {known}, each once, got {got}")
        asked[name] = replace(each, column=name)
    sequence = asked.get(columns[model.family.sequence.argument])
    for column in model.family.columns:
        mask = columns.get(column.argument) if column.is_mask else None
        if sequence is not None and mask is not None:
            asked.setdefault(mask, replace(sequence, column=mask))
    return [asked[name] for name in sorted(asked)]


def _noise_of(folder: Path) -> Noise:
    """Give the rule of a folder's images, whose noise stays as it is, or the one for new ones."""
    settings = settings_of(folder)
    # What no rule is, as one of a later version, is refused by `Settings`.
    return "file_id" if settings is None else cast("Noise", noise_rule(settings))


def _choose_pool(
    pool: Pool, model: Model, schema: Schema, columns: Mapping[str, str], report: Report
) -> Pool | None:
    """Give the pooling that is needed: none where the store holds what the model takes."""
    for column in model.family.columns:
        name = columns.get(column.argument, "")
        shape = schema.columns.get(name, ())
        if column.kind == "vector" and len(shape) == 2:
            others = " or ".join(p for p in get_args(Pool) if p != pool)
            report(
                f"{name} is a sequence {list(shape)}, which has no pooled vector: using pool "
                f"{pool} of its tokens ({others} are the alternatives)"
            )
            return pool
    return None


def _tokens(model: Model, schema: Schema, columns: Mapping[str, str]) -> int:
    return schema.columns[columns[model.family.sequence.argument]][0]


def _batch_size(
    request: Request, model: Model, settings: Settings, tokens: int, placement: Placement
) -> int:
    """Decide on the images of a batch as well as that can be done before weights are there."""
    if not model.has_weights:
        return request.batch_size or decode_size(settings.height * settings.width)
    return place(request, model, settings, tokens, placement)[1]
