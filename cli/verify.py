"""Checking every record and file of a store: ``verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .answer import answers
from .command import Command
from .options import quiet_option, wait_option
from .progress import progress
from .tables import counted, print_table

if TYPE_CHECKING:
    from fedgfe_store.storage.engine import Verification
    from fedgfe_store.store import EmbeddingStore

    from .finding import Context

DAMAGED = 3
"""Exit code when something is damaged."""

_SHOWN_LEFTOVERS = 20


@click.command("verify", cls=Command)
@click.option(
    "--repair",
    is_flag=True,
    help="Mark damaged records as deleted, so that they can come back; undo old releases' damage.",
)
@wait_option
@quiet_option
@answers
@click.pass_context
def command(
    ctx: click.Context, /, repair: bool, timeout: float, quiet: bool, answer: dict[str, Any]
) -> None:
    """Read every record and check everything else that the store needs.

    Names each damaged record and goes on. With --repair they are marked as deleted, in one
    commit: importing the same checkpoints again then puts exactly them back.

    \b
    fedgfe-store verify
    fedgfe-store verify --repair

    Exit code: 0 sound, 3 something is damaged (whether repaired or not).
    """
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import DamagedDataError

    obj: Context = ctx.obj
    try:
        store = EmbeddingStore.open(obj.store)
    except DamagedDataError as error:
        answer.update(store=obj.store, sound=False, problems=[str(error)])
        click.echo(f"problem: {error}")
        ctx.exit(DAMAGED)
    with progress(_expected(store), "records", quiet=quiet) as advance:
        found = store.verify(repair=repair, timeout=timeout, progress=advance)
    repaired_in = store.commit if repair and found.damaged else None
    answer.update(store=store.location, sound=found.sound, repaired_in=repaired_in, **vars(found))
    _print_damage(found)
    if found.sound:
        click.echo(f"sound: {_extent(store, found)}")
        return
    problems = counted(len(found.problems), "problem")
    damaged = counted(len(found.damaged), "damaged record")
    click.echo(f"not sound: {_extent(store, found)}: {damaged}, {problems}")
    _print_remedy(found, repaired_in=store.commit if repair else None)
    ctx.exit(DAMAGED)


def _expected(store: EmbeddingStore) -> int:
    from fedgfe_store.errors import DamagedDataError

    try:
        return len(store)
    except DamagedDataError:  # verify says so itself, and reads no record then
        return 0


def _extent(store: EmbeddingStore, found: Verification) -> str:
    return f"{counted(found.records, 'record')} of {store.location}, commit {found.commit}"


def _print_damage(found: Verification) -> None:
    if found.damaged:
        headers = ("node", "round", "split", "class_name", "index", "reason")
        rows = [
            (d.key.node, d.key.round, d.key.split, d.key.class_name, d.key.index, d.reason)
            for d in found.damaged
        ]
        print_table(headers, rows, right=("round", "index"))
        click.echo()
    for mended in found.mended:
        click.echo(f"mended: {mended}")
    for problem in found.problems:
        click.echo(f"problem: {problem}")
    more = len(found.leftovers) - _SHOWN_LEFTOVERS
    for leftover in found.leftovers[:_SHOWN_LEFTOVERS]:
        click.echo(f"leftover: {leftover}")
    if more > 0:
        click.echo(f"leftover: and {more:,} more")


def _print_remedy(found: Verification, *, repaired_in: int | None) -> None:
    if not found.damaged:
        return
    back = "importing the same checkpoints again puts them back"
    if repaired_in is None:
        click.echo(f"verify --repair marks the damaged records as deleted; {back}")
    else:
        records = counted(len(found.damaged), "record")
        click.echo(f"repaired: {records} marked as deleted in commit {repaired_in}; {back}")
