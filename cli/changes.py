"""Changing a store and looking after it: ``delete history compact merge backup upgrade``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store.common.location import Location

from .answer import answers
from .command import Command
from .options import Filters, filter_options, format_option, quiet_option, wait_option
from .progress import progress
from .store_path import StorePath
from .tables import counted, names, numbers, print_counts, print_data, print_table, size

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.selection import Selection
    from fedgfe_store.storage.append import AppendBatch
    from fedgfe_store.store import EmbeddingStore

    from .finding import Context

_MERGED = ("source", "records", "added", "replaced", "unchanged")
_NUMERIC = ("commit", "added", "deleted", "records", "bytes")


@click.command(cls=Command)
@filter_options
@click.option("--dry-run", is_flag=True, help="Count what would be deleted and stop.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@wait_option
@answers
@click.pass_obj
def delete(
    obj: Context,
    /,
    filters: Filters,
    dry_run: bool,
    yes: bool,
    timeout: float,
    answer: dict[str, Any],
) -> None:
    """Delete the records that meet every filter, in one commit.

    At least one filter is needed. What is deleted stays visible with --as-of until the store is
    compacted.

    \b
    fedgfe-store delete --round 3 --node 0-4 --dry-run
    fedgfe-store delete --round 3 --node 0-4 --yes
    """
    from fedgfe_store import EmbeddingStore

    if not filters:
        raise click.UsageError("expected at least one filter, such as --round 3")
    store = EmbeddingStore.open(obj.store)
    if not dry_run:
        store.snapshot.check_writable()  # before anything is asked
    wanted = filters.resolved(store)
    selection = store.select(**wanted)
    filters.check(store, selection)
    records = selection.records[["node", "round"]]
    found = counted(len(records), "record")
    answer.update(
        store=store.location, commit=store.commit, dry_run=dry_run, found=len(records), deleted=0
    )
    if len(records):
        _print_matched(selection, filters)
    if dry_run and len(records):
        print_counts(records)
        click.echo()
    if dry_run or not len(records):
        click.echo(f"{found} found; {'dry run, ' if dry_run else ''}nothing deleted")
        return
    if not yes:
        question = f"delete {found} ({_whose(records)}) from {store.location}?"
        click.confirm(question, abort=True, err=True)
    deleted = store.delete(timeout=timeout, **wanted)
    answer.update(commit=store.commit, deleted=deleted, records=len(store))
    if deleted != len(records):
        click.echo(f"note: {found} found at first; another writer came in between", err=True)
    click.echo(
        f"{counted(deleted, 'record')} deleted: {store.location} is at commit {store.commit}, "
        f"with {counted(len(store), 'record')}"
    )


def _print_matched(selection: Selection, filters: Filters) -> None:
    """Say what the filters were taken for: the values of each, with the records that have them."""
    from fedgfe_store.common.lookup import matched, noun

    for name in filters.typed:
        click.echo(f"{noun(name)}: {matched(name, selection.column(name).tolist())}")


def _whose(records: pd.DataFrame) -> str:
    nodes = names(records["node"].unique().tolist())
    return f"nodes {nodes}; rounds {numbers(records['round'].unique().tolist())}"


@click.command(cls=Command)
@format_option("json gives one commit per line.")
@click.option(
    "--limit", type=click.IntRange(min=0), help="Only the newest commits [table: 20, else all]."
)
@click.pass_obj
def history(obj: Context, form: str, limit: int | None) -> None:
    """Show what each commit added and deleted, the newest last.

    A replaced record counts as one added and one deleted. Bytes are those of the tensor files
    that the commit wrote and that are still there.

    \b
    fedgfe-store history
    fedgfe-store history --limit 100 --format csv > history.csv
    """
    from fedgfe_store import EmbeddingStore

    commits = EmbeddingStore.open(obj.store).history()
    if limit is None and form == "table":
        limit = 20
    shown = commits if limit is None else commits.iloc[max(0, len(commits) - limit) :]
    if form == "csv":
        lists = {name: [_listed(each) for each in shown[name]] for name in ("nodes", "rounds")}
        print_data(shown.assign(**lists), form)
    elif form == "json":
        print_data(shown, form, date_format="iso")
    else:
        print_table(list(shown.columns), map(_commit_row, _rows(shown)), right=_NUMERIC)
        cut = "" if len(shown) == len(commits) else f", {len(shown)} shown"
        click.echo(f"\n{counted(len(commits), 'commit')}{cut}")


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


def _commit_row(commit: dict[str, Any]) -> list[object]:
    shown = {
        "time": f"{commit['time']:%Y-%m-%d %H:%M:%S}",
        "nodes": names(commit["nodes"]),
        "rounds": numbers(commit["rounds"]),
        "bytes": size(commit["bytes"]),
    }
    return list((commit | shown).values())


def _listed(values: tuple[str | int, ...]) -> str:
    from fedgfe_store.common.words import quoted

    return ",".join(quoted(str(value)) for value in values)


@click.command(cls=Command)
@wait_option
@answers
@click.pass_obj
def compact(obj: Context, timeout: float, answer: dict[str, Any]) -> None:
    """Give space back: gather small commits, and free files of deleted records.

    Records keep their bits. Older commits (--as-of) lose what was deleted since.

    \b
    fedgfe-store compact
    """
    from fedgfe_store import EmbeddingStore

    store = EmbeddingStore.open(obj.store)
    done = store.compact(timeout=timeout)
    answer.update(store=store.location, commit=store.commit, **vars(done))
    if not done.files_freed:
        click.echo(f"nothing to free: {size(done.bytes_before)} of tensor files")
        return
    click.echo(
        f"tensor files: {size(done.bytes_before)} before, {size(done.bytes_after)} after\n"
        f"{counted(done.records_moved, 'record')} moved, {counted(done.files_freed, 'file')} "
        f"freed: {store.location} is at commit {store.commit}"
    )


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, type=StorePath(), metavar="SRC...")
@click.option(
    "--if-exists",
    type=click.Choice(["error", "replace", "skip"]),
    default="error",
    show_default=True,
    help="What becomes of records that the store has with other tensors.",
)
@wait_option
@quiet_option
@answers
@click.pass_obj
def merge(
    obj: Context,
    /,
    sources: tuple[Location, ...],
    if_exists: Any,
    timeout: float,
    quiet: bool,
    answer: dict[str, Any],
) -> None:
    """Bring the records of other stores into the store, one commit each.

    The store is made like the first source if it is not there. Merging again changes nothing.

    \b
    fedgfe-store --store all.zarr merge site_a.zarr site_b.zarr
    fedgfe-store merge /mnt/site_c/embeddings.zarr --if-exists replace
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.storage.engines import check_target

    check_target(obj.target)
    for path in sources:
        if _is_same(path, obj.target):
            raise click.UsageError(f"cannot merge {path} into itself")
    opened = [EmbeddingStore.open(path) for path in sources]
    target = _target(obj.target, opened, timeout)
    rows: list[list[object]] = []
    try:
        with progress(sum(map(len, opened)), "records", quiet=quiet) as advance:
            for source in opened:
                batch = target.merge(source, if_exists=if_exists, timeout=timeout, progress=advance)
                rows.append(_merge_row(source, batch))
    finally:  # what was merged before an error stays
        if rows:
            print_table(_MERGED, rows, right=_MERGED[1:])
    answer.update(store=target.location, commit=target.commit, records=len(target))
    answer.update(sources=[dict(zip(_MERGED, row, strict=True)) for row in rows])
    click.echo(
        f"\n{target.location} is at commit {target.commit}, with {counted(len(target), 'record')}"
    )


def _is_same(one: Location, other: Location) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.exists() and other.exists() and one.samefile(other)
    return one == other


def _target(path: Location, sources: list[EmbeddingStore], timeout: float) -> EmbeddingStore:
    """Open the store at `path`, or make it like the first source, if every source fits."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import NotFoundError

    try:
        store = EmbeddingStore.open(path)
    except NotFoundError:
        store = None
    schema = store.schema if store is not None else sources[0].schema
    for source in sources:
        schema.check_fits(source.schema, str(source.location))
    return store or EmbeddingStore.create(path, schema, timeout=timeout)


def _merge_row(source: EmbeddingStore, batch: AppendBatch) -> list[object]:
    return [source.location, len(source), batch.added, batch.replaced, batch.skipped]


@click.command(cls=Command)
@click.argument("target", type=click.Path(path_type=Path))
@wait_option
@quiet_option
@answers
@click.pass_obj
def backup(
    obj: Context, /, target: Path, timeout: float, quiet: bool, answer: dict[str, Any]
) -> None:
    """Bring a copy of the store to the folder TARGET, also while training writes.

    The copy is a store itself, and sound at any moment. Run again, it brings what is new. On the
    same file system tensor files are linked, not copied; keep one on another disk, too.

    \b
    fedgfe-store backup /backups/run2.zarr
    """
    from fedgfe_store import EmbeddingStore

    store = EmbeddingStore.open(obj.store)
    with progress(0, "bytes", quiet=quiet) as advance:
        done = store.backup(target, timeout=timeout, progress=advance)
    answer.update(store=store.location, target=target, **vars(done))
    brought = [
        f"{counted(done.copied, 'file')} copied ({size(done.nbytes)})" if done.copied else "",
        f"{counted(done.linked, 'file')} linked" if done.linked else "",
        f"{counted(done.removed, 'file')} removed" if done.removed else "",
    ]
    told = ", ".join(filter(None, brought)) or "nothing new"
    click.echo(f"{target}: {counted(done.records, 'record')}, commit {done.commit}; {told}")


@click.command(cls=Command)
@wait_option
@click.pass_obj
def upgrade(obj: Context, /, timeout: float) -> None:
    """Bring the store to format version 2.

    Version 2 keeps each sample's file_id as a column, where each commit came from, and ties every
    piece of a key column to its place. Releases that only know version 1 cannot open it then; a
    store of version 1 is read and written on without.

    \b
    fedgfe-store upgrade
    """
    from fedgfe_store import EmbeddingStore

    store = EmbeddingStore.open(obj.store)
    if store.upgrade(timeout=timeout):
        click.echo(f"{obj.store} is of format version 2 now, commit {store.commit}")
    else:
        click.echo(f"{obj.store} is of format version 2: nothing to do")
