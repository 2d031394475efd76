"""A SLURM script: ``slurm``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedgfe_store.common.location import Location

from .command import Command
from .options import Filters

if TYPE_CHECKING:
    from .finding import Context

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_LONG_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?")


# Minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on, as sbatch takes them.
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


def _one_line(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.isprintable():
        raise click.BadParameter(f"expected one line, got {value!r}")
    return value


def _time(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not _TIME.fullmatch(value):
        raise click.BadParameter(f"expected such as 12:00:00, 90 (minutes) or 2-12, got {value!r}")
    return value


def _file_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if "/" in value:
        raise click.BadParameter(f"expected a name without /, since logs are named so, got {value}")
    return _one_line(ctx, param, value) or ""


def _long_options(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[str]:
    for value in values:
        _one_line(ctx, param, value)
        if not _LONG_OPTION.fullmatch(value):
            raise click.BadParameter(f"expected such as --account=NAME, got {value!r}")
    return list(values)


@click.command("slurm", cls=Command)
@click.option(
    "--parts",
    "--shards",
    "parts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Parts of the work: tasks of an array, each with a GPU.",
)
@click.option(
    "--time",
    "limit",
    default="24:00:00",
    show_default=True,
    metavar="TIME",
    callback=_time,
    help="Time limit of a task: hours:minutes:seconds, minutes or days-hours.",
)
@click.option("--partition", callback=_one_line, help="Partition [the cluster's default].")
@click.option(
    "--gres", default="gpu:1", show_default=True, callback=_one_line, help="Resources of a task."
)
@click.option("--job-name", default="fedgfe", show_default=True, callback=_file_name)
@click.option("--setup", multiple=True, metavar="LINE", help="Shell line to run first; repeatable.")
@click.option(
    "--sbatch",
    multiple=True,
    metavar="OPTION",
    callback=_long_options,
    help='Further option of sbatch, such as "--account=x"; repeatable.',
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- GENERATE_OPTIONS")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    parts: int,
    limit: str,
    partition: str | None,
    gres: str,
    job_name: str,
    setup: tuple[str, ...],
    sbatch: list[str],
    arguments: tuple[str, ...],
) -> None:
    """Print a SLURM script that renders on many GPUs.

    What stands after -- goes to generate, and is checked now rather than in the queue. A task
    that its time limit stops is queued again and goes on where it stopped.

    \b
    fedgfe-store slurm --parts 8 --setup "conda activate flvit" -- --round 5 > job.sh
    sbatch job.sh
    fedgfe-store status --round 5
    """
    from .generate import command as generate
    from .legacy import OldFlags

    for name in ("--part", "--shard"):
        if any(word == name or word.startswith(f"{name}=") for word in arguments):
            raise click.UsageError(f"{name}: the script itself gives each task its own part")
    with generate.make_context("generate", list(arguments), parent=ctx.parent) as checked:
        names = (checked.params[name] for name in ("checkpoint", "checkpoint_dir", "pattern"))
        old = OldFlags(*names)
        filters = Filters.of(checked.params)
    obj: Context = ctx.obj
    if not old.given:
        _remark_on(filters, obj.store)
    # Checkpoints have a store of their own, which goes after one that is named.
    store = ["--store", str(obj.store)] if obj.store_given or not old.given else []
    options = {
        "job-name": job_name,
        "array": f"0-{parts - 1}" if parts > 1 else None,
        "time": limit,
        "partition": partition,
        "gres": gres,
    }
    directives = [f"--{name}={value}" for name, value in options.items() if value]
    click.echo(job_script([*directives, *_always(parts), *sbatch], setup, store, arguments, parts))


def _remark_on(filters: Filters, path: Location) -> None:
    """Say which names are not in the store yet; by the time that the job runs they may be."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import NotFoundError

    if not filters or (isinstance(path, Path) and not path.exists()):
        return
    try:
        filters.resolved(EmbeddingStore.open(path))
    except NotFoundError as error:
        for line in str(error).splitlines():
            click.echo(f"note: {line}", err=True)


def _always(parts: int) -> list[str]:
    from fedgfe_store.generation.stopping import SIGNAL_LEAD

    log = "%x-%A_%a.out" if parts > 1 else "%x-%j.out"
    return ["--requeue", f"--signal=USR1@{SIGNAL_LEAD}", "--open-mode=append", f"--output={log}"]


def job_script(
    directives: Sequence[str],
    setup: Sequence[str],
    store: Sequence[str],
    arguments: Sequence[str],
    parts: int,
) -> str:
    """Return a batch script that runs ``generate`` in the present folder.

    Parameters
    ----------
    directives : sequence of str
        Options of sbatch.
    setup : sequence of str
        Shell lines, taken as they are.
    store : sequence of str
        Options that name the embedding store.
    arguments : sequence of str
        Arguments of ``generate``.
    parts : int
        Tasks of the array; without one for 1.
    """
    words = ["fedgfe-store", *store, "generate", *arguments]
    run, job = shlex.join(words), '"$SLURM_JOB_ID"'
    if parts == 1:
        # Said here too, since sbatch hands on the environment that it is called in.
        run += " --part 0/1"
    else:
        # With their number, since only some of the tasks may be submitted again.
        run += f" --part auto/{parts}"
        # The id of an array's first task names the whole array.
        job = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_sbatch_quoted(directive)}" for directive in directives),
        "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *setup,
        "",
        "# A step of srun gets the signal ahead of the time limit; its CPUs have to be named.",
        f'srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} {run}',
        "code=$?",
        "# 75: stopped, to be continued.",
        'if [ "$code" -eq 75 ]; then',
        f"    scontrol requeue {job}",
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines)


def _sbatch_quoted(directive: str) -> str:
    """Quote as sbatch reads it: a backslash escapes inside any quotes, and # starts a comment."""
    if _PLAIN.fullmatch(directive):
        return directive
    name, equals, value = directive.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'
