"""Rendering images: ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store.common.location import Location

from .answer import answers
from .codes import SOME_FAILED, STOPPED, ends_other_processes
from .command import Command, in_options
from .derived_options import NAMES, Asked, derived_options, described
from .legacy import OldFlags, old_flags
from .options import (
    FILTERS,
    Filters,
    as_of_option,
    default_folder,
    filter_options,
    folder_option,
    quiet_option,
)
from .progress import progress
from .request_options import DECIDED_BY_IMAGE, request_options
from .say import say
from .tables import counted

if TYPE_CHECKING:
    from fedgfe_store.generation.prepare import Run
    from fedgfe_store.generation.request import Request
    from fedgfe_store.generation.run import GenerationReport
    from fedgfe_store.generation.stopping import Stop

    from .finding import Context

_SHOWN_FAILURES = 20
_DEFAULT = click.core.ParameterSource.DEFAULT
_DECIDED_BY_IMAGE = DECIDED_BY_IMAGE | {*FILTERS, *NAMES, "checkpoint", "checkpoint_dir", "pattern"}


@click.command("generate", cls=Command)
@filter_options
@derived_options
@as_of_option
@old_flags
@folder_option("output")
@request_options("diffusion_type", "part")
@click.option(
    "--from-image",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Make this picture again, from its own metadata [into a folder again beside it].",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="With --from-image: in place of the picture itself, or of the one in --images.",
)
@request_options("part", "on_stale")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where to render: in this process, or on the workers of a Ray cluster.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Workers of --engine ray [as many as GPUs, else as machines].",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@request_options("on_stale")
@quiet_option
@answers
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    derived: Asked,
    as_of: int | None,
    old: OldFlags,
    output_dir: Path | None,
    from_image: Path | None,
    overwrite: bool,
    engine: str,
    workers: int | None,
    dry_run: bool,
    quiet: bool,
    answer: dict[str, Any],
    **asked: Any,
) -> None:
    """Render images from embeddings; run it again to go on where it stopped.

    Only images that are not there yet, or whose embedding has changed, are rendered. Exit code 3
    says that some records could not be; 75 that a signal (SIGTERM, SIGUSR1 or Ctrl-C) ended the
    run early: everything finished is kept, and the same command goes on. It is 1 where no image was
    finished, twice in a row.

    \b
    fedgfe-store generate --round 5
    fedgfe-store generate --round 1,5,10 --class dog --per-class 2 --dry-run
    fedgfe-store generate --node server --model tiny --images pictures
    fedgfe-store generate --round 5 --steps 50 --guidance 7.5 --images output_images/fine
    fedgfe-store generate --round 5 --diffusion-type sd --images-per-record 4
    fedgfe-store generate --round 5 --mean round,class
    fedgfe-store generate --round 20 --node server --split test --per-class 1 --walk dog:drum
    """
    from fedgfe_store.generation.request import Request
    from fedgfe_store.generation.run import note_stop
    from fedgfe_store.generation.stopping import Stopped

    if from_image is not None and engine != "local":
        raise click.UsageError("--engine ray goes with many images, --from-image makes one")
    if workers is not None and engine == "local":
        raise click.UsageError("--workers goes with --engine ray")
    if overwrite and from_image is None:
        raise click.UsageError("--overwrite goes with --from-image; see --on-stale for other runs")
    own = place(asked.pop("part"), from_image)
    request = Request(**asked, **own, again=overwrite)
    with stopping(ctx) as stop, _engine(engine, workers) as (prepare, render):
        with stop.interrupting():
            if from_image is not None:
                run = _run_again(ctx, from_image, as_of, output_dir, request, dry_run=dry_run)
            else:
                records = old.select(ctx, filters, as_of, dry_run=dry_run, quiet=quiet)
                selection = derived.of(records)
                folder = output_dir or default_folder(selection)
                try:
                    run = prepare(
                        selection, folder, request, keep_negative=not dry_run, report=remark
                    )
                except Stopped:
                    if not dry_run and note_stop(folder, request.part, stop, remark):
                        _print_stuck(stop, "planned")
                        ctx.exit(1)
                    raise
            answer.update(_planned(run), dry_run=dry_run)
            if dry_run or not quiet:
                print_plan(run)
            shortage = run.plan.shortage(run.batch_size, stop.seconds_left)
            if shortage is not None:
                remark(shortage)
            if dry_run:
                return
        with progress(len(run.plan.todo), "images", quiet=quiet) as advance:
            report = render(run, report=remark, progress=advance, stop=stop)
    answer.update(_made(report))
    print_result(report)
    if report.stuck:
        _print_stuck(stop, f"finished a batch of {run.batch_size}")
        ctx.exit(1)
    if report.stopped and report.left:
        ctx.exit(STOPPED)
    if report.failed and ends_other_processes():
        remark("exit code 0, since torchrun ends the others at any other; see status --failed")
    elif report.failed:
        ctx.exit(SOME_FAILED)


@contextmanager
def _engine(
    name: str, workers: int | None
) -> Iterator[tuple[Callable[..., Run], Callable[..., Any]]]:
    """Give what plans and what renders: here, or on a Ray cluster, connected for the block."""
    if name == "local":
        from fedgfe_store.generation.prepare import prepare
        from fedgfe_store.generation.run import render

        yield prepare, render
        return
    from fedgfe_store.generation import ray

    with ray.connected():
        yield ray.prepare, partial(ray.render, workers=workers)


@contextmanager
def stopping(ctx: click.Context) -> Iterator[Stop]:
    """Turn signals into a stop; one that comes before there is anything to keep ends at once."""
    import os

    from fedgfe_store.generation.stopping import Stop, Stopped, expected_stop, stop_on_signals

    stop = Stop(expected_stop(os.environ))
    try:
        with stop_on_signals(stop, announce=_announce):
            yield stop
    except Stopped:
        say("stopped before the first image", err=True)
        ctx.exit(STOPPED)


def _announce(name: str) -> None:
    say(f"{name}: stopping after this step; once more ends at once", err=True)


def _run_again(
    ctx: click.Context,
    path: Path,
    as_of: int | None,
    output_dir: Path | None,
    asked: Request,
    *,
    dry_run: bool,
) -> Run:
    """Plan one picture as its own metadata say; the model's place may be given."""
    from fedgfe_store.generation.prepare import prepare
    from fedgfe_store.generation.recipe import AGAIN_FOLDER, Recipe

    _refuse_beside_image(ctx)
    recipe = Recipe.read(path)
    request = recipe.request(asked)
    stores = _stores_in_reach(ctx.obj, recipe.store)
    selection = recipe.find(stores, as_of=as_of, report=remark)
    folder = path.parent if request.again else path.parent / AGAIN_FOLDER
    run = prepare(
        selection, output_dir or folder, request, keep_negative=not dry_run, report=remark
    )
    recipe.check(run)
    return recipe.with_its_noise(run)


def _stores_in_reach(obj: Context, named: Location | None) -> list[Location]:
    """Give the store of the command line, then that which a picture names."""
    if named is None or named.resolve() == obj.store.resolve():
        return [obj.store]
    in_reach = obj.store_given or (isinstance(obj.store, Path) and obj.store.exists())
    return [obj.store, named] if in_reach else [named]


def _refuse_beside_image(ctx: click.Context) -> None:
    """Refuse options that would make another picture."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in _DECIDED_BY_IMAGE and ctx.get_parameter_source(name) is not _DEFAULT:
            raise click.UsageError(f"--from-image decides on {parameter.opts[0]} itself")


def place(text: str | None, from_image: Path | None) -> dict[str, Any]:
    """Tell which part of the work, and which GPU, is this process's."""
    import os

    import torch

    from fedgfe_store.generation.launchers import AskedPart, detect_part, in_array, local_device
    from fedgfe_store.generation.parts import WHOLE

    part = WHOLE
    if from_image is None:
        asked = AskedPart.parse(text) if text else AskedPart()
        part, reason = detect_part(os.environ, asked)
        if asked.part is None and (part.count > 1 or asked.array):
            remark(f"part {part}: {reason}")
        if not text and in_array(os.environ):
            remark(
                "the tasks of the SLURM array are not taken for parts of the work, each renders "
                "all that it selects; --part auto shares it out"
            )
    local = local_device(os.environ, torch.cuda.device_count())
    return {"part": part, "local": local}


def remark(line: str) -> None:
    """Tell the user something, on stderr, in the words of the command line."""
    say(f"note: {in_options(line, click.get_current_context().command)}", err=True)


def _planned(run: Run) -> dict[str, Any]:
    return {
        "store": run.selection.location,
        "commit": run.selection.commit,
        "records": len(run.selection),
        "folder": run.plan.folder,
        "settings": run.plan.settings,
        "device": run.placement.device,
        "batch_size": run.batch_size,
        "images": run.plan.counts,
        "to_render": len(run.plan.todo),
    }


def _made(report: GenerationReport) -> dict[str, Any]:
    names = ("done", "skipped", "elsewhere", "failed", "stopped", "left", "stuck", "seconds")
    return {name: getattr(report, name) for name in names}


def print_plan(run: Run) -> None:
    """Print what a run will do, and with what."""
    plan, settings = run.plan, run.plan.settings
    shown = [f"{settings.steps} steps"]
    if settings.guidance is not None:
        shown.append(f"guidance {settings.guidance:g}")
    shown += [f"{settings.width}x{settings.height}", f"seed {settings.seed}"]
    if settings.pool:
        shown.append(f"pool {settings.pool}")
    if settings.quantization:
        shown.append(settings.quantization)
    shown += [f"{n} {' '.join(v)}" for n in ("column", "lora") if (v := getattr(settings, n))]
    part = "" if run.request.part.count == 1 else f", part {run.request.part}"
    say(f"{described(run.selection)}{part}")
    where = f"{settings.dtype} on {run.placement.device}"
    say(f"model: {settings.model} ({settings.revision[:12]}), {where}")
    say(f"settings: {', '.join(shown)}")
    if run.negative:
        say(f"negative: {run.negative.source}")
    say(f"folder: {plan.folder}")
    say(plan.summary(run.batch_size))


def _print_stuck(stop: Stop, what: str) -> None:
    say(
        f"error: {stop.reason} stopped this run before it had {what}, and the run before it "
        "finished no image, either: queued again as it is, it would do so for ever; a smaller "
        "--batch-size or a longer time limit helps",
        err=True,
    )


def print_result(report: GenerationReport) -> None:
    """Print what a run has done, and what failed."""
    if report.failed:
        say(f"failed: {len(report.failed)}", err=True)
        for failure in report.failed[:_SHOWN_FAILURES]:
            say(f"  {failure}", err=True)
        if len(report.failed) > _SHOWN_FAILURES:
            say(f"  and {len(report.failed) - _SHOWN_FAILURES} more", err=True)
    rate = f" in {report.seconds:.1f} s, {report.rate:.2f} images/s" if report.done else ""
    say(
        f"{counted(report.done, 'image')} rendered{rate}, {report.skipped} were there already: "
        f"{report.plan.folder}"
    )
    if report.elsewhere:
        images = counted(report.elsewhere, "image")
        say(f"another process's: {images} made meanwhile, or being made")
    if report.stopped and report.left:
        more = "" if report.stuck else "; the same command goes on"
        say(f"stopped by {report.stopped} with {counted(report.left, 'image')} left{more}")
        if not (report.done or report.elsewhere or report.stuck or report.stopped == "SIGINT"):
            say("no image was finished: if none is in the next run, it ends with an error")
