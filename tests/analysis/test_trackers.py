"""``--log``: curves and sheets as TensorBoard's own reader and W&B's files show them."""

from __future__ import annotations

import io
import json
import sys
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill
from curves import curves, tensorboard, wandb_history
from PIL import Image
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.analysis.trackers import Point, points_of
from fedgfe_store.cli.main import group
from fedgfe_store.images.png import write_png
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey


@pytest.fixture
def store(tmp_path, monkeypatch) -> EmbeddingStore:
    monkeypatch.chdir(tmp_path)
    store = EmbeddingStore.create("embeddings.zarr", SMALL)
    for node in (0, "server"):
        for number in (1, 5):
            fill(store, node=node, round=number)
    return store


def run(*words: object):
    return CliRunner().invoke(group, list(map(str, words)))


def rows(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_points_are_named_by_command_measure_and_group():
    table = pd.DataFrame(
        {
            "node": ["0", "server", "clinic"],
            "round": [5, 5, 10],
            "class_name": ["dog", "female speech, a/b", "dog"],
            "records": [3, 3, 3],
            "closest": ["dog", "cat", "cat"],
            "norm": [0.5, nan, 2.0],
        }
    )
    assert points_of(table, ["node", "round", "class_name"], "stats") == [
        Point("stats/norm/node_0/dog", 5, 0.5),
        Point("stats/norm/clinic/dog", 10, 2.0),
    ]
    by = ["index", "round", "split"]
    table = pd.DataFrame({"index": [7], "round": [1], "split": ["test"], "kid": [0.25]})
    assert points_of(table, by, "fidelity") == [Point("fidelity/kid/test/index_7", 1, 0.25)]


@pytest.mark.parametrize(
    ("words", "group_of"),
    [
        (("stats", "--by", "round,class"), lambda row: row["class_name"]),
        (
            ("quality", "--to", "node=server", "--measure", "classes", "--by", "node,round"),
            lambda row: f"node_{row['node']}/{row['class_name']}",
        ),
    ],
)
def test_a_table_becomes_the_curves_that_tensorboard_shows(store, words, group_of):
    log = ("--log", "tensorboard:runs/a")
    given = run(*words, "--format", "json", *log)
    shown = curves(Path("runs/a"))
    wanted: dict = {}
    for row in rows(given):
        for name, value in row.items():
            if isinstance(value, float):
                tag = f"{words[0]}/{name}/{group_of(row)}"
                wanted.setdefault(tag, {})[row["round"]] = pytest.approx(value)
    assert shown == wanted
    count = sum(map(len, wanted.values()))
    assert given.stderr.splitlines()[-1] == f"log: {count} values to tensorboard:runs/a"
    # Run again when there is a round more: each curve goes on, and no step has two values.
    again = run(*words, *log)
    assert again.stdout.endswith(f"; {count} values were there already\n")
    for node in (0, "server"):
        fill(store, node=node, round=10)
    assert run(*words, *log).exit_code == 0
    longer = curves(Path("runs/a"))
    before = {tag: {r: v for r, v in each.items() if r < 10} for tag, each in longer.items()}
    assert before == shown
    assert all(10 in curve for curve in longer.values())


def test_values_that_differ_from_earlier_ones_are_told(store):
    log = ("stats", "--by", "round", "--log", "tensorboard:runs")
    assert run(*log).exit_code == 0
    store.refresh()
    store.delete(node="server", round=5)
    assert "differ from earlier ones of their rounds: both are kept" in run(*log).stdout


def test_a_sheet_becomes_a_picture_at_its_last_round(store):
    folder = Path("pictures")
    folder.mkdir()
    for number in (1, 5):
        key = RecordKey("0", number, "train", "dog", 0)
        pixels = np.full((16, 16, 3), 40 * number, np.uint8)
        said = {"key": key_json(key), "image": 0, "settings": {"width": 16, "height": 16}}
        write_png(folder / image_name(key), pixels, said)
    done = run("sheet", "--input-dir", folder, "--log", "tensorboard:runs")
    assert done.exit_code == 0, done.output
    assert "log: 1 picture to tensorboard:runs\n" in done.stdout
    (event,) = tensorboard(Path("runs")).Images("sheet")
    assert event.step == 5
    with Image.open("sheet.png") as drawn, Image.open(io.BytesIO(event.encoded_image_string)) as it:
        assert np.array_equal(np.asarray(it), np.asarray(drawn.convert("RGB")))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("stats", "--by", "class", "--log", "tensorboard:r"), "--log is by round: expected --by"),
        (("stats", "--log", "tensorboard:"), "expected tensorboard:DIR, wandb or wandb:PROJECT"),
        (("stats", "--log", "wandb:"), "expected tensorboard:DIR, wandb or wandb:PROJECT"),
        (("stats", "--log", "tensorboard:a file"), "--log: expected a folder, got a file"),
        (("quality", "--measure", "confusion", "--log", "wandb"), "--log takes curves"),
        (("sheet", "--animate", "--log", "tensorboard:r"), "--log takes sheets, not animations"),
        (("sheet", "--output", "a.pdf", "--log", "tensorboard:r"), "--log takes pictures"),
    ],
)
def test_what_cannot_be_logged_is_refused_first(store, words, says):
    Path("a file").touch()
    done = run(*words)
    assert done.exit_code in (1, 2)
    assert says in done.stderr
    assert done.stdout == ""
    assert not Path("r").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_not_installed_is_named(store, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    done = run("stats", "--log", "tensorboard:r" if name == "tensorboard" else "wandb")
    assert done.output == f"error: --log {name} needs {name}: pip install 'fedgfe-store[{name}]'\n"


@pytest.mark.long
def test_wandb_keeps_the_curves_offline(store, tmp_path):
    pytest.importorskip("wandb", reason="needs wandb, which `make test-long` installs")
    command = [sys.executable, "-m", "fedgfe_store", "stats", "--format", "json", "--log"]
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = finished([*command, "wandb:federation"], env=environment)
    shown = wandb_history(tmp_path)
    for row in map(json.loads, done.stdout.splitlines()):
        for name, value in row.items():
            if isinstance(value, float):
                tag = f"stats/{name}/{row['class_name']}"
                assert shown[tag][row["round"]] == pytest.approx(value), tag
    # Without a key, and where it may not ask for one, it is one line.
    online = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "",
        "WANDB_SILENT": "true",
        "HOME": str(tmp_path),
    }
    done = finished([*command, "wandb"], env=online, check=False)
    assert done.returncode == 1
    assert "error: Weights & Biases: " in done.stderr
    assert "Traceback" not in done.stderr
