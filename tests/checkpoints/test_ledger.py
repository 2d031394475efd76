"""Importing only what is new: the ledger, deleted records, and several processes at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

import legacy
import numpy as np
import pytest
import torch
from legacy import tensors
from processes import finished, started

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.checkpoints.ledger import Ledger, content_digest
from fedgfe_store.checkpoints.torch_files import inspect
from fedgfe_store.errors import BusyError
from fedgfe_store.records import RecordKey


def again(folder: Path, *paths: Path, **options):
    """Import what is new of the files in `folder`, or of `paths`, into its store."""
    return import_checkpoints(store_of(folder), paths or [folder], new_only=True, **options)


def store_of(folder: Path) -> Path:
    return folder / "embeddings.zarr"


def ledger_of(folder: Path) -> Path:
    return folder / ".embeddings.zarr.imported"


def records(folder: Path) -> set[RecordKey]:
    return set(EmbeddingStore.open(store_of(folder)).select().keys())


def wipe_tensors(path: Path) -> None:
    """Overwrite everything between a file's first bytes and the directory at its end."""
    with zipfile.ZipFile(path) as archive:
        end = archive.start_dir
    with path.open("r+b") as file:
        file.seek(64)
        file.write(b"\xff" * (end - 64))


def save(folder: Path, dogs: dict[int, int], *, name: str = "node_0_embeddings_r5.pt") -> Path:
    """Write a checkpoint of node 0, round 5 with the sample numbers `dogs`, by seed."""
    made = {index: tensors(1, seed) for index, seed in dogs.items()}
    entries = [legacy.entry(t5[0], clip[0], index) for index, (t5, clip) in made.items()]
    return legacy.save(folder, legacy.content(entries), name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two node files of one record each, and a server file of four."""
    legacy.node_file(tmp_path, 0, n=1)
    legacy.node_file(tmp_path, 1, n=1)
    legacy.server_file(tmp_path, n=1, audio=False)
    return tmp_path


def test_the_second_time_no_tensor_is_read(folder):
    first = again(folder)
    assert [(file.records, file.known) for file in first.files] == [(1, False)] * 2 + [(4, False)]
    for path in folder.glob("*.pt"):
        wipe_tensors(path)
    assert import_checkpoints(folder / "other.zarr", folder, new_only=True).failed
    second = again(folder)
    assert [file.known for file in second.files] == [True] * 3
    assert (second.records, second.failed) == (0, ())
    assert EmbeddingStore.open(store_of(folder)).commit == 3


def test_a_plain_import_reads_everything_and_leaves_the_same_ledger(folder):
    import_checkpoints(store_of(folder), folder)
    assert all(file.known for file in again(folder).files)
    wipe_tensors(folder / "node_0_embeddings_r5.pt")
    assert len(import_checkpoints(store_of(folder), folder).failed) == 1


def test_a_dry_run_leaves_no_ledger(folder):
    import_checkpoints(store_of(folder), folder, dry_run=True)
    assert not ledger_of(folder).exists()


def test_a_change_in_place_is_noticed_by_its_content(tmp_path):
    path = save(tmp_path, {0: 1, 1: 2})
    again(tmp_path)
    before = path.stat()
    save(tmp_path, {0: 1, 1: 3})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    (report,) = again(tmp_path).files
    assert "node 0, round 5, split train, class dog, index 1" in report.error
    assert "with other tensors" in report.error


def test_a_file_that_is_put_back_as_it_was_conflicts_with_what_replaced_it(tmp_path):
    path = save(tmp_path, {0: 1})
    old = path.read_bytes()
    again(tmp_path)
    save(tmp_path, {0: 2})
    import_checkpoints(store_of(tmp_path), path, if_exists="replace")
    assert again(tmp_path).files[0].known
    path.write_bytes(old)
    assert "with other tensors" in again(tmp_path).files[0].error


def test_a_file_that_grew_brings_its_new_records_only(tmp_path):
    save(tmp_path, {0: 1})
    again(tmp_path)
    save(tmp_path, {0: 1, 1: 2})
    (report,) = again(tmp_path).files
    assert (report.records, report.unchanged, report.known) == (1, 1, False)


def test_deleted_records_stay_deleted(folder):
    again(folder)
    EmbeddingStore.open(store_of(folder)).delete(node="server", class_name="dog")
    left = records(folder)
    assert len(left) == 4
    again(folder)
    assert records(folder) == left
    ledger_of(folder).unlink()
    report = again(folder)
    assert records(folder) == left
    assert report.files[2].skipped == {"deleted from the store before": 2}
    assert report.files[2].unchanged == 2
    import_checkpoints(store_of(folder), folder)
    assert len(records(folder)) == 6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_what_was_deleted_stays_away_when_a_file_is_written_anew(tmp_path, precision):
    save(tmp_path, {0: 1, 1: 2, 2: 3})
    import_checkpoints(store_of(tmp_path), tmp_path, precision=precision)
    store = EmbeddingStore.open(store_of(tmp_path))
    store.delete(index=[0, 1])
    store.compact()
    save(tmp_path, {0: 1, 1: 9, 2: 3, 3: 4})  # 1 is made anew, 3 is new
    (report,) = again(tmp_path).files
    assert (report.error, report.records, report.unchanged) == (None, 2, 1)
    assert report.skipped == {"deleted from the store before": 1}
    assert {key.index for key in records(tmp_path)} == {1, 2, 3}


def test_replaced_tensors_do_not_count_as_deleted(tmp_path):
    save(tmp_path, {0: 1})
    again(tmp_path)
    save(tmp_path, {0: 2})
    import_checkpoints(store_of(tmp_path), tmp_path, if_exists="replace")
    save(tmp_path, {0: 1})
    ledger_of(tmp_path).unlink()
    (report,) = again(tmp_path).files
    assert "with other tensors" in report.error


def test_a_store_that_was_made_anew_is_filled_anew(folder):
    again(folder)
    shutil.rmtree(store_of(folder))
    assert [file.records for file in again(folder).files] == [1, 1, 4]
    assert all(file.known for file in again(folder).files)
    shutil.rmtree(store_of(folder))
    again(folder, folder / "node_1_embeddings_r5.pt")  # commit 1 again, at another time
    assert [file.known for file in again(folder).files] == [False, True, False]


def test_losing_the_ledger_costs_a_second_reading_and_nothing_else(folder):
    again(folder)
    before = records(folder)
    ledger_of(folder).unlink()
    report = again(folder)
    assert (report.records, report.unchanged) == (0, 6)
    assert (records(folder), EmbeddingStore.open(store_of(folder)).commit) == (before, 3)
    assert all(file.known for file in again(folder).files)


def test_torn_and_strange_lines_are_left_out(folder):
    again(folder)
    ledger = ledger_of(folder)
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    strange = [b"[1]\n", b"\xff\n", b'{"file": "x"}\n', b"\n", b'{"file": 1, "commit": "1"}\n']
    ledger.write_bytes(b"".join([lines[0], *strange, lines[1][:40]]))
    assert [file.known for file in again(folder).files] == [True, False, False]
    assert all(file.known for file in again(folder).files)
    assert json.loads(ledger.read_bytes().splitlines()[-1])["file"] == "server_embeddings_r5.pt"


def test_files_of_two_folders_in_one_store(tmp_path):
    first, second = (save(tmp_path / part, {i: i}) for i, part in enumerate(("train", "val")))
    both = import_checkpoints(tmp_path / "s.zarr", [first, second], new_only=True)
    assert both.records == 2
    report = import_checkpoints(tmp_path / "s.zarr", [first, second], new_only=True)
    assert all(file.known for file in report.files)


def test_the_ledger_moves_with_the_folder(folder, tmp_path_factory):
    again(folder)
    moved = tmp_path_factory.mktemp("moved") / "checkpoints"
    shutil.copytree(folder, moved)
    assert all(file.known for file in again(moved).files)


def test_the_older_format_is_told_by_all_its_bytes(tmp_path):
    t5, clip = tensors(1)
    value = legacy.content([legacy.entry(t5[0], clip[0])])
    path = legacy.save(tmp_path, value, _use_new_zipfile_serialization=False)
    assert content_digest(inspect(path)).startswith("bytes ")
    again(tmp_path)
    assert again(tmp_path).files[0].known
    value["embeddings"][0]["clip_embedding"] += 1
    legacy.save(tmp_path, value, _use_new_zipfile_serialization=False)
    assert "with other tensors" in again(tmp_path).files[0].error


def test_a_file_without_checksums_is_told_by_all_its_bytes(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        one, other = (save(tmp_path, {0: seed}, name=f"{seed}.pt") for seed in (1, 2))
    finally:
        torch.serialization.set_crc32_options(True)
    assert content_digest(inspect(one)).startswith("bytes ")
    assert content_digest(inspect(one)) != content_digest(inspect(other))


def test_digests_of_one_content_are_equal_and_one_bit_makes_another(tmp_path):
    t5, clip = tensors(1)
    digests = []
    for number in range(3):
        if number == 2:
            bits = t5.numpy().view(np.uint32)
            bits[0, 16, 4095] ^= 1
        value = legacy.content([legacy.entry(t5[0], clip[0])])
        digests.append(content_digest(inspect(legacy.save(tmp_path / str(number), value))))
    assert digests[0] == digests[1] != digests[2]


def test_a_ledger_that_cannot_be_written_is_a_warning(folder, caplog):
    ledger_of(folder).mkdir()
    report = import_checkpoints(store_of(folder), folder / "node_0_embeddings_r5.pt")
    assert (report.records, report.failed) == (1, ())
    assert "will be read again next time" in caplog.text


@pytest.mark.slow
def test_processes_that_begin_at_once_share_the_work(tmp_path):
    for node in range(6):
        legacy.node_file(tmp_path, node, n=4)
    code = (
        "import sys\nfrom fedgfe_store.checkpoints import import_checkpoints\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "report = import_checkpoints(sys.argv[1], sys.argv[2], new_only=True)\n"
        "print(sum(not f.known for f in report.files), len(report.failed), report.records)\n"
    )
    command = [sys.executable, "-c", code, str(store_of(tmp_path)), str(tmp_path)]
    with ExitStack() as stack:
        running = [stack.enter_context(started(command)) for _ in range(3)]
        assert [process.line() for process in running] == ["ready"] * 3
        for process in running:
            process.tell()
        said = [process.line().split() for process in running]
    read, failed, added = (sum(map(int, column)) for column in zip(*said, strict=True))
    assert (read, failed, added) == (6, 0, 24)
    store = EmbeddingStore.open(store_of(tmp_path))
    assert (store.commit, len(store), store.verify().sound) == (6, 24, True)


def test_whoever_waits_too_long_for_another_import_is_told(folder):
    with Ledger(store_of(folder)).turn(0):
        with pytest.raises(
            BusyError, match=r"importing into .*embeddings\.zarr: gave up after 0 s"
        ):
            again(folder, timeout=0)
    assert again(folder, timeout=0).records == 6


def test_a_folder_that_may_not_be_written(tmp_path):
    folder = tmp_path / "checkpoints"
    legacy.node_file(folder, 0, n=1)
    again(folder)
    legacy.node_file(folder, 1, n=1)
    bound = ["mount", "--bind", folder, folder]
    if finished(bound, check=False).returncode:
        pytest.skip("this process may not mount a folder read-only")
    try:
        finished(["mount", "-o", "remount,ro,bind", folder])
        assert again(folder, folder / "node_0_embeddings_r5.pt").files[0].known
        with pytest.raises(OSError, match="Read-only file system") as error:
            again(folder)
        (note,) = error.value.__notes__
        assert note.endswith("name a store in another folder with --store")
        elsewhere = tmp_path / "new" / "s.zarr"
        assert import_checkpoints(elsewhere, folder, new_only=True).records == 2
        assert all(f.known for f in import_checkpoints(elsewhere, folder, new_only=True).files)
    finally:
        finished(["umount", folder])
