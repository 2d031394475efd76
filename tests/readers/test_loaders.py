"""Batches in torch's DataLoader, and wrong arguments that say what was meant."""

from __future__ import annotations

import pickle
import sys
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
from conftest import fill
from processes import finished
from torch.utils.data import DataLoader, IterableDataset

from fedgfe_store.analysis import (
    centroids,
    class_spread,
    combine,
    distance_to_server,
    drift,
    project,
    summarize,
)
from fedgfe_store.errors import SchemaMismatchError


@pytest.fixture
def filled(store):
    for number in (0, 1):
        fill(store, node=0, round=number, n=5)
    return store


def seen(batches):
    return [(len(b), b["t5"].sum().item(), b.selection.keys()[0]) for b in batches]


@pytest.mark.parametrize("options", [{"batch_size": None}, {}])
def test_a_loader_gives_each_batch_once_and_in_order(filled, options):
    batches = filled.select().batches(3, dtype=torch.bfloat16)
    expected = len(batches)
    assert isinstance(batches, IterableDataset)
    loader = DataLoader(batches, **options)
    assert len(loader) == expected == 7
    assert seen(loader) == seen(batches)


def test_any_number_of_batches_may_be_read_ahead(filled):
    assert [len(b) for b in filled.select().batches(16, prefetch=2**70)] == [16, 4]


def test_workers_of_a_loader_share_the_batches(filled, monkeypatch):
    """As two processes of it do, each with a copy of the dataset; a loader takes them in turn."""
    batches = filled.select().batches(3)
    shares = []
    for number in range(2):
        worker = SimpleNamespace(id=number, num_workers=2)
        monkeypatch.setattr(
            "fedgfe_store.readers.torch.get_worker_info", lambda worker=worker: worker
        )
        copy = pickle.loads(pickle.dumps(batches))
        shares.append([pickle.loads(pickle.dumps(batch)) for batch in copy])
    monkeypatch.undo()
    assert [len(share) for share in shares] == [4, 3]
    in_turn = [b for pair in zip_longest(*shares) for b in pair if b is not None]
    assert seen(in_turn) == seen(batches)


def test_a_loader_that_would_batch_batches_says_how_to_call_it(filled):
    with pytest.raises(SchemaMismatchError, match=r"DataLoader\(batches, batch_size=None\)"):
        next(iter(DataLoader(filled.select().batches(3), batch_size=2)))


def test_selecting_loads_no_torch(filled):
    code = (
        "import sys; from fedgfe_store import EmbeddingStore; "
        f"EmbeddingStore.open({str(filled.path)!r}).select(round=1).records; "
        "assert 'torch' not in sys.modules"
    )
    finished([sys.executable, "-c", code])


@pytest.mark.parametrize("function", [centroids, summarize, project])
def test_analysis_of_what_is_no_selection_says_what_it_expects(filled, function):
    for wrong in (filled, filled.select().to_xarray(), "x.zarr", None):
        with pytest.raises(SchemaMismatchError, match=r"expected a selection, such as store\.sel"):
            function(wrong)


@pytest.mark.parametrize(
    "function", [drift, distance_to_server, class_spread, lambda groups: combine(groups, ["round"])]
)
def test_distances_of_what_is_no_result_of_centroids_say_what_they_expect(filled, function):
    for wrong in (filled.select(), filled.select().records, filled.select().to_xarray(), None):
        with pytest.raises(SchemaMismatchError, match="expected a result of centroids"):
            function(wrong)


def test_merging_a_path_says_what_to_open(filled):
    with pytest.raises(SchemaMismatchError, match=r"merge: expected an EmbeddingStore, .*open"):
        filled.merge("other.zarr")
