"""A round that is recorded again: within one run blocks add up, another run's take their place."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import values
from places import TESTS
from processes import finished

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.recording import Recorder
from fedgfe_store.recording.fedgfe import EmbeddingBatch, EmbeddingClientMixin, EmbeddingServerMixin

FLUX = Schema.flux(17)


def put(
    recorder: Recorder, index, *, seed: int, node=0, round=1, split="train", name="dog", **more
):
    """Record one block; samples are numbered by `index`, their values come from `seed`."""
    with recorder.record(node=node, round=round) as batch:
        batch.add(split=split, class_name=name, index=index, **(values(len(index), seed) | more))
    return batch


def keys(path) -> list[tuple[str, int, str, str, int]]:
    """Return node, round, split, class and index of each live record, sorted."""
    found = EmbeddingStore.open(path).select().keys()
    return sorted((k.node, k.round, k.split, k.class_name, k.index) for k in found)


def indices(path, **where) -> list[int]:
    return sorted(key.index for key in EmbeddingStore.open(path).select(**where).keys())


def shuffled(seed: int, n: int = 20, of: int = 40) -> list[int]:
    return np.random.default_rng(seed).permutation(of)[:n].tolist()


# one recorder


def test_blocks_of_one_run_add_up(store):
    with Recorder(store) as recorder:
        for block in range(3):
            batch = put(recorder, range(4 * block, 4 * block + 4), seed=block)
    assert indices(store.path) == list(range(12))
    assert (batch.added, batch.replaced, batch.removed) == (4, 0, 0)
    expected = np.concatenate([values(4, seed)["t5"] for seed in range(3)])
    assert np.array_equal(EmbeddingStore.open(store.path).select().read("t5"), expected)


def test_a_run_that_was_killed_goes_on_under_another_shuffle(store, caplog):
    """Old and new samples under each other would be records that nobody trained together."""
    with Recorder(store) as first:
        for round in (1, 2):
            put(first, shuffled(round), seed=round, round=round)
    with Recorder(store) as second:
        batch = put(second, shuffled(5), seed=5, round=2)
        put(second, shuffled(6), seed=6, round=3)
    assert indices(store.path, round=1) == sorted(shuffled(1))
    assert indices(store.path, round=2) == sorted(shuffled(5))
    gone = len(set(shuffled(2)) - set(shuffled(5)))
    assert gone > 0
    assert (batch.removed, batch.added, batch.replaced) == (gone, gone, 20 - gone)
    told = f"node 0, round 2: recorded anew; {gone} records that an earlier run left of it are gone"
    assert [m for m in caplog.messages if "earlier run" in m] == [f"{store.path}: {told}"]
    store = EmbeddingStore.open(store.path)
    assert store.commit == 4, "one commit replaces the round"
    assert EmbeddingStore.open(store.path, as_of=3).select(round=2).keys() != []
    assert store.verify().sound


def test_what_is_recorded_again_alike_is_not_touched(store):
    for _ in range(2):
        with Recorder(store) as recorder:
            batch = put(recorder, range(20), seed=1)
    assert (batch.added, batch.replaced, batch.removed, batch.skipped) == (0, 0, 0, 20)
    assert EmbeddingStore.open(store.path).commit == 1


def test_the_second_block_of_a_run_adds_to_the_first_that_replaced_an_earlier_runs(store):
    with Recorder(store) as first:
        put(first, range(10), seed=1)
    with Recorder(store) as second:
        put(second, range(20, 25), seed=2)
        put(second, range(30, 35), seed=3)
        batch = put(second, range(30, 32), seed=4)
    assert indices(store.path) == [*range(20, 25), *range(30, 35)]
    assert (batch.added, batch.replaced, batch.removed) == (0, 2, 0)


def test_a_process_that_is_started_again_between_two_blocks_records_the_round_whole_again(store):
    with Recorder(store) as first:  # of three blocks only one came through
        put(first, range(4), seed=1)
    with Recorder(store) as second:
        for block in range(1, 4):
            put(second, range(10 * block, 10 * block + 4), seed=block)
    assert indices(store.path) == [
        n for block in range(1, 4) for n in range(10 * block, 10 * block + 4)
    ]


def test_only_the_node_round_and_split_of_a_block_are_replaced(store):
    with Recorder(store) as first:
        for node in (0, "server"):
            for split in ("train", "val"):
                for round in (1, 2):
                    put(first, range(3), seed=1, node=node, round=round, split=split)
    before = keys(store.path)
    with Recorder(store) as second:
        put(second, [7], seed=2, node=0, round=2, split="val")
    gone = {("0", 2, "val", "dog", n) for n in range(3)}
    assert keys(store.path) == sorted(set(before) - gone | {("0", 2, "val", "dog", 7)})


def test_several_splits_in_one_block(store):
    def both(recorder, index):
        with recorder.record(node=0, round=1) as batch:
            for split in ("train", "val"):
                batch.add(
                    split=split, class_name="dog", index=index, **values(len(index), index[0])
                )
        return batch

    with Recorder(store) as first:
        both(first, range(4))
    with Recorder(store) as second:
        put(second, [9], seed=3, split="val")
        batch = both(second, range(5, 7))
    assert indices(store.path, split="train") == [5, 6]
    assert indices(store.path, split="val") == [5, 6, 9]
    assert batch.removed == 4


def test_classes_of_a_split_in_blocks_of_their_own(store):
    for run in range(2):
        with Recorder(store) as recorder:
            for name in ("dog", "cat", "drum"):
                put(recorder, range(10 * run, 10 * run + 2), seed=run, name=name, node="server")
    assert [key[3:] for key in keys(store.path)] == [
        (name, index) for name in ("cat", "dog", "drum") for index in (10, 11)
    ]


def test_two_recorders_for_different_nodes_leave_each_other_alone(store):
    with Recorder(store) as first, Recorder(store) as second:
        for block in range(2):
            put(first, [block], seed=block, node=0)
            first.flush()
            put(second, [block], seed=block, node=1)
            second.flush()
    assert [key[0] for key in keys(store.path)] == ["0", "0", "1", "1"]


def test_parts_of_one_split_from_several_recorders_where_that_is_said(store):
    for rank in range(2):
        with Recorder(store, keep_earlier=True) as recorder:
            put(recorder, [rank], seed=rank)
    assert indices(store.path) == [0, 1]


@pytest.mark.parametrize("if_exists", ["skip", "error"])
def test_by_key_alone_where_nothing_is_to_be_replaced(store, if_exists):
    for index in (range(3), range(3, 5)):
        with Recorder(store, if_exists=if_exists) as recorder:
            put(recorder, index, seed=1)
    assert indices(store.path) == list(range(5))


def test_records_left_out_as_not_finite_do_not_keep_an_earlier_runs(store):
    with Recorder(store) as first:
        put(first, range(4), seed=1)
        put(first, range(4), seed=1, split="val")
    with Recorder(store) as second:
        put(second, range(2), seed=2, t5=np.full((2, 3, 8), np.nan, np.float32))
        tensors = values(2, 3)
        tensors["t5"][0] = np.inf
        put(second, range(2), split="val", seed=0, **tensors)
    assert indices(store.path, split="train") == []
    assert indices(store.path, split="val") == [1]
    assert len(second.left_out) == 3


def test_a_first_block_that_failed_or_raised_replaces_nothing_and_the_next_does(store):
    with Recorder(store) as first:
        put(first, range(4), seed=1)
    with Recorder(store) as second:
        with pytest.raises(ZeroDivisionError):
            with second.record(node=0, round=1) as batch:
                batch.add(split="train", class_name="dog", index=[7], **values(1, 7))
                raise ZeroDivisionError
        second.flush()
        assert indices(store.path) == [0, 1, 2, 3]
        put(second, [8], seed=8)
    assert indices(store.path) == [8]


def test_a_commit_says_which_recorder_it_came_from(store):
    for _ in range(2):
        with Recorder(store) as recorder:
            put(recorder, [0], seed=1, round=1)
            put(recorder, [0], seed=2, round=2)
            put(recorder, [1], seed=3, round=2)
    sources = EmbeddingStore.open(store.path).history()["source"].tolist()
    runs = list(dict.fromkeys(source for source in sources if source))
    assert len(runs) == 2
    assert all(run.startswith("recorder ") for run in runs)


KILLED = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_runs import put, shuffled
from fedgfe_store.recording import Recorder
recorder = Recorder(sys.argv[1])
put(recorder, shuffled(1), seed=1)
put(recorder, shuffled(2), seed=2, round=2)
recorder.flush()
os._exit(9)
"""


@pytest.mark.kill
def test_after_a_killed_process(store):
    folders = [str(TESTS), str(TESTS / "recording")]
    command = [sys.executable, "-c", KILLED, str(store.path), *folders]
    assert finished(command, check=False).returncode == 9
    with Recorder(store) as recorder:
        put(recorder, shuffled(3), seed=3, round=2)
    assert indices(store.path, round=1) == sorted(shuffled(1))
    assert indices(store.path, round=2) == sorted(shuffled(3))


# FedGFE's methods


class Host:
    """What a host object yields: samples whose numbers are those of one pass over a shuffle."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def iter_embeddings(self, split):
        for name in ("dog", "cat"):
            index = shuffled(self.seed + len(split), 3)
            tensors = values(3, self.seed, FLUX)
            yield EmbeddingBatch(class_name=name, index=index, **tensors)


class Client(Host, EmbeddingClientMixin):
    id = 0


class Server(Host, EmbeddingServerMixin):
    round = 1

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed)
        self.clients = [Client(seed)]
        section = {"save_embeddings_instead_of_images": True}
        self.config = {"feda2v": section | {"embeddings_checkpoint_dir": folder}}


def expected(seed: int, splits="train val test", node="0", round=1):
    return sorted(
        (node, round, split, name, index)
        for split in splits.split()
        for name in ("dog", "cat")
        for index in shuffled(seed + len(split), 3)
    )


def test_split_by_split_adds_within_a_host_and_another_host_replaces_each(tmp_path):
    first, second = Client(1), Client(20)
    for split in ("train", "val", "test"):
        path = first.save_embeddings_to_checkpoint(split, tmp_path, 1)
    assert keys(path) == expected(1)
    second.save_embeddings_to_checkpoint("train", tmp_path, 1)
    assert keys(path) == sorted(expected(20, "train") + expected(1, "val test"))
    second.save_embeddings_to_checkpoint("all", tmp_path, 1)
    assert keys(path) == expected(20)


def test_a_host_that_saves_again_adds_also_as_a_copy(tmp_path):
    client = Client(1)
    client.save_embeddings_to_checkpoint("train", tmp_path, 1)
    client = pickle.loads(pickle.dumps(copy.deepcopy(client)))
    client.seed = 20
    path = client.save_embeddings_to_checkpoint("train", tmp_path, 1)
    assert keys(path) == sorted({*expected(1, "train"), *expected(20, "train")})


def test_a_server_that_is_started_again_replaces_the_round_of_all_its_nodes(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "fedgfe_store")
    for seed in (1, 20):
        server = Server(seed, tmp_path)
        path = server.save_round_embeddings()
        everyone = expected(seed) + expected(seed, node="server")
        assert keys(path) == sorted(everyone)
    assert sum("an earlier run left" in message for message in caplog.messages) == 2
    server.seed = server.clients[0].seed = 50
    server.round = 2
    server.save_round_embeddings()
    assert len(keys(path)) == 2 * len(everyone)
