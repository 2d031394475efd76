"""The old script's options: checkpoint files as names for the records in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .codes import SOME_FAILED, ends_other_processes
from .finding import tell_of_copies
from .progress import progress
from .tables import counted, size

if TYPE_CHECKING:
    from fedgfe_store.checkpoints import FileReport, Sources
    from fedgfe_store.selection import Selection

    from .finding import Context
    from .options import Filters

_MOST_SHOWN = 4

_OPTIONS = [
    click.option(
        "--checkpoint",
        multiple=True,
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Import this file if it is new, and render its records; repeatable.",
    ),
    click.option(
        "--checkpoint-dir",
        "--checkpoint_dir",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="The same for the files of a folder. The store is DIR/embeddings.zarr unless given.",
    ),
    click.option("--pattern", metavar="GLOB", help="Which files of --checkpoint-dir [*.pt]."),
]


def old_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the old script's options, as one argument `old`.

    A command that has done its work exits with 3 where files could not be imported.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        given = (kwargs.pop(name) for name in ("checkpoint", "checkpoint_dir", "pattern"))
        old = OldFlags(*given)
        function(*args, old=old, **kwargs)
        if old.failed and not ends_other_processes():
            click.get_current_context().exit(SOME_FAILED)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


class OldFlags:
    """What ``--checkpoint``, ``--checkpoint_dir`` and ``--pattern`` ask for.

    Attributes
    ----------
    failed : sequence of FileReport
        Files that `select` could not import.
    """

    def __init__(self, files: tuple[Path, ...], folder: Path | None, pattern: str | None) -> None:
        if files and folder:
            raise click.UsageError("expected --checkpoint or --checkpoint-dir, got both")
        if pattern is not None and folder is None:
            raise click.UsageError("--pattern goes with --checkpoint-dir")
        if pattern is not None and "/" in pattern:
            raise click.UsageError(
                f"--pattern: expected one of file names, got {pattern!r}: name their folder with"
                " --checkpoint-dir"
            )
        self._files, self._folder, self._pattern = files, folder, pattern or "*.pt"
        self.failed: Sequence[FileReport] = ()

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return bool(self._files or self._folder)

    def select(
        self,
        ctx: click.Context,
        filters: Filters,
        as_of: int | None,
        *,
        dry_run: bool,
        quiet: bool,
    ) -> Selection:
        """Return the records that are asked for, after importing files that are new.

        With `as_of` nothing is imported, since that commit would not show it. In a dry run
        nothing is, either; where there is nothing but new files, it ends here.
        """
        obj: Context = ctx.obj
        if not self.given:
            from fedgfe_store import EmbeddingStore

            return filters.select(EmbeddingStore.open(obj.store, as_of=as_of))
        from fedgfe_store.checkpoints import Sources, find_new, select_records
        from fedgfe_store.errors import NotFoundError

        sources = Sources(self._files, self._folder, self._pattern)
        path = _store_path(ctx, sources)
        new: list[Path] = []
        if as_of is None and dry_run:
            new = find_new(path, sources)
            _announce(new, path)
        elif as_of is None:
            self.failed = _import_new(path, sources, quiet=quiet)
        if new and not path.exists():
            ctx.exit()
        store = sources.open_store(path, as_of=as_of)
        # What is only announced may hold names that the store has not yet.
        wanted = filters.resolved(store, strict=not new)
        selection = select_records(store, sources, failed=self.failed, **wanted)
        if new and not len(selection):
            ctx.exit()
        if filters.typed and not filters.allow_empty and not len(selection):
            filters.check(store, store.select(**wanted))
            raise NotFoundError(
                f"no record of those files meets the filters, others of {store.location} do"
            )
        return selection


def _store_path(ctx: click.Context, sources: Sources) -> Path:
    """Return the store that was named, else the one among the checkpoints."""
    from fedgfe_store.common.location import own_folder
    from fedgfe_store.errors import SchemaMismatchError

    obj: Context = ctx.obj
    if obj.store_given:
        return own_folder(obj.store)
    try:
        return sources.store_path
    except SchemaMismatchError as error:
        raise click.UsageError(f"{error}; or name a store for them with --store") from None


def _import_new(path: Path, sources: Sources, *, quiet: bool) -> Sequence[FileReport]:
    """Import what is new, show what became of it, and return the files that failed."""
    from fedgfe_store.checkpoints import import_checkpoints

    from .importing import show_report

    files = sources.present()
    if not files:
        return ()
    with progress(len(files), "files", quiet=quiet) as advance:
        report = import_checkpoints(path, files, new_only=True, on_file=lambda file: advance(1))
    if not all(file.known for file in report.files):
        show_report(report, quiet=quiet)
        tell_of_copies(path, report)
    if report.failed:
        click.echo("note: records of files that failed are left out", err=True)
    return report.failed


def _announce(new: Sequence[Path], path: Path) -> None:
    if new:
        shown = ", ".join(file.name for file in new[:_MOST_SHOWN])
        more = f" and {len(new) - _MOST_SHOWN} more" if len(new) > _MOST_SHOWN else ""
        total = size(sum(file.lstat().st_size for file in new))
        click.echo(
            f"would first import {counted(len(new), 'file')}, {total}, into {path}: {shown}{more}"
        )
