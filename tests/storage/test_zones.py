"""Zone maps: a query reads the key chunks that may hold its records, and finds what it found."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, fill
from test_columns import rewritten

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import DamagedDataError
from fedgfe_store.storage.places import LocalFolder

CHUNK = 8
MODULES = ("layout", "commit", "key_chunks", "snapshot", "metadata", "key_files", "verify")
TABLE = [("0", 1), ("1", 1), ("0", 2), ("server", 2), ("0", 7), ("1", 9)]
"""Node and round of each append, which fills a key chunk."""


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(f"fedgfe_store.storage.{module}.KEY_CHUNK", CHUNK)
        yield


@pytest.fixture(scope="module")
def made(small_chunks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = EmbeddingStore.create(tmp_path_factory.mktemp("z") / "s.zarr", SMALL)
    for node, number in TABLE:
        fill(store, node=node, round=number, classes="dog cat", n=CHUNK // 2)
    return store.path


@pytest.fixture
def chunked(made: Path, tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.open(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the files of key columns that are read."""
    names: set[str] = set()
    read = LocalFolder.read

    def listed(place: LocalFolder, name: str, most: int) -> bytes:
        names.add(name)
        return read(place, name, most)

    monkeypatch.setattr(LocalFolder, "read", listed)
    return names


def chunks_of(names: set[str], column: str) -> list[int]:
    return sorted(int(n.split("c.")[1]) for n in names if n.startswith(f"{column}/c."))


def forget(path: Path) -> None:
    """Leave `path` as a release without zone maps leaves it."""
    rewritten(path, lambda ours, _: ours.pop("zones"))


def zones(path: Path) -> dict[str, Any]:
    return json.loads((path / "zarr.json").read_bytes())["attributes"]["fedgfe_store"]["zones"]


def test_what_is_known_of_each_chunk_is_in_the_group(chunked):
    assert zones(chunked.path) == {
        "nodes": ["0", "1", "server"],
        "chunks": [[1, 1, "1"], [1, 1, "2"], [2, 2, "1"], [2, 2, "4"], [7, 7, "1"], [9, 9, "2"]],
    }


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"round": 2}, [2, 3]),
        ({"round": [1, 7]}, [0, 1, 4]),
        ({"round": range(3, 10**30)}, [4, 5]),
        ({"round": range(9, 6, -2), "node": range(2)}, [4, 5]),
        ({"node": "server"}, [3]),
        ({"node": 1, "round": 1, "class_name": "cat"}, [1]),
        ({"node": "nobody"}, []),
        ({"round": []}, []),
        ({"class_name": "cat"}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_a_query_reads_the_chunks_that_may_hold_it(chunked, seen, filters, expected):
    selection = chunked.select(**filters)
    _ = selection.records, selection.read("t5")
    for column in ("created_in", "deleted_in"):
        assert chunks_of(seen, column) == expected
    for column in ("round", "node", "class_name", "t5_digest", "row_digest", "extra"):
        assert set(chunks_of(seen, column)) <= set(expected)


def test_queries_find_what_they_find_without_zone_maps(chunked):
    fill(chunked, node="0", round=2, classes="bird", n=3)
    chunked.delete(node="1", index=0)
    known = chunked.select().keys()
    bare = shutil.copytree(chunked.path, chunked.path.with_name("bare.zarr"))
    forget(bare)
    nodes: tuple[Any, ...] = (None, "0", ["1", "server"], range(1))
    rounds: tuple[Any, ...] = (None, 2, [1, 9], range(2, 8))
    for node, number in itertools.product(nodes, rounds):
        found = chunked.select(node=node, round=number).keys()
        assert found == EmbeddingStore.open(bare).select(node=node, round=number).keys()
        names = ["0"] if node in ("0", range(1)) else node or ["0", "1", "server"]
        numbers = [2] if number == 2 else number or range(10)
        assert found == [key for key in known if key.node in names and key.round in numbers]
    for commit in range(chunked.commit + 1):
        then, bare_then = (EmbeddingStore.open(p, as_of=commit) for p in (chunked.path, bare))
        for number in (1, 2):
            assert then.select(round=number).keys() == bare_then.select(round=number).keys()
    assert len(EmbeddingStore.open(bare, as_of=6).select(round=1)) == 16
    assert len(EmbeddingStore.open(bare).select(round=1)) == 14


def test_an_append_looks_for_its_keys_where_they_may_be(chunked, seen):
    fill(chunked, node="server", round=2, classes="dog cat", n=CHUNK // 2)
    assert chunks_of(seen, "round") == chunks_of(seen, "class_name") == [3]
    assert len(chunked) == 48  # the same records: all were there
    seen.clear()
    fill(EmbeddingStore.open(chunked.path), node="0", round=8)
    assert chunks_of(seen, "node") == chunks_of(seen, "created_in") == []


def test_the_next_commit_gives_zone_maps_to_a_store_without(chunked):
    before = zones(chunked.path)
    forget(chunked.path)
    store = EmbeddingStore.open(chunked.path)
    assert len(store.select(round=2)) == 16
    fill(store, node="2", round=3, classes="dog", n=4)
    assert zones(store.path)["chunks"][:6] == before["chunks"]
    assert zones(store.path)["chunks"][6] == [3, 3, "8"]
    assert store.verify().sound


def test_a_damaged_chunk_keeps_no_one_from_appending(chunked):
    forget(chunked.path)
    file = chunked.path / "node" / "c.2"
    file.write_bytes(file.read_bytes()[::-1])
    store = EmbeddingStore.open(chunked.path)
    fill(store, node="0", round=3)
    assert zones(store.path)["chunks"][2] is None
    with pytest.raises(DamagedDataError, match="key column node, rows 16 to 24"):
        len(store.select(node="0"))


def test_zone_maps_that_hide_records_are_damage(chunked):
    for wrong in ([1, 1, "1"], [2, 2, "2"], [0, -1, "0"]):
        rewritten(
            chunked.path, lambda ours, _, wrong=wrong: ours["zones"]["chunks"].__setitem__(2, wrong)
        )
        found = EmbeddingStore.open(chunked.path).verify()
        assert not found.sound
        assert "rows from 16 on hides records" in found.problems[0]
    raw = (chunked.path / "zarr.json").read_bytes()
    (chunked.path / "zarr.json").write_bytes(raw.replace(b'[7, 7, "1"]', b'[8, 8, "1"]'))
    with pytest.raises(DamagedDataError, match="its checksum does not fit"):
        EmbeddingStore.open(chunked.path)


@pytest.mark.parametrize("wrong", [[], [1, 2], [1, 2, "8"], [1, 2, "-1"], [1.0, 2, "1"], "x", 7])
def test_zone_maps_that_no_writer_leaves_are_refused(chunked, wrong):
    rewritten(chunked.path, lambda ours, _: ours["zones"]["chunks"].__setitem__(2, wrong))
    with pytest.raises(DamagedDataError, match="zarr.json is damaged"):
        EmbeddingStore.open(chunked.path)


def test_of_very_many_nodes_rounds_tell(store, monkeypatch):
    monkeypatch.setattr("fedgfe_store.storage.zones.MOST_NODES", 3)
    nodes = [f"client {i}" for i in range(6)]
    for number, node in enumerate(nodes):
        fill(store, node=node, round=number, classes="dog cat", n=4)
    assert zones(store.path) == {
        "nodes": nodes[:3],
        "chunks": [[n, n, text] for n, text in enumerate(["1", "2", "4", None, None, None])],
    }
    opened = EmbeddingStore.open(store.path)
    assert [len(opened.select(node=node)) for node in (*nodes, "nobody")] == [8] * 6 + [0]
    assert opened.verify().sound


def test_rows_that_hold_no_record_are_never_read(store, seen):
    """Of the last granule of a commit some rows stay empty; a chunk may have no others."""
    fill(store, node="0", round=1, classes="dog", n=1)
    fill(store, node="0", round=2, classes="dog", n=5)
    assert zones(store.path)["chunks"] == [[1, 2, "1"], [2, 2, "1"]]
    seen.clear()
    assert len(EmbeddingStore.open(store.path).select(round=-1)) == 0
    assert chunks_of(seen, "round") == []


def test_the_history_is_that_of_the_commits(chunked):
    chunked.delete(node="0", round=[1, 7])
    history = chunked.history()
    assert history["nodes"].tolist() == [(node,) for node, _ in TABLE] + [("0",)]
    assert history["rounds"].tolist() == [(number,) for _, number in TABLE] + [(1, 7)]
    assert history["added"].tolist() == [8] * 6 + [0]
    assert history["deleted"].tolist() == [0] * 6 + [16]
    assert history["records"].tolist() == [8, 16, 24, 32, 40, 48, 32]
