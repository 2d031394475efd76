"""The command line: help, init, info, query, and how mistakes are shown."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from conftest import fill
from processes import finished

from fedgfe_store import EmbeddingStore, __version__
from fedgfe_store.cli.main import _COMMANDS, group


def run(*args: object, store=None):
    options = ["--store", str(store)] if store else []
    return CliRunner().invoke(group, [*options, *map(str, args)])


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "  fedgfe-store " in result.output


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom fedgfe_store.cli.main import group\n"
        "try: group(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'zarr', 'pandas', 'numpy', 'xarray', 'diffusers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = finished([sys.executable, "-c", code])
    assert out.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in out.stdout for name in _COMMANDS)


def test_no_global_module_is_named_cli(tmp_path):
    command = [sys.executable, "-c", "import cli"]
    out = finished(command, cwd=tmp_path, check=False)
    assert "No module named 'cli'" in out.stderr


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ([], {"t5": (17, 4096), "clip": (768,)}),
        (["--tokens", 512, "--clip-sequence"], {"t5": (512, 4096), "clip": (77, 768)}),
        (["--kind", "sd"], {"clip": (77, 768)}),
    ],
)
def test_init(tmp_path, options, shapes):
    path = tmp_path / "s.zarr"
    result = run("init", "--experiment", "vegas", "--model", "tiny", *options, store=path)
    assert result.exit_code == 0, result.output
    schema = EmbeddingStore.open(path).schema
    assert schema.columns == shapes
    assert (schema.metadata.experiment, schema.metadata.model) == ("vegas", "tiny")
    again = run("init", store=path)
    assert again.exit_code == 1
    assert again.output.startswith(f"error: cannot make a store at {path}")


def test_info_counts_by_round_and_node(store):
    for node, rounds in ((10, (1, 2)), (9, (1,)), ("server", (1, 2, 3))):
        for round_ in rounds:
            fill(store, node=node, round=round_)
    lines = run("info", store=store.path).output.splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    assert facts["records"].strip() == "36"
    assert facts["nodes"].strip() == "9, 10, server"
    assert facts["rounds"].strip() == "1-3"
    assert facts["kind"].strip() == "flux: t5 [3, 8], clip [4]"
    table = [line.split() for line in lines[-5:]]
    assert table[0] == ["round", "9", "10", "server", "all"]
    assert table[2:] == [list("1") + ["6"] * 3 + ["18"], ["2", "0", "6", "6", "12"],
                         ["3", "0", "0", "6", "6"]]  # fmt: skip


def test_info_of_an_empty_store(store):
    result = run("info", store=store.path)
    assert result.exit_code == 0
    assert "records:     0" in result.output


def test_query_formats_agree(store):
    for round_ in (1, 5):
        fill(store, node=0, round=round_)
    options = ["--round", "4-9", "--class", "dog", "--index", "0,2"]
    table = run("query", *options, store=store.path).output
    assert "2 records" in table
    rows = [line.split() for line in table.splitlines()[2:4]]
    assert [row[:5] for row in rows] == [["0", "5", "train", "dog", i] for i in "02"]
    lines = run("query", *options, "--format", "json", store=store.path).output.splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["round"], r["class_name"], r["index"]) for r in records] == [
        (5, "dog", 0),
        (5, "dog", 2),
    ]
    csv = run("query", *options, "--format", "csv", store=store.path).output.splitlines()
    assert csv[0].startswith("node,round,split,class_name,index,sample_id")
    assert csv[1].startswith("0,5,train,dog,0,train_0")
    assert len(csv) == 3


def test_a_long_table_is_cut_and_says_so(store):
    fill(store, node=0, round=1, n=15)
    output = run("query", store=store.path).output
    assert output.endswith("30 records, 20 shown\n")
    assert run("query", "--limit", 30, store=store.path).output.endswith("30 records\n")
    assert len(run("query", "--format", "csv", store=store.path).output.splitlines()) == 31


def test_filters_of_the_command_line(store):
    for node in (0, 1, 2, "server"):
        fill(store, node=node, round=1)
    for option, count in {
        "--node=0-1,server": 18, "--split=train": 24, "--class=cat,dog": 24, "--per-class=1": 8,
        "--sample-id=train_1": 8, "--round=0-99999999999": 24, "--node=2-99999999999": 6,
    }.items():  # fmt: skip
        assert f"\n{count} records" in run("query", option, store=store.path).output, option


@pytest.mark.parametrize(
    "option", ["--round=x", "--round=5-1", f"--round={'9' * 5000}", "--per-class=0"]
)
def test_usage_mistakes_exit_with_2(store, option):
    result = run("query", option, store=store.path)
    assert (result.exit_code, result.output.count("Traceback")) == (2, 0)


def test_a_missing_store_is_one_line(tmp_path):
    result = run("info", store=tmp_path / "no.zarr")
    assert result.exit_code == 1
    assert result.output.startswith(f"error: no embedding store at {tmp_path / 'no.zarr'}")
    assert result.output.count("\n") == 1


def test_the_store_may_come_from_the_environment(store, monkeypatch):
    monkeypatch.setenv("FEDGFE_STORE", str(store.path))
    assert str(store.path) in run("info").output


@pytest.mark.parametrize(
    ("typed", "meant"), [("genrate", "generate"), ("stat", "stats or status"), ("xyz", "--help")]
)
def test_a_command_that_is_none_is_told_which_it_may_be(typed, meant):
    done = CliRunner().invoke(group, [typed])
    assert done.exit_code == 2
    assert f"no command '{typed}'" in done.stderr
    assert meant in done.stderr


def test_every_command_has_a_near_name_for_its_own_misspelt():
    for name in _COMMANDS:
        done = CliRunner().invoke(group, [name[:-1] + "x"])
        assert name in done.stderr, name


def test_it_is_a_module_too(tmp_path):
    done = finished([sys.executable, "-m", "fedgfe_store", "--version"], cwd=tmp_path)
    assert __version__ in done.stdout
