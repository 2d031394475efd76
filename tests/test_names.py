"""What names records says exactly which: nothing is rounded, cut or taken for something else."""

from __future__ import annotations

from enum import Enum, IntEnum

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore
from fedgfe_store.analysis import centroids, distance_to_server, drift, project
from fedgfe_store.errors import SchemaMismatchError


class Named(str, Enum):  # noqa: UP042 - its str() differs, which is what is tested
    DOG = "dog"


class Numbered(IntEnum):
    ONE = 1


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for number in (0, 1):
        for node in (0, 1, "server"):
            fill(store, node=node, round=number)
    return store


@pytest.fixture(scope="module")
def part(filled):
    return filled.select(round=0, node=0)


def taken(selection, positions):
    return [(key.class_name, key.index) for key in selection.take(positions).keys()]


DOGS = [("dog", 0), ("dog", 1), ("dog", 2)]


@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask,
        lambda mask: mask.tolist(),
        lambda mask: tuple(mask.to_numpy()),
        lambda mask: mask.to_numpy(),
        lambda mask: mask.to_numpy(object),
        lambda mask: mask.astype("boolean"),
        lambda mask: torch.tensor(mask.tolist()),
        lambda mask: mask[::-1],
    ],
)
def test_a_mask_takes_the_records_that_it_marks(part, form):
    assert taken(part, form(part.records.class_name == "dog")) == DOGS


def test_a_mask_of_xarray_takes_the_records_that_it_marks_in_their_order_only(part):
    dataset = part.to_xarray()
    assert taken(part, dataset.class_name == "dog") == DOGS
    with pytest.raises(SchemaMismatchError, match="class_name of the records in their order"):
        part.take(dataset.sortby("class_name").class_name == "dog")


def test_positions_of_any_library_take_their_records_in_that_order(part):
    wanted = [("cat", 2), ("dog", 0)]
    forms = [[-1, 0], (5, 0), np.array([5, 0], np.uint8), torch.tensor([5, 0]), pd.Index([5, 0])]
    forms += [pd.Series([5, 0], index=[7, 8]), np.array([5, 0], object), range(5, -1, -5)]
    for form in forms:
        assert taken(part, form) == wanted
    assert len(part.take([])) == 0
    assert taken(part, part.records.index[part.records.class_name == "dog"]) == DOGS


@pytest.mark.parametrize(
    "positions",
    [
        [True, False],
        [0.9, 1.9],
        [0.0, 1.0],
        np.array([1], np.float32),
        torch.tensor([1.5]),
        [True, 2],
        [0, None],
        None,
        1,
        True,
        "1",
        ["1"],
        [[0, 1]],
        {0},
        {0: 1},
        [6],
        [-7],
        [2**70],
        np.array([2**63], np.uint64),
        np.array(["2020"], "M8[D]"),
        np.ma.array([0, 1], mask=[False, True]),
        pd.Series([True, None] * 3, dtype="boolean"),
        pd.Series([True] * 6, index=list("abcdef")),
        slice(0.5),
    ],
)
def test_what_is_no_position_is_refused(part, positions):
    with pytest.raises(SchemaMismatchError, match="^take: expected"):
        part.take(positions)


@pytest.mark.parametrize(
    "number",
    [True, np.True_, [True], 1.0, np.float64(1), np.array([1.9], np.float32), "1", b"1", {1: 2},
     [[1]], torch.tensor(True), torch.tensor([True]), torch.tensor(1.9), float("nan"), pd.NA,
     pd.Series([True]), pd.DataFrame({1: [0]}), slice(0, 2), np.datetime64(1, "ns"),
     np.timedelta64(1, "ns"), np.ma.array([1, 0], mask=[False, True])],
)  # fmt: skip
def test_a_number_is_a_whole_number_in_every_filter(filled, number):
    for name in ("round", "index"):
        with pytest.raises(SchemaMismatchError, match=f"^{name}: expected whole numbers"):
            filled.select(**{name: number})


@pytest.mark.parametrize(
    "number",
    [1, np.int8(1), np.array(1), np.array([1]), torch.tensor(1), torch.tensor([1]), Numbered.ONE,
     pd.Series([1]), pd.Categorical([1]), xr.DataArray([1]), [range(1, 2)], range(1, 10**30),
     range(1, 10**30, 10**25), [2**70, 1], (n for n in [1])],
)  # fmt: skip
def test_whole_numbers_of_any_library_name_the_same_round(filled, number):
    assert set(filled.select(round=number).records["round"]) == {1}


@pytest.mark.parametrize("node", [range(10**12), [range(10**12)], torch.tensor([0, 1]), [0, "1"]])
def test_nodes_may_be_named_by_numbers(filled, node):
    assert set(filled.select(node=node).records["node"]) == {"0", "1"}


@pytest.mark.parametrize("number", [2**70, -1, range(10**30, 10**31), range(5, 0), []])
def test_numbers_that_no_record_can_have_name_none(filled, number):
    assert len(filled.select(round=number)) == 0


@pytest.mark.parametrize("name", [Named.DOG, np.str_("dog"), np.array(["dog"]), {"dog"},
                                  pd.Series(["dog"]), xr.DataArray(["dog"])])  # fmt: skip
def test_text_of_any_library_names_the_same_class(filled, name):
    assert set(filled.select(class_name=name).records["class_name"]) == {"dog"}


@pytest.mark.parametrize(
    "name", [b"dog", {"dog": 3}, 1, True, range(10**12), "\udcff", ["dog", "\udcff"], [None]]
)
def test_what_is_no_text_names_no_class(filled, name):
    with pytest.raises(SchemaMismatchError, match="^class_name: expected text"):
        filled.select(class_name=name)


@pytest.mark.parametrize("number", [True, np.True_, 1.0, "1", torch.tensor(1.9), torch.tensor(1)])
def test_a_count_is_a_whole_number(filled, part, number):
    with pytest.raises(SchemaMismatchError, match="per_class: expected"):
        filled.select(per_class=number)
    with pytest.raises(SchemaMismatchError, match="as_of: expected"):
        EmbeddingStore.open(filled.path, as_of=number)
    with pytest.raises(SchemaMismatchError, match="batch_size: expected"):
        part.batches(number)
    with pytest.raises(SchemaMismatchError, match="prefetch: expected"):
        part.batches(1, prefetch=number)
    with pytest.raises(SchemaMismatchError, match="components: expected"):
        project(part, components=number)


@pytest.mark.parametrize("options", [{"columns": "t5"}, {"dtype": torch.int64}, {"dtype": "half"}])
def test_options_of_batches_are_not_guessed(part, options):
    with pytest.raises(SchemaMismatchError, match=f"{next(iter(options))}: expected"):
        part.batches(2, **options)


@pytest.mark.parametrize("pairs", [[(0.9, 1.9)], [(False, True)], [("0", "1")], [0, 1]])
def test_pairs_of_rounds_are_whole_numbers(filled, pairs):
    with pytest.raises(SchemaMismatchError, match="pairs: expected"):
        drift(centroids(filled.select(), ["round"]), pairs=pairs)


def test_the_server_of_distances_may_be_a_number(filled):
    groups = centroids(filled.select(), ["node"])
    assert len(distance_to_server(groups, server=0)) == 2


@pytest.mark.parametrize("by", ["round", {"round"}, None, [["round"]], [1], []])
def test_key_columns_are_a_list_of_names(part, by):
    with pytest.raises(SchemaMismatchError, match="by: expected some of node, round"):
        centroids(part, by)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"node": torch.tensor(1)}, [("1", "dog", 0), ("1", "dog", 1)]),
        ({"node": torch.tensor([0, 1])}, [("0", "dog", 0), ("1", "dog", 1)]),
        ({"class_name": Named.DOG}, [("0", "dog", 0), ("0", "dog", 1)]),
        ({"index": [torch.tensor(3), torch.tensor(4)]}, [("0", "dog", 3), ("0", "dog", 4)]),
    ],
)
def test_keys_are_recorded_as_what_they_say(store, keys, wanted):
    given = {"node": 0, "round": 0, "split": "train", "class_name": "dog", "index": [0, 1]} | keys
    with store.append() as batch:
        batch.add(**given, **values(2))
    found = [(key.node, key.class_name, key.index) for key in store.select().keys()]
    assert found == wanted


@pytest.mark.parametrize(
    "keys",
    [
        {"node": torch.tensor(True)},
        {"index": [torch.tensor(False), torch.tensor(True)]},
        {"index": [torch.tensor(0.0), torch.tensor(1.9)]},
        {"index": range(10**12)},
        {"index": range(10**30)},
        {"class_name": {"dog", "cat"}},
    ],
)
def test_keys_that_say_nothing_clear_are_not_recorded(store, keys):
    given = {"node": 0, "round": 0, "split": "train", "class_name": "dog", "index": [0, 1]} | keys
    with pytest.raises(SchemaMismatchError, match=f"^{next(iter(keys))}: "):
        with store.append() as batch:
            batch.add(**given, **values(2))
    assert len(store) == 0
