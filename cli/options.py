"""Options that several commands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store.common.words import counted, numbers_first, printable

from .command import STORE
from .finding import Context
from .option_types import NUMERIC, NumberList

if TYPE_CHECKING:
    import numpy as np
    from click.decorators import FC

    from fedgfe_store.common.location import Location
    from fedgfe_store.derived.record import Derived
    from fedgfe_store.images.foreign import PictureNames
    from fedgfe_store.selection import Selection
    from fedgfe_store.store import EmbeddingStore


def own_device(device: str | None) -> str | None:
    """Give a process of torchrun or srun its own GPU, where none is named by number."""
    import torch

    from fedgfe_store.generation.launchers import local_device

    if device in (None, "cuda"):
        local = local_device(os.environ, torch.cuda.device_count())
        return device if local is None else f"cuda:{local}"
    return device


def _complete(ctx: click.Context, param: click.Parameter, typed: str) -> list[str]:
    """Tell the shell how a filter may go on: by the values that the store has."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import FedgfeStoreError

    before, comma, last = typed.rpartition(",")
    named = ctx.meta.get(STORE) or ctx.find_root().params["store"]
    try:
        values = EmbeddingStore.open(Context(named).store).select().column(param.name or "")
    except FedgfeStoreError:
        return []  # where there is no store the shell has nothing to offer
    known = sorted(set(map(str, values.tolist())), key=numbers_first)
    return [f"{before}{comma}{value}" for value in known if value.startswith(last)]


def _filter(name: str, text: str, *flags: str) -> Callable[[FC], FC]:
    kind: dict[str, Any] = {"type": NumberList()} if name in NUMERIC else {"metavar": "NAMES"}
    flags = (*flags, name) if flags else (f"--{name.replace('_', '-')}", name)
    return click.option(*flags, multiple=True, shell_complete=_complete, help=text, **kind)


_FILTERS = [
    _filter("node", "Nodes: 0-4,server."),
    _filter("round", "Rounds: 1,5,10-20."),
    _filter("split", "Splits: train,val,test."),
    _filter("class_name", "Classes: dog,drum.", "--class"),
    _filter("index", "Sample numbers: 0-9."),
    _filter("sample_id", "Sample ids: train_0."),
    _filter("file_id", "Files, as they were recorded."),
    click.option(
        "--per-class",
        type=click.IntRange(min=1),
        help="Only the first N samples of each node, round, split and class.",
    ),
    click.option(
        "--allow-empty",
        is_flag=True,
        help="Names that are not there, and filters that nothing meets, are no error.",
    ),
]


FILTERS = ("node", "round", "split", "class_name", "index", "sample_id", "file_id", "per_class")
"""Names of the filters, as `EmbeddingStore.select` takes them."""


@dataclass(frozen=True)
class Filters:
    """What was asked for: names as they were typed, numbers and ranges, by column.

    Parameters
    ----------
    typed : mapping
        Texts, or numbers and ranges, of the columns that were filtered.
    per_class : int, optional
        As in `EmbeddingStore.select`.
    allow_empty : bool
        Whether names that are not there, and an empty result, are no error.
    """

    typed: Mapping[str, list[Any]]
    per_class: int | None = None
    allow_empty: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Filters:
        """Return the filters among the parameters of a command."""
        names = [name for name in FILTERS if name != "per_class" and params[name]]
        typed = {name: _flat(name, params[name]) for name in names}
        return cls(typed, params["per_class"], params["allow_empty"])

    def __bool__(self) -> bool:
        return bool(self.typed) or self.per_class is not None

    def select(self, store: EmbeddingStore) -> Selection:
        """Return the records that were asked for.

        Raises
        ------
        NotFoundError
            If a name or number is not there, or nothing meets all of them.
        """
        selection = store.select(**self.resolved(store))
        self.check(store, selection)
        return selection

    def resolved(self, store: EmbeddingStore, *, strict: bool = True) -> dict[str, Any]:
        """Return the filters for `EmbeddingStore.select` of `store`.

        Raises
        ------
        NotFoundError
            If a name or number is not there.
        """
        if not self:
            return {}
        everything = _everything(store) if "split" in self.typed else store.select()
        return self.looked_up(everything.column, _where(everything), strict=strict)

    def looked_up(
        self, column: Callable[[str], np.ndarray], where: str, *, strict: bool = True
    ) -> dict[str, Any]:
        """Return the filters in terms of the values that `column` gives, which are those `where`.

        Raises
        ------
        NotFoundError
            If a name or number is not there.
        """
        from fedgfe_store.common.lookup import Known, look_up

        found: dict[str, Any] = dict(
            look_up(
                self.typed,
                lambda name: Known(name, column(name)),
                where,
                strict=strict and not self.allow_empty,
            )
        )
        return found if self.per_class is None else found | {"per_class": self.per_class}

    def check(self, store: EmbeddingStore, selection: Selection) -> None:
        """Refuse an empty selection that these filters made of records that are there.

        Raises
        ------
        NotFoundError
            If nothing meets them; says how many records each filter alone leaves out.
        """
        from fedgfe_store.common.lookup import no_records
        from fedgfe_store.errors import NotFoundError

        if self.allow_empty or not self.typed or len(selection):
            return
        wanted = {n: v for n, v in self.resolved(store).items() if n != "per_class"}
        without = {
            name: len(store.select(**{n: v for n, v in wanted.items() if n != name}))
            for name in wanted
        }
        raise NotFoundError(no_records(wanted, without, _where(selection)))


def _everything(store: EmbeddingStore) -> Selection:
    from fedgfe_store.selection import Selection

    return Selection.whole(store.snapshot)


def class_names(
    texts: Sequence[str], selection: Selection | None, remark: Callable[[str], object] | None = None
) -> list[str]:
    """Return classes that need not be in the store; a text is split where it is none of its.

    `remark` is told of those that may be misspelt.
    """
    import numpy as np

    from fedgfe_store.common.lookup import Known, look_up, said

    empty = np.empty(0, np.dtypes.StringDType())
    values = empty if selection is None else selection.others().column("class_name")
    known = Known("class_name", values)
    found = look_up({"class_name": list(texts)}, lambda column: known, "", strict=False)
    for name in found["class_name"]:
        nearest = [] if remark is None or known.has(name) else known.nearest(name)
        if nearest and remark is not None:
            remark(f"no record is of class {said([name])}; the nearest: {said(nearest)}")
    return found["class_name"]


def _where(selection: Selection) -> str:
    return f"{selection.location}, commit {selection.commit}"


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the filter options, as one argument `filters`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in (*FILTERS, "allow_empty")}
        return function(*args, filters=Filters.of(given), **kwargs)

    for option in reversed(_FILTERS):
        wrapped = option(wrapped)
    return wrapped


def _flat(name: str, values: Sequence[Any]) -> list[Any]:
    """Return the values of an option that may be repeated as one list."""
    return [each for value in values for each in value] if name in NUMERIC else list(values)


as_of_option = click.option(
    "--as-of",
    type=click.IntRange(min=0),
    metavar="COMMIT",
    help="See the store as this commit left it; history lists them.",
)
wait_option = click.option(
    "--wait",
    "timeout",
    type=click.FloatRange(min=0),
    default=600.0,
    metavar="SECONDS",
    help="How long to wait for another writer [600].",
)


class Renamed(click.Option):
    """An option of which help shows the first name only; the older ones work as before."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the first name and the help."""
        record = super().get_help_record(ctx)
        return record and (f"{self.opts[0]} {self.make_metavar(ctx)}", record[1])

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the first name, as help shows it."""
        return f"'{self.opts[0]}'"


def folder_option(name: str) -> Callable[[FC], FC]:
    """Return the option ``--images``, as the argument ``NAME_dir``.

    It was called ``--NAME-dir``, and ``--NAME_dir`` in old scripts.
    """
    return click.option(
        "--images",
        f"--{name}-dir",
        f"--{name}_dir",
        f"{name}_dir",
        cls=Renamed,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of the images [output_images/<experiment>].",
    )


def format_option(text: str) -> Callable[[FC], FC]:
    """Return the option ``--format``, whose value is the argument `form`; `text` is its help."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help=text,
    )


column_option = click.option(
    "--column", default=None, help="Tensor column [the first of embeddings: t5; clip for sd]."
)
tokens_option = click.option(
    "--tokens",
    type=click.Choice(["mean", "flat"]),
    default="mean",
    show_default=True,
    help="A vector per record: the mean over its tokens, or all of them.",
)
device_option = click.option("--device", help="Such as cpu or cuda:1 [a GPU where there is one].")


def plot_option(text: str) -> Callable[[FC], FC]:
    """Return the option ``--plot``; `text` is its help."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help=text,
    )


pattern_option = click.option(
    "--pattern",
    "patterns",
    multiple=True,
    metavar="REGEX",
    help="Names of another program's pictures, with groups of node, round, split, class, index and "
    r"image: (?P<class>.+)_(?P<round>\d+); repeat it for several.",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, only results.")


def default_folder(selection: Selection | Derived) -> Path:
    """Return where images go unless told otherwise: ``output_images/<experiment>``."""
    from fedgfe_store.errors import SchemaMismatchError

    experiment = selection.schema.metadata.experiment or selection.location.resolve().stem
    name = Path(experiment)
    # A store that somebody sent must not choose a folder anywhere on the disk.
    if name.is_absolute() or ".." in name.parts or not experiment.isprintable():
        raise SchemaMismatchError(
            f"experiment: expected a name that can be a folder's, got {experiment!r}: name the "
            "images' folder with --images"
        )
    return Path("output_images") / name


def image_folder(store: Location) -> Path:
    """Return where the images of the store at `store` are unless told otherwise."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import NotFoundError

    try:
        return default_folder(EmbeddingStore.open(store).select())
    except NotFoundError as error:
        error.add_note("without a store, --images names the folder of the images")
        raise


def store_in_reach(obj: Context) -> EmbeddingStore | None:
    """Open the store that pictures are compared with; where there is none they are not."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import FedgfeStoreError, NotFoundError

    try:
        return EmbeddingStore.open(obj.store)
    except NotFoundError:
        return None
    except FedgfeStoreError as error:
        click.echo(f"note: the pictures are not compared with the store: {error}", err=True)
        return None


def picture_names(patterns: Sequence[str], store: EmbeddingStore | None) -> PictureNames:
    """Return how other programs name their pictures; `store` tells the classes in the names."""
    from fedgfe_store.images.foreign import PictureNames

    known = [] if store is None else set(store.select().column("class_name").tolist())
    return PictureNames.of(patterns, known)


def foreign_line(number: int) -> str:
    """Say how many pictures another program made."""
    return f"of another program: {counted(number, 'picture')}, by their names"


def outdated_line(marks: Mapping[str, int]) -> str:
    """Say how many pictures are marked as out of date, and as what: ``2 records deleted``."""
    words = [(number, mark.partition(" ")) for mark, number in sorted(marks.items())]
    parts = [f"{counted(number, noun)} {what}" for number, (noun, _, what) in words]
    return f"out of date: {', '.join(parts)}"


def print_left_out(left_out: Mapping[str, str], *, most: int = 10) -> None:
    """Say on stderr which files were left out, and why."""
    for name, reason in list(left_out.items())[:most]:
        click.echo(f"left out: {printable(name)}: {reason}", err=True)
    if len(left_out) > most:
        click.echo(f"left out: and {len(left_out) - most} more", err=True)
