"""Shared stores: many writers without locks, on a folder and on S3; kills, lost answers, damage."""

from __future__ import annotations

import random
import shutil
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import BUCKET, SMALL, fill, values
from processes import finished, meanwhile, until
from servers import azure_server, azure_variables, azurite
from shared_writers import check, killed, race

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError, FedgfeStoreError, SchemaMismatchError
from fedgfe_store.recording import Recorder
from fedgfe_store.storage.shared import transaction


@pytest.fixture
def shared(tmp_path):
    return EmbeddingStore.create(tmp_path / "shared.zarr", SMALL, shared=True)


@pytest.fixture
def url(aws, tmp_path):
    return f"s3://{BUCKET}/{tmp_path.name}/shared.zarr"


@pytest.fixture
def azure_url(monkeypatch):
    if azurite() is None:
        pytest.skip("Azurite is not installed (make test-long does it where npm is)")
    with azure_server(BUCKET) as endpoint:
        for name, value in azure_variables(endpoint).items():
            monkeypatch.setenv(name, value)
        yield f"az://{BUCKET}/shared.zarr"


def put(store, *, node, n=2, seed=0, if_exists="error", index=None):
    with store.append(node=node, round=1, if_exists=if_exists) as batch:
        batch.add(split="train", class_name="dog", index=index or range(n), **values(n, seed))
    return batch


def test_writers_of_a_folder_at_the_same_time_lose_nothing(shared):
    told = race(shared.path, range(3), 4)
    shared.refresh()
    assert (len(told), check(shared, told)) == (12, 0)
    found = shared.verify()
    assert found.sound
    assert not found.leftovers


@pytest.mark.long
def test_compactions_while_others_write_lose_nothing(shared):
    told = []
    with meanwhile(lambda: told.extend(race(shared.path, range(3), 8))):
        until(lambda: EmbeddingStore.open(shared.path).commit >= 3)
        while len(told) < 24:
            shared.compact()
            assert shared.verify().sound
    shared.refresh()
    assert (len(told), check(shared, told)) == (24, 0)
    assert "compact" in set(shared.history()["kind"])


def test_a_query_of_a_round_reads_its_files_alone(shared, reads):
    for number in range(6):
        fill(shared, node=0, round=number)
    shared.delete(round=2, class_name="cat")
    opened = EmbeddingStore.open(shared.path)
    reads.clear()
    assert len(opened) == 33
    assert not reads
    assert len(opened.select(round=2)) == 3
    assert len([name for name in reads if name.endswith(".parquet")]) == 2  # records, and marks
    opened.compact()
    opened = EmbeddingStore.open(shared.path)
    assert [len(opened.select(round=number)) for number in range(6)] == [6, 6, 3, 6, 6, 6]
    assert len(EmbeddingStore.open(shared.path, as_of=6).select(round=2)) == 6


@pytest.mark.long
def test_many_writers_of_a_folder(shared):
    told = race(shared.path, range(8), 20)
    shared.refresh()
    assert (len(told), check(shared, told)) == (160, 0)


@pytest.mark.long
def test_many_writers_on_s3(url):
    EmbeddingStore.create(url, SMALL, shared=True)
    told = race(url, range(8), 20)
    assert (len(told), check(EmbeddingStore.open(url), told)) == (160, 0)


@pytest.mark.long
def test_many_writers_on_azure(azure_url):
    EmbeddingStore.create(azure_url, SMALL, shared=True)
    told = race(azure_url, range(8), 20)
    store = EmbeddingStore.open(azure_url)
    assert (len(told), check(store, told)) == (160, 0)
    assert store.verify().sound


@pytest.mark.long
def test_thirty_two_writers_get_through(shared):
    told = race(shared.path, range(32), 2)
    shared.refresh()
    assert (len(told), check(shared, told)) == (64, 0)


@pytest.mark.long
@pytest.mark.kill
def test_writers_that_are_killed_leave_whole_commits_and_no_orphans(shared, monkeypatch):
    told = []
    for kill in range(20):
        told += killed(shared.path, kill, 100, seed=kill)
    shared.refresh()
    assert check(shared, told) <= 20
    monkeypatch.setattr(transaction, "LIFETIME", 0.0)
    shared.compact()
    assert check(shared, told) <= 20
    found = shared.verify()
    assert found.sound
    assert not found.leftovers


def test_what_a_dead_writer_left_is_removed_where_nothing_else_is_to_do(shared, monkeypatch):
    fill(shared, node=0, round=1, classes="dog", n=4)
    commit = shared.commit
    left = shared.path / "t5" / "c.70.0.0"
    left.write_bytes(b"nobody's")
    shared.compact()
    assert left.exists()  # its writer may be at work
    monkeypatch.setattr(transaction, "LIFETIME", 0.0)
    assert shared.compact().files_freed == 1
    assert not left.exists()
    assert shared.commit == commit
    assert shared.verify().sound


@pytest.mark.parametrize("path", ["_delta_log", pytest.param("", marks=pytest.mark.long)])
def test_an_answer_that_is_lost_does_not_double_a_commit(aws, url, path):
    proxy = aws(lost=0.3 if path else 0.08, methods="PUT POST", path=path)
    store = EmbeddingStore.create(url, SMALL, shared=True)
    rounds = 8 if path else 30
    for number in range(rounds):
        with store.append(node=0, round=number) as batch:
            batch.add(split="train", class_name="dog", index=range(3), **values(3, number))
        assert batch.added == 3
    assert proxy.done["lost"]
    seen = EmbeddingStore.open(url)
    check(seen, [(0, number) for number in range(rounds)])
    assert len(seen.history()) == rounds


def test_one_writer_asks_a_server_at_most_twenty_times_for_a_commit(aws, url):
    proxy = aws()
    store = EmbeddingStore.create(url, SMALL, shared=True)
    fill(store, node=0, round=1)
    counts = []
    for number in range(2, 6):
        proxy.forget()
        fill(store, node=0, round=number)
        tensors = [line for line in proxy.asked if "/t5/" in line or "/clip/" in line]
        counts.append(len(proxy.asked) - len(tensors))
    assert max(counts) <= 20, counts


def test_what_is_recorded_imported_and_made_by_commands_at_a_url(url, aws, tmp_path):
    def run(*words):
        done = CliRunner().invoke(group, ["--store", url, *map(str, words)], standalone_mode=True)
        assert done.exit_code == 0, done.output
        return done.output

    assert f"made {url}" in run("init", "--shared", "--tokens", 3)
    store = EmbeddingStore.open(url)
    given = values(2, 1, store.schema)
    with Recorder(url) as recorder, recorder.record(node=3, round=1) as block:
        block.add(split="train", class_name="dog", index=range(2), **given)
    entry = {"split": "train", "class_name": "cat", "t5_embedding": torch.ones(3, 4096)}
    entries = [entry | {"clip_embedding": torch.ones(768), "sample_metadata": {"sample_id": "a"}}]
    told = {"node_id": "0", "round": 5, "embeddings": entries, "metadata": {}}
    torch.save(told, tmp_path / "node_0_embeddings_r5.pt")
    for added in (1, 0):
        assert f"{added} new record" in run("import", tmp_path / "node_0_embeddings_r5.pt")
    run("delete", "--node", 3, "--yes")
    run("compact")
    assert "sound" in run("verify")
    assert len(EmbeddingStore.open(url)) == 1


def test_the_same_key_from_two_writers_is_thought_over_again(shared):
    """Both begin before either commits: what the first has added the second one sees."""
    one, other = (EmbeddingStore.open(shared.path) for _ in range(2))
    with one.append(node=0, round=1) as first:
        first.add(split="train", class_name="dog", index=range(2), **values(2, 1))
        with other.append(node=0, round=1) as second:
            second.add(split="train", class_name="dog", index=range(2), **values(2, 1))
            second.add(split="train", class_name="dog", index=2, **values(1, 5))
    assert (second.added, second.skipped, first.added, first.skipped) == (3, 0, 0, 2)
    assert len(EmbeddingStore.open(shared.path)) == 3


@pytest.mark.parametrize("if_exists", ["error", "skip", "replace"])
def test_a_commit_that_was_overtaken_after_it_was_written(shared, monkeypatch, if_exists):
    """The other one commits after this one has looked up its keys and written its tensors."""
    other = EmbeddingStore.open(shared.path)
    begin = transaction.SharedTransaction.commit_change
    came: list[bool] = []

    def commit(self, change):
        if not came:
            came.append(True)
            put(other, node=0, seed=7)
        return begin(self, change)

    monkeypatch.setattr(transaction.SharedTransaction, "commit_change", commit)
    if if_exists == "error":
        with pytest.raises(ConflictError, match="is in .* already, with other tensors"):
            put(shared, node=0, n=3, seed=8)
    else:
        batch = put(shared, node=0, n=3, seed=8, if_exists=if_exists)
        assert batch.added == 1
        assert (batch.replaced, batch.skipped) == ((2, 0) if if_exists == "replace" else (0, 2))
    seen = EmbeddingStore.open(shared.path)
    expected = {"error": values(2, 7)["t5"], "replace": values(3, 8)["t5"]}
    expected["skip"] = np.concatenate([values(2, 7)["t5"], values(3, 8)["t5"][2:]])
    order = np.argsort(seen.select().column("index"))
    np.testing.assert_array_equal(seen.select().read("t5")[order], expected[if_exists])
    assert seen.verify().sound


def test_records_go_from_local_to_shared_and_back(shared, tmp_path):
    local = EmbeddingStore.create(tmp_path / "local.zarr", SMALL)
    given = fill(local, node=0, round=1)
    assert shared.merge(local).added == len(given)
    fill(shared, node=1, round=2)
    back = EmbeddingStore.create(tmp_path / "back.zarr", SMALL)
    assert back.merge(shared).added == 2 * len(given)
    for name in ("t5", "clip"):
        assert back.select().read(name).tobytes() == shared.select().read(name).tobytes()


@pytest.mark.parametrize("flips", [12, pytest.param(400, marks=pytest.mark.long)])
def test_a_changed_bit_is_never_a_wrong_value(shared, tmp_path, flips):
    for node in (0, 1):
        fill(shared, node=node, round=node)
    shared.delete(node=0, class_name="cat")
    right = told(shared)
    rng = random.Random(flips)
    files = [path for path in sorted(shared.path.rglob("*")) if path.is_file()]
    for number in range(flips):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(shared.path, copy)
        victim = copy / files[number % len(files)].relative_to(shared.path)
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        try:
            found = told(EmbeddingStore.open(copy))
        except (FedgfeStoreError, OSError):
            pass
        else:
            assert found == right, victim.relative_to(copy)
        shutil.rmtree(copy)


def told(store):
    selection = store.select()
    shown = selection.records.drop(columns="recorded_in").to_csv()
    return shown, [selection.read(name).tobytes() for name in ("t5", "clip")]


@pytest.mark.long
def test_without_its_libraries_it_is_one_clear_error(tmp_path):
    code = (
        "import sys; sys.modules['deltalake'] = None\n"
        "from fedgfe_store import EmbeddingStore, Schema\n"
        f"EmbeddingStore.create({str(tmp_path / 'local.zarr')!r}, Schema.flux(3, width=8))\n"
        "assert 'pyarrow.parquet' not in sys.modules\n"
        f"EmbeddingStore.create({str(tmp_path / 's.zarr')!r}, Schema.flux(3, width=8), shared=True)"
    )
    done = finished([sys.executable, "-c", code], check=False)
    assert "SchemaMismatchError: a shared store needs the extra cloud" in done.stderr


def test_the_past_of_a_shared_store_has_no_backup(shared, tmp_path):
    with pytest.raises(SchemaMismatchError, match="merge it into a store in a folder"):
        shared.backup(tmp_path / "copy")
