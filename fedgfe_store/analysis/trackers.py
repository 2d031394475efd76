"""Tables of measures, and sheets, where training is watched: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from fedgfe_store.common.extra import extra
from fedgfe_store.errors import NotFoundError, SchemaMismatchError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Point:
    """A measure's value at a round.

    Parameters
    ----------
    tag : str
        Command, measure and group: ``score/agreement/node_0/dog``.
    round : int
        Federated round, the step of its curve.
    value : float
        What was measured, finite.
    """

    tag: str
    round: int
    value: float


@dataclass(frozen=True)
class Picture:
    """An image file at a round.

    Parameters
    ----------
    tag : str
        What it shows: ``sheet``.
    round : int
        Federated round, the step at which it is seen.
    file : Path
        A file that Pillow reads.
    """

    tag: str
    round: int
    file: Path


@dataclass(frozen=True)
class Source:
    """What points and pictures are of.

    Parameters
    ----------
    command : str
        What measured them: ``score``.
    about : mapping
        Further facts, such as store and commit.
    """

    command: str
    about: Mapping[str, Any]


class Tracker(Protocol):
    """Where points and pictures go."""

    def check(self) -> None:
        """Refuse what could not be written, before anything is measured.

        Raises
        ------
        NotFoundError
            If its library is not installed.
        SchemaMismatchError
            If its folder cannot be one.
        """

    def log(
        self, source: Source, points: Sequence[Point] = (), pictures: Sequence[Picture] = ()
    ) -> list[str]:
        """Write them, and return what there is to say about it, in lines.

        Raises
        ------
        OSError
            If they cannot be written.
        """


@dataclass(frozen=True)
class TensorBoard:
    """A folder of TensorBoard's event files; a curve goes on in the next call.

    Parameters
    ----------
    folder : Path
        The folder, made if it is not there.
    """

    folder: Path

    def __str__(self) -> str:
        return f"tensorboard:{self.folder}"

    def check(self) -> None:
        """Refuse a folder that is none, or a machine without TensorBoard."""
        extra("tensorboard", "--log tensorboard", "tensorboard")
        if self.folder.exists() and not self.folder.is_dir():
            raise SchemaMismatchError(f"--log: expected a folder, got {self.folder}")

    def log(
        self, source: Source, points: Sequence[Point] = (), pictures: Sequence[Picture] = ()
    ) -> list[str]:
        """Add what the folder does not have yet: the same values again would bend the curves."""
        self.check()
        writer = extra("torch.utils.tensorboard", "--log tensorboard", "tensorboard").SummaryWriter
        known = self._known() if points else {}
        new = [p for p in points if known.get((p.tag, p.round)) != np.float32(p.value)]
        other = sum((p.tag, p.round) in known for p in new)
        if new or pictures:
            with writer(str(self.folder), filename_suffix=".fedgfe-store") as events:
                for point in new:
                    events.add_scalar(point.tag, point.value, point.round)
                for picture in pictures:
                    pixels = np.asarray(_opened(picture))
                    events.add_image(picture.tag, pixels, picture.round, dataformats="HWC")
        lines = [f"{len(points) - len(new):,} values were there already"]
        lines = lines if len(new) < len(points) else []
        if other:
            lines.append(
                f"{other:,} values differ from earlier ones of their rounds: both are kept"
            )
        return lines

    def _known(self) -> dict[tuple[str, int], np.float32]:
        """Return the last value of each tag and round in the folder."""
        if not self.folder.is_dir():
            return {}
        what = "tensorboard.backend.event_processing.event_accumulator"
        reader = extra(what, "--log tensorboard", "tensorboard")
        guidance = dict.fromkeys(reader.DEFAULT_SIZE_GUIDANCE, 1) | {reader.SCALARS: 0}
        events = reader.EventAccumulator(str(self.folder), size_guidance=guidance)
        events.Reload()
        return {
            (tag, event.step): np.float32(event.value)
            for tag in events.Tags()[reader.SCALARS]
            for event in events.Scalars(tag)
        }


@dataclass(frozen=True)
class WandB:
    """Weights & Biases: each call is a run of its own, offline where ``WANDB_MODE`` says so.

    Parameters
    ----------
    project : str, optional
        The project, by default that of ``WANDB_PROJECT``, else what W&B takes.
    """

    project: str | None = None

    def __str__(self) -> str:
        return ":".join(filter(None, ["wandb", self.project]))

    def check(self) -> None:
        """Refuse a machine without W&B."""
        extra("wandb", "--log wandb", "wandb")

    def log(
        self, source: Source, points: Sequence[Point] = (), pictures: Sequence[Picture] = ()
    ) -> list[str]:
        """Write a run, whose steps are the rounds."""
        wandb = extra("wandb", "--log wandb", "wandb")
        found: dict[int, dict[str, Any]] = {}
        for point in points:
            found.setdefault(point.round, {})[point.tag] = point.value
        for picture in pictures:
            found.setdefault(picture.round, {})[picture.tag] = wandb.Image(_opened(picture))
        try:
            run = wandb.init(
                project=self.project,
                group=source.about.get("experiment"),
                job_type=source.command,
                config=dict(source.about),
                settings=wandb.Settings(console="off"),  # what a command prints stays as it is
            )
            for round in sorted(found):  # W&B takes no step behind the last one
                run.log(found[round], step=round)
            run.finish()
        except wandb.errors.Error as error:
            said = str(error).strip().partition("\n")[0]
            raise ConnectionError(
                f"Weights & Biases: {said} (WANDB_MODE=offline writes the run to a folder)"
            ) from error
        return []


def tracker(text: str) -> TensorBoard | WandB:
    """Return what ``tensorboard:DIR``, ``wandb`` or ``wandb:PROJECT`` names.

    Raises
    ------
    SchemaMismatchError
        If it is none of them.
    """
    kind, colon, name = text.partition(":")
    if kind == "tensorboard" and name:
        return TensorBoard(Path(name))
    if kind == "wandb" and bool(name) == bool(colon):
        return WandB(name or None)
    raise SchemaMismatchError(f"expected tensorboard:DIR, wandb or wandb:PROJECT, got {text!r}")


def points_of(table: pd.DataFrame, by: Sequence[str], command: str) -> list[Point]:
    """Return the values of a table of measures as points of curves over the rounds.

    Parameters
    ----------
    table : DataFrame
        A row for each group: the columns of `by`, then measures; those that are not finite, as the
        drift of a first round, have no point, and counts are none.
    by : sequence of str
        Its key columns.
    command : str
        What comes before the measure in a tag.

    Raises
    ------
    SchemaMismatchError
        If ``round`` is not in `by`.
    """
    check_rounds(by)
    measures = [str(n) for n in table.select_dtypes("float") if n not in by]
    groups = zip(*(table[name].tolist() for name in by), strict=True)
    tails = ["/".join(_labels(dict(zip(by, group, strict=True)))) for group in groups]
    return [
        Point("/".join(filter(None, [command, measure, tail])), int(round), value)
        for measure in measures
        for tail, round, value in zip(
            tails, table["round"].tolist(), table[measure].tolist(), strict=True
        )
        if isfinite(value)
    ]


def check_rounds(by: Sequence[str]) -> None:
    """Refuse a table without rounds: its values would have no step."""
    if "round" not in by:
        raise SchemaMismatchError(
            f"--log is by round: expected --by with round, got {', '.join(by) or 'all together'}"
        )


def _labels(group: Mapping[str, Any]) -> list[str]:
    """Name a group in a tag: its node, split and class, then numbers by what they are."""
    words = {name: str(group[name]) for name in ("node", "split", "class_name") if name in group}
    if words.get("node", "").isdecimal():
        words["node"] = f"node_{words['node']}"
    rest = [name for name in group if name not in words and name != "round"]
    return [*words.values(), *(f"{name}_{group[name]}" for name in rest)]


def _opened(picture: Picture) -> Image.Image:
    try:
        with Image.open(picture.file) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise NotFoundError(f"{picture.file}: there is no such picture") from error
