"""What is on the disk when: the order of flushes, renames and removals, as the system saw it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import SMALL, fill
from places import TESTS
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.storage.layout import array_metadata

HINTS = tuple(f"/{name}/zarr.json" for name in array_metadata(SMALL))
"""What a commit does not flush: the arrays' own metadata, of which our readers need nothing."""

TRACED = """
import os, sys
sys.path.insert(0, {tests!r})
from conftest import SMALL, fill, values
from fedgfe_store import EmbeddingStore
path, out = {path!r}, open({log!r}, "w")
real = dict(fsync=os.fsync, link=os.link, replace=os.replace, unlink=os.unlink)
def note(*words):
    print(*words, file=out, flush=True, sep="\t")
def fsync(handle):
    real["fsync"](handle)
    note("fsync", os.readlink(f"/proc/self/fd/{{handle}}"))
def link(old, new):
    real["link"](old, new)
    note("link", old, new)
def replace(old, new):
    note("replace", old, new)
    real["replace"](old, new)
def unlink(file, **options):
    note("unlink", file)
    real["unlink"](file, **options)
os.fsync, os.link, os.replace, os.unlink = fsync, link, replace, unlink
"""


@pytest.fixture
def trace(tmp_path):
    """Run code in a process whose flushes, renames and removals are recorded, in order."""

    def run(path: Path, code: str) -> list[list[str]]:
        log = tmp_path / "calls"
        head = TRACED.format(tests=str(TESTS), path=str(path), log=str(log))
        finished([sys.executable, "-c", head + code])
        return [line.split("\t") for line in log.read_text().splitlines()]

    return run


def check_renames(calls: list[list[str]], hints: tuple[str, ...] = ()) -> None:
    """Every file is flushed before it takes its name, and its folder after that.

    But for the note on who holds the lock, which means nothing after a crash, and for `hints`.
    """
    for i, call in enumerate(calls):
        if call[0] == "replace" and not call[2].endswith((".writer", *hints)):
            assert ["fsync", call[1]] in calls[:i], f"{call[2]} was named before it was flushed"
            assert ["fsync", os.path.dirname(call[2])] in calls[i:], (
                f"{call[2]}: folder not flushed"
            )


def position(calls: list[list[str]], *call: str) -> int:
    found = [i for i, c in enumerate(calls) if c[0] == call[0] and c[-1] == call[1]]
    assert len(found) == 1, (call, found)
    return found[0]


CHANGES = {
    "append": "fill(EmbeddingStore.open(path), node=0, round=50)",
    "replace": """
store = EmbeddingStore.open(path)
with store.append(node=0, round=1, if_exists="replace") as batch:
    batch.add(split="train", class_name="dog", index=[0, 1], **values(2, 77))
""",
    "delete": "EmbeddingStore.open(path).delete(round=1)",
    "compact": "EmbeddingStore.open(path).compact()",
}


@pytest.mark.parametrize("kind", CHANGES)
def test_everything_is_on_the_disk_before_the_commit_point(store, trace, kind):
    for round_ in range(1, 5):
        fill(store, node=0, round=round_, classes="dog", n=1)
    before = {file for name in SMALL.columns for file in (store.path / name).glob("c.*")}
    calls = trace(store.path, CHANGES[kind])
    check_renames(calls, HINTS)
    published = position(calls, "replace", str(store.path / "zarr.json"))
    begun = position(calls, "link", str(store.path / "claim.5.0"))
    made_sure = [position(calls, "link", str(store.path / f"claim.5.{n}")) for n in (1, 2)]
    in_place = [i for i, c in enumerate(calls) if c[0] == "replace" and begun < i < published]
    assert ["fsync", calls[begun][1]] in calls[:begun]
    assert ["fsync", str(store.path)] in calls[begun : made_sure[0]]
    assert begun < made_sure[0] < in_place[0] <= in_place[-1] < made_sure[1] < published
    needed = [calls[i][1] for i in in_place if not calls[i][2].endswith(HINTS)]
    assert all(calls.index(["fsync", file]) < made_sure[0] for file in needed)
    assert published < position(calls, "unlink", str(store.path / "claim.5.0"))
    renamed = {c[2] for c in calls[published + 1 :] if c[0] == "replace"}
    assert renamed == set(), "something was written after the commit point"
    synced = {c[1] for c in calls[:published] if c[0] == "fsync"}
    after = {file for name in SMALL.columns for file in (store.path / name).glob("c.*")}
    named = {c[2]: c[1] for c in calls if c[0] == "replace"}
    for file in after - before:
        assert {named[str(file)], str(file.parent)} <= synced
    freed = [c for c in calls if c[0] == "unlink" and "/c." in c[1] and not c[1].endswith(".tmp")]
    assert (len(freed) > 0) == (kind == "compact")
    assert all(calls.index(c) > published for c in freed), "unlinked before the commit point"
    assert EmbeddingStore.open(store.path).commit == 5


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux tells what is open")
def test_of_many_files_few_wait_for_their_flush(store, monkeypatch):
    flush, waiting = os.fsync, []

    def fsync(handle: int) -> None:
        open_files = []
        for entry in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # another thread has closed it
                open_files.append(os.readlink(f"/proc/self/fd/{entry}"))
        waiting.append(sum("/c." in file and file.endswith(".tmp") for file in open_files))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    fill(store, node=0, round=1, n=200)
    files = [file for name in SMALL.columns for file in (store.path / name).glob("c.*")]
    assert len(files) == 200
    assert max(waiting) <= 32 + 18  # and one of each thread that writes


def test_a_new_store_is_on_the_disk_up_to_its_parent(tmp_path, trace):
    path = tmp_path / "deep" / "er" / "s.zarr"
    calls = trace(path, "EmbeddingStore.create(path, SMALL)")
    check_renames(calls)
    published = position(calls, "replace", str(path / "zarr.json"))
    assert not [c for c in calls[published + 1 :] if c[0] == "replace"]
    synced = {c[1] for c in calls[:published] if c[0] == "fsync"}
    assert {str(tmp_path), str(tmp_path / "deep"), str(path.parent), str(path)} <= synced
    assert {str(path / name) for name in SMALL.columns} <= synced


@pytest.mark.kill
def test_a_roll_back_is_on_the_disk_before_it_is_forgotten(store, trace):
    fill(store, node=0, round=1)
    died = """
import _thread
from fedgfe_store.storage import append
append._BUFFER_BYTES = 1
with EmbeddingStore.open(path).append(node=1, round=1) as batch:
    batch.add(split="train", class_name="dog", index=range(9), **values(9))
    os._exit(0)
"""
    trace(store.path, died)
    torn = [file for name in SMALL.columns for file in (store.path / name).glob("c.[2-9]*.tmp")]
    assert torn
    assert (store.path / "claim.2.0").exists()
    calls = trace(store.path, "assert EmbeddingStore.open(path).delete(round=99) == 0")
    check_renames(calls)
    forgotten = position(calls, "unlink", str(store.path / "claim.2.0"))
    for file in torn:
        removed = position(calls, "unlink", str(file))
        assert ["fsync", str(file.parent)] in calls[removed:forgotten]
    assert ["fsync", str(store.path)] in calls[forgotten:]
    assert EmbeddingStore.open(store.path).commit == 1
