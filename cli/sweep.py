"""Rendering with every combination of some settings: ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .codes import SOME_FAILED, STOPPED
from .command import Command
from .derived_options import Asked, derived_options
from .generate import place, print_plan, print_result, remark, stopping
from .option_types import NumberList, Numbers
from .options import (
    Filters,
    as_of_option,
    default_folder,
    filter_options,
    folder_option,
    quiet_option,
)
from .progress import progress
from .request_options import request_options
from .say import say


@click.command("sweep", cls=Command)
@filter_options
@derived_options
@as_of_option
@folder_option("output")
@click.option("--model", multiple=True, help="Hub ids, folders or tiny; repeat it for several.")
@click.option("--steps", type=NumberList(), help="Denoising steps: 1,2,4,8.")
@click.option("--guidance", type=Numbers(), help="Guidance scales: 1,3.5,9.")
@click.option("--seed", type=NumberList(), help="Base seeds: 0-3.")
@request_options("diffusion_type", "model")
@request_options("negative", "seed")
@request_options("images_per_record")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    derived: Asked,
    as_of: int | None,
    output_dir: Path | None,
    model: tuple[str, ...],
    steps: list[int | range] | None,
    guidance: list[float] | None,
    seed: list[int | range] | None,
    dry_run: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Render records with every combination of models, steps, guidance scales and seeds.

    Each combination is a folder of its own, such as steps-4_guidance-3.5, whose images are those of
    `generate` with these settings. Run it again to go on where it stopped; `sheet` draws them side
    by side.

    \b
    fedgfe-store sweep --round 5 --node server --per-class 1 --steps 1,2,4,8 --guidance 1,3.5,9
    fedgfe-store sweep --round 5 --class dog --seed 0-3 --model tiny --images seeds
    fedgfe-store sheet --images seeds --columns seed
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.generation.request import Request
    from fedgfe_store.generation.sweep import prepare_cells, render_cells

    given = {"model": list(model), "steps": steps, "guidance": guidance, "seed": seed}
    values = {name: _flat(each) for name, each in given.items() if each}
    axes = {name: each for name, each in values.items() if len(each) > 1}
    alone = {name: each[0] for name, each in values.items() if len(each) == 1}
    if not axes:
        raise click.UsageError("expected several values of --model, --steps, --guidance or --seed")
    own = place(asked.pop("part"), None)
    request = Request(**asked, **own, **alone)
    with stopping(ctx) as stop:
        with stop.interrupting():
            records = filters.select(EmbeddingStore.open(ctx.obj.store, as_of=as_of))
            selection = derived.of(records)
            folder = output_dir or default_folder(selection)
            runs = prepare_cells(
                selection, folder, request, axes=axes, keep_negative=not dry_run, report=remark
            )
            if dry_run or not quiet:
                for run in runs:
                    print_plan(run)
            if dry_run:
                return
        todo = sum(len(run.plan.todo) for run in runs)
        with progress(todo, "images", quiet=quiet) as advance:
            reports = list(render_cells(runs, report=remark, progress=advance, stop=stop))
    for each in reports:
        print_result(each)
    left = sum(len(run.plan.todo) for run in runs[len(reports) :])
    if left:
        say(f"{len(runs) - len(reports)} folders with {left} images were not begun")
    if left or any(each.stopped and each.left for each in reports):
        ctx.exit(STOPPED)
    if any(each.failed for each in reports):
        ctx.exit(SOME_FAILED)


def _flat(values: list[Any]) -> list[Any]:
    """Return values and ranges as values."""
    return [each for value in values for each in (value if isinstance(value, range) else [value])]
