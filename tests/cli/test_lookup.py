"""Filters on the command line name what is there, or say what is nearest and what there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.images.png import write_png
from fedgfe_store.names import image_name, key_json

SPEECH = "female speech, woman speaking"
ODD = (SPEECH, "male speech", "man speaking", "dog")


def run(store, *arguments):
    words = ["--store", str(store.path), *map(str, arguments)]
    return CliRunner().invoke(group, words)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for node in (0, 1, "server"):
        for number in (1, 5, 10):
            fill(store, node=node, round=number)
    return store


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Classes with commas, and nodes that look like ranges."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("odd") / "s.zarr", SMALL)
    for node in ("10-12", "2026-01", "11", "site,a"):
        with store.append(node=node, round=0) as batch:
            batch.add(split="train", class_name=ODD, index=range(4), **values(4))
    return store


def queried(store, *arguments):
    result = run(store, "query", "--format", "json", *arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


TYPOS = {
    "--class=dgo": "no class dgo in {where}; the nearest: dog; there are cat, dog",
    "--class=DOG,cat": "no class DOG in {where}; the nearest: dog; there are cat, dog",
    "--node=3": "no node 3 in {where}; there are 0, 1, server",
    "--node=sever": "no node sever in {where}; the nearest: server; there are 0, 1, server",
    "--node=3-7": "no node 3-7 in {where}; there are 0, 1, server",
    "--round=7": "no round 7 in {where}; the nearest: 5, 10; there are 1, 5, 10",
    "--round=11-40": "no round 11-40 in {where}; the nearest: 10; there are 1, 5, 10",
    "--split=tran": "no split tran in {where}; the nearest: train; there are train",
    "--index=3": "no index 3 in {where}; the nearest: 2; there are 0-2",
    "--sample-id=train_7": "no sample id train_7 in {where}; the nearest: train_2, train_1; "
    "there are train_0, train_1, train_2",
}


@pytest.mark.parametrize("option", TYPOS)
def test_a_name_that_is_not_there_is_an_error_that_names_the_nearest(filled, option):
    result = run(filled, "query", option)
    where = f"{filled.path}, commit {filled.commit}"
    wanted = f"error: {TYPOS[option].format(where=where)}\n"
    assert (result.exit_code, result.output) == (1, wanted)


@pytest.mark.parametrize(
    "command",
    [
        ("query",),
        ("status",),
        ("stats",),
        ("generate", "--model", "tiny", "--dry-run"),
        ("export", "--output-dir", "exported"),
        ("delete", "--yes"),
        ("score", "--clip-model", "none"),
    ],
)
def test_no_command_takes_a_typo_for_an_empty_success(filled, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(filled, *command, "--class", "dgo")
    assert result.exit_code == 1
    assert "no class dgo" in result.output
    assert "the nearest: dog" in result.output
    assert len(EmbeddingStore.open(filled.path)) == 54


def test_a_job_script_is_written_with_a_note_on_what_is_not_there_yet(filled, tmp_path):
    result = run(filled, "slurm", "--", "--class", "dgo,cat", "--round", "5")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"note: no class dgo in {filled.path}, commit 9; the nearest")
    assert "generate --class dgo,cat --round 5" in result.stdout
    assert run(filled, "slurm", "--", "--class", "cat").stderr == ""


def test_several_mistakes_are_named_at_once(filled):
    output = run(filled, "query", "--class", "dgo,dog,kat", "--round", "7").output
    assert [line.split(" in ")[0].removeprefix("error: ") for line in output.splitlines()] == [
        "no round 7",
        "no class dgo",
        "no class kat",
    ]


def test_filters_that_nothing_meets_together_say_which_one_empties(store):
    for number in (1, 5, 10):
        fill(store, node=number % 2, round=number)
    with store.append(node=2, round=1) as batch:
        batch.add(split="train", class_name="owl", index=0, **values(1))
    result = run(store, "query", "--node", "0-1", "--class", "owl")
    assert result.exit_code == 1
    assert "no record in" in result.output
    assert "meets all filters: node 0-1; class owl" in result.output
    assert "(1 do without node, 18 do without class)" in result.output


def test_pipelines_may_allow_what_is_empty(filled, tmp_path):
    options = ("--class", "dgo", "--allow-empty")
    assert queried(filled, *options) == []
    status = run(filled, "status", *options, "--output-dir", tmp_path)
    assert (status.exit_code, "records: 0" in status.output) == (0, True)
    assert len(queried(filled, "--class", "dgo,dog", "--allow-empty")) == 27


def test_a_store_without_records_says_so(store):
    assert run(store, "query").exit_code == 0
    result = run(store, "query", "--class", "dog")
    assert result.exit_code == 1
    assert result.output.endswith("which has no records\n")


def test_what_there_is_fits_a_few_lines(store):
    with store.append(node=0, round=0) as batch:
        names = [str(2 * n) for n in range(500)]
        keys = {"split": "train", "class_name": "dog", "index": range(0, 1000, 2)}
        batch.add(**keys, sample_id=names, **values(500))
    for option in ("--sample-id=7", "--index=7"):
        output = run(store, "query", option).output
        assert output.endswith(", ...\n")
        assert len(output) < 700


def test_in_python_what_is_not_there_selects_nothing(filled):
    assert len(filled.select(class_name="dgo", round=7)) == 0


def test_a_range_need_not_be_full_and_is_never_a_list(filled):
    assert len(queried(filled, "--round", "2-99999999999", "--node", "0-99999999999")) == 24


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        (["--class", SPEECH], {SPEECH}),
        (["--class", "male speech, man speaking"], {"male speech", "man speaking"}),
        (["--class", SPEECH, "--class", "dog"], {SPEECH, "dog"}),
        (["--class", "dog,male speech", "--class", SPEECH], {SPEECH, "dog", "male speech"}),
    ],
)
def test_a_name_with_a_comma_is_split_only_where_there_is_none_of_the_whole(odd, options, classes):
    assert {record["class_name"] for record in queried(odd, *options)} == classes


def test_a_misspelt_name_with_a_comma_is_one_name(odd):
    result = run(odd, "query", "--class", "female speach, woman speaking")
    assert result.exit_code == 1
    assert 'no class "female speach, woman speaking" in' in result.output
    assert f'the nearest: "{SPEECH}"' in result.output
    assert "no class woman" not in result.output


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        (["--node", "10-12"], {"10-12"}),
        (["--node", "2026-01"], {"2026-01"}),
        (["--node", "9-11"], {"11"}),
        (["--node", "10-12,9-11"], {"10-12", "11"}),
        (["--node", "site,a", "--node", "11"], {"site,a", "11"}),
    ],
)
def test_a_node_that_looks_like_a_range_is_that_node(odd, options, nodes):
    assert {record["node"] for record in queried(odd, *options)} == nodes


def test_delete_says_first_what_the_names_were_taken_for(odd, tmp_path):
    odd = EmbeddingStore.open(shutil.copytree(odd.path, tmp_path / "s.zarr"))
    result = run(odd, "delete", "--class", "male speech, man speaking", "--node", "10-12", "--yes")
    assert result.output.splitlines()[:2] == [
        'node: "10-12" (2)',
        "class: male speech (1), man speaking (1)",
    ]
    assert run(odd, "delete", "--class", SPEECH, "--yes").output.startswith(
        f'class: "{SPEECH}" (4)'
    )
    assert set(EmbeddingStore.open(odd.path).select().records["class_name"]) == set(ODD[1:])


def test_listings_tell_names_with_commas_and_like_ranges_from_others(odd):
    output = run(odd, "info").output
    assert '11, "10-12", "2026-01", "site,a"' in output
    assert f'dog, "{SPEECH}", male speech, man speaking' in output
    history = run(odd, "history", "--format", "csv").output
    assert '"""10-12"""' in history


@pytest.mark.parametrize("name", ["007", "0-2"])
def test_a_node_that_is_no_plain_number_stands_beside_the_number(store, name):
    for node in (7, 0, 1, 2, name):
        fill(store, node=node, round=0, n=1)
    listed = run(store, "info").output
    assert f"0-2, 7, {name if name == '007' else json.dumps(name)}\n" in listed
    assert {record["node"] for record in queried(store, "--node", name)} == {name}


def test_files_are_named_like_samples(store):
    with store.append(node=0, round=0) as batch:
        for place, name in enumerate(["a,b", "clip-7"]):
            keys = {"split": "train", "class_name": "dog", "index": place, "file_id": name}
            batch.add(**keys, **values(1))
    assert [record["index"] for record in queried(store, "--file-id", "a,b")] == [0]
    output = run(store, "query", "--file-id", "clip-8").output
    assert "no file id clip-8 in" in output
    assert output.endswith('the nearest: clip-7; there are "a,b", clip-7\n')


def test_sheets_go_by_the_pictures_that_there_are(filled, tmp_path):
    key = filled.select(class_name="dog", round=5, node=0, index=0).keys()[0]
    facts = {"key": key_json(key), "image": 0, "settings": {"width": 8, "height": 8}}
    write_png(tmp_path / image_name(key), np.zeros((8, 8, 3), np.uint8), facts)
    result = run(filled, "sheet", "--input-dir", tmp_path, "--class", "dgo")
    assert result.exit_code == 1
    assert f"no class dgo in {tmp_path}; the nearest: dog; there are dog" in result.output


def test_a_filter_that_delete_does_not_know_is_named(filled):
    for wrong, right in {
        "klass": "class_name",
        "clas_name": "class_name",
        "rounds": "round",
    }.items():
        with pytest.raises(
            SchemaMismatchError, match=f"{wrong} is no filter; the nearest: {right}"
        ):
            filled.delete(**{wrong: "dog"})
    with pytest.raises(SchemaMismatchError, match="x is no filter; expected some of node, round"):
        filled.delete(x=None, round=1)
    assert len(filled) == 54


@pytest.mark.parametrize("path", [str, Path, lambda path: None])
def test_a_store_is_opened_by_open_only(filled, path):
    with pytest.raises(SchemaMismatchError, match=r"expected EmbeddingStore\.open\(path\) or"):
        EmbeddingStore(path(filled.path))
