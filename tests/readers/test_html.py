"""What notebooks show of stores and selections: true counts, bounded, and nothing that runs."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import fill, values
from places import DATA

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.errors import DamagedDataError, SchemaMismatchError
from fedgfe_store.storage import key_files
from fedgfe_store.storage.snapshot import Snapshot

EVIL = ["<script>alert('x')</script>", 'a"b/ü & <b>', "x" * 300, "<img src=x onerror=alert(1)>"]


class Page(HTMLParser):
    """The table's rows, the facts, every tag and every attribute of an HTML text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "dt":
            self.facts[""] = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "dt":
            self.label = self.facts.pop("")
            self.facts[self.label] = ""

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif "dt" in self.open:
            self.facts[""] += data
        elif "dd" in self.open:
            self.facts[self.label] += data


def show(shown) -> Page:
    return Page(shown._repr_html_())


def test_a_store_shows_its_counts_and_facts(tmp_path):
    metadata = Metadata(experiment="vegas", model="tiny")
    schema = Schema.flux(3, width=8, clip=(4,), granule=4, precision="bfloat16", metadata=metadata)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    for node, rounds in ((10, (1, 2)), (9, (1,)), ("server", (1, 2, 3))):
        for number in rounds:
            fill(store, node=node, round=number)
    page = show(EmbeddingStore.open(store.path, as_of=5))
    assert page.rows == [
        ["round", "9", "10", "server", "all"],
        ["1", "6", "6", "6", "18"],
        ["2", "0", "6", "6", "12"],
        ["all", "6", "12", "12", "30"],
    ]
    moment = store.history()["time"].iloc[4]
    files = [file.stat().st_size for file in store.path.rglob("*") if file.is_file()]
    expected = {
        "experiment": "vegas",
        "records": "30, 3.4 kB as float32",
        "on disk": f"{sum(files) / 1000:.1f} kB in {len(files)} files",
        "kind": "flux: t5 [3, 8], clip [4]",
        "precision": "bfloat16",
        "commit": f"5 of 6, {moment:%Y-%m-%d %H:%M} UTC",
        "model": "tiny",
        "rounds": "1, 2",
        "nodes": "9, 10, server",
        "splits": "train 30",
        "classes": "cat 15dog 15",
    }
    assert page.facts == expected


def test_a_selection_shows_its_own(store):
    for number in (1, 5):
        fill(store, node=0, round=number)
    page = show(store.select(round=5, class_name=["dog"], per_class=2))
    assert page.facts["filters"] == "round=[5], class_name=['dog'], per_class=2"
    assert page.facts["classes"] == "dog 2"
    assert "on disk" not in page.facts
    assert page.rows == [["round", "0", "all"], ["5", "2", "2"], ["all", "2", "2"]]
    assert "taken by position" in show(store.select().take([0, 3])).facts["filters"]
    assert show(store.select()).facts["filters"] == "none: all records"


def test_nothing_in_it_runs_or_is_fetched(tmp_path):
    metadata = Metadata(experiment=EVIL[0], model=EVIL[3])
    schema = Schema.flux(1, width=2, clip=(2,), granule=4, metadata=metadata)
    store = EmbeddingStore.create(tmp_path / "<b>s&.zarr", schema)
    with store.append(node='"><script>', round=0) as batch:
        for name in EVIL:
            batch.add(split="<i>", class_name=name, index=0, **values(1, schema=schema))
    for shown in (store, store.select(class_name=EVIL[0], split="<i>")):
        html = shown._repr_html_()
        page = Page(html)
        assert set(page.tags) <= {
            "div", "style", "b", "code", "dl", "dt", "dd", "span",
            "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
        }  # fmt: skip
        assert {name for name, _ in page.attributes} <= {"class", "style", "title"}
        assert not re.search(r"https?:|url\(|@import|<link", html)
        assert EVIL[0] in page.facts["classes"]
    page = show(store)
    assert page.facts["experiment"] == EVIL[0]
    assert EVIL[1] in page.facts["classes"]
    assert ("title", EVIL[2]) in page.attributes
    assert EVIL[2] not in page.facts["classes"]
    assert page.rows[0][1] == '"><script>'


def test_a_big_store_is_shown_in_part(tmp_path):
    schema = Schema.flux(1, width=1, clip=(1,), granule=1024)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    nodes = [*range(40), "server"]
    ones = {"t5": np.ones((41 * 50, 1, 1), np.float32), "clip": np.ones((41 * 50, 1), np.float32)}
    with store.append(round=0) as batch:
        batch.add(
            round=[number for number in range(50) for _ in nodes],
            node=nodes * 50,
            split="train",
            class_name=[f"class {i:02}" for i in range(41)] * 50,
            index=0,
            **ones,
        )
    page = show(store)
    assert len(page.rows) == 1 + 20
    assert {len(row) for row in page.rows} == {1 + 12}
    assert page.rows[0] == ["round", *"012345678", "…", "server", "all"]
    assert [row[0] for row in page.rows[1:]] == [
        *map(str, range(9)), "…", *map(str, range(41, 50)), "all"
    ]  # fmt: skip
    assert page.rows[-1] == ["all", *["50"] * 9, "…", "50", "2,050"]
    assert page.rows[1] == ["0", *["1"] * 9, "…", "1", "41"]
    assert "32 rounds not shown, 31 nodes not shown" in store._repr_html_()
    assert page.facts["classes"].endswith("and 17 more")
    assert len(store._repr_html_()) < 30_000


@pytest.mark.slow
def test_many_rounds_by_many_nodes_are_not_spread_out(tmp_path):
    schema = Schema.flux(1, width=1, clip=(1,), granule=4096)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    n = 20_000  # a table of all of them would have 400 million cells
    with store.append() as batch:
        batch.add(round=range(0, 2 * n, 2), node=range(n), split="train", class_name="dog", index=0,
                  t5=np.ones((n, 1, 1), np.float32), clip=np.ones((n, 1), np.float32))  # fmt: skip
    page = show(store)
    assert page.rows[-1][-1] == "20,000"
    assert page.facts["rounds"].startswith("0, 2, 4,")
    assert len(page.facts["rounds"]) < 150
    assert page.facts["nodes"] == "0-19999"


def test_an_empty_store_and_an_empty_selection(store):
    page = show(store)
    assert page.rows == []
    assert page.facts["records"] == page.facts["commit"] == "0"
    fill(store, node=0, round=1)
    page = show(store.select(round=2))
    assert (page.rows, page.facts["records"]) == ([], "0")


def test_a_class_without_a_name_is_seen(tmp_path):
    """As old stores may have one, which new records cannot."""
    path = tmp_path / "old.zarr"
    shutil.copytree(DATA / "federation_v1.zarr", path)
    store = EmbeddingStore.open(path)
    assert isinstance(store.snapshot, Snapshot)
    column = store.snapshot.group.key_columns["class_name"]
    nameless = store.snapshot.column("class_name").copy()
    nameless[:] = ""
    file = key_files.key_file(path, "class_name", 0)
    file.write_bytes(key_files.encode(column, nameless).contents)
    assert show(EmbeddingStore.open(path)).facts["classes"] == "(empty) 13"


def test_damaged_key_columns_raise(store):
    fill(store, node=0, round=1)
    (store.path / "class_name" / "c.0").unlink()
    with pytest.raises(DamagedDataError, match="class_name"):
        EmbeddingStore.open(store.path)._repr_html_()


def test_counts_of_a_selection(store):
    for number in (1, 5):
        fill(store, node=0, round=number)
    fill(store, node="server", round=5, n=1)
    counts = store.select(class_name="dog").counts("round", "node")
    assert counts.to_dict() == {(1, "0"): 3, (5, "0"): 3, (5, "server"): 1}
    assert store.select().counts("class_name").to_dict() == {"cat": 7, "dog": 7}
    assert store.select(round=9).counts("round").to_dict() == {}
    for names in ((), ("nod",), ("node", "node")):
        with pytest.raises(SchemaMismatchError, match="counts: expected some of node, round"):
            store.select().counts(*names)
