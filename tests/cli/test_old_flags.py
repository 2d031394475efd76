"""--checkpoint, --checkpoint_dir, --pattern, --verbose: imports, mistakes, failures, dry runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import legacy
import pytest
from click.testing import CliRunner
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.cli.main import group
from fedgfe_store.records import RecordKey

FOLDER = Path("checkpoints")
STORE = FOLDER / "embeddings.zarr"
NODE_0 = FOLDER / "node_0_embeddings_r5.pt"
NODE_1 = FOLDER / "node_1_embeddings_r5.pt"
DIR = ("--checkpoint_dir", FOLDER)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Stand beside a folder of two node files, of two records each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDGFE_MODEL", "tiny")
    monkeypatch.delenv("FEDGFE_STORE", raising=False)
    for node in (0, 1):
        legacy.node_file(FOLDER, node, n=2)


def generate(*options: Any, store: object = None, limit: int | None = 0):
    """Run ``generate``, by default without rendering what it has planned."""
    before = ["--store", str(store)] if store else []
    after = [] if limit is None else ["--limit", str(limit)]
    words = [*before, "generate", *map(str, options), *after, "--steps", "1"]
    result = CliRunner().invoke(group, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def keys(store: Path = STORE) -> set[RecordKey]:
    return set(EmbeddingStore.open(store).select().keys())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--checkpoint", NODE_0, *DIR], "expected --checkpoint or --checkpoint-dir, got both"),
        (["--checkpoint", NODE_0, "--pattern", "*"], "--pattern goes with --checkpoint-dir"),
        ([*DIR, "--pattern", "a/*.pt"], "name their folder with --checkpoint-dir"),
        (["--checkpoint", FOLDER], "is a directory"),
        (["--checkpoint_dir", NODE_0], "is a file"),
        (["--checkpoint", NODE_0, "--checkpoint", "x.pt"], "name a store for them with --store"),
    ],
)
def test_mistakes(options, says):
    result = generate(*options)
    assert result.exit_code == 2
    assert says in result.output
    assert not STORE.exists()


def test_several_files_and_filters():
    legacy.node_file(FOLDER, 2, n=2, classes=("dog", "drum"))
    files = ["--checkpoint", NODE_0, "--checkpoint", FOLDER / "node_2_embeddings_r5.pt"]
    assert "\nrecords: 6 of checkpoints/embeddings.zarr, commit 2\n" in generate(*files).output
    assert "records: 2 of" in generate(*files, "--class", "drum").output
    assert "records: 3 of" in generate(*files, "--per-class", 1).output
    result = generate(*files, "--class", "drum", "--node", 0)
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        1,
        "error: no record in checkpoints/embeddings.zarr, commit 2, meets all filters: "
        "node 0; class drum (2 do without node, 2 do without class)",
    )
    result = generate(*DIR, "--pattern", "node_2*", "--node", 0)
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        1,
        "error: no record of those files meets the filters, others of "
        "checkpoints/embeddings.zarr do",
    )


def test_without_old_flags_nothing_is_imported():
    here = Path("embeddings.zarr").absolute()
    assert generate().output.startswith(f"error: no embedding store at {here}: expected")


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_store_that_is_named_takes_the_files(tmp_path, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("FEDGFE_STORE", "other.zarr")
    result = generate(*DIR, store="other.zarr" if way == "option" else None)
    assert "records: 4 of other.zarr" in result.output
    assert not STORE.exists()
    assert len(keys(Path("other.zarr"))) == 4


def test_files_of_two_folders_in_a_store_that_is_named():
    second, _ = legacy.node_file(Path("more"), 7, n=1)
    result = generate("--checkpoint", NODE_0, "--checkpoint", second, store="s.zarr")
    assert "records: 3 of s.zarr" in result.output


def test_what_is_imported_is_shown_once():
    first = generate(*DIR).output
    assert re.search(r"^node_1_embeddings_r5.pt +1 +5 +2 ", first, re.MULTILINE)
    assert "2 files, 1.1 MB: 4 new records; store checkpoints/embeddings.zarr" in first
    assert generate(*DIR).output.startswith("records: 4 of ")
    legacy.node_file(FOLDER, 3, n=1)
    assert "\n1 file, " in generate(*DIR).output
    legacy.node_file(FOLDER, 4, n=1)
    assert "node_4" not in generate(*DIR, "--quiet").output
    assert len(keys()) == 6


def test_deleted_records_do_not_come_back():
    generate(*DIR)
    words = ["--store", str(STORE), "delete", "--node", "0", "--index", "1", "--yes"]
    assert CliRunner().invoke(group, words).exit_code == 0
    assert "records: 3 of" in generate(*DIR).output
    (FOLDER / ".embeddings.zarr.imported").unlink()
    result = generate(*DIR)
    assert "deleted from the store before: 1" in result.output
    assert "records: 3 of" in result.output


def test_a_file_that_fails_leaves_the_others_and_exits_with_3():
    cut(NODE_1)
    result = generate(*DIR, limit=None)
    assert result.exit_code == 3
    assert re.search(rf"^failed: {NODE_1}: cut short or damaged", result.output, re.MULTILINE)
    assert "2 images rendered" in result.output
    again = generate(*DIR)
    assert again.exit_code == 3
    assert "1 file, 564.9 kB: 0 new records, 1 failed; " in again.output


def test_a_changed_file_is_a_conflict_and_its_old_records_are_not_rendered():
    generate(*DIR)
    legacy.node_file(FOLDER, 1, n=2, seed=8)
    result = generate(*DIR)
    assert result.exit_code == 3
    assert "failed: checkpoints/node_1_embeddings_r5.pt: node 1, round 5, " in result.output
    assert "records: 2 of" in result.output
    assert "records of files that failed are left out" in result.output
    words = ["--store", str(STORE), "import", str(NODE_1), "--if-exists", "replace"]
    assert CliRunner().invoke(group, words).exit_code == 0
    result = generate(*DIR)
    assert (result.exit_code, "records: 4 of" in result.output) == (0, True)


@pytest.mark.parametrize("known", [True, False])
def test_nothing_but_failures_exits_with_1(known):
    if known:
        generate("--checkpoint", NODE_1)
    cut(NODE_0)
    result = generate("--checkpoint", NODE_0)
    assert result.exit_code == 1
    assert f"failed: {NODE_0}: cut short" in result.output
    assert "expected" in result.output.splitlines()[-1]


def test_a_dry_run_imports_nothing():
    result = generate(*DIR, "--dry-run")
    assert result.exit_code == 0
    assert result.output == (
        "would first import 2 files, 1.1 MB, into checkpoints/embeddings.zarr: "
        "node_0_embeddings_r5.pt, node_1_embeddings_r5.pt\n"
    )
    assert sorted(path.name for path in FOLDER.iterdir()) == [NODE_0.name, NODE_1.name]
    generate("--checkpoint", NODE_0)
    result = generate(*DIR, "--dry-run")
    assert result.exit_code == 0
    assert "would first import 1 file, " in result.output
    assert "records: 2 of" in result.output
    result = generate("--checkpoint", NODE_1, "--dry-run")
    assert (result.exit_code, len(result.output.splitlines())) == (0, 1)
    assert len(keys()) == 2
    generate(*DIR)
    assert "would first" not in generate(*DIR, "--dry-run").output


def test_an_older_commit_is_shown_as_it_was():
    generate(*DIR)
    legacy.node_file(FOLDER, 2, n=2)
    assert (
        "records: 2 of checkpoints/embeddings.zarr, commit 1\n"
        in generate(*DIR, "--as-of", 1).output
    )
    assert len(keys()) == 4


def test_verbose_tells_what_was_imported_and_what_was_known():
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO checkpoints/node_%s_embeddings_r5.pt: %s"
    first = generate("--checkpoint", NODE_0, "--verbose").stderr
    assert re.search(line % (0, "node 0, round 5: 2 new records"), first)
    second = generate(*DIR, "--verbose").stderr
    assert re.search(line % (0, "known, not read again\n"), second)
    assert "INFO" not in generate(*DIR).stderr


def test_a_folder_that_may_not_be_written(tmp_path):
    generate("--checkpoint", NODE_0)
    bound = ["mount", "--bind", str(FOLDER), str(FOLDER)]
    if finished(bound, check=False).returncode:
        pytest.skip("this process may not mount a folder read-only")
    try:
        finished(["mount", "-o", "remount,ro,bind", FOLDER])
        assert generate("--checkpoint", NODE_0).exit_code == 0
        result = generate(*DIR)
        assert result.exit_code == 1
        error, note = result.output.splitlines()
        assert error.startswith("error: [Errno 30] Read-only file system: ")
        assert note.endswith("name a store in another folder with --store")
        assert "records: 4 of" in generate(*DIR, store=tmp_path / "s.zarr").output
    finally:
        finished(["umount", FOLDER])


def test_plain_imports_count_too():
    import_checkpoints(STORE, FOLDER)
    assert generate(*DIR).output.startswith("records: 4 of ")
