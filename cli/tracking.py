"""``--log``: what a command measures or draws, in TensorBoard or Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .tables import counted

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.analysis.trackers import Tracker
    from fedgfe_store.selection import Selection

    TrackerParam = click.ParamType["Tracker", object]
else:
    TrackerParam = click.ParamType


class _TrackerType(TrackerParam):
    """``tensorboard:DIR``, ``wandb`` or ``wandb:PROJECT``."""

    name = "tracker"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as what it names."""
        if not isinstance(value, str):
            return value
        from fedgfe_store.analysis.trackers import tracker
        from fedgfe_store.errors import SchemaMismatchError

        try:
            return tracker(value)
        except SchemaMismatchError as error:
            return self.fail(str(error), param, ctx)


log_option = click.option(
    "--log",
    type=_TrackerType(),
    metavar="WHERE",
    help="Log it by round, too: tensorboard:DIR, or wandb or wandb:PROJECT.",
)


def check_log(log: Tracker | None, by: Sequence[str], measure: str = "") -> None:
    """Refuse what could not be logged, before anything is computed."""
    from fedgfe_store.analysis.trackers import check_rounds

    if log is None:
        return
    if measure == "confusion":
        raise click.UsageError("--log takes curves: --measure averages or classes has some")
    check_rounds(by)
    log.check()


def log_table(
    log: Tracker | None,
    command: str,
    table: pd.DataFrame,
    by: Sequence[str],
    *,
    of: Selection,
    form: str,
) -> None:
    """Log a table of measures of `of`; what is said goes to stderr where `form` is for programs."""
    from fedgfe_store.analysis.trackers import Source, points_of

    if log is None:
        return
    keys = [*by, *(["class_name"] if "class_name" in table and "class_name" not in by else [])]
    points = points_of(table, keys, command)
    about = {"store": str(of.location), "commit": of.commit}
    experiment = of.schema.metadata.experiment
    lines = log.log(
        Source(command, about | ({"experiment": experiment} if experiment else {})), points
    )
    _say(log, counted(len(points), "value"), lines, err=form != "table")


def log_sheet(log: Tracker, files: Sequence[Path], round: int) -> None:
    """Log the pages of a sheet, whose last round is `round`."""
    from fedgfe_store.analysis.trackers import Picture, Source

    tags = ["sheet"] if len(files) == 1 else [f"sheet/{n}" for n in range(1, len(files) + 1)]
    pictures = [Picture(tag, round, file) for tag, file in zip(tags, files, strict=True)]
    lines = log.log(Source("sheet", {"files": [str(file) for file in files]}), pictures=pictures)
    _say(log, counted(len(files), "picture"), lines, err=False)


def _say(log: Tracker, what: str, lines: Sequence[str], *, err: bool) -> None:
    click.echo("; ".join([f"log: {what} to {log}", *lines]), err=err)
