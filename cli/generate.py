"""Rendering images: ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._legacy import OldFlags, old_flags
from ._options import as_of_option, filter_options, quiet_option
from ._progress import progress

if TYPE_CHECKING:
    from fedgfe_store.generation.job import Job
    from fedgfe_store.generation.run import GenerationReport
    from fedgfe_store.selection import Selection

_SHOWN_FAILURES = 20
SOME_FAILED = 3
"""Exit code when some records could not be rendered."""


@click.command("generate")
@filter_options
@as_of_option
@old_flags
@click.option("--model", help="Hub id, folder or tiny [$FEDGFE_MODEL, the store's, FLUX.1-dev].")
@click.option(
    "--output-dir",
    "--output_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the images [output_images/<experiment>].",
)
@click.option(
    "--batch-size",
    "--batch_size",
    type=click.IntRange(min=1),
    help="Records per call of the model [as many as fit 1024 x 1024 pixels, up to 8].",
)
@click.option(
    "--steps",
    "--num_inference_steps",
    type=click.IntRange(min=1),
    help="Denoising steps [dev 28, schnell 4, tiny 8].",
)
@click.option(
    "--guidance", "--guidance_scale", type=float, help="Guidance scale [3.5; schnell takes none]."
)
@click.option("--height", type=click.IntRange(min=1), help="Pixels [1024, tiny 64].")
@click.option("--width", type=click.IntRange(min=1), help="Pixels [1024, tiny 64].")
@click.option(
    "--pool",
    type=click.Choice(["last", "first", "mean"]),
    default="last",
    show_default=True,
    help="How a CLIP sequence becomes a vector, where the store holds sequences.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Base seed of the noise.")
@click.option("--device", help="Such as cpu or cuda:1 [a GPU where there is one].")
@click.option(
    "--offload",
    type=click.Choice(["auto", "none", "model"]),
    default="auto",
    show_default=True,
    help="model keeps only one of transformer and decoder on the GPU.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in [bfloat16 on a GPU, float32 on the CPU].",
)
@click.option("--limit", type=click.IntRange(min=0), help="Render at most so many images now.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option(
    "--on-stale",
    type=click.Choice(["error", "regenerate", "keep"]),
    default="error",
    show_default=True,
    help="What to do about images made with other settings.",
)
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: dict[str, Any],
    as_of: int | None,
    old: OldFlags,
    output_dir: Path | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Render images from embeddings; run it again to go on where it stopped.

    Only images that are not there yet, or whose embedding has changed, are rendered. Exit code 3
    says that some records could not be.

    \b
    fedgfe-store generate --round 5
    fedgfe-store generate --round 1,5,10 --class dog --per-class 2 --dry-run
    fedgfe-store generate --node server --model tiny --output-dir pictures
    fedgfe-store generate --round 5 --steps 50 --guidance 7.5 --output-dir output_images/fine
    """
    from fedgfe_store.generation.job import prepare
    from fedgfe_store.generation.run import render

    selection = old.select(ctx, filters, as_of, dry_run=dry_run, quiet=quiet)
    job = prepare(selection, output_dir or _default_folder(selection), report=_remark, **options)
    if dry_run or not quiet:
        _print_plan(job)
    if dry_run:
        return
    with progress(len(job.plan.todo), "images", quiet=quiet) as advance:
        report = render(job, report=_remark, progress=advance)
    _print_result(report)
    if report.failed:
        ctx.exit(SOME_FAILED)


def _default_folder(selection: Selection) -> Path:
    experiment = selection.schema.metadata.experiment or selection.path.resolve().stem
    return Path("output_images") / experiment


def _remark(line: str) -> None:
    click.echo(f"note: {line}", err=True)


def _print_plan(job: Job) -> None:
    plan, settings = job.plan, job.plan.settings
    guidance = "" if settings.guidance is None else f", guidance {settings.guidance:g}"
    pool = f", pool {settings.pool}" if settings.pool else ""
    click.echo(
        f"records: {len(job.selection)} of {job.selection.path}, commit {job.selection.commit}"
    )
    click.echo(
        f"model: {settings.model} ({settings.revision[:12]}), {settings.dtype} on {job.device}"
    )
    click.echo(
        f"settings: {settings.steps} steps{guidance}, {settings.width}x{settings.height}, "
        f"seed {settings.seed}{pool}"
    )
    click.echo(f"folder: {plan.folder}")
    click.echo(plan.summary(job.batch_size))


def _print_result(report: GenerationReport) -> None:
    if report.failed:
        click.echo(f"failed: {len(report.failed)}", err=True)
        for failure in report.failed[:_SHOWN_FAILURES]:
            click.echo(f"  {failure}", err=True)
        if len(report.failed) > _SHOWN_FAILURES:
            click.echo(f"  and {len(report.failed) - _SHOWN_FAILURES} more", err=True)
    rate = f" in {report.seconds:.1f} s, {report.rate:.2f} images/s" if report.done else ""
    click.echo(
        f"{report.done} images rendered{rate}, {report.skipped} were there already: "
        f"{report.plan.folder}"
    )
