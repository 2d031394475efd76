"""Do to stores what power cuts, kills, disks, locks and copying do, and count what is lost.

    python tools/soak.py [PIECE ...] [--short] [--seed 0] [--folder DIR] [--json]

`make soak` runs every piece in its long form, some hours of one processor; the tests run the
short one. The pieces are in `tests/storage`. A fault names the piece, the seed and the place.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "storage"))
import copies
import crashes
import random_kills
import served
import shared_writers
import writers
from figures import Figures
from operations import OPERATIONS

CONTROL = ("append", "compact")
"""Operations of which the flushes are left out, to see that it is found."""
FEW = ("create", "append", "replace", "compact", "back up again", "upgrade", "roll back replace")
"""Operations that the short form tries."""
KEPT = {
    "no flush": lambda kind: False,
    "no flush of a file": lambda kind: kind != "flush",
    "no flush of a folder": lambda kind: kind != "flush folder",
}


def power_cuts(root: Path, *, seed: int, short: bool) -> Figures:
    """Look at every state that a power cut can leave, or a sample of them."""
    return crashes.power_cuts(
        root, FEW if short else OPERATIONS, seed=seed, most=1 if short else None
    )


def without_flushes(root: Path, *, seed: int, short: bool) -> Figures:
    """See, as a control, that power cuts do damage where flushes are left out."""
    figures = Figures()
    for left_out, flushes in KEPT.items():
        found = crashes.power_cuts(
            root,
            CONTROL[: 1 if short else None],
            seed=seed,
            most=1 if short else 60,
            flushes=flushes,
        )
        real = [fault for fault in found.faults if "left over" not in fault]
        figures.counts["tried"] += found.counts["tried"]
        figures.counts[f"faults with {left_out}"] = len(real)
        if not real:
            figures.faults.append(f"nothing was found with {left_out}")
    return figures


def kills(root: Path, *, seed: int, short: bool) -> Figures:
    """Kill before, within and after each write, flush, rename, link and unlink."""
    return crashes.kills(root, FEW if short else OPERATIONS, seed=seed, most=2 if short else None)


def kills_at_random(root: Path, *, seed: int, short: bool) -> Figures:
    """Kill at any moment of a long life."""
    most, longest = (4, 0.05) if short else (200, 0.2)
    return random_kills.random_kills(root, seed=seed, most=most, longest=longest)


def refusals(root: Path, *, seed: int, short: bool) -> Figures:
    """Let disks be full or broken, or too many files open, at each call."""
    return crashes.refusals(
        root, FEW if short else OPERATIONS, seed=seed, most=2 if short else None
    )


def granted_locks(root: Path, *, seed: int, short: bool) -> Figures:
    """Let writers on several hosts each be granted every lock."""
    return writers.granted_locks(
        root, runs=1 if short else 5, shapes=[(3, 10)] if short else [(2, 20), (4, 15)]
    )


def stopped_writers(root: Path, *, seed: int, short: bool) -> Figures:
    """Stop a writer, let it be taken for dead, and let it go on."""
    return writers.stopped_writers(root, seed=seed, most=4 if short else None)


def shared_stores(root: Path, *, seed: int, short: bool) -> Figures:
    """Let writers of a shared store race while others are killed and it is compacted."""
    lives, rounds, kills = (1, 4, 2) if short else (20, 20, 10)
    return shared_writers.shared_lives(root, seed=seed, lives=lives, rounds=rounds, kills=kills)


def locks_not_offered(root: Path, *, seed: int, short: bool) -> Figures:
    """Let lock calls fail."""
    return writers.locks_not_offered(root)


def live_copies(root: Path, *, seed: int, short: bool) -> Figures:
    """Copy a store plainly under a busy writer."""
    figures = Figures()
    for copy in (copies.zarr_json_first, copies.in_any_order):
        many = 2 if short else 20
        found = copies.live_copies(root, copy, seed=seed, copies=many, all_sound=False)
        figures.counts += found.counts
        figures.faults += found.faults
    return figures


def backups(root: Path, *, seed: int, short: bool) -> Figures:
    """Back up a store under a busy writer: every backup is sound."""
    many = 2 if short else 20
    return copies.live_copies(root, copies.backed_up, seed=seed, copies=many, all_sound=True)


def faulty_servers(root: Path, *, seed: int, short: bool) -> Figures:
    """Read from S3 and Azure, where 15 % of requests are refused, cut or not answered."""
    names = ("moto",) if short else tuple(served.SERVERS)
    return served.faulty_servers(root, seed=seed, names=names, queries=4 if short else 200)


PIECES: dict[str, Callable[..., Figures]] = {
    "power-cuts": power_cuts,
    "without-flushes": without_flushes,
    "kills": kills,
    "kills-at-random": kills_at_random,
    "refusals": refusals,
    "granted-locks": granted_locks,
    "stopped-writers": stopped_writers,
    "locks-not-offered": locks_not_offered,
    "shared-stores": shared_stores,
    "live-copies": live_copies,
    "backups": backups,
    "faulty-servers": faulty_servers,
}


def _in_memory() -> str | None:
    """Return a folder in memory: crashes are acted, and no disk has to be waited for."""
    folder = "/dev/shm"
    return folder if os.access(folder, os.W_OK) else None


def _seconds() -> float:
    """Return the processor's seconds up to now, children included."""
    return sum(os.times()[:4])


@click.command()
@click.argument("pieces", nargs=-1, type=click.Choice(list(PIECES)))
@click.option("--short", is_flag=True, help="A sample of each piece, in seconds.")
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where; by default a temporary one."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(
    pieces: tuple[str, ...], short: bool, seed: int, folder: Path | None, as_json: bool
) -> None:
    """Run PIECES, by default all, and print a table of figures; exit with 1 after a fault."""
    where = Path(tempfile.mkdtemp(prefix="soak", dir=_in_memory())) if folder is None else folder
    say = partial(click.echo, err=as_json)
    say(f"seed {seed}, {'short' if short else 'long'} form")
    figures = {}
    try:
        for piece in pieces or PIECES:
            begun = _seconds()
            found = figures[piece] = PIECES[piece](where, seed=seed, short=short)
            counts = ", ".join(f"{what} {many}" for what, many in found.counts.items())
            say(f"{piece:18} {len(found.faults):3} faults {_seconds() - begun:6.0f} s  {counts}")
            for fault in found.faults:
                say(f"    {fault}")
    finally:
        if folder is None:
            shutil.rmtree(where)
    if as_json:
        made = {p: {"counts": f.counts, "faults": f.faults} for p, f in figures.items()}
        click.echo(json.dumps(made))
    sys.exit(any(found.faults for found in figures.values()))


if __name__ == "__main__":
    main()
