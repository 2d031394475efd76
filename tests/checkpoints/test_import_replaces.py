"""Importing a round again: what replaces it, and whether an index still means the same sample."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import legacy
import pytest
from click.testing import CliRunner
from places import DATA

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import export_checkpoints, import_checkpoints
from fedgfe_store.cli.main import group


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write(
    folder: Path,
    samples: dict[tuple[str, str, int], int],
    *,
    round: int = 5,
    name: str | None = None,
    ids: dict[int, str] | None = None,
) -> Path:
    """Write samples by split, class and index, each with the tensors of a seed."""
    entries = []
    for (split, class_name, index), seed in samples.items():
        t5, clip = legacy.tensors(1, seed)
        made = legacy.entry(t5[0], clip[0], index, split=split, class_name=class_name)
        if ids is not None:
            made["sample_metadata"] = {"sample_id": f"{split}_{index}", "file_id": ids[seed]}
        entries.append(made)
    name = name or f"node_0_embeddings_r{round}.pt"
    return legacy.save(folder, legacy.content(entries, round=round), name)


def keys(store: Path) -> set[tuple[str, str, int]]:
    found = EmbeddingStore.open(store).select(round=5).keys()
    return {(key.split, key.class_name, key.index) for key in found}


def test_replace_puts_a_file_in_the_place_of_what_a_dead_run_left(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    first = {("train", name, i): 10 * i for name in ("dog", "cat") for i in range(3)}
    write(tmp_path, first | {("test", "dog", 0): 5})
    write(tmp_path, first, round=4)
    import_checkpoints(store, tmp_path)
    second = {("train", "dog", i): 10 * i for i in range(1, 5)}
    path = write(tmp_path, second)
    result = run("--store", store, "import", path, "--if-exists", "replace")
    assert result.exit_code == 0
    assert "removed: node_0_embeddings_r5.pt: 4 records that it does not hold" in result.output
    assert re.search(r"2 new records, 4 removed, 2 unchanged; store", result.output)
    assert keys(store) == {*second, ("test", "dog", 0)}
    made = EmbeddingStore.open(store)
    assert made.commit == 3
    assert len(made.select(round=4)) == 6
    again = run("--store", store, "import", path, "--if-exists", "replace")
    assert "removed" not in again.output
    assert EmbeddingStore.open(store).commit == 3


@pytest.mark.parametrize("if_exists", ["error", "skip"])
def test_without_replace_records_are_added_by_key(tmp_path: Path, if_exists: Any) -> None:
    store = tmp_path / "s.zarr"
    import_checkpoints(store, write(tmp_path, {("train", "dog", 0): 1}))
    path = write(tmp_path, {("train", "cat", 0): 2})
    (report,) = import_checkpoints(store, path, if_exists=if_exists).files
    assert (report.records, report.removed) == (1, 0)
    assert keys(store) == {("train", "dog", 0), ("train", "cat", 0)}


def test_two_files_of_one_round_and_split_replace_together(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    import_checkpoints(store, write(tmp_path / "old", {("train", "dog", 9): 1}))
    new = tmp_path / "new"
    write(new, {("train", "dog", 0): 2}, name="a.pt")
    write(new, {("train", "cat", 0): 3}, name="b.pt")
    report = import_checkpoints(store, new, if_exists="replace")
    assert [file.removed for file in report.files] == [1, 0]
    assert keys(store) == {("train", "dog", 0), ("train", "cat", 0)}


def test_replacing_a_text_cache_leaves_other_references(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    import_checkpoints(store, legacy.text_cache(tmp_path / "a", ["dog"])[0])
    import_checkpoints(store, legacy.text_cache(tmp_path / "b", ["cat"])[0], if_exists="replace")
    found = EmbeddingStore.open(store).select(node="text").records["class_name"]
    assert sorted(found) == ["cat", "dog"]


def test_a_file_that_fails_replaces_nothing(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    path = write(tmp_path, {("train", "dog", 0): 1})
    import_checkpoints(store, path)
    t5, clip = legacy.tensors(1)
    bad = legacy.entry(t5[0], clip[0] / 0, 1)
    legacy.save(tmp_path, legacy.content([bad]))
    for fail_fast in (True, False):
        import_checkpoints(store, path, if_exists="replace", fail_fast=fail_fast)
        assert keys(store) == {("train", "dog", 0)}


# who a sample is


def test_file_ids_have_a_column_and_come_back(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    import_checkpoints(store, write(tmp_path, {("train", "dog", 0): 1}, ids={1: "clip_17"}))
    selection = EmbeddingStore.open(store).select(file_id="clip_17")
    assert selection.records["file_id"].tolist() == ["clip_17"]
    assert "file_id" not in selection.records["extra"].iloc[0]
    for layout in ("guide", "upstream"):
        export_checkpoints(selection, tmp_path / layout, layout=layout)
        import_checkpoints(tmp_path / f"{layout}.zarr", tmp_path / layout)
        back = EmbeddingStore.open(tmp_path / f"{layout}.zarr").select()
        assert back.records["file_id"].tolist() == ["clip_17"]


def test_where_a_commit_came_from(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    import_checkpoints(store, write(tmp_path, {("train", "dog", 0): 1}))
    history = EmbeddingStore.open(store).history()
    assert history["source"].tolist() == ["import node_0_embeddings_r5.pt"]


def test_an_index_that_means_another_sample_than_in_the_round_before_is_noted(
    tmp_path: Path,
) -> None:
    store = tmp_path / "s.zarr"
    ids = {1: "f1", 2: "f2", 3: "f3"}
    places = [("train", "dog", i) for i in range(3)]
    paths = [
        write(tmp_path, dict(zip(places, seeds, strict=True)), round=number, ids=ids)
        for number, seeds in ((3, (1, 2, 3)), (4, (1, 2, 3)), (5, (2, 1, 3)))
    ]
    report = import_checkpoints(store, paths)
    assert [file.notes for file in report.files] == [
        (),
        (),
        (
            "2 of 3 indices mean another sample than in round 4, such as split train, class dog, "
            "index 0: file f2 here, f1 there",
        ),
    ]


def test_samples_without_names_are_not_compared(tmp_path: Path) -> None:
    for number in (4, 5):
        t5, clip = legacy.tensors(1, number)
        made = legacy.entry(t5[0], clip[0], sample_metadata={})
        legacy.save(
            tmp_path, legacy.content([made], round=number), f"node_0_embeddings_r{number}.pt"
        )
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    assert [file.notes for file in report.files] == [(), ()]


def test_a_store_of_the_older_format_stays_one(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(DATA / "federation_v1.zarr", store)
    t5, clip = legacy.tensors(2, 1, tokens=2)
    entries = [legacy.entry(t5[i], clip[i], i) for i in range(2)]
    entries[0]["sample_metadata"] = {"file_id": "file 7-0", "sample_id": "other"}
    path = legacy.save(tmp_path, legacy.content(entries, round=2), "node_0_embeddings_r2.pt")
    for records in (2, 0):
        report = import_checkpoints(store, path, if_exists="replace", other_experiment=True).files[
            0
        ]
        assert (report.error, report.records) == (None, records)
        assert report.notes == (
            "1 of 2 indices mean another sample than in round 1, such as split train, class dog, "
            "index 1: file f1 here, file 7-1 there",
        )
    opened = EmbeddingStore.open(store)
    assert (opened.id, opened.commit, opened.verify().sound) == (None, 12, True)
    extra = [json.loads(text) for text in opened.select(round=2).records["extra"]]
    assert [found["file_id"] for found in extra] == ["file 7-0", "f1"]
