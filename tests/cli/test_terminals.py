"""Every command can be read on any terminal, whatever its encoding and the sizes of numbers."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import values
from processes import finished

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.checkpoints import export_checkpoints
from fedgfe_store.cli.main import group
from fedgfe_store.cli.stats import _column

CLASS, NODE = "été 日本", "zürich"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a store whose names are not ASCII, and the same as checkpoints."""
    folder = tmp_path_factory.mktemp("s")
    schema = Schema.flux(1, clip=(768,))
    store = EmbeddingStore.create(folder / "spür.zarr", schema)
    with store.append(node=NODE, round=1) as batch:
        batch.add(split="train", class_name=CLASS, index=[0, 1], **values(2, 0, schema))
    export_checkpoints(store.select(), folder / "checkpoints")
    return store


@pytest.mark.parametrize(
    "command",
    [
        ("info",),
        ("query",),
        ("history",),
        ("stats", "--by", "round,node,class"),
        ("status",),
        ("status", "--by", "class"),
        ("verify",),
        ("compact",),
        ("export", "--output-dir", "out ü"),
        ("delete", "--class", CLASS, "--dry-run"),
        ("query", "--class", "ete"),
        ("generate", "--model", "tiny", "--dry-run"),
        ("import", "checkpoints"),
        ("merge", "spür.zarr", "--if-exists", "ö"),
        ("slurm", "--", "--class", CLASS),
        ("encode", "--class", CLASS, "--model", "nirgends/ü"),
        ("gallery", "--input-dir", "bilder ü"),
        ("sheet", "--input-dir", "bilder ü"),
        ("nö",),
    ],
)
def test_any_terminal_shows_every_command(foreign, command, monkeypatch):
    monkeypatch.chdir(foreign.path.parent)
    monkeypatch.delenv("FEDGFE_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for charset in ("ascii", "latin-1"):
        runner = CliRunner(charset=charset)
        result = runner.invoke(group, ["--store", str(foreign.path), *command])
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert result.output


def test_what_a_terminal_lacks_is_escaped(foreign):
    command = ["--store", str(foreign.path), "query"]
    rows = {}
    for charset in ("latin-1", "ascii"):
        lines = CliRunner(charset=charset).invoke(group, command).stdout_bytes.splitlines()
        text = lines[2].decode("utf-8" if charset == "ascii" else charset)
        rows[charset] = text.replace("|", "").split()[:5]
    assert rows["latin-1"] == [NODE, "1", "train", "été", r"\u65e5\u672c"]
    assert rows["ascii"] == [NODE, "1", "train", *CLASS.split()]


def test_data_are_utf8_whatever_the_terminal(foreign):
    for form in ("json", "csv"):
        command = ["--store", str(foreign.path), "query", "--format", form]
        result = CliRunner(charset="ascii").invoke(group, command)
        assert CLASS in result.stdout_bytes.decode()


def test_a_process_on_another_terminal_prints_too(foreign):
    environ = os.environ | {"PYTHONIOENCODING": "cp1251"}
    command = [sys.executable, "-m", "fedgfe_store.cli.main", "--store", foreign.path, "query"]
    done = finished(command, env=environ, encoding="cp1251")
    assert r"z\xfcrich" in done.stdout


def test_a_file_name_that_is_no_text_is_shown(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path / "st") + b"\xff.zarr")
    result = CliRunner().invoke(group, ["--store", name, "init"])
    assert result.exit_code == 0, result.exception
    assert r"st\udcff.zarr" in result.output


def test_no_rows_are_no_lines(store):
    for command in ("query", "history"):
        words = ["--store", str(store.path), command, "--format", "json"]
        assert CliRunner().invoke(group, words).output == ""


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ([0.5, 0.25, 0.0, np.nan], ["0.5000", "0.2500", "0.0000", "-"]),
        ([1234.5, 1.0], ["1,234", "1"]),
        ([3.1e-33, 0.0], ["3.100e-33", "0.000e+00"]),
        ([0.00012], ["0.0001200"]),
        ([2.5e30, 1.0], ["2.500e+30", "1.000e+00"]),
        ([np.inf, 0.5], ["inf", "0.5000"]),
        ([np.nan, 0.0], ["-", "0.000"]),
    ],
)
def test_numbers_have_as_many_digits_as_people_read(numbers, shown):
    assert _column(numbers, 4) == shown


def test_stats_of_embeddings_that_hardly_move_have_few_digits(store):
    tensors = values(1)
    for number in (1, 2):
        moved = {name: array * np.float32(1 + number * 1e-7) for name, array in tensors.items()}
        with store.append(node=0, round=number) as batch:
            batch.add(split="train", class_name="dog", index=0, **moved)
    output = CliRunner().invoke(group, ["--store", str(store.path), "stats"]).output
    assert max(len(word) for word in output.split() if word[0].isdigit()) < 20
