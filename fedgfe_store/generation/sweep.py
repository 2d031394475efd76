"""A sweep: every combination of some settings, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgfe_store.derived.record import Derived
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.prepare import Report, Run, log_remark, prepare
from fedgfe_store.generation.request import DEFAULTS, Request
from fedgfe_store.generation.run import GenerationReport, load_model, render
from fedgfe_store.generation.stopping import Stop
from fedgfe_store.generation.write import Progress
from fedgfe_store.models.pipeline import ImagePipeline
from fedgfe_store.names import name_part

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

AXES = ("model", "steps", "guidance", "seed")
"""Fields of `Request` that a sweep can take several values of. The model is the first of them, so
that each is loaded once."""

Axes = Mapping[str, Sequence[Any]]


def cells(folder: Path, request: Request, axes: Axes) -> dict[Path, Request]:
    """Return what is asked of each cell, by its folder: ``steps-4_guidance-3.5_seed-0``.

    Parameters
    ----------
    folder : Path
        Where the cells' folders are.
    request : Request
        What is asked of all of them.
    axes : mapping
        Values of some of `AXES`.

    Raises
    ------
    SchemaMismatchError
        If an axis is none, has no value or one twice, or two models would share a folder.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise SchemaMismatchError(f"sweep: expected axes of {', '.join(AXES)}, got {name}")
        if not values or len(set(values)) < len(values):
            raise SchemaMismatchError(f"{name}: expected values, each once, got {list(values)}")
    names = [name for name in AXES if name in axes]
    found: dict[Path, Request] = {}
    for values in product(*(axes[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        path = folder / "_".join(f"{name}-{_said(value)}" for name, value in chosen.items())
        if path in found:
            other = found[path].model
            raise SchemaMismatchError(
                f"model: expected models whose names differ, got {other} and {chosen['model']}: "
                f"both go to {path}"
            )
        found[path] = replace(request, **chosen)
    return found


def _said(value: Any) -> str:
    """Return a value as part of a folder's name; of a model's folder its own name."""
    if isinstance(value, float):
        return f"{value:g}"
    plain = Path(value).name if Path(str(value)).is_dir() else str(value)
    return name_part(plain)


def prepare_cells(
    selection: Selection | Derived,
    folder: str | Path,
    request: Request = DEFAULTS,
    *,
    axes: Axes,
    keep_negative: bool = True,
    report: Report = log_remark,
) -> list[Run]:
    """Plan every cell of a sweep before any is rendered, so that a fault is found at once.

    Parameters
    ----------
    selection, request, keep_negative, report
        As for `prepare`.
    folder : str or Path
        Where the cells' folders are.
    axes : mapping
        Values of some of `AXES`: ``{"steps": [4, 8], "seed": range(3)}``.

    Returns
    -------
    list of Run
        For `render_cells`. The images of each are those of a run of its own in that folder.

    Raises
    ------
    FedgfeStoreError
        As `prepare`.
    SchemaMismatchError
        If `axes` is of no use.
    """
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            report(line)

    asked = cells(Path(folder), request, {name: list(values) for name, values in axes.items()})
    return [
        prepare(selection, path, each, keep_negative=keep_negative, report=once)
        for path, each in asked.items()
    ]


def render_cells(
    runs: Sequence[Run],
    *,
    stop: Stop | None = None,
    report: Report = log_remark,
    progress: Progress | None = None,
) -> Iterator[GenerationReport]:
    """Render cell after cell; a model is loaded once for those that follow one another with it.

    Parameters
    ----------
    runs : sequence of Run
        From `prepare_cells`.
    stop, report, progress
        As for `render`.

    Yields
    ------
    GenerationReport
        What became of each cell; none follows one that was stopped.
    """
    stop, kept = stop or Stop(), _Kept()
    for run in runs:
        done = render(run, load=kept.load, stop=stop, report=report, progress=progress)
        yield done
        if stop.requested:
            return


class _Kept:
    """The model that was loaded last, for the next run that can use it."""

    def __init__(self) -> None:
        self._kind: tuple[Any, ...] = ()
        self._held: tuple[Run, ImagePipeline] | None = None

    def load(self, run: Run, report: Report) -> tuple[Run, ImagePipeline]:
        settings = run.plan.settings
        # With negatives a batch takes twice the memory: where weights go is decided anew.
        kind = (settings.model, settings.revision, run.negative is None)
        if self._held is None or kind != self._kind:
            self._held = None  # before the next one is loaded beside it
            self._held, self._kind = load_model(run, report), kind
        placed, pipeline = self._held
        # Where it is now: the run before may have moved it.
        here = replace(run, placement=pipeline.placement, batch_size=placed.batch_size)
        return here, pipeline
