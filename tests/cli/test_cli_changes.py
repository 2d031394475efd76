"""The command line: delete, history, verify, compact, merge, --as-of, --wait, system errors."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values
from legacy import node_file

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import NotFoundError


def run(store, *args: Any, answer: str | None = None):
    result = CliRunner().invoke(group, ["--store", str(store), *map(str, args)], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def table(output: str) -> list[list[str]]:
    """Cells of the rows between a table's rule and the next empty line."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if set(line) == {"─"})
    rows = lines[start + 1 :]
    return [row.split() for row in rows[: rows.index("") if "" in rows else None]]


@pytest.fixture
def filled(store):
    """Commits 1 to 3: nodes 0 and 1 at round 1, the server at round 2; 6 records each."""
    for node, round_ in ((0, 1), (1, 1), ("server", 2)):
        fill(store, node=node, round=round_)
    return store


def reopened(store: EmbeddingStore) -> EmbeddingStore:
    return EmbeddingStore.open(store.path)


def hit(store: EmbeddingStore, granule: int) -> None:
    """Remove the tensor file that holds `granule`."""
    (store.path / "t5" / f"c.{granule}.0.0").unlink()


# delete


def test_delete_in_a_dry_run_counts_by_round_and_node(filled):
    result = run(filled.path, "delete", "--class", "dog", "--dry-run")
    assert result.exit_code == 0
    assert table(result.output) == [["1", "3", "3", "0", "6"], ["2", "0", "0", "3", "3"]]
    assert result.output.endswith("\n9 records found; dry run, nothing deleted\n")
    assert reopened(filled).commit == 3


def test_delete_with_yes_is_one_commit(filled):
    result = run(filled.path, "delete", "--node", "0-1", "--class", "dog", "--yes")
    assert (result.exit_code, result.output) == (
        0,
        "node: 0 (3), 1 (3)\nclass: dog (6)\n"
        f"6 records deleted: {filled.path} is at commit 4, with 12 records\n",
    )
    left = reopened(filled)
    assert (left.commit, len(left), len(left.select(node=[0, 1], class_name="dog"))) == (4, 12, 0)


@pytest.mark.parametrize(
    ("answer", "code", "commit"), [("y\n", 0, 4), ("n\n", 1, 3), ("\n", 1, 3), (None, 1, 3)]
)
def test_delete_asks_with_the_count(filled, answer, code, commit):
    result = run(filled.path, "delete", "--round", "1", answer=answer)
    assert f"delete 12 records (nodes 0, 1; rounds 1) from {filled.path}?" in result.stderr
    assert (result.exit_code, reopened(filled).commit) == (code, commit)


def test_delete_of_nothing_asks_nothing(filled):
    result = run(filled.path, "delete", "--round", "7", "--allow-empty")
    assert (result.exit_code, result.output) == (0, "0 records found; nothing deleted\n")
    assert reopened(filled).commit == 3


def test_delete_needs_a_filter(filled):
    result = run(filled.path, "delete", "--yes")
    assert result.exit_code == 2
    assert "expected at least one filter" in result.output
    assert len(reopened(filled)) == 18


def test_delete_says_when_another_writer_came_in_between(filled, monkeypatch):
    def confirm(*args: Any, **kwargs: Any) -> None:
        fill(filled, node=2, round=1)

    monkeypatch.setattr("click.confirm", confirm)
    result = run(filled.path, "delete", "--round", "1")
    assert "\n18 records deleted" in result.stdout
    assert "12 records found at first; another writer came in between" in result.stderr


# history


def test_history_tells_what_each_commit_did(filled):
    run(filled.path, "delete", "--class", "cat", "--yes")
    result = run(filled.path, "history")
    rows = table(result.output)  # date and time, and number and unit of the bytes, are two cells
    assert [[*row[:1], *row[3:-2]] for row in rows] == [
        ["1", "append", "0", "1", "6", "0", "6"],
        ["2", "append", "1", "1", "6", "0", "12"],
        ["3", "append", "server", "2", "6", "0", "18"],
        ["4", "delete", "0,", "1,", "server", "1,", "2", "0", "9", "9"],
    ]
    assert result.output.endswith("\n4 commits\n")


def test_history_in_other_formats(filled):
    lines = run(filled.path, "history", "--format", "json", "--limit", 2).output.splitlines()
    commits = [json.loads(line) for line in lines]
    expected = filled.history().iloc[1:]
    assert [c["commit"] for c in commits] == [2, 3]
    assert [(c["nodes"], c["rounds"]) for c in commits] == [(["1"], [1]), (["server"], [2])]
    assert [c["bytes"] for c in commits] == expected["bytes"].tolist()
    text = run(filled.path, "history", "--format", "csv").output
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(r["commit"], r["nodes"], r["rounds"], r["records"]) for r in rows] == [
        ("1", "0", "1", "6"),
        ("2", "1", "1", "12"),
        ("3", "server", "2", "18"),
    ]


@pytest.mark.slow
def test_history_shows_the_newest(store):
    for number in range(22):
        fill(store, node=0, round=number, classes="dog", n=1)
    output = run(store.path, "history").output
    assert [row[0] for row in table(output)] == [str(n) for n in range(3, 23)]
    assert output.endswith("\n22 commits, 20 shown\n")
    assert [row[0] for row in table(run(store.path, "history", "--limit", 1).output)] == ["22"]
    assert table(run(store.path, "history", "--limit", 0).output) == []
    assert len(run(store.path, "history", "--format", "csv").output.splitlines()) == 23


def test_history_of_an_empty_store(store):
    result = run(store.path, "history")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "0 commits")


# verify


def test_verify_of_a_sound_store(filled):
    result = run(filled.path, "verify")
    assert (result.exit_code, result.output) == (
        0,
        f"sound: 18 records of {filled.path}, commit 3\n",
    )


def test_verify_lists_leftovers_which_harm_nothing(filled):
    left = filled.path / "t5" / "c.99.0.0"
    left.write_bytes(b"x")
    result = run(filled.path, "verify")
    assert result.exit_code == 0
    assert f"leftover: {left}" in result.output
    assert "sound: 18 records" in result.output


def test_verify_does_not_flood_with_leftovers(filled):
    for number in range(100, 130):
        (filled.path / "t5" / f"c.{number}.0.0").write_bytes(b"x")
    lines = run(filled.path, "verify").output.splitlines()
    assert sum(line.startswith("leftover: ") for line in lines) == 21
    assert lines[20] == "leftover: and 10 more"


def test_verify_names_the_damaged_and_goes_on(filled):
    hit(filled, 0)
    (filled.path / "clip" / "zarr.json").write_text("{")
    result = run(filled.path, "verify")
    assert result.exit_code == 3
    rows = table(result.output)
    assert [row[:5] for row in rows] == [
        ["0", "1", "train", name, str(index)]
        for name, index in [("dog", 0), ("dog", 1), ("dog", 2), ("cat", 0)]
    ]
    assert all("t5/c.0.0.0 is missing" in " ".join(row) for row in rows)
    assert f"problem: {filled.path / 'clip' / 'zarr.json'}" in result.output
    assert ", commit 3: 4 damaged records, 1 problem\n" in result.output
    assert "verify --repair marks the damaged records" in result.output
    assert reopened(filled).commit == 3


def test_verify_repair_lets_the_same_checkpoints_put_them_back(tmp_path):
    checkpoint, _ = node_file(tmp_path / "checkpoints", 4, 7)
    path = tmp_path / "s.zarr"
    assert run(path, "import", checkpoint).exit_code == 0
    before = EmbeddingStore.open(path)
    tensors, count = before.select().read("clip"), len(before)
    for file in (path / "clip").glob("c.0.*"):
        file.unlink()
    result = run(path, "verify", "--repair")
    assert result.exit_code == 3
    assert f"repaired: {count} records marked as deleted in commit 2" in result.output
    assert "importing the same checkpoints again puts them back" in result.output
    assert len(EmbeddingStore.open(path)) == 0
    assert run(path, "import", checkpoint).exit_code == 0
    assert (EmbeddingStore.open(path).select().read("clip") == tensors).all()
    again = run(path, "verify", "--repair")
    assert again.exit_code == 0
    assert f"sound: {count} records of {path}, commit 3\n" in again.output


@pytest.mark.parametrize("file", ["created_in/c.0", "round/c.0"])
def test_verify_of_damaged_key_columns(filled, file):
    (filled.path / file).write_bytes(b"x")
    result = run(filled.path, "verify")
    assert result.exit_code == 3
    assert "problem: " in result.output
    assert file in result.output


def test_verify_of_a_damaged_commit_point(filled):
    file = filled.path / "zarr.json"
    file.write_text(file.read_text().replace('"live": 18', '"live": 17'))
    result = run(filled.path, "verify")
    assert result.exit_code == 3
    assert result.output == f"problem: {file} is damaged: its checksum does not fit\n"


# compact


def test_compact_reports_what_it_gives_back(store):
    for number in range(9):
        fill(store, node=0, round=number, classes="dog", n=1)
    before = store.select().read("t5")
    result = run(store.path, "compact")
    assert result.exit_code == 0
    assert result.output.startswith("tensor files: ")
    assert "9 records moved, 18 files freed: " in result.output
    assert (reopened(store).select().read("t5") == before).all()
    again = run(store.path, "compact")
    assert (again.exit_code, again.output.split(":")[0]) == (0, "nothing to free")
    assert reopened(store).commit == 10


def test_compact_refuses_damage_in_one_line(store):
    for number in range(4):
        fill(store, node=0, round=number, classes="dog", n=1)
    hit(store, 2)
    result = run(store.path, "compact")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith("error: t5 of node 0, round 2")


# merge


@pytest.fixture
def sites(tmp_path):
    """Two stores that share node 0: `b` has one record of it with other tensors."""
    a = EmbeddingStore.create(tmp_path / "a.zarr", SMALL)
    fill(a, node=0, round=1)
    b = EmbeddingStore.create(tmp_path / "b.zarr", SMALL)
    fill(b, node=1, round=1)
    fill(b, node=0, round=1)
    with b.append(node=0, round=1, if_exists="replace") as batch:
        batch.add(split="train", class_name="dog", index=0, **values(1, 777))
    return a, b


def test_merge_makes_a_store_like_the_first(sites, tmp_path):
    a, b = sites
    path = tmp_path / "new" / "all.zarr"
    result = run(path, "merge", a.path, b.path, "--if-exists", "skip")
    assert result.exit_code == 0
    assert table(result.output) == [
        [str(a.path), "6", "6", "0", "0"],
        [str(b.path), "12", "6", "0", "6"],
    ]
    assert result.output.endswith(f"{path} is at commit 2, with 12 records\n")
    assert EmbeddingStore.open(path).schema == a.schema
    again = run(path, "merge", a.path)
    assert table(again.output) == [[str(a.path), "6", "0", "0", "6"]]
    assert EmbeddingStore.open(path).commit == 2


def test_merge_replaces_when_told(sites):
    a, b = sites
    result = run(a.path, "merge", b.path, "--if-exists", "replace")
    assert table(result.output) == [[str(b.path), "12", "6", "1", "5"]]
    wanted: dict[str, Any] = {"node": 0, "class_name": "dog", "index": 0}
    merged = reopened(a).select(**wanted).read("t5")
    assert (merged == b.select(**wanted).read("t5")).all()


def test_merge_keeps_what_was_merged_before_a_conflict_and_says_so(sites, tmp_path):
    a, b = sites
    path = tmp_path / "all.zarr"
    result = run(path, "merge", a.path, b.path)
    assert result.exit_code == 1
    assert [row[0] for row in table(result.stdout)] == [str(a.path)]
    assert result.stderr.startswith("error: node 0, round 1, split train, class dog, index 0 is in")
    assert len(EmbeddingStore.open(path)) == 6


def test_merge_into_itself_is_refused(sites, tmp_path):
    a, b = sites
    (tmp_path / "link.zarr").symlink_to(a.path)
    for path in (a.path, tmp_path / "link.zarr"):
        result = run(path, "merge", b.path, a.path)
        assert (result.exit_code, reopened(a).commit) == (2, 1)
        assert "into itself" in result.output


def test_merge_of_what_does_not_fit_or_is_not_there_makes_nothing(sites, tmp_path):
    a, _ = sites
    path = tmp_path / "all.zarr"
    wide = EmbeddingStore.create(tmp_path / "wide.zarr", Schema.flux(5, width=8, clip=(4,)))
    unfit = run(path, "merge", a.path, wide.path)
    assert "t5 [3, 8]" in unfit.output
    assert "t5 [5, 8]" in unfit.output
    missing = run(path, "merge", a.path, tmp_path / "no.zarr")
    assert "error: no embedding store at" in missing.output
    assert (unfit.exit_code, missing.exit_code, path.exists()) == (1, 1, False)
    assert run(path, "merge").exit_code == 2


# --as-of


def test_as_of_shows_the_past(filled):
    run(filled.path, "delete", "--node", "0", "--yes")
    past = run(filled.path, "query", "--node", "0", "--as-of", 3)
    now = run(filled.path, "query", "--node", "0")
    assert past.output.endswith("\n6 records\n")
    assert (now.exit_code, "no node 0 in" in now.output) == (1, True)
    facts = run(filled.path, "info", "--as-of", 2).output
    assert "commit:      2, 2" in facts
    assert "records:     12" in facts
    assert "nodes:       0, 1\n" in facts


@pytest.mark.parametrize("command", ["info", "query", "generate"])
def test_as_of_an_unknown_commit(filled, command):
    result = run(filled.path, command, "--as-of", 4)
    assert (result.exit_code, result.output) == (
        1,
        f"error: --as-of: expected a commit from 0 to 3 of {filled.path}, got 4\n",
    )
    assert run(filled.path, command, "--as-of", -1).exit_code == 2


def test_generate_plans_the_past(tmp_path):
    path = tmp_path / "s.zarr"
    for round_ in (5, 7):
        run(path, "import", node_file(tmp_path / "checkpoints", 0, round_)[0])
    options = ["--model", "tiny", "--dry-run", "--output-dir", tmp_path / "pictures"]
    assert run(path, "generate", *options).output.startswith(f"records: 6 of {path}, commit 2\n")
    past = run(path, "generate", "--as-of", 1, *options).output
    assert past.startswith(f"records: 3 of {path}, commit 1\n")


# --wait, and what the system refuses


def run_beside_a_writer(store: EmbeddingStore, *args: Any):
    results: list[Any] = []

    def meanwhile(records: int) -> None:  # verify holds the lock while it calls this
        if not results:
            with ThreadPoolExecutor(1) as pool:
                results.append(pool.submit(run, store.path, *args).result())

    store.verify(repair=True, progress=meanwhile)
    return results[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["delete --round 1 --yes", "verify --repair", "compact", "merge"]
)
def test_a_writer_waits_as_long_as_told(filled, tmp_path, command):
    other = EmbeddingStore.create(tmp_path / "other.zarr", SMALL)
    fill(other, node=5, round=5)
    sources = [other.path] if command == "merge" else []
    result = run_beside_a_writer(filled, *command.split(), *sources, "--wait", "1.2")
    assert result.exit_code == 1
    holder = f"process {os.getpid()} on "
    note, error = result.stderr.splitlines()
    assert note.startswith(f"note: {filled.path}: waiting up to 1.2 s for {holder}")
    assert error.startswith(f"error: {filled.path} is being written by {holder}")
    assert error.endswith("gave up after 1.2 s")
    assert logging.getLogger("fedgfe_store").handlers == []


def test_import_waits_as_long_as_told(tmp_path):
    checkpoint, _ = node_file(tmp_path / "checkpoints", 4, 7)
    path = tmp_path / "s.zarr"
    run(path, "import", checkpoint)
    result = run_beside_a_writer(EmbeddingStore.open(path), "import", checkpoint, "--wait", 0)
    assert result.exit_code == 1
    assert result.output.endswith("gave up after 0 s\n")


def test_a_negative_wait_is_a_usage_mistake(filled):
    assert run(filled.path, "compact", "--wait", -1).exit_code == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_is_one_line_and_what_became_of_the_commit(
    filled, monkeypatch, code
):
    real = os.fsync

    def refuse(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        raise OSError(code, os.strerror(code), "the-file")

    monkeypatch.setattr(os, "fsync", refuse)
    result = run(filled.path, "delete", "--round", "1", "--yes")
    assert result.exit_code == 1
    error, *notes = result.stderr.splitlines()
    assert error == f"error: [Errno {code}] {os.strerror(code)}: 'the-file'"
    assert notes == [f"nothing of this commit was published: {filled.path} is at commit 3"]
    assert len(reopened(filled)) == 18


def test_a_broken_pipe_is_left_alone(filled, monkeypatch):
    def close(*args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("fedgfe_store.store.EmbeddingStore.history", close)
    result = run(filled.path, "history")
    assert (result.exit_code, result.output) == (1, "")


def test_query_says_which_part_of_the_past_is_only_listed(filled):
    run(filled.path, "delete", "--node", "0", "--yes")
    assert run(filled.path, "query", "--as-of", 3).stderr == ""
    run(filled.path, "compact")
    for form in ("table", "json"):
        past = run(filled.path, "query", "--as-of", 3, "--format", form)
        assert past.stderr.startswith("note: the tensors of ")
        assert past.exit_code == 0
    selection = EmbeddingStore.open(filled.path, as_of=3).select()
    gone = selection.compacted_away()
    assert 6 <= gone.sum() <= 18
    words = f"note: the tensors of {gone.sum()} records were compacted away since; "
    assert run(filled.path, "query", "--as-of", 3).stderr.startswith(words)
    for place, lost in enumerate(gone):
        if lost:
            with pytest.raises(NotFoundError, match="compacted away"):
                selection.take([place]).read("t5")
        else:
            selection.take([place]).read("t5")
    assert run(filled.path, "query").stderr == ""
    assert not EmbeddingStore.open(filled.path).select().compacted_away().any()
