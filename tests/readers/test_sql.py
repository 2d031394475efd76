"""Conditions in SQL: the same records as pandas finds, and nothing but these records."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError

pytest.importorskip("duckdb", reason="needs the extra sql")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", SMALL)
    for node in ("0", "server"):
        for number in (1, 5, 10):
            fill(store, node=node, round=number)
    with store.append(node="it's", round=7) as batch:
        extra = [{"label": "loud", "gain": 2.5}, None]
        batch.add(split="val", class_name="cat", index=[0, 1], extra=extra, **values(2))
    return store


@pytest.mark.parametrize(
    ("condition", "query"),
    [
        ("round % 5 = 0 AND class_name LIKE 'd%'", "round % 5 == 0 and class_name == 'dog'"),
        ("node = 'it''s'", 'node == "it\'s"'),
        ("index > 0 or \"index\" = 0 and round = 1", "index > 0 or index == 0 and round == 1"),
        ("round = (SELECT max(round) FROM records)", "round == round.max()"),
        ("false", "index < 0"),
    ],
)  # fmt: skip
def test_conditions_agree_with_pandas(filled, condition, query):
    selection = filled.select()
    frame = selection.records.rename(columns={"index": "at"})
    expected = frame.query(query.replace("index", "at")).index
    found = selection.where(condition)
    assert found.keys() == selection.take(expected).keys()
    assert found.read("t5").tobytes() == selection.read("t5")[expected].tobytes()


def test_extra_is_json_and_times_are_utc(filled):
    found = filled.select().where("(extra->>'$.label') = 'loud' AND (extra->>'gain')::FLOAT > 2")
    assert [(key.node, key.index) for key in found.keys()] == [("it's", 0)]
    assert len(filled.select().where("timestamp BETWEEN '2020-01-01' AND now()::TIMESTAMP")) == 38
    assert len(filled.select(node=0).where("round > 1").where("class_name = 'dog'")) == 6


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("round >", "where 'round >': Parser Error: syntax error"),
        ("klass = 'dog'", 'Referenced column "klass" not found'),
        ("true; SELECT 1", "where 'true; SELECT 1': Parser Error"),
        ("true) UNION SELECT * FROM (SELECT 1", "Parser Error"),
        ("round = 1, node = '0'", "where"),
        ("node", "Could not convert string '0|Could not convert string"),
        ("exists(SELECT * FROM read_text('/etc/hosts'))", "operations are disabled"),
        ("exists(SELECT * FROM '/etc/hosts')", "does not exist"),
        ("exists(SELECT * FROM frame)", "Table with name frame does not exist"),
        ("node = 0", "texts stand in quotes"),
        (" ", "where: expected a condition in SQL, got ' '"),
        (5, "where: expected a condition in SQL, got 5"),
    ],
)
def test_what_is_no_condition_of_the_records_is_one_line(filled, condition, words):
    with pytest.raises(SchemaMismatchError, match=words) as error:
        filled.select().where(condition)
    assert "\n" not in str(error.value)


def test_query_takes_one(filled):
    def run(*arguments):
        return CliRunner().invoke(group, ["--store", str(filled.path), "query", *arguments])

    found = run("--class", "dog", "--where", "round > 5", "--format", "json")
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert {(line["class_name"], line["round"]) for line in lines} == {("dog", 10)}
    none = run("--where", "round > 50")
    assert (none.exit_code, none.stderr) == (
        1, "error: none of 38 records meets --where 'round > 50'\n"
    )  # fmt: skip
    assert run("--where", "round > 50", "--allow-empty").exit_code == 0
    wrong = run("--where", "round >")
    assert wrong.exit_code == 1
    assert len(wrong.stderr.splitlines()) == 1
