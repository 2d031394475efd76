"""What holds of every command: help, options before and behind, JSON, completion, its own words."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from click import Context
from click.shell_completion import BashComplete
from click.testing import CliRunner
from conftest import SMALL, fill

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.command import Command, in_options
from fedgfe_store.cli.main import _COMMANDS, _SECTIONS, group
from fedgfe_store.images.png import write_png
from fedgfe_store.names import image_name, key_json

KEYS = {"node", "round", "split", "class_name", "index", "sample_id", "file_id", "per_class"}


def command(name):
    found = group.get_command(Context(group), name)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for node in (0, "server"):
        for number in (1, 5):
            fill(store, node=node, round=number)
    return store


@pytest.fixture
def store(made, tmp_path):
    return EmbeddingStore.open(shutil.copytree(made.path, tmp_path / "s.zarr"))


def run(*words):
    return CliRunner().invoke(group, [str(word) for word in words])


def test_every_command_stands_once_in_the_help_of_the_program():
    listed = [name for names in _SECTIONS.values() for name in names.split()]
    assert sorted(listed) == sorted(_COMMANDS)
    said = run("--help").output
    assert all(f"\n  {name} " in said for name in listed)


def test_every_command_is_of_the_kind_that_shares_options():
    assert {type(command(name)) for name in _COMMANDS} == {Command}


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_names_each_option_once(name):
    said = run(name, "--help").output
    shown = [line.split()[0].rstrip(",") for line in said.splitlines() if line.startswith("  -")]
    assert len(shown) == len(set(shown))
    for option in command(name).get_params(Context(command(name))):
        # Behind the first name are older ones, which go on working.
        first = next((each for each in option.opts if each.startswith("--")), "")
        hidden = option.param_type_name == "argument" or getattr(option, "hidden", False)
        assert hidden or (first and first in said)


@pytest.mark.parametrize(
    "name", ["generate", "status", "sweep", "sheet", "gallery", "score", "audio", "fidelity"]
)
def test_the_folder_of_pictures_has_one_name_and_older_ones(name):
    (option,) = [each for each in command(name).params if "--images" in each.opts]
    old = {"--input-dir", "--input_dir"} & {*option.opts}
    assert old or {"--output-dir", "--output_dir"} < {*option.opts}
    said = run(name, "--help").output
    assert "--images DIRECTORY" in said
    assert not re.search(r"--(in|out)put[-_]dir", said)


@pytest.mark.parametrize("name", _COMMANDS)
def test_no_heading_of_help_is_over_one_option(name):
    _, *parts = re.split(r"^[A-Z][a-z ]+:$", run(name, "--help").output, flags=re.MULTILINE)
    for part in parts:
        assert part.count("\n  -") != 1


def test_generates_help_is_in_groups_and_what_is_asked_most_comes_first():
    said = run("generate", "--help").output
    headings = ["Which records:", "Run:", "Pictures:", "Model and memory:", "Old script:"]
    assert [line for line in said.splitlines() if line in headings] == headings
    assert said.index("--node ") < said.index("--steps") < said.index("--offload")


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_misspelt_option_names_the_nearest(name):
    result = run(name, "--stroe", "x.zarr")
    assert result.exit_code == 2
    assert "--store" in result.output


FILTERING = [name for name in _COMMANDS if {p.name for p in command(name).params} > KEYS]


@pytest.mark.parametrize("name", FILTERING)
def test_a_misspelt_value_names_the_nearest_in_every_command_with_filters(name, store, tmp_path):
    key = store.select(class_name="dog").keys()[0]
    facts = {"key": key_json(key), "image": 0, "settings": {"width": 8, "height": 8}}
    write_png(tmp_path / image_name(key), np.zeros((8, 8, 3), np.uint8), facts)
    needed = {
        "score": ["--clip-model", tmp_path],
        "fidelity": ["--features", tmp_path, "--real", tmp_path],
        "export": ["--output-dir", tmp_path / "out"],
        "sweep": ["--steps", "1,2"],
        "sheet": ["--input-dir", tmp_path],
        "gallery": ["--input-dir", tmp_path],
        "map": ["--method", "pca", "--format", "csv"],
        "audio": ["--audio-model", tmp_path, "--clip-model", tmp_path],
    }
    result = run("--store", store.path, name, *needed.get(name, []), "--class", "dgo")
    assert result.exit_code == 1, result.output
    assert "no class dgo" in result.output
    assert "the nearest: dog" in result.output


def test_the_store_may_be_named_behind_the_command(store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = run("--store", store.path, "query")
    behind = run("query", "--store", store.path)
    assert before.exit_code == behind.exit_code == 0
    assert before.output == behind.output
    assert "server" in behind.output
    assert run("--store", "no.zarr", "query", "--store", store.path).exit_code == 2


def test_quiet_and_verbose_may_stand_before_the_command(store):
    before = run("-q", "--store", store.path, "verify")
    behind = run("verify", "--store", store.path, "-q")
    assert before.exit_code == 0
    assert before.output == behind.output
    assert before.stderr == ""
    assert run("-v", "--store", store.path, "verify").exit_code == 0


def answer(*words, code=0):
    result = run(*words)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_each_reporting_command_prints_one_document(store, tmp_path):
    at = ["--store", store.path]
    told = answer(*at, "info", "--format", "json")
    assert (told["command"], told["records"], told["commit"]) == ("info", len(store), 4)
    assert sum(each["records"] for each in told["counts"]) == len(store)

    out = tmp_path / "out"
    told = answer(*at, "export", "--output-dir", out, "--format", "json")
    assert sum(file["records"] for file in told["files"]) == len(store)

    new = ["--store", tmp_path / "new.zarr"]
    told = answer(*new, "import", out, "--format", "json")
    assert sum(file["records"] for file in told["files"]) == len(store)
    assert {file["error"] for file in told["files"]} == {None}

    told = answer(*new, "merge", store.path, "--format", "json")
    assert told["records"] == len(EmbeddingStore.open(tmp_path / "new.zarr"))

    told = answer(*new, "delete", "--round", 1, "--yes", "--format", "json")
    assert told["deleted"] == len(store) // 2
    assert told["records"] == len(EmbeddingStore.open(tmp_path / "new.zarr"))

    told = answer(*new, "compact", "--format", "json")
    assert told["bytes_after"] < told["bytes_before"]

    told = answer(*new, "verify", "--format", "json")
    assert (told["sound"], told["damaged"], told["problems"]) == (True, [], [])

    told = answer(*new, "backup", tmp_path / "copy.zarr", "--format", "json")
    assert told["records"] == len(EmbeddingStore.open(tmp_path / "copy.zarr"))


def test_a_damaged_store_is_a_document_and_an_exit_code(store):
    for file in (store.path / "t5").glob("c.*"):
        file.write_bytes(file.read_bytes()[:100])
    told = answer("--store", store.path, "verify", "--format", "json", code=3)
    assert not told["sound"]
    assert len(told["damaged"]) == len(store)
    assert {each["key"]["node"] for each in told["damaged"]} == {"0", "server"}


def test_an_error_leaves_stdout_empty(tmp_path):
    result = run("--store", tmp_path / "no.zarr", "info", "--format", "json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "no.zarr" in result.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["query", "--class", "d"], ["dog"]),
        (["query", "--class", "cat,"], ["cat,cat", "cat,dog"]),
        (["generate", "--round", ""], ["1", "5"]),
        (["status", "--node", ""], ["0", "server"]),
    ],
)
def test_the_shell_completes_values_of_the_store(store, typed, offered):
    *before, last = typed
    complete = BashComplete(group, {}, "fedgfe-store", "_FEDGFE_STORE_COMPLETE")
    for words in (
        ["--store", str(store.path), *before],
        [before[0], "--store", str(store.path), *before[1:]],
    ):
        found = [item.value for item in complete.get_completions(words, last)]
        assert found == offered
    assert complete.get_completions(["--store", "no.zarr", *before], last) == []


def test_errors_speak_of_options_and_not_of_arguments():
    text = "if_exists='replace' takes it; as_of: expected; other_experiment=True; /a/if_exists/b"
    assert in_options(text, command("import")) == (
        "--if-exists replace takes it; as_of: expected; --other-experiment; /a/if_exists/b"
    )


def test_an_error_of_an_option_with_another_name_speaks_of_that():
    text = "error: height: expected a multiple of 16 pixels"
    assert in_options(text, command("preview")) == text.replace("height", "--size")
    assert in_options(text, command("generate")) == text


def test_errors_leave_alone_what_stands_in_quotes():
    text = """where "class_name = 'dgo'": no column "class_id"; bindings "class_name"; per_class"""
    assert in_options(text, command("query")) == text.replace("per_class", "--per-class")


def test_an_option_of_several_names_is_refused_by_its_first(tmp_path):
    (tmp_path / "file").touch()
    said = run("generate", "--images", tmp_path / "file").output
    assert "'--images': Directory" in said
    assert "output" not in said
