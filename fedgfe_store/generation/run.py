"""A run: read embeddings, denoise, decode and write, each while the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from fedgfe_store.common.location import retold
from fedgfe_store.derived.record import Derived
from fedgfe_store.errors import ConflictError
from fedgfe_store.generation.claims import Claims
from fedgfe_store.generation.denoise import Renderer
from fedgfe_store.generation.parts import Part
from fedgfe_store.generation.plan import Plan, PlanItem, comparer_of
from fedgfe_store.generation.prepare import Report, Run, log_remark, prepare
from fedgfe_store.generation.request import DEFAULTS, Request, RequestOptions
from fedgfe_store.generation.stopping import Stop, Stopped
from fedgfe_store.generation.write import Failure, ImageWriter, Progress, Tally
from fedgfe_store.images.checked import keep_notes
from fedgfe_store.images.manifest import (
    Manifest,
    fruitless_stops,
    listed_files,
    manifest_name,
    timestamp,
)
from fedgfe_store.images.png import Stamp, read_provenance, remove_stale_temps
from fedgfe_store.models.pipeline import ImagePipeline

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection


Load = Callable[[Run, Report], tuple[Run, ImagePipeline]]
"""Loads a run's model; gives the run as this machine's memory has it, and its pipeline."""


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
    elsewhere : int
        Images that another process has made meanwhile, or was making at the end.
    failed : tuple of Failure
        Images that could not be made.
    stopped : str or None
        The signal that ended the run early.
    stuck : bool
        Whether this run and the one before it were stopped before either finished an image, so
        that going on in the same way would do so for ever.
    seconds : float
        Time of rendering and writing, without loading the model.
    """

    plan: Plan
    done: int = 0
    skipped: int = 0
    elsewhere: int = 0
    failed: tuple[Failure, ...] = ()
    stopped: str | None = None
    stuck: bool = False
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> int:
        """Images that a stop has left for another run."""
        return len(self.plan.todo) - self.done - self.elsewhere - len(self.failed)


def generate(
    selection: Selection | Derived,
    output_dir: str | Path,
    request: Request = DEFAULTS,
    *,
    dry_run: bool = False,
    pipeline: ImagePipeline | None = None,
    stop: Stop | None = None,
    report: Report = log_remark,
    progress: Progress | None = None,
    shard: Part | None = None,
    **options: Unpack[RequestOptions],
) -> GenerationReport:
    """Render the images of a selection that are not done yet.

    Parameters
    ----------
    selection : Selection or Derived
        The records, or means and walks of some.
    output_dir : str or Path
        Folder of the images.
    request : Request
        What is asked.
    dry_run : bool
        Only plan.
    pipeline : ImagePipeline, optional
        Use this one rather than load a model.
    stop : Stop, optional
        Ends the run early when it is requested; what is denoised is still decoded and written.
    report : callable
        Gets remarks for the user, one line each; by default they are logged as warnings.
    progress : callable, optional
        Called with 1 for each image that was made or has failed.
    shard : Part, optional
        What the field `part` was called before.
    **options
        Fields of `Request` that take the place of those of `request`, as ``steps=20``.

    Returns
    -------
    GenerationReport
        The plan and what became of it. Records whose embeddings are damaged, whose images are
        not finite or cannot be written fail alone and are listed there.

    Raises
    ------
    FedgfeStoreError
        As for `prepare` and `render`.
    """
    if shard is not None:
        options["part"] = shard
    run = prepare(
        selection,
        output_dir,
        replace(request, **options),
        pipeline=pipeline,
        keep_negative=not dry_run,
        report=report,
    )
    if dry_run:
        return GenerationReport(run.plan, skipped=skipped(run.plan))
    return render(run, pipeline=pipeline, stop=stop, report=report, progress=progress)


def render(
    run: Run,
    *,
    pipeline: ImagePipeline | None = None,
    stop: Stop | None = None,
    report: Report = log_remark,
    progress: Progress | None = None,
    manifest: str | None = None,
    load: Load | None = None,
) -> GenerationReport:
    """Render what a run's plan has to do.

    Parameters
    ----------
    run : Run
        From `prepare`.
    pipeline : ImagePipeline, optional
        Use this one rather than load the run's model.
    stop, report, progress
        As for `generate`.
    manifest : str, optional
        File that lists its images, by default that of its part. Whoever names one is a worker of
        a run of several, and does not note that it was stopped without an image.
    load : callable, optional
        Loads the run's model, as `load_model` does by default.

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
    plan, stop = run.plan, stop or Stop()
    # Also where nothing is left to do: the run before may have been killed between an image and its
    # line.
    if plan.counts["done"]:
        complete_manifest(run, report)
    if not plan.todo:
        note_done(run, {}, report)
        return GenerationReport(plan, skipped=skipped(plan))
    _make_folder(plan.folder)
    # Before anything is claimed: loading takes minutes, in which other processes may do the work.
    try:
        with stop.interrupting():
            loaded = pipeline
            if loaded is None:
                run, loaded = (load or load_model)(run, report)
    except Stopped:
        stuck = note_stop(plan.folder, run.request.part, stop, report)
        return GenerationReport(plan, skipped=skipped(plan), stopped=stop.reason, stuck=stuck)
    started = time.perf_counter()
    # In this order: the writer ends first, while the manifest takes its lines; claims are given
    # back last, when others find the images.
    with (
        Claims(plan.folder, report=report, ended=lambda: stop.requested) as claims,
        Manifest(plan.folder, manifest or manifest_of(run.request.part)) as lines,
    ):

        def settle(item: PlanItem, error: str | None) -> None:
            if error is not None:
                places = plan.folder, run.selection.location, run.model.folder
                told = retold(error, plan.folder, places)
                _note_failure(lines, item, told, report)
            # After the line, so that who takes the claim next can read why it failed.
            claims.release(item.path.name)

        tally = Tally(progress or (lambda _: None), settle)
        with ImageWriter(lines, tally) as writer:
            # A caller's own stays where the caller has put it, but a worker's is the run's.
            movable = pipeline is None or manifest is not None
            renderer = Renderer(
                run, loaded, writer, tally, movable=movable, stop=stop, report=report
            )
            renderer.run(claims)
    note_done(run, tally.done, report)
    if renderer.gave_up:
        tally.give_up(plan.todo, f"not rendered, since {renderer.gave_up}")
    made = GenerationReport(
        plan,
        done=len(tally.done),
        skipped=skipped(plan),
        elsewhere=len(tally.elsewhere),
        failed=tally.failures,
        stopped=stop.reason,
        seconds=time.perf_counter() - started,
    )
    # What others made is progress, too: the next run has less to do.
    fruitless = made.stopped and made.left and not (made.done or made.elsewhere)
    # Of a worker others know what the run has come to.
    if not fruitless or manifest is not None:
        return made
    return replace(made, stuck=note_stop(plan.folder, run.request.part, stop, report))


def manifest_of(part: Part) -> str:
    """Name a part's manifest: network disks mix the lines of machines that write to one file."""
    return manifest_name(part.index, part.count)


def _note_failure(manifest: Manifest, item: PlanItem, error: str, report: Report) -> None:
    try:
        manifest.fail(item.path.name, key=item.key, image=item.number, error=error)
    except OSError as problem:  # the run itself reports the failure too
        report(f"cannot note in the manifest that {item.path.name} has failed: {problem}")


def note_stop(folder: Path, part: Part, stop: Stop, report: Report) -> bool:
    """Note in a folder that a run was stopped without an image; whether the one before was, too.

    A person's Ctrl-C does not count, since no queue goes on after it. When two runs in a row have
    been noted, counting begins anew: whoever goes on then has probably changed something.

    Parameters
    ----------
    folder : Path
        Folder of the images; made if it is not there.
    part : Part
        Which part of the work the run had.
    stop : Stop
        What stopped it.
    report : callable
        Hears why it could not be noted.
    """
    if stop.reason is None or stop.reason == "SIGINT":
        return False
    stuck = fruitless_stops(folder, manifest_of(part)) == 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Manifest(folder, manifest_of(part)) as manifest:
            manifest.stopped(stop.reason, times=2 if stuck else 1)
    except OSError as error:
        report(f"cannot note in the manifest of {folder} that no image was finished: {error}")
    return stuck


def load_model(run: Run, report: Report = log_remark) -> tuple[Run, ImagePipeline]:
    """Load a run's model; return the run as this machine's memory has it, and its pipeline.

    Raises
    ------
    NotFoundError
        If the model's weights are neither here nor reachable.
    SchemaMismatchError
        If they do not fit.
    """
    run.model.fetch_weights()
    from fedgfe_store.models.diffusers import DiffusersImages

    placed = run.placed(report)
    return placed, DiffusersImages.load(placed.model, placed.placement)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConflictError(f"output folder: expected a folder, got a file {folder}") from None
    remove_stale_temps(folder)


def complete_manifest(run: Run, report: Report) -> None:
    """List the images that a killed run wrote without getting to their lines."""
    folder = run.plan.folder
    unlisted = run.plan.images.done
    own = manifest_of(run.request.part)
    for name in (own, None):  # its own manifest lists most of them, if not all
        listed = listed_files(folder, name=name) if unlisted else set()
        unlisted = [file for file in unlisted if file not in listed]
    if not unlisted:
        return
    try:
        with Manifest(folder, own) as manifest:
            for file in unlisted:
                provenance = read_provenance(folder / file) or {}
                found = (folder / file).stat()
                facts = {"bytes": found.st_size, "created": timestamp(found.st_mtime)}
                manifest.append({"file": file, **provenance, **facts})
    except OSError as error:  # the images say the same of themselves
        report(f"the manifest of {folder} is not completed: {error}")


def note_done(run: Run, written: Mapping[PlanItem, Stamp], report: Report) -> None:
    """Note which files are as they should be, so that the next plan need not read them."""
    plan, comparer = run.plan, comparer_of(run.plan)
    # Of the others that are done the notes have said so.
    read = (item for item in plan.images.items.values() if item.status == "done")
    stamps = {item: item.seen for item in read if item.seen is not None}
    notes = {
        item.path.name: (stamp, comparer.mark(item.digests))
        for item, stamp in {**stamps, **written}.items()
    }
    try:
        keep_notes(plan.folder, notes)
    except OSError as error:  # the next plan reads all files, as this one did
        report(f"cannot note in {plan.folder} which images are done: {error}")


def skipped(plan: Plan) -> int:
    """Count the images that a run leaves as they are."""
    return plan.counts["done"] + plan.kept
