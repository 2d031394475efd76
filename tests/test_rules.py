"""A store against a plain dict: whatever the order of operations, both say the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, values
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import ConflictError, NotFoundError, SchemaMismatchError

Key = tuple[str, int, str, int]
NODES, ROUNDS, CLASSES = st.sampled_from(["0", "server"]), st.integers(0, 2), st.sampled_from("ab")
RECORDS = st.dictionaries(st.integers(0, 6), st.integers(0, 2), max_size=7)
"""Seeds of the tensors by index: so few that the same tensors come again."""


class Rules(RuleBasedStateMachine):
    """Operations on a store and on a dict from key to seed, and what must hold after each."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = EmbeddingStore.create(self.folder / "s.zarr", SMALL)
        self.model: dict[Key, int] = {}
        self.past: list[dict[Key, int]] = [{}]
        self.compacted = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(
        node=NODES,
        round_=ROUNDS,
        name=CLASSES,
        given=RECORDS,
        if_exists=st.sampled_from(["error", "replace", "skip"]),
    )
    def append(self, node, round_, name, given, if_exists):
        keys = {(node, round_, name, index): seed for index, seed in given.items()}
        known = {key for key in keys if key in self.model}
        same = {key for key in known if self.model[key] == keys[key]}
        if if_exists == "error" and known != same:
            with pytest.raises(ConflictError, match=f"node {node}, round {round_}"):
                self._append(keys, if_exists)
            self.store.refresh()
            return
        left_out = known if if_exists == "skip" else same
        batch = self._append(keys, if_exists)
        assert batch.skipped == len(left_out)
        assert batch.added == len(keys) - len(known)
        assert batch.replaced == len(known) - len(left_out)
        if len(left_out) < len(keys):
            self._committed(self.model | {k: s for k, s in keys.items() if k not in left_out})

    def _append(self, keys, if_exists):
        with self.store.append(if_exists=if_exists) as batch:
            for (node, round_, name, index), seed in keys.items():
                batch.add(
                    node=node,
                    round=round_,
                    split="train",
                    class_name=name,
                    index=index,
                    **values(1, seed),
                )
        return batch

    def _committed(self, model):
        self.model = model
        self.past.append(model)

    @rule(round_=ROUNDS, name=st.none() | CLASSES, index=st.none() | st.integers(0, 6))
    def delete(self, round_, name, index):
        gone = {
            key
            for key in self.model
            if key[1] == round_ and name in (None, key[2]) and index in (None, key[3])
        }
        assert self.store.delete(round=round_, class_name=name, index=index) == len(gone)
        if gone:
            self._committed({k: s for k, s in self.model.items() if k not in gone})

    @rule()
    def compact(self):
        before = self.store.commit
        done = self.store.compact()
        assert done.bytes_after <= done.bytes_before
        if self.store.commit > before:
            self._committed(self.model)
            self.compacted = self.store.commit
        assert self.store.compact().files_freed == 0

    @rule()
    def reopen(self):
        self.store = EmbeddingStore.open(self.store.path)

    @rule()
    def another_writer(self):
        """What this store has read so far is then old."""
        other = EmbeddingStore.open(self.store.path)
        key = ("1", 9, "z", self.store.commit)
        with other.append(node=key[0], round=key[1]) as batch:
            batch.add(split="train", class_name=key[2], index=key[3], **values(1, 7))
        self._committed(self.model | {key: 7})
        with pytest.raises(SchemaMismatchError, match="at least one filter"):
            self.store.delete()
        self.store.refresh()

    @precondition(lambda self: len(self.past) > 1)
    @rule(data=st.data())
    def as_of(self, data):
        commit = data.draw(st.integers(0, len(self.past) - 1))
        store = EmbeddingStore.open(self.store.path, as_of=commit)
        assert len(store) == len(self.past[commit])
        try:
            compare(store, self.past[commit])
        except NotFoundError as error:
            assert f"commit {commit} was compacted away in commit {self.compacted}" in str(error)
            assert commit < self.compacted

    @rule()
    def verify(self):
        found = EmbeddingStore.open(self.store.path).verify()
        assert found.sound, found
        assert found.records == len(self.model)
        assert not [file for file in found.leftovers if "no live record" not in file]
        assert self.store.history()["records"].tolist() == [len(m) for m in self.past[1:]]

    @invariant()
    def the_store_is_the_model(self):
        assert (self.store.commit, len(self.store)) == (len(self.past) - 1, len(self.model))
        compare(self.store, self.model)


def compare(store: EmbeddingStore, model: dict[Key, int]) -> None:
    selection = store.select()
    keys = [(k.node, k.round, k.class_name, k.index) for k in selection.keys()]
    assert sorted(keys) == sorted(model)
    for name in SMALL.columns:
        found = selection.read(name)
        for key, array in zip(keys, found, strict=True):
            assert np.array_equal(array, values(1, model[key])[name][0])


TestRules = pytest.mark.slow(Rules.TestCase)
TestRules.settings = settings(max_examples=14, stateful_step_count=14, database=None)
