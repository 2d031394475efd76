"""Which store is meant: the one that was named, or the one that lies where training leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from fedgfe_store.common.location import Location
from fedgfe_store.common.words import counted, numbers

if TYPE_CHECKING:
    from fedgfe_store.checkpoints import ImportReport

DEFAULT = Path("embeddings.zarr")
"""The store of a project's folder, where nobody names another."""

_CHECKPOINTS = Path("checkpoints")


class Context:
    """What every command is given: where the store is, and whether the user named it.

    Parameters
    ----------
    given : Path or Address, optional
        What ``--store`` or ``$FEDGFE_STORE`` says.
    """

    def __init__(self, given: Location | None = None) -> None:
        self.given = given

    @property
    def store_given(self) -> bool:
        """Whether the user named the store."""
        return self.given is not None

    @cached_property
    def store(self) -> Location:
        """The store that is read, or added to.

        Raises
        ------
        ConflictError
            If it could be one of several.
        """
        return _found_in(Path()) if self.given is None else self.target

    @cached_property
    def target(self) -> Location:
        """The store that is made: nothing is looked for where none is named."""
        if not isinstance(self.given, Path):
            return self.given or DEFAULT
        return _store_of(self.given)


@dataclass(frozen=True)
class _Seen:
    """A store as it was found; `records` is None where it cannot be read."""

    path: Path
    records: int | None
    rounds: str = ""
    experiment: str | None = None

    @classmethod
    def of(cls, path: Path) -> _Seen:
        from fedgfe_store import EmbeddingStore
        from fedgfe_store.errors import FedgfeStoreError

        try:
            store = EmbeddingStore.open(path)
            rounds = numbers(store.select().column("round").tolist())
        except (FedgfeStoreError, OSError):
            return cls(path, None)  # the command that opens it says why
        return cls(path, len(store), rounds, store.schema.metadata.experiment)

    @property
    def words(self) -> tuple[str, str]:
        """How it is named, and what it holds."""
        name = f"--store {quote(str(self.path))}"
        if self.records is None:
            return name, "cannot be read"
        rounds, of = f"rounds {self.rounds or '-'}", f"experiment {self.experiment or '-'}"
        return name, f"{counted(self.records, 'record')}, {rounds}, {of}"


def _found_in(folder: Path) -> Path:
    """Return the project's own store, else the one among its checkpoints."""
    own, others = folder / DEFAULT, _below(folder / _CHECKPOINTS)
    if not others:
        return own
    if not own.exists():
        return _only(others)
    first = _Seen.of(own)
    if first.records != 0:
        return own
    if any(seen.records != 0 for seen in map(_Seen.of, others)):
        return _only([own, *others])
    return own


def _store_of(given: Path) -> Path:
    """Return the store that a user means by its folder, or by a folder that holds it."""
    if not given.is_dir() or (given / "zarr.json").exists():
        return given
    inside = _stores(given.glob("*.zarr")) or _below(given) or _below(given / _CHECKPOINTS)
    return _only(inside) if inside else given


def _below(folder: Path) -> list[Path]:
    """Return the stores in a folder of checkpoints, all of the name that FedGFE's mixins give."""
    depths = ("", "*/", "*/*/")
    return _stores(path for depth in depths for path in folder.glob(f"{depth}{DEFAULT}"))


def _stores(paths: Iterable[Path]) -> list[Path]:
    from fedgfe_store.storage.metadata import is_store
    from fedgfe_store.storage.places import place_of

    return sorted(path for path in paths if is_store(place_of(path)))


def _only(paths: Sequence[Path]) -> Path:
    """Return the only one of `paths` that holds records, and say which it is."""
    from fedgfe_store.errors import ConflictError

    seen = [_Seen.of(path) for path in paths]
    filled = [each for each in seen if each.records != 0] or seen
    if len(filled) > 1:
        width = max(len(each.words[0]) for each in filled)
        lines = [f"  {name:<{width}}   {what}" for name, what in (each.words for each in filled)]
        raise ConflictError("\n".join([f"{len(filled)} stores are here: say which one", *lines]))
    (only,) = filled
    for each in seen:
        if each is not only:
            click.echo(f"note: {each.path} holds no records", err=True)
    click.echo(f"note: the store is {only.path}", err=True)
    return only.path


def tell_of_copies(store: Location, report: ImportReport) -> None:
    """Say on stderr where records of the experiment that was imported to `store` are as well."""
    from fedgfe_store import EmbeddingStore

    standard = (*_stores([DEFAULT]), *_below(_CHECKPOINTS))
    others = [path for path in standard if path.resolve() != store.resolve()]
    if not (report.records and others) or (isinstance(store, Path) and not store.exists()):
        return
    experiment = EmbeddingStore.open(store).schema.metadata.experiment
    for other in map(_Seen.of, others):
        if other.records and experiment and other.experiment == experiment:
            click.echo(
                f"note: {other.path} holds {counted(other.records, 'record')} of experiment "
                f"{experiment}, too: --store {quote(str(other.path))} imports there, merge makes "
                f"one of both",
                err=True,
            )
