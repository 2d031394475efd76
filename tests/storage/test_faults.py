"""What disks, kills and other processes do to a store: an error that says so, or nothing at all."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import legacy
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values
from places import TESTS
from processes import finished, meanwhile, started

from fedgfe_store import EmbeddingStore, FedgfeStoreError, Metadata, Schema
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.cli.main import group
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.records import KEY_COLUMNS, NOTE_COLUMNS

CHUNKED = Schema.flux(17, width=4096, clip=(768,), audio=(2, 3), granule=8)
"""Several inner chunks a file, as real stores have them."""


def everything(path: Path, schema: Schema = CHUNKED) -> dict[str, object]:
    """All that the store at `path` tells, its tensors read record by record."""
    store = EmbeddingStore.open(path)
    selection = store.select()
    told: dict[str, object] = {"len": len(store), "records": selection.records.to_dict("list")}
    told["history"] = store.history().drop(columns="bytes").to_dict("list")
    for name in schema.columns:
        told[name] = [selection.take([i]).read(name).tobytes() for i in range(len(selection))]
    return told


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A store of two tensor files a column, with a replaced, a deleted and skipped rows."""
    store = EmbeddingStore.create(tmp_path / "s.zarr", CHUNKED)
    audio = values(4, 3, Schema.flux(2, width=3, clip=(1,)))["t5"]
    with store.append(node=0, round=5) as batch:
        tensors = values(4, 1, CHUNKED)
        batch.add(split="train", class_name="dog", index=range(4), audio=audio, **tensors)
    with store.append(node="server", round=6, if_exists="replace") as batch:
        tensors = values(2, 2, CHUNKED)
        batch.add(split="val", class_name="cat", index=range(2), image_filename="i", **tensors)
        one = values(1, 4, CHUNKED)
        batch.add(split="train", class_name="dog", index=0, node=0, round=5, **one)
    store.delete(round=5, index=3)
    return store.path


def kind_of(path: Path, file: Path) -> str:
    if file == path / "zarr.json":
        return "group"
    if file.name == "zarr.json":
        return "array"
    return "tensor" if file.parent.name in CHUNKED.columns else "key column"


def files_by_kind(path: Path) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        kinds.setdefault(kind_of(path, file), []).append(file)
    return kinds


TIED = ("row_digest", *KEY_COLUMNS, *NOTE_COLUMNS)


def outcome(path: Path, expected: dict[str, object], *hit: Path) -> str:
    """Read everything: it is as expected, or a damage error that names one of the files `hit`."""
    try:
        told = everything(path)
    except FedgfeStoreError as error:
        if not isinstance(error, DamagedDataError):
            return check_group_error(path, error)
        named = [str(file.relative_to(path)) in str(error) for file in hit]
        named += [f"key column {file.parent.name}" in str(error) for file in hit]
        named += [file.parent.name == "created_in" for file in hit if "marks show" in str(error)]
        tied = "the key or notes of row" in str(error)
        named += [tied and file.parent.name in TIED for file in hit]
        named += [file.parent.name[:-7] + " of node" in str(error) for file in hit]  # _digest
        assert any(named) or not hit, f"{hit} was hit, but the error is: {error}"
        if any(kind_of(path, file) == "tensor" for file in hit):
            assert re.search(r"(t5|clip|audio) of node \w+, round \d, split", str(error))
        return "damaged"
    assert told == expected
    return "harmless"


def check_group_error(path: Path, error: FedgfeStoreError) -> str:
    """Say whether the group's ``zarr.json`` itself says that there is no store of this format."""
    text = (path / "zarr.json").read_bytes()
    if isinstance(error, NotFoundError):
        assert b'"fedgfe_store":' not in text
    else:
        assert isinstance(error, SchemaMismatchError)
        assert "format version" in str(error)
        assert b'"version": 1,' not in text
    return "says so"


@pytest.mark.slow
def test_400_flipped_bytes_are_named_or_harmless(sound):  # cases.md c5, d3
    expected, kinds, rng = everything(sound), files_by_kind(sound), random.Random(4)
    for kind, count in {"tensor": 150, "key column": 120, "group": 80, "array": 50}.items():
        outcomes = []
        for _ in range(count):
            file = rng.choice(kinds[kind])
            with file.open("r+b") as opened:
                size = os.fstat(opened.fileno()).st_size
                # The index of a tensor file's chunks lies at its end.
                first = size - 60 if kind == "tensor" and rng.random() < 0.3 else 0
                offset = rng.randrange(first, size)
                byte = os.pread(opened.fileno(), 1, offset)
                changed = bytes([byte[0] ^ rng.randrange(1, 256)])
                os.pwrite(opened.fileno(), changed, offset)
                outcomes.append(outcome(sound, expected, file))
                os.pwrite(opened.fileno(), byte, offset)
        if kind == "array":  # our readers trust the group's file only
            assert set(outcomes) == {"harmless"}
        else:
            assert outcomes.count("damaged") > count * 0.5
    assert everything(sound) == expected


@pytest.mark.slow
def test_every_kind_of_file_cut_or_missing(sound):
    expected = everything(sound)
    for kind, files in files_by_kind(sound).items():
        chosen = files if kind in ("tensor", "group") else files[::3]
        for file in chosen:
            good = file.read_bytes()
            for bad in (None, b"", good[:-1], good[: len(good) // 2], bytes(len(good))):
                if bad is None:
                    file.unlink()
                else:
                    file.write_bytes(bad)
                if kind == "group" and bad is None:
                    with pytest.raises(NotFoundError, match="no embedding store"):
                        everything(sound)
                else:
                    wanted = "harmless" if kind == "array" else "damaged"
                    assert outcome(sound, expected, file) == wanted, (file, bad and len(bad))
                file.write_bytes(good)
    assert everything(sound) == expected


@contextmanager
def swapped(one: Path, other: Path) -> Iterator[None]:
    aside = one.with_name("aside")
    for _ in range(2):
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        if _ == 0:
            yield


NUMBERS = ["created_in", "deleted_in", "round", "recorded_in"]
TEXTS = ["node", "split", "class_name", "sample_id", "image_filename", "extra", "commit_kind"]


@pytest.mark.parametrize(
    "pairs",
    [
        [("t5/c.0.0.0", "t5/c.1.0.0"), ("clip/c.0.0", "clip/c.1.0")],
        [("t5_digest/c.0", "clip_digest/c.0"), ("t5_digest/c.0", "timestamp/c.0")],
        list(zip([f"{n}/c.0" for n in NUMBERS], [f"{t}/c.0" for t in TEXTS], strict=False)),
        [(f"{a}/c.0", f"{b}/c.0") for a, b in pairwise(NUMBERS)],
        [("has_audio/c.0", "created_in/c.0"), ("has_audio/c.0", "node/c.0")],
        [("commit_kind/c.0", "node/c.0"), ("commit_time/c.0", "index/c.0")],
        [("clip/zarr.json", "t5/zarr.json"), ("node/zarr.json", "round/zarr.json")],
    ],
    ids=["tensors", "digests", "types", "numbers", "bool", "commits", "metadata"],
)
def test_files_that_changed_places(sound, pairs):
    expected = everything(sound)
    for one, other in pairs:
        with swapped(sound / one, sound / other):
            found = outcome(sound, expected, sound / one, sound / other)
        assert found == "damaged" or one.endswith("zarr.json"), (one, other)
    assert everything(sound) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [*pairwise(TEXTS[:-1]), ("index", "timestamp"), ("row_digest", "t5_digest")],
)
def test_key_columns_of_one_type_that_changed_places(sound, one, other):
    expected = everything(sound)
    one, other = sound / one / "c.0", sound / other / "c.0"
    with swapped(one, other):
        same = one.read_bytes() == other.read_bytes()
        assert outcome(sound, expected, one, other) == ("harmless" if same else "damaged")


def contents(store: EmbeddingStore) -> dict[str, bytes]:
    selection = store.select()
    read = {name: selection.read(name) for name in ("t5", "clip")}
    return {
        str(key): read["t5"][i].tobytes() + read["clip"][i].tobytes()
        for i, key in enumerate(selection.keys())
    }


def leftovers(path: Path) -> list[Path]:
    names = (".tmp", ".partial", "pending")
    return [file for file in path.rglob("*") if file.name.endswith(names)]


def append(store: EmbeddingStore, *, round: int, n: int = 6) -> None:
    with store.append(node=0, round=round) as batch:
        tensors = values(n, round, store.schema)
        batch.add(split="train", class_name="dog", index=range(n), **tensors)


def check_after_failure(path: Path, error: BaseException, before: dict, *, commit: int) -> bool:
    """Look at the store after an append of round 2 failed; return whether it was published."""
    after = EmbeddingStore.open(path)
    notes = "\n".join(error.__notes__)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    if after.commit == commit:
        assert f"nothing of this commit was published: {path} is at commit {commit}" in notes
        assert contents(after) == before
    else:
        assert f"commit {commit + 1} of {path} was published before this failed" in notes
        assert len(after) == len(before) + len(after.select(round=2))
    return after.commit > commit


def check_later_append(store: EmbeddingStore, before: dict, n: int) -> None:
    """Append again, in the store object that failed: all is there, and nothing lies about."""
    append(store, round=2, n=n)
    opened = EmbeddingStore.open(store.path)
    now = contents(opened)
    assert {key: now[key] for key in before} == before
    assert len(now) == len(before) + n == len(opened)
    assert not leftovers(store.path)
    found = opened.verify()
    assert (found.sound, found.leftovers) == (True, ())


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_nth_flush(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def count(handle):
        calls.append(handle)
        real(handle)

    def failing(n, for_good):
        def fsync(handle):
            calls.append(handle)
            if len(calls) == n or (for_good and len(calls) > n):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        return fsync

    published = []
    for run in range(21):
        store = EmbeddingStore.create(tmp_path / f"{run}.zarr", SMALL)
        append(store, round=1)
        before = contents(store)
        calls.clear()
        with monkeypatch.context() as patch:
            if run == 0:
                patch.setattr(os, "fsync", count)
                append(store, round=2)
                total = len(calls)
                continue
            patch.setattr(os, "fsync", failing(round(1 + (run - 1) / 19 * (total - 1)), run % 2))
            with pytest.raises(OSError, match="No space left") as error:
                append(store, round=2)
        published.append(check_after_failure(store.path, error.value, before, commit=1))
        check_later_append(store, before, 6)
    assert (published[0], published[-1]) == (False, True)
    assert published.count(False) >= 17


def _fails(command: list[str]) -> bool:
    return finished(command, check=False).returncode != 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or _fails(command):
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    finished(["umount", str(folder)])


@pytest.mark.slow
def test_a_full_disk(small_disk):
    schema = Schema.flux(17, granule=4)
    failed = 0
    for kilobytes in [*range(0, 160, 12), *range(200, 2600, 300)]:
        path = small_disk / f"{kilobytes}.zarr"
        store = EmbeddingStore.create(path, schema)
        append(store, round=1, n=2)
        before = contents(store)
        disk = os.statvfs(small_disk)
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            size = disk.f_bavail * disk.f_frsize - kilobytes * 1024
            os.posix_fallocate(file.fileno(), 0, size)
        try:
            append(store, round=2, n=8)
        except OSError as error:
            failed += 1
            assert not check_after_failure(path, error, before, commit=1)
            assert len(list((path / "t5").glob("c.*"))) == 1, "the tail was not reclaimed"
        ballast.unlink()
        check_later_append(store, before, 8)
        shutil.rmtree(path)
    assert failed >= 20


def test_a_read_only_folder(tmp_path):
    store = EmbeddingStore.create(tmp_path / "disk" / "s.zarr", SMALL)
    append(store, round=1)
    before = contents(store)
    folder = str(tmp_path / "disk")
    if _fails(["mount", "--bind", folder, folder]):
        pytest.skip("this process may not mount a folder read-only")
    try:
        finished(["mount", "-o", "remount,ro,bind", folder])
        for change in (lambda: append(store, round=2), lambda: store.delete(round=1)):
            with pytest.raises(OSError, match=r"Read-only file system: '.*s\.zarr") as error:
                change()
            assert f"{store.path} is at commit 1" in "".join(error.value.__notes__)
        assert contents(EmbeddingStore.open(store.path)) == before
        assert EmbeddingStore.open(store.path).verify().sound
        done = CliRunner().invoke(group, ["--store", f"{folder}/new.zarr", "init"])
        assert done.exit_code == 1
        assert done.output.startswith("error: [Errno 30] Read-only file system: ")
    finally:
        finished(["umount", folder])
    check_later_append(store, before, 6)


def test_too_many_open_files_are_no_damage(sound):
    code = f"""
import os, resource
from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import DamagedDataError
selection = EmbeddingStore.open({str(sound)!r}).select()
selection.records, selection.read("clip")
used = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
try: selection.read("t5")
except OSError as error: print(isinstance(error, DamagedDataError), error.errno, error)
"""
    out = finished([sys.executable, "-c", code])
    assert out.stdout.startswith(f"False {errno.EMFILE} "), (out.stdout, out.stderr)


WRITER = """
import sys; sys.path.insert(0, {tests!r})
from conftest import values
from fedgfe_store import EmbeddingStore
store = EmbeddingStore.open({path!r})
for number in range(20):
    with store.append(node={node}, round=number) as batch:
        tensors = values(5, {node} * 100 + number)
        batch.add(split="train", class_name="dog", index=range(5), **tensors)
"""


def check_view(path: Path) -> int:
    """Commits add five records of one node and round each: see whole commits, and right values."""
    store = EmbeddingStore.open(path)
    selection = store.select()
    frame, t5 = selection.records, selection.read("t5")
    assert len(store) == len(frame) == 5 * store.commit
    for _, part in frame.groupby(["node", "round"]):
        assert part["index"].tolist() == [0, 1, 2, 3, 4]
        expected = values(5, int(part["node"].iloc[0]) * 100 + int(part["round"].iloc[0]))["t5"]
        assert np.array_equal(t5[part.index.to_numpy()], expected)
    return store.commit


@pytest.mark.long
@pytest.mark.slow
def test_8_writers_and_2_readers(store):  # cases.md c6
    sources = [
        WRITER.format(tests=str(TESTS), path=str(store.path), node=node) for node in range(8)
    ]
    stop, seen = threading.Event(), []

    def poll():
        while not stop.wait(0.3):
            seen.append(check_view(store.path))

    with meanwhile(poll, poll), ExitStack() as stack:
        stack.callback(stop.set)
        writers = [stack.enter_context(started([sys.executable, "-c", s])) for s in sources]
        codes = [writer.wait() for writer in writers]
    assert codes == [0] * 8
    assert check_view(store.path) == 160
    assert len(set(seen)) > 10


@pytest.mark.slow
def test_4_threads_append_beside_file_boundaries(store):  # cases.md c3
    failures = []

    def work(node):
        own = EmbeddingStore.open(store.path)
        try:
            for number in range(10):
                with own.append(node=node, round=number) as batch:
                    tensors = values(3, node * 100 + number)
                    batch.add(split="train", class_name="dog", index=range(3), **tensors)
        except BaseException as error:  # noqa: BLE001 - a thread's error is shown by the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(node,)) for node in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    selection = EmbeddingStore.open(store.path).select()
    assert len(selection) == 120
    t5 = selection.read("t5")
    for key, array in zip(selection.keys(), t5, strict=True):
        assert np.array_equal(array, values(3, int(key.node) * 100 + key.round)["t5"][key.index])


def test_a_small_append_writes_one_file_a_column_and_no_other(tmp_path):  # cases.md c4
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema.flux(17))
    records, per_record = 16, (17 * 4096 + 768) * 4
    assert store.schema.granule == 32
    states: dict[Path, tuple[int, bytes]] = {}
    for number in range(3):
        append(store, round=number, n=records)
        files = [f for name in ("t5", "clip") for f in (store.path / name).glob("c.*")]
        assert {f.name.split(".")[1] for f in set(files) - set(states)} == {str(number)}
        assert len(files) == 2 * (number + 1)
        for file, state in states.items():
            assert (file.stat().st_mtime_ns, file.read_bytes()) == state
        written = sum(f.stat().st_size for f in set(files) - set(states))
        assert written < 1.02 * records * per_record  # of noise, which does not compress
        states = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    keys = sum(f.stat().st_size for f in store.path.glob("*/c.?"))
    assert keys < 0.01 * 3 * records * per_record


LOADER = """
import sys, numpy as np, torch
from fedgfe_store import EmbeddingStore


class Embeddings(torch.utils.data.Dataset):
    def __init__(self, store):
        self.selection = store.select(round=1)

    def __len__(self):
        return len(self.selection)

    def __getitem__(self, i):
        return torch.from_numpy(self.selection.take([i]).read("t5")[0])


if __name__ == "__main__":
    store = EmbeddingStore.open(sys.argv[1])
    store.select().read("t5")  # our threads are running when the workers start
    options = {"num_workers": 2, "multiprocessing_context": sys.argv[2], "timeout": 600}
    loader = torch.utils.data.DataLoader(Embeddings(store), batch_size=2, **options)
    read = torch.cat(list(loader)).numpy()
    assert np.array_equal(read, store.select(round=1).read("t5"))
    print("same", len(read))
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_dataloader_read_an_open_store(store, tmp_path, start):  # cases.md c10
    fill(store, node=0, round=1)
    fill(store, node=0, round=2)
    (tmp_path / "loader.py").write_text(LOADER)
    done = finished(
        [sys.executable, str(tmp_path / "loader.py"), str(store.path), start], check=False
    )
    assert done.stdout == "same 6\n", done.stderr


def test_a_mismatch_shows_both_sides(tmp_path):  # cases.md d1, d4, d5
    schema = Schema.flux(3, width=8, clip=(4,), metadata=Metadata(encoder="t5-xxl@1/bf16/17"))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    with pytest.raises(SchemaMismatchError, match="'t5-xxl@1/bf16/17'.*'t5-xxl@1/bf16/512'"):
        store.append(node=0, round=0, encoder="t5-xxl@1/bf16/512")
    for wrong in ({"t5": (2, 5, 8)}, {"clip": (2, 7, 4)}, {"audio": (2, 3)}):
        tensors = values(2) | {k: np.zeros(s, np.float32) for k, s in wrong.items()}
        with pytest.raises(SchemaMismatchError) as error, store.append(node=0, round=0) as batch:
            batch.add(split="train", class_name="dog", index=range(2), **tensors)
        name, shape = next(iter(wrong.items()))
        assert "expected" in str(error.value)
        assert name in str(error.value)
        assert "got" in str(error.value)
        if name != "audio":
            assert str(list(shape)) in str(error.value)
            assert "flux: t5 [3, 8], clip [4]" in str(error.value)
    sd = EmbeddingStore.create(tmp_path / "sd.zarr", Schema.sd(3, width=8))
    with pytest.raises(SchemaMismatchError, match=r"expected flux: t5 \[3, 8\].*got sd: clip"):
        store.merge(sd)
    assert EmbeddingStore.open(store.path).commit == 0


def test_a_checkpoint_changed_in_place_is_a_conflict(tmp_path):  # cases.md d2
    path, _ = legacy.node_file(tmp_path)
    store = tmp_path / "s.zarr"
    assert import_checkpoints(store, path).records == 3
    before = path.stat()
    legacy.node_file(tmp_path, seed=77)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    report = import_checkpoints(store, path)
    assert report.records == 0
    assert "node 0, round 5, split train, class dog, index 0" in str(report.files[0].error)
    assert EmbeddingStore.open(store).commit == 1


DIE_BEFORE_PUBLISHING = """
import os, sys
from fedgfe_store import EmbeddingStore

rename = os.replace


def replace(old, new):
    if str(new) == os.path.join(sys.argv[1], "zarr.json"):
        os._exit(9)
    rename(old, new)


os.replace = replace
EmbeddingStore.open(sys.argv[1]).delete(round=1)
"""


@pytest.mark.kill
@pytest.mark.parametrize("change", ["append", "replace", "delete", "compact"])
def test_marks_of_a_dead_writer_do_not_come_to_life(store, change):
    for round_ in (1, 2, 3):
        append(store, round=round_, n=6)
    store.delete(round=3, index=5)
    command = [sys.executable, "-c", DIE_BEFORE_PUBLISHING, str(store.path)]
    assert finished(command, check=False).returncode == 9
    seen = EmbeddingStore.open(store.path)
    assert len(seen) == len(seen.select(round=1)) + 11 == 17
    if change == "append":
        append(seen, round=4, n=6)
    elif change == "replace":
        with seen.append(node=0, round=2, if_exists="replace") as batch:
            batch.add(split="train", class_name="dog", index=0, **values(1, 9, SMALL))
    elif change == "delete":
        assert seen.delete(round=2, index=1) == 1
    else:
        seen.delete(round=3)
        seen.compact()
    opened = EmbeddingStore.open(store.path)
    assert len(opened) == {"append": 23, "replace": 17, "delete": 16, "compact": 12}[change]
    assert len(opened.select(round=1)) == 6
    assert opened.verify().sound
    assert not leftovers(store.path)


def failing_reads(monkeypatch, file: Path, code: int, *, beyond: int) -> None:
    """Let reads of `file` from a place on, as of a bad sector, fail as the disk does."""
    inode, pread, preadv = file.stat().st_ino, os.pread, os.preadv

    def fail(handle, offset):
        if os.fstat(handle).st_ino == inode and offset >= beyond:
            raise OSError(code, os.strerror(code))

    def read(handle, size, offset):
        if offset + size != file.stat().st_size:  # the index
            fail(handle, offset)
        return pread(handle, size, offset)

    def read_into(handle, memory, offset, *flags):
        fail(handle, offset)
        return preadv(handle, memory, offset, *flags)

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(os, "preadv", read_into)


def test_a_bad_sector_is_damage_of_the_records_that_lie_there(sound, monkeypatch):
    file = sound / "t5" / "c.0.0.0"
    last = EmbeddingStore.open(sound).select(round=5, index=2)
    failing_reads(monkeypatch, file, errno.EIO, beyond=file.stat().st_size * 2 // 5)
    store = EmbeddingStore.open(sound)
    with pytest.raises(DamagedDataError, match="t5 of node 0, round 5, .* index 2"):
        last.read("t5")
    found = store.verify()
    assert [record.key.index for record in found.damaged] == [2]
    assert store.verify(repair=True).damaged
    assert len(store.select(round=5, index=1).read("t5")) == 1
    monkeypatch.undo()
    assert EmbeddingStore.open(sound).verify().sound


def test_what_the_system_refuses_to_read_names_the_file(sound, monkeypatch):
    file = sound / "t5" / "c.0.0.0"
    failing_reads(monkeypatch, file, errno.ENOMEM, beyond=0)
    with pytest.raises(OSError, match="t5/c.0.0.0") as error:
        EmbeddingStore.open(sound).select().read("t5")
    assert not isinstance(error.value, DamagedDataError)


def test_what_lies_in_the_place_of_an_absent_value_is_not_read(sound):
    (sound / "audio" / "c.1.0.0").write_bytes((sound / "audio" / "c.0.0.0").read_bytes())
    assert np.isnan(EmbeddingStore.open(sound).select(round=6).read("audio")).all()
