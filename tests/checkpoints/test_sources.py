"""Checkpoint files as names for records: exactly theirs, whether the files are there or not."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import legacy
import pytest
from conftest import SMALL, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import (
    Sources,
    find_checkpoints,
    find_new,
    import_checkpoints,
    read_checkpoint,
    select_records,
)
from fedgfe_store.errors import NotFoundError, SchemaMismatchError

NODES = ("0", "1", "4", "5", "10", "server")
ROUNDS = (0, 1, 5, 11, 15)
PATTERNS = (
    "*.pt",
    "node_[0-4]*.pt",
    "node_[5-9]*.pt",
    "*_r1.pt",
    "*_r?.pt",
    "node_1_*",
    "s*",
    "*.x",
)


def name_of(node: str, round: int) -> str:
    return f"{'server' if node == 'server' else f'node_{node}'}_embeddings_r{round}.pt"


def origins(selection) -> set[tuple[str, int]]:
    return {(key.node, key.round) for key in selection.keys()}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> EmbeddingStore:
    """A store of every node at every round, two records each, that training wrote itself."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("full") / "embeddings.zarr", SMALL)
    for node in NODES:
        for number in ROUNDS:
            fill(store, node=node, round=number, n=1)
    return store


pairs = st.sets(st.tuples(st.sampled_from(NODES), st.sampled_from(ROUNDS)))


@settings(max_examples=50)
@given(wanted=pairs.filter(len))
def test_named_files_stand_for_exactly_their_nodes_and_rounds(full, wanted):
    files = tuple(full.path.parent / name_of(*origin) for origin in wanted)
    selection = select_records(full, Sources(files))
    assert origins(selection) == wanted
    assert len(selection) == 2 * len(wanted)
    dogs = select_records(full, Sources(files), class_name="dog")
    assert origins(dogs) == wanted
    assert {key.class_name for key in dogs.keys()} == {"dog"}
    assert len(dogs) == len(wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_the_files_that_a_shell_would_find(full, tmp_path, pattern):
    """Judged by real files of those names."""
    for node in NODES:
        for number in ROUNDS:
            (tmp_path / name_of(node, number)).touch()
    found = {os.path.basename(name) for name in glob.glob(f"{tmp_path}/{pattern}")}
    expected = {(n, r) for n in NODES for r in ROUNDS if name_of(n, r) in found}
    sources = Sources(folder=full.path.parent, pattern=pattern)
    if not expected:
        with pytest.raises(NotFoundError, match=r"no file matches .* no record of such a file"):
            select_records(full, sources)
    else:
        assert origins(select_records(full, sources)) == expected
    assert {p.name for p in Sources(folder=tmp_path, pattern=pattern).present()} == found


def test_records_come_in_the_stores_order(full):
    rows = [(key.node, key.round) for key in full.select(round=[15, 1]).keys()]
    files = [name_of(n, r) for r in (15, 1) for n in reversed(NODES)]
    selection = select_records(full, Sources(tuple(full.path.parent / f for f in files)))
    assert [(key.node, key.round) for key in selection.keys()] == rows


def test_per_class_and_an_older_commit(full):
    files = (full.path.parent / name_of("1", 5), full.path.parent / name_of("server", 0))
    assert len(select_records(full, Sources(files), per_class=1)) == 4
    past = EmbeddingStore.open(full.path, as_of=2)
    assert origins(select_records(past, Sources((full.path.parent / name_of("0", 1),)))) == {
        ("0", 1)
    }
    with pytest.raises(NotFoundError, match="node_1_embeddings_r5"):
        select_records(past, Sources(files))


def taken_in(folder: Path) -> EmbeddingStore:
    path = folder / "embeddings.zarr"
    assert not import_checkpoints(path, folder, new_only=True).failed
    return EmbeddingStore.open(path)


@pytest.mark.parametrize("there", [True, False])
def test_a_file_of_another_name_stands_for_what_it_says(tmp_path, there):
    legacy.node_file(tmp_path, 0, 5, n=1)
    path, _ = legacy.node_file(tmp_path, 3, 7, n=2)
    other = path.rename(tmp_path / "checkpoint.pt")
    store = taken_in(tmp_path)
    if not there:
        other.unlink()
    assert origins(select_records(store, Sources((other,)))) == {("3", 7)}
    for pattern, expected in {"check*": {("3", 7)}, "*_r5.pt": {("0", 5)},
                              "*.pt": {("3", 7), ("0", 5)}}.items():  # fmt: skip
        sources = Sources(folder=tmp_path, pattern=pattern)
        assert origins(select_records(store, sources)) == expected


def test_a_file_whose_content_differs_from_its_name_stands_for_its_content(tmp_path):
    path, _ = legacy.node_file(tmp_path, 3, 5, n=1)
    renamed = path.rename(tmp_path / "node_0_embeddings_r5.pt")
    legacy.node_file(tmp_path / "more", 0, 5, n=1)
    store = taken_in(tmp_path)
    assert origins(select_records(store, Sources((renamed,)))) == {("3", 5)}
    import_checkpoints(store.path, tmp_path / "more")
    store.refresh()
    assert origins(select_records(store, Sources((renamed,)))) == {("3", 5)}


@pytest.mark.parametrize("number", [-1, None])
def test_a_file_that_does_not_know_its_round_stands_for_that_of_its_name(tmp_path, number):
    """Training without a round wrote -1 into a file that it named r0."""
    t5, clip = legacy.tensors(1)
    value = legacy.content([legacy.entry(t5[0], clip[0])], round=number)
    path = legacy.save(tmp_path, value, "node_0_embeddings_r0.pt")
    assert read_checkpoint(path).round == 0
    store = taken_in(tmp_path)
    path.unlink()
    assert origins(select_records(store, Sources((path,)))) == {("0", 0)}


def test_what_failed_is_left_out(tmp_path):
    for node in (0, 1, 2):
        legacy.node_file(tmp_path, node, n=1)
    (tmp_path / "node_2_embeddings_r5.pt").rename(tmp_path / "checkpoint.pt")
    store = taken_in(tmp_path)
    legacy.node_file(tmp_path, 1, n=1, seed=1)
    path, _ = legacy.node_file(tmp_path, 2, n=1, seed=1)
    path.rename(tmp_path / "checkpoint.pt")
    sources = Sources(folder=tmp_path)
    assert [file.name for file in find_new(store.path, sources)] == [
        "checkpoint.pt",
        "node_1_embeddings_r5.pt",
    ]
    report = import_checkpoints(store.path, sources.present(), new_only=True)
    assert len(report.failed) == 2
    assert origins(select_records(store, sources, failed=report.failed)) == {("0", 5)}


def test_text_caches_and_hidden_files_are_no_checkpoints(tmp_path):
    legacy.node_file(tmp_path, n=1)
    legacy.text_cache(tmp_path)
    (tmp_path / ".hidden.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    names = [path.name for path in Sources(folder=tmp_path).present()]
    assert names == ["node_0_embeddings_r5.pt"]
    import_checkpoints(tmp_path / "embeddings.zarr", tmp_path / names[0])
    assert len({path.name for path in tmp_path.glob(".embeddings*")}) == 3  # ledger and two locks
    everything = [path.name for path in Sources(folder=tmp_path, pattern="*").present()]
    assert everything == ["node_0_embeddings_r5.pt"]
    assert [path.name for path in find_checkpoints(tmp_path, pattern="*_r*")] == names
    hidden = Sources(folder=tmp_path, pattern=".hid*")
    assert [path.name for path in hidden.present()] == [".hidden.pt"]


def test_the_store_lies_among_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Sources((Path("checkpoint.pt"),)).store_path == Path("embeddings.zarr")
    assert Sources((Path("a/x.pt"), tmp_path / "a" / "y.pt")).store_path.parent.name == "a"
    assert Sources(folder=Path("a/b/")).store_path == Path("a/b/embeddings.zarr")
    for sources in (Sources((Path("a/x.pt"), Path("b/x.pt"))), Sources()):
        with pytest.raises(SchemaMismatchError, match="expected files of one folder, got"):
            _ = sources.store_path


def test_what_is_not_there_is_named(full, tmp_path):
    sources = Sources((tmp_path / "node_9_embeddings_r1.pt",))
    with pytest.raises(NotFoundError, match=r"r1\.pt: no such file, and no record of it in .*zarr"):
        select_records(full, sources)
    with pytest.raises(NotFoundError, match=r"r1\.pt: no such file, and no embedding store at"):
        sources.open_store(tmp_path / "embeddings.zarr")
    legacy.node_file(tmp_path / "outer" / "experiment1", n=1)
    outer = Sources(folder=tmp_path / "outer")
    with pytest.raises(NotFoundError, match=r"but in its folders experiment1: name one"):
        outer.open_store(outer.store_path)
    with pytest.raises(NotFoundError, match=r"nowhere: no such folder, and no embedding store at"):
        Sources(folder=tmp_path / "nowhere").open_store(tmp_path / "embeddings.zarr")
