"""Checkpoints of two experiments do not get into one store unless that is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import legacy
import pytest
import torch
from click.testing import CliRunner

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError

T5, CLIP = torch.ones(17, 4096), torch.ones(768)


def node_file(folder: Path, images: str | None, node: int = 0, round: int = 1) -> Path:
    """Write a file whose images lie in ``output_images/IMAGES``; None: nobody knows where."""
    path = None if images is None else f"/home/x/output_images/{images}/a.png"
    entry = legacy.entry(T5, CLIP, image_path=path, class_name=f"c{node}")
    name = f"node_{node}_embeddings_r{round}.pt"
    return legacy.save(folder, legacy.content([entry], node, round), name)


def server_file(folder: Path, round: int = 1) -> Path:
    value = legacy.content([legacy.stack(T5[None], CLIP[None])], "server", round)
    return legacy.save(folder, value, f"server_embeddings_r{round}.pt")


def made(path: Path, experiment: str | None) -> EmbeddingStore:
    return EmbeddingStore.create(path, Schema.flux(17, metadata=Metadata(experiment)))


def taken(store: Path, *paths: Path, **options: Any) -> int:
    report = import_checkpoints(store, paths, **options)
    assert [file.error for file in report.failed] == []
    return report.records


def test_another_experiment_is_refused_with_both_names(tmp_path: Path) -> None:
    first, second, store = tmp_path / "run1", tmp_path / "run2", tmp_path / "s.zarr"
    node_file(first, "vegas")
    for node in (1, 2):
        node_file(second, "esc50", node)
    assert taken(store, first) == 1
    words = ["--store", str(store), "import", str(second)]
    result = CliRunner().invoke(group, words)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "of the experiment 'esc50', by the folder of its images, but" in result.stderr
    assert "holds 'vegas'" in result.stderr
    assert "--other-experiment" in result.stderr
    assert (EmbeddingStore.open(store).commit, len(EmbeddingStore.open(store))) == (1, 1)
    assert CliRunner().invoke(group, [*words, "--other-experiment"]).exit_code == 0
    assert len(EmbeddingStore.open(store)) == 3


def test_two_experiments_in_one_command_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    node_file(tmp_path / "experiment1", None)
    node_file(tmp_path / "experiment2", None, 1)
    folders = [tmp_path / "experiment1", tmp_path / "experiment2"]
    with pytest.raises(ConflictError, match="'experiment2', by the folder of its checkpoints"):
        import_checkpoints(tmp_path / "s.zarr", folders)
    assert not (tmp_path / "s.zarr").exists()
    assert taken(tmp_path / "s.zarr", *folders, other_experiment=True) == 2


def test_one_odd_file_of_a_folder_fails_alone(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for node, images in enumerate(("vegas", "esc50", "vegas")):
        node_file(folder, images, node)
    report = import_checkpoints(tmp_path / "s.zarr", folder)
    assert [file.records for file in report.files] == [1, 0, 1]
    assert "'esc50'" in (report.files[1].error or "")


def test_the_same_folder_passes_again_and_as_it_grows(tmp_path: Path) -> None:
    folder, store = tmp_path / "run7", tmp_path / "s.zarr"
    node_file(folder, "vegas")
    server_file(folder)
    assert taken(store, folder) == 2
    assert taken(store, folder) == 0
    assert taken(store, server_file(folder, 2)) == 1  # a file without images, by itself
    assert taken(store, node_file(folder, "vegas", 3), new_only=True) == 1
    legacy.text_cache(folder)
    assert taken(store, folder) == 2


def test_a_store_named_by_its_folder_takes_that_folder(tmp_path: Path) -> None:
    folder, store = tmp_path / "experiment1", tmp_path / "s.zarr"
    assert taken(store, server_file(folder)) == 1
    assert EmbeddingStore.open(store).schema.metadata.experiment == "experiment1"
    assert taken(store, node_file(folder, "vegas-10n")) == 1


@pytest.mark.parametrize("name", [None, "embeddings", "checkpoints"])
def test_a_store_without_a_name_of_its_own_takes_all(tmp_path: Path, name: str | None) -> None:
    made(tmp_path / "s.zarr", name)
    assert taken(tmp_path / "s.zarr", node_file(tmp_path / "run1", "vegas")) == 1
    assert taken(tmp_path / "s.zarr", node_file(tmp_path / "run2", None, 1)) == 1


def test_a_folder_without_a_name_of_its_own_goes_anywhere(tmp_path: Path) -> None:
    made(tmp_path / "s.zarr", "vegas")
    assert taken(tmp_path / "s.zarr", server_file(tmp_path / "checkpoints" / "embeddings")) == 1


def test_a_folder_that_was_used_again_by_another_experiment_is_refused(tmp_path: Path) -> None:
    folder, store = tmp_path / "embeddings", tmp_path / "s.zarr"
    node_file(folder, "vegas")
    taken(store, folder)
    shutil.rmtree(folder)
    node_file(folder, "esc50", round=2)
    report = import_checkpoints(store, folder, new_only=True)
    assert "'esc50'" in (report.files[0].error or "")
