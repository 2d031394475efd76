"""A run: read embeddings, denoise, decode and write, each while the others go on."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import torch
from numpy.typing import NDArray

import fedgfe_store
from fedgfe_store.errors import ConflictError, DamagedDataError
from fedgfe_store.generation.images import key_json, read_provenance, remove_stale_temps
from fedgfe_store.generation.job import Job, Options, Report, log_remark, prepare
from fedgfe_store.generation.manifest import Manifest, listed_files, timestamp
from fedgfe_store.generation.offload import choose_offload, estimate_footprint
from fedgfe_store.generation.pipelines import DTYPES, FluxImages, ImagePipeline, free_bytes
from fedgfe_store.generation.plan import Plan, PlanItem
from fedgfe_store.generation.settings import Settings, fingerprint
from fedgfe_store.generation.writer import Failure, PictureWriter, Progress, Tally
from fedgfe_store.torch_data import prefetch

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

_PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class GenerationReport:
    """What a run did.

    Parameters
    ----------
    plan : Plan
        What was to be done.
    done : int
        Images rendered and written.
    skipped : int
        Images that were there already, or kept.
    failed : tuple of Failure
        Images that could not be made.
    seconds : float
        Time of rendering and writing, without loading the model.
    """

    plan: Plan
    done: int = 0
    skipped: int = 0
    failed: tuple[Failure, ...] = ()
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.done / self.seconds if self.seconds else 0.0


def generate(
    selection: Selection,
    output_dir: str | Path,
    *,
    dry_run: bool = False,
    pipeline: ImagePipeline | None = None,
    report: Report = log_remark,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> GenerationReport:
    """Render the images of a selection that are not done yet.

    Parameters
    ----------
    selection : Selection
        The records.
    output_dir : str or Path
        Folder of the images.
    dry_run : bool
        Only plan.
    pipeline : ImagePipeline, optional
        Use this one rather than load a model.
    report : callable
        Gets remarks for the user, one line each; by default they are logged as warnings.
    progress : callable, optional
        Called with 1 for each image that was made or has failed.
    **options
        ``model, steps, guidance, height, width, pool, seed, device, offload, dtype, batch_size,
        limit, on_stale``, see `prepare`.

    Returns
    -------
    GenerationReport
        The plan and what became of it. Records whose embeddings are damaged, whose pictures are
        not finite or cannot be written fail alone and are listed there.

    Raises
    ------
    FedgfeStoreError
        As for `prepare` and `render`.
    """
    job = prepare(selection, output_dir, pipeline=pipeline, report=report, **options)
    if dry_run:
        return GenerationReport(job.plan, skipped=_skipped(job.plan))
    return render(job, pipeline=pipeline, report=report, progress=progress)


def render(
    job: Job,
    *,
    pipeline: ImagePipeline | None = None,
    report: Report = log_remark,
    progress: Progress | None = None,
) -> GenerationReport:
    """Render what a job's plan has to do.

    Parameters
    ----------
    job : Job
        From `prepare`.
    pipeline : ImagePipeline, optional
        Use this one rather than load the job's model.
    report, progress : callable
        As for `generate`.

    Returns
    -------
    GenerationReport
        What became of each image.

    Raises
    ------
    NotFoundError
        If the model's weights are neither here nor reachable.
    ConflictError
        If the output folder cannot be made.
    """
    plan, tally = job.plan, Tally(progress or (lambda _: None))
    if plan.counts["done"]:
        _complete_manifest(plan)
    if not plan.todo:
        return GenerationReport(plan, skipped=_skipped(plan))
    _make_folder(plan.folder)
    pipeline = pipeline or _load_pipeline(job, report)
    started = time.perf_counter()
    with Manifest(plan.folder) as manifest, PictureWriter(manifest, tally) as writer:
        _render_batches(job, pipeline, writer, tally)
    for item in plan.todo:
        if item not in tally.done and item not in tally.failed:
            tally.fail(item, "not rendered, since the pictures before it could not be written")
    seconds = time.perf_counter() - started
    return GenerationReport(plan, len(tally.done), _skipped(plan), tally.failures, seconds)


def _render_batches(job: Job, pipeline: ImagePipeline, writer: PictureWriter, tally: Tally) -> None:
    """Denoise a group of batches, decode it, and so on; usually a group is one batch."""
    reading = prefetch(_read_batches(job, pipeline.columns), _PREFETCHED_BATCHES)
    with closing(cast("Generator[_Batch]", reading)) as batches:
        while not writer.gave_up:
            # One pass over a group at a time, so that only its latents are held, not what
            # they were made from.
            group = [
                _denoise(batch, job.plan.settings, pipeline, tally)
                for batch in islice(batches, pipeline.batches_per_swap)
            ]
            if not group:
                return
            for denoised in group:
                _decode(denoised, job, pipeline, writer, tally)


@dataclass(frozen=True)
class _Batch:
    """Embeddings of some images, one row each, and the images whose record is damaged."""

    items: tuple[PlanItem, ...]
    embeddings: dict[str, torch.Tensor]
    damaged: dict[PlanItem, str]


@dataclass(frozen=True)
class _Denoised:
    """Latents of some images, one row each, and the seconds that an image took."""

    items: tuple[PlanItem, ...]
    latents: torch.Tensor
    seconds: float


def _read_batches(job: Job, columns: Sequence[str]) -> Iterator[_Batch]:
    todo = job.plan.todo
    for start in range(0, len(todo), job.batch_size):
        items = todo[start : start + job.batch_size]
        yield _read_batch(job.selection, items, columns, job.plan.settings.pool)


def _read_batch(
    selection: Selection, items: Sequence[PlanItem], columns: Sequence[str], pool: str | None
) -> _Batch:
    damaged: dict[PlanItem, str] = {}
    try:
        rows = _read_rows(selection, items, columns)
    except DamagedDataError:
        # One bad record must not take its neighbours along: find it by reading each alone.
        sound = []
        for item in items:
            try:
                sound.append((item, _read_rows(selection, [item], columns)))
            except DamagedDataError as error:
                damaged[item] = str(error)
        items = [item for item, _ in sound]
        rows = {c: np.concatenate([row[c] for _, row in sound]) for c in columns if sound}
    embeddings = {name: torch.from_numpy(values) for name, values in rows.items()}
    if pool is not None and embeddings:
        embeddings["clip"] = _pooled(embeddings["clip"], pool)
    return _Batch(tuple(items), embeddings, damaged)


def _read_rows(
    selection: Selection, items: Sequence[PlanItem], columns: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    part = selection.take([item.position for item in items])
    return {name: part.read(name) for name in columns}


def _pooled(sequence: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool ``[images, tokens, features]`` to ``[images, features]``."""
    if pool == "mean":
        return sequence.mean(dim=1)
    # The last token of a causal text encoder is the one that has seen all the others.
    return sequence[:, -1 if pool == "last" else 0]


def _denoise(batch: _Batch, settings: Settings, pipeline: ImagePipeline, tally: Tally) -> _Denoised:
    for item, reason in batch.damaged.items():
        tally.fail(item, reason)
    if not batch.items:
        return _Denoised((), torch.empty(0), 0.0)
    started = time.perf_counter()
    size = settings.height, settings.width
    latents = pipeline.denoise(
        batch.embeddings,
        pipeline.noise([item.seed for item in batch.items], *size),
        steps=settings.steps,
        guidance=settings.guidance,
        height=settings.height,
        width=settings.width,
    )
    finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
    seconds = (time.perf_counter() - started) / len(batch.items)
    for item, ok in zip(batch.items, finite, strict=True):
        if not ok:
            tally.fail(item, "the model gave latents that are not finite (NaN or infinity)")
    items = tuple(item for item, ok in zip(batch.items, finite, strict=True) if ok)
    return _Denoised(items, latents[torch.tensor(finite, device=latents.device)], seconds)


def _decode(
    denoised: _Denoised, job: Job, pipeline: ImagePipeline, writer: PictureWriter, tally: Tally
) -> None:
    if not denoised.items:
        return
    started = time.perf_counter()
    settings = job.plan.settings
    pictures = pipeline.decode(denoised.latents, settings.height, settings.width)
    seconds = denoised.seconds + (time.perf_counter() - started) / len(denoised.items)
    common = _common_provenance(job, pipeline)
    for item, picture in zip(denoised.items, pictures, strict=True):
        if picture is None:
            tally.fail(item, "the model gave a picture that is not finite (NaN or infinity)")
        else:
            writer.submit(item, picture, {**_own_provenance(item), **common}, seconds=seconds)


def _own_provenance(item: PlanItem) -> dict[str, Any]:
    return {
        "key": key_json(item.key),
        "image": item.number,
        "seed": item.seed,
        "digests": item.digests,
    }


def _common_provenance(job: Job, pipeline: ImagePipeline) -> dict[str, Any]:
    return {
        "settings": asdict(job.plan.settings),
        "fingerprint": fingerprint(job.plan.settings),
        "commit": job.selection.commit,
        "batch_size": job.batch_size,
        "device": pipeline.device,
        "offload": pipeline.offload,
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    return {
        "fedgfe_store": fedgfe_store.__version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
    }


def _load_pipeline(job: Job, report: Report) -> ImagePipeline:
    settings = job.plan.settings
    job.model.fetch_weights()
    footprint = estimate_footprint(
        job.model,
        item_bytes=DTYPES[settings.dtype].itemsize,
        batch_size=job.batch_size,
        tokens=job.selection.schema.columns["t5"][0],
        height=settings.height,
        width=settings.width,
    )
    offload, remark = choose_offload(
        job.offload,
        device_type=torch.device(job.device).type,
        free_bytes=free_bytes(job.device),
        footprint=footprint,
    )
    if remark:
        report(remark)
    return FluxImages.load(job.model, dtype=settings.dtype, device=job.device, offload=offload)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConflictError(f"output folder: expected a folder, got a file {folder}") from None
    remove_stale_temps(folder)


def _complete_manifest(plan: Plan) -> None:
    """List the images that a killed run wrote without getting to their lines."""
    listed = listed_files(plan.folder)
    unlisted = [i for i in plan.items if i.status == "done" and i.path.name not in listed]
    if not unlisted:
        return
    with Manifest(plan.folder) as manifest:
        for item in unlisted:
            provenance = read_provenance(item.path) or {}
            found = item.path.stat()
            facts = {"bytes": found.st_size, "created": timestamp(found.st_mtime)}
            manifest.append({"file": item.path.name, **provenance, **facts})


def _skipped(plan: Plan) -> int:
    return plan.counts["done"] + plan.kept
