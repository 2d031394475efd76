"""The comparison reads the same values from every format, and notices where it does not."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.compare import cases, measure, tables
from benchmarks.compare.data import TINY, Plan
from benchmarks.compare.formats import NAMES, load

PLAN = Plan(TINY, whole=40, rounds=3, small=10, repeats=1, sizes=(1, 2), memory=())
EXTRA = {
    "safetensors": "safetensors",
    "HDF5": "h5py",
    "Lance": "lance",
    "TensorStore": "tensorstore",
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "store"])
def test_every_format_returns_what_the_store_does(name, tmp_path):
    pytest.importorskip(EXTRA.get(name, "torch"))
    formats = [load("store"), load(name)]
    sizes = measure.build(formats, tmp_path, PLAN)
    times = measure.reads(formats, tmp_path, PLAN, cold=False, report=lambda text: None)
    assert set(times) == set(cases.CASES)
    least = TINY.nbytes if name not in ("store bfloat16", "TensorStore", "zarr-python") else 0
    assert sizes["bytes"][name] > least


def test_other_values_are_noticed(tmp_path):
    store = load("store")
    measure.build([store], tmp_path, PLAN)
    read = store.at(tmp_path / store.folder, np.arange(4))
    expected = (read[0] + 1, read[1])
    plan = replace(PLAN, whole=4, rounds=1)
    fake: Any = SimpleNamespace(name="fake", exact=True, at=lambda path, positions: read)
    with pytest.raises(AssertionError, match="fake, scattered: other values"):
        cases.check("scattered", fake, tmp_path, plan, expected)


def test_the_table_shows_the_best_seconds_and_their_ratio_to_ours():
    times = {"store": [0.2, 0.1], "HDF5": [0.3, 0.05]}
    assert tables._seconds(times, "store") == "0.1000"
    assert tables._seconds(times, "HDF5") == "0.0500 (0.50)"


def test_appends_are_timed_at_each_size(tmp_path):
    formats = [load("store"), load("torch.load")]
    times = measure.growth(formats, tmp_path, PLAN, report=lambda text: None)
    assert {name: set(taken) for name, taken in times.items()} == {
        "append_at_1": {"store", "torch.load"},
        "append_at_2": {"store", "torch.load"},
    }
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
