"""Options that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store._text import printable

if TYPE_CHECKING:
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.selection import Selection

_RANGE = re.compile(r"(\d+)-(\d+)")


class NumberList(click.ParamType):
    """Whole numbers and ranges: ``1,5,10-20``."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a list of int."""
        if not isinstance(value, str):
            return value
        numbers: list[int] = []
        for part in value.split(","):
            if found := _RANGE.fullmatch(part.strip()):
                numbers += _ascending(self, found, param, ctx)
            elif part.strip().isdecimal():
                numbers.append(int(part))
            else:
                self.fail(f"expected numbers such as 1,5,10-20, got {value!r}", param, ctx)
        return numbers


class NameList(click.ParamType):
    """Names; ranges of numbers too where `ranges` is set: ``0-4,server``."""

    name = "names"

    def __init__(self, *, ranges: bool = False) -> None:
        self.ranges = ranges

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a list of str."""
        if not isinstance(value, str):
            return value
        names: list[str] = []
        for part in value.split(","):
            found = _RANGE.fullmatch(part.strip()) if self.ranges else None
            names += map(str, _ascending(self, found, param, ctx)) if found else [part.strip()]
        return names


KEYS = {
    "node": "node",
    "round": "round",
    "split": "split",
    "class": "class_name",
    "index": "index",
}
"""Key columns by the names of their filters."""


class KeyList(NameList):
    """Key columns by the names of their filters: ``round,class``; those of `known` only."""

    name = "keys"

    def __init__(self, known: Mapping[str, str] = KEYS) -> None:
        super().__init__()
        self._known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return `value` as a list of the columns' names."""
        if not isinstance(value, str):
            return value
        names = super().convert(value, param, ctx)
        if not set(names) <= self._known.keys() or len(set(names)) < len(names):
            wanted = f"some of {', '.join(self._known)}, each once"
            self.fail(f"expected {wanted}, got {value!r}", param, ctx)
        return [self._known[name] for name in names]


def _ascending(kind: click.ParamType, found: re.Match[str], param: Any, ctx: Any) -> range:
    first, last = int(found[1]), int(found[2])
    if first > last:
        kind.fail(f"expected a range from low to high, got {found[0]!r}", param, ctx)
    return range(first, last + 1)


_FILTERS = [
    click.option("--node", type=NameList(ranges=True), help="Nodes: 0-4,server."),
    click.option("--round", type=NumberList(), help="Rounds: 1,5,10-20."),
    click.option("--split", type=NameList(), help="Splits: train,val,test."),
    click.option("--class", "class_name", type=NameList(), help="Classes: dog,drum."),
    click.option("--index", type=NumberList(), help="Sample numbers: 0-9."),
    click.option("--sample-id", "sample_id", type=NameList(), help="Sample ids: train_0."),
    click.option(
        "--per-class",
        type=click.IntRange(min=1),
        help="Only the first N samples of each node, round, split and class.",
    ),
]


FILTERS = ("node", "round", "split", "class_name", "index", "sample_id", "per_class")
"""Names of the filters, as `EmbeddingStore.select` takes them."""


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the filter options, as one argument `filters` for `EmbeddingStore.select`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        filters = {name: kwargs.pop(name) for name in FILTERS}
        given = {name: value for name, value in filters.items() if value is not None}
        return function(*args, filters=given, **kwargs)

    for option in reversed(_FILTERS):
        wrapped = option(wrapped)
    return wrapped


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
    show_default="600",
    metavar="SECONDS",
    help="How long to wait for another writer.",
)


def folder_option(name: str) -> Any:
    """Return the option ``--NAME-dir`` (and ``--NAME_dir``, as old scripts have it) of images."""
    return click.option(
        f"--{name}-dir",
        f"--{name}_dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of the images [output_images/<experiment>].",
    )


def format_option(text: str) -> Any:
    """Return the option ``--format``, whose value is the argument `form`; `text` is its help."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help=text,
    )


quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, only results.")


def default_folder(selection: Selection) -> Path:
    """Return where images go unless told otherwise: ``output_images/<experiment>``."""
    from fedgfe_store.errors import SchemaMismatchError

    experiment = selection.schema.metadata.experiment or selection.path.resolve().stem
    name = Path(experiment)
    # A store that somebody sent must not choose a folder anywhere on the disk.
    if name.is_absolute() or ".." in name.parts or not experiment.isprintable():
        raise SchemaMismatchError(
            f"experiment: expected a name that can be a folder's, got {experiment!r}: name the "
            f"images' folder with --output-dir (sheet and gallery: --input-dir)"
        )
    return Path("output_images") / name


def image_folder(store: Path) -> Path:
    """Return where the images of the store at `store` are unless told otherwise."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import NotFoundError

    try:
        return default_folder(EmbeddingStore.open(store).select())
    except NotFoundError as error:
        error.add_note("without a store, --input-dir names the folder of the images")
        raise


def store_in_reach(path: Path) -> EmbeddingStore | None:
    """Open the store that pictures are compared with; where there is none they are not."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import FedgfeStoreError, NotFoundError

    try:
        return EmbeddingStore.open(path)
    except NotFoundError:
        return None
    except FedgfeStoreError as error:
        click.echo(f"note: the pictures are not compared with the store: {error}", err=True)
        return None


def outdated_line(marks: Mapping[str, int]) -> str:
    """Say how many pictures are marked as out of date, and as what."""
    parts = [f"{number:,} {mark}" for mark, number in sorted(marks.items())]
    return f"out of date: {', '.join(parts)}"


def print_left_out(left_out: Mapping[str, str], *, most: int = 10) -> None:
    """Say on stderr which files were left out, and why."""
    for name, reason in list(left_out.items())[:most]:
        click.echo(f"left out: {printable(name)}: {reason}", err=True)
    if len(left_out) > most:
        click.echo(f"left out: and {len(left_out) - most} more", err=True)
