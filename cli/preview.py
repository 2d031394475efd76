"""A small sheet of a round, quickly: ``preview``, which the recorder starts while training."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store.common.location import Location

from .codes import SOME_FAILED, STOPPED
from .command import Command
from .generate import print_plan, print_result, remark, stopping
from .options import Filters, device_option, filter_options, quiet_option
from .progress import progress
from .tables import counted
from .tracking import log_option, log_sheet

if TYPE_CHECKING:
    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.generation.prepare import Run
    from fedgfe_store.generation.request import Request
    from fedgfe_store.selection import Selection

    from .finding import Context

_LAST_SECONDS = 30.0
"""How long rendering may take to stop by itself once nobody waits for it."""


@click.command("preview", cls=Command)
@filter_options
@click.option(
    "--records",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How many to show, one of each class before a second one of any.",
)
@click.option("--model", help="Hub id, folder or tiny [$FEDGFE_MODEL, the store's].")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps [the model's].")
@click.option(
    "--size", "height", type=click.IntRange(min=1), help="Width and height [the model's]."
)
@device_option
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file [previews/round_N.png beside the store]; pictures go to images/ beside it.",
)
@log_option
@click.option("--while-stdin", is_flag=True, hidden=True, help="End when standard input does.")
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    filters: Filters,
    records: int,
    height: int | None,
    output: Path | None,
    log: Tracker | None,
    while_stdin: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Draw a small sheet of a round: the last one, if none is named.

    A recorder with preview=3 runs it while training goes on. The same records are shown of each
    round, the server's where there are some, and `sheet --images previews/images` draws all
    rounds together. A model has to be named, here, by $FEDGFE_MODEL or by the store.

    \b
    fedgfe-store preview --model tiny
    fedgfe-store preview --round 5 --node 0 --records 10 --steps 4 --size 256
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.generation.request import Request
    from fedgfe_store.images.sheet import check_output

    if while_stdin:
        os.nice(19)
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    obj: Context = ctx.obj
    if log is not None:
        log.check()
    selection = _shown(filters.select(EmbeddingStore.open(obj.store)), records)
    number = int(selection.column("round")[0])
    file = output or _beside(obj.store) / f"round_{number}.png"
    if output is None:
        file.parent.mkdir(exist_ok=True)
    check_output(file)
    _check_model(asked["model"], selection)
    request = Request(height=height, width=height, on_stale="regenerate", **asked)
    run = _rendered(ctx, selection, file.parent / "images", request, quiet=quiet)
    _draw(run, selection, file)
    if log is not None:
        log_sheet(log, [file], number)


def _end_with_stdin() -> None:
    """Stop once whoever started this is gone: the other end of the pipe closes by itself."""
    # Not `sys.stdin`: a thread that waits in it has Python abort as it ends.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_SECONDS)
    os._exit(STOPPED)


def _shown(selection: Selection, most: int) -> Selection:
    """Return a few records of the last round: the server's first, and of many classes."""
    from fedgfe_store.common.words import numbers_first
    from fedgfe_store.errors import NotFoundError
    from fedgfe_store.records import SERVER

    if not len(selection):
        raise NotFoundError(f"{selection.location} holds no records")
    rounds = selection.column("round")
    selection = selection.take(rounds == rounds.max())
    nodes, classes = (selection.column(name).tolist() for name in ("node", "class_name"))
    splits, index = (selection.column(name).tolist() for name in ("split", "index"))
    order = sorted(
        range(len(selection)),
        key=lambda row: (nodes[row] != SERVER, numbers_first(nodes[row]), splits[row], index[row]),
    )
    seen: Counter[str] = Counter()
    places = {}
    for row in order:
        places[row] = seen[classes[row]], classes[row]
        seen[classes[row]] += 1
    return selection.take(sorted(order, key=places.__getitem__)[:most])


def _beside(store: Location) -> Path:
    from fedgfe_store.recording.preview import FOLDER

    return (store.parent if isinstance(store, Path) else Path()) / FOLDER


def _check_model(model: str | None, selection: Selection) -> None:
    """Refuse to take the largest model for want of a name: a preview is to be quick."""
    from fedgfe_store.errors import NotFoundError

    if not (model or os.environ.get("FEDGFE_MODEL") or selection.schema.metadata.model):
        raise NotFoundError(
            "no model is named: --model or $FEDGFE_MODEL says which one to preview with"
        )


def _rendered(
    ctx: click.Context, selection: Selection, folder: Path, request: Request, *, quiet: bool
) -> Run:
    from fedgfe_store.generation.prepare import prepare
    from fedgfe_store.generation.run import render

    with stopping(ctx) as stop:
        with stop.interrupting():
            run = prepare(selection, folder, request, keep_negative=False, report=remark)
            if not quiet:
                print_plan(run)
        with progress(len(run.plan.todo), "images", quiet=quiet) as advance:
            report = render(run, report=remark, progress=advance, stop=stop)
    if not quiet or report.failed:
        print_result(report)
    if report.stopped and report.left:
        ctx.exit(STOPPED)
    if report.failed:
        ctx.exit(SOME_FAILED)
    return run


def _draw(run: Run, selection: Selection, file: Path) -> None:
    from fedgfe_store.images.arrange import arrange
    from fedgfe_store.images.folder import ImageFolder
    from fedgfe_store.images.sheet import save_sheet

    keys = set(selection.keys())
    number = int(selection.column("round")[0])
    found = ImageFolder.scan(run.plan.folder).select(round=number)
    images = [image for image in found if image.key in keys]
    several = [n for n in ("node", "split") if len({getattr(key, n) for key in keys}) > 1]
    sheet = arrange(images, rows=["round"], columns=[*several, "class_name", "index"])
    save_sheet(sheet, file, report=remark)
    click.echo(f"{file}: {counted(len(sheet.cells), 'picture')} of round {number}")
