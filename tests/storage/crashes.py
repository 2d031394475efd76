"""Power cuts, kills and refused calls: an operation, and what may be found after it.

Every function here forks, so it runs in a program of its own (`tools/soak.py`): a process that has
started threads should not.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import disk
from children import in_child
from figures import Figures
from operations import OPERATIONS, STORE, Expected, Operation, Told, check, prepare, told
from system_calls import (
    CHANGING,
    REFUSED,
    Call,
    Killer,
    PublicationKiller,
    Recorder,
    Recording,
    Refuser,
    no_flushes,
)

from fedgfe_store import EmbeddingStore, FedgfeStoreError
from fedgfe_store.errors import NotFoundError

KINDS_OF_KILLS = ("before", "within", "after")
PLAIN = 10
"""Every how manieth state a plain Zarr reader looks at, which takes as long as all the rest."""


@dataclass(frozen=True)
class Scene:
    """An operation made ready in a folder: what lies there, and what it tells before and after."""

    name: str
    root: Path
    path: Path
    start: disk.Tree
    expected: Expected

    @classmethod
    @cache
    def of(cls, name: str, where: Path) -> Scene:
        """Make `OPERATIONS[name]` ready in a folder of its own below `where`."""
        operation, root = OPERATIONS[name], where / name.replace(" ", "_")
        with no_flushes():
            path = in_child(lambda: prepare(operation, root))
            if operation.after_death_of is not None:
                _leave_a_dead_writer(OPERATIONS[operation.after_death_of], root, path)
            start = disk.lying(root)
            before = _told_or_none(path)
            in_child(lambda: _do(operation.change, path))
            after = told(path)
        scene = cls(
            name, root, path, start, Expected(before, after, operation.change, operation.resumes)
        )
        scene.reset()
        return scene

    def reset(self) -> None:
        """Put back what the operation begins with."""
        disk.make(self.start)

    def change(self) -> None:
        """Do the operation."""
        _do(OPERATIONS[self.name].change, self.path)

    def recorded(self) -> Recording:
        """Do the operation in a process that is dead afterwards, and return its calls."""

        def record() -> tuple[Recording, disk.Tree]:
            # After a power cut no one can tell that the process is dead, unlike after a kill.
            socket.gethostname = lambda: "before the power cut"
            with Recorder(self.root) as recorder:
                self.change()
            return recorder.recording, disk.lying(self.root)

        self.reset()
        recording, there = in_child(record)
        followed = disk.Disk(recording)
        for call in recording.calls:
            followed.apply(call)
        made = followed.cached()
        other = [path for path in {*made, *there} if made.get(path, 0) != there.get(path, 0)]
        if other:
            raise AssertionError(f"written past the recorder: {min(other)}")
        return recording


def _do(change: Callable[[Path], object], path: Path) -> None:
    change(path)


def _told_or_none(path: Path) -> Told | None:
    try:
        return told(path)
    except NotFoundError:
        return None


def _leave_a_dead_writer(operation: Operation, root: Path, path: Path) -> None:
    """Leave what a writer leaves that is killed as late as it can be without having committed."""
    commit = EmbeddingStore.open(path).commit

    def die() -> None:
        with PublicationKiller(root, f"{path}/zarr.json"):
            operation.change(path)

    with no_flushes():
        in_child(die)
    if (
        EmbeddingStore.open(path).commit != commit
        or not EmbeddingStore.open(path).verify().leftovers
    ):
        raise AssertionError("the killed operation left nothing, or was committed")


def _calls(
    operation: Operation,
    root: Path,
    path: Path,
    start: disk.Tree,
    kinds: frozenset[str] = CHANGING,
) -> int:
    """Return how many calls of some kinds the operation makes."""

    def count() -> int:
        with Killer(root, None, kinds) as watch:
            operation.change(path)
        return watch.count

    disk.make(start)
    return int(in_child(count))


def _killed(operation: Operation, root: Path, path: Path, at: int, where: str) -> None:
    with Killer(root, at, where=where):
        operation.change(path)


# --- power cuts


def power_cuts(
    root: Path,
    names: Iterable[str],
    *,
    seed: int,
    most: int | None = None,
    flushes: Callable[[str], bool] = lambda kind: True,
) -> Figures:
    """Cut the power in the middle of operations, and look at what may be left.

    Parameters
    ----------
    root : Path
        A folder to work in.
    names : iterable of str
        Which of `OPERATIONS`.
    seed : int
        Of what is drawn.
    most : int, optional
        Moments to cut at for each operation, drawn, with one state each, besides its end and its
        commit; by default all states at every moment.
    flushes : callable
        Which kinds of flushes count; a control leaves some out.
    """
    figures = Figures()
    for name in names:
        rng = random.Random(f"{seed} {name}")
        scene = Scene.of(name, root)
        recording = scene.recorded()
        with no_flushes():
            for number, state in enumerate(_states(recording, rng, most=most, flushes=flushes)):
                _look_at(figures, scene, state, plain=number % PLAIN == 0)
    return figures


@dataclass(frozen=True)
class _State:
    """What a power cut at a moment left; `done` when the operation had returned by then."""

    moment: str
    tree: disk.Tree
    done: bool


def _states(
    recording: Recording, rng: random.Random, *, most: int | None, flushes: Callable[[str], bool]
) -> list[_State]:
    """Return states, each once, that a power cut can leave in a recording: all, or `most`."""
    calls = [c for c in recording.calls if not c.kind.startswith("flush") or flushes(c.kind)]
    moments = range(len(calls) + 1)
    drawn = set(moments if most is None else rng.sample(moments, min(most, len(moments))))
    # Where a commit is made, and where it has been.
    whole = {number for number in moments if number and _publishes(calls[number - 1])}
    whole |= {len(calls)}
    there, found, seen = disk.Disk(recording), [], set()
    for number in moments:
        if number:
            there.apply(calls[number - 1])
        done = number == len(calls)
        if number not in drawn | whole:
            continue
        states = list(there.states(rng, whole=most is None))
        if most is not None:
            # The extremes come first.
            states = [*states[:2], rng.choice(states)] if number in whole else [rng.choice(states)]
        for tree in states:
            mark = disk.fingerprint(tree), done
            if mark not in seen:
                seen.add(mark)
                found.append(_State(_moment(calls, number), tree, done))
    return found


def _publishes(call: Call) -> bool:
    """Whether this is the rename by which a commit is there, for any reader."""
    return call.kind == "rename" and call.to.endswith(f"/{STORE}/zarr.json")


def _moment(calls: list[Call], number: int) -> str:
    if not number:
        return "before its first call"
    last = calls[number - 1]
    return f"after call {number} of {len(calls)}, {last.kind} {Path(last.to or last.path).name}"


def _look_at(figures: Figures, scene: Scene, state: _State, *, plain: bool) -> None:
    def find() -> str:
        found = check(scene.path, scene.expected, plain=plain, power_cut=True)
        if state.done and found != "after":
            raise AssertionError("the operation had returned, and is lost")
        return found

    disk.make(state.tree)
    figures.look(f"{scene.name}, power cut {state.moment}", find)


# --- kills


def kills(root: Path, names: Iterable[str], *, seed: int, most: int | None = None) -> Figures:
    """Kill a writer before, within and after its calls; `most` kills an operation, or all."""
    figures = Figures()
    for name in names:
        rng = random.Random(f"{seed} {name}")
        scene, operation = Scene.of(name, root), OPERATIONS[name]
        total = _calls(operation, scene.root, scene.path, scene.start)
        moments = [(at, where) for at in range(total) for where in KINDS_OF_KILLS]
        moments = moments if most is None else rng.sample(moments, min(most, len(moments)))
        for number, (at, where) in enumerate(moments):
            scene.reset()
            in_child(lambda: _killed(operation, scene.root, scene.path, at, where))  # noqa: B023
            with no_flushes():
                figures.look(
                    f"{name}, killed {where} call {at} of {total}",
                    lambda: check(scene.path, scene.expected, plain=number % PLAIN == 0),  # noqa: B023
                )
    return figures


# --- refused calls


@dataclass(frozen=True)
class _Outcome:
    """How an operation ended in whose way the system put an error."""

    refused: str
    error: str | None
    text: str
    code: int | None
    notes: str


def _refused(scene: Scene, code: int, at: int, *, for_good: bool) -> _Outcome:
    with Refuser(scene.root, at, REFUSED[code], code=code, for_good=for_good) as watch:
        try:
            scene.change()
        except Exception as error:  # noqa: BLE001 - which one it is, is looked at
            kind = "clear" if isinstance(error, FedgfeStoreError | OSError) else "raw"
            notes = "\n".join(getattr(error, "__notes__", []))
            text = f"{type(error).__name__}: {error}"
            number = getattr(error, "errno", None)
            return _Outcome(", ".join(watch.refused[:1]), kind, text, number, notes)
    return _Outcome(", ".join(watch.refused[:1]), None, "", None, "")


def refusals(root: Path, names: Iterable[str], *, seed: int, most: int | None = None) -> Figures:
    """Let single calls, and all calls from one on, fail as a full or a broken disk does."""
    figures = Figures()
    for name in names:
        rng = random.Random(f"{seed} {name}")
        scene, operation = Scene.of(name, root), OPERATIONS[name]
        totals = {
            code: _calls(operation, scene.root, scene.path, scene.start, kinds)
            for code, kinds in REFUSED.items()
        }
        moments = [
            (code, at, good)
            for code, total in totals.items()
            for at in range(total)
            for good in (False, True)
        ]
        for code, at, good in moments if most is None else rng.sample(moments, most):
            scene.reset()
            outcome = in_child(lambda: _refused(scene, code, at, for_good=good))  # noqa: B023
            how = f"{errno.errorcode[code]} {'from' if good else 'at'} call {at}, {outcome.refused}"
            with no_flushes():
                figures.look(f"{name}, {how}", lambda: _judged(scene, outcome, code))  # noqa: B023
    return figures


def _judged(scene: Scene, outcome: _Outcome, code: int) -> str:
    """See that the error is clear and names a file, that its note is true, and nothing is lost."""
    found = check(scene.path, scene.expected, plain=False)
    if outcome.error is None:
        assert found == "after", "the operation had returned, and is lost"
        return "got over it"
    assert outcome.error == "clear", f"a raw error: {outcome.text}"
    assert "\n" not in outcome.text, f"more than a line: {outcome.text}"
    assert str(scene.root) in outcome.text, f"names no file: {outcome.text}"
    assert outcome.code in (code, None), f"another error: {outcome.text}"
    if outcome.notes and found == "after" and scene.expected.before is not None:
        changed = scene.expected.after != scene.expected.before
        published = "was published before this failed" in outcome.notes
        assert published or not changed, f"published, but it says: {outcome.notes}"
    if found == "before":
        assert "was published before this failed" not in outcome.notes, outcome.notes
    return f"refused, {found}"
