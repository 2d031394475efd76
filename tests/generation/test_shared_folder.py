"""Two experiments and one folder of images: neither takes the other's place unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, values
from generation_fakes import SIZE, FakePipeline
from pictures import provenance_of

from fedgfe_store import EmbeddingStore, Metadata
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.images.identity import Identity
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.images.png import write_png
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name

SETTINGS = {"steps": 2, "height": SIZE, "width": SIZE, "batch_size": 2}
PIXELS = np.full((SIZE, SIZE, 3), 99, np.uint8)


def make_store(path: Path, experiment: str | None, *, node: int = 0, n: int = 4) -> EmbeddingStore:
    """Make a store of `n` records, whose embeddings are its own."""
    schema = replace(SMALL, metadata=Metadata(experiment=experiment))
    store = EmbeddingStore.create(path, schema)
    with store.append(node=node, round=5) as batch:
        tensors = values(n, seed=sum(map(ord, path.name)))
        batch.add(split="train", class_name="dog", index=range(n), **tensors)
    return store


@pytest.fixture
def ours(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "ours.zarr", "first")


@pytest.fixture
def theirs(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "theirs.zarr", "second")


def render(store: EmbeddingStore, flux: Path, folder: Path, **options: Any) -> GenerationReport:
    pipeline = FakePipeline(flux)
    return generate(store.select(), folder, pipeline=pipeline, **{**SETTINGS, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_images_and_manifest_name_the_experiment(
    flux: Path, ours: EmbeddingStore, tmp_path: Path
) -> None:
    render(ours, flux, tmp_path / "out")
    found = [provenance_of(path) for path in (tmp_path / "out").glob("*.png")]
    for facts in (*found, *read_manifest(tmp_path / "out")):
        assert facts["experiment"] == "first"
        assert Identity.of_image(facts) == Identity.of_store(ours.select())


@pytest.mark.parametrize("on_stale", ["error", "regenerate"])
def test_another_experiments_images_are_refused_with_both_names(
    flux: Path, ours: EmbeddingStore, theirs: EmbeddingStore, tmp_path: Path, on_stale: str
) -> None:
    render(theirs, flux, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConflictError) as refused:
        render(ours, flux, tmp_path / "out", on_stale=on_stale)
    message = str(refused.value)
    assert "4 files: images of experiment second, not of experiment first" in message
    assert "--replace-others" in message
    assert contents(tmp_path / "out") == before
    report = render(ours, flux, tmp_path / "out", on_stale="keep")
    assert (report.done, report.plan.kept) == (0, 4)
    assert contents(tmp_path / "out") == before
    assert render(ours, flux, tmp_path / "out", replace_others=True).done == 4
    assert render(ours, flux, tmp_path / "out").skipped == 4
    status = image_status(theirs.select(), tmp_path / "out")
    assert status.totals["stale"] == 4
    assert set(status.frame["reason"]) == {"images of experiment first, not of experiment second"}


def test_the_command_says_how_to_mean_it(
    flux: Path, ours: EmbeddingStore, theirs: EmbeddingStore, tmp_path: Path
) -> None:
    render(theirs, flux, tmp_path / "out")
    size = ["--height", str(SIZE), "--width", str(SIZE), "--steps", "2", "--device", "cpu"]
    command = ["--store", str(ours.path), "generate", "--model", str(flux), *size, "--dry-run"]
    command += ["--output-dir", str(tmp_path / "out")]
    refused = CliRunner().invoke(group, command)
    assert refused.exit_code == 1
    assert "images of experiment second, not of experiment first" in refused.stderr
    meant = CliRunner().invoke(group, [*command, "--replace-others"])
    assert meant.exit_code == 0, meant.output
    assert "4 out of date" in meant.stdout


def test_a_folder_with_others_images_beside_is_noticed(
    flux: Path, ours: EmbeddingStore, tmp_path: Path
) -> None:
    theirs = make_store(tmp_path / "theirs.zarr", "second", node=1)
    render(theirs, flux, tmp_path / "out")
    remarks: list[str] = []
    assert render(ours, flux, tmp_path / "out", report=remarks.append).done == 4
    assert remarks == [
        f"{tmp_path / 'out'} holds images of experiment second, too: this is experiment first"
    ]
    assert render(theirs, flux, tmp_path / "out").skipped == 4


@pytest.mark.parametrize("names", [("first", None), (None, "second"), (None, None)])
def test_stores_without_a_name_are_told_apart_by_their_ids(
    flux: Path, tmp_path: Path, names: tuple[str | None, str | None]
) -> None:
    one, other = (make_store(tmp_path / f"{n}.zarr", name) for n, name in enumerate(names))
    render(one, flux, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConflictError, match="--replace-others") as refused:
        render(other, flux, tmp_path / "out")
    for store, name in zip((one, other), names, strict=True):
        named = f"of experiment {name}" if name else f"of store {(store.id or '')[:12]}"
        assert named in str(refused.value)
    assert contents(tmp_path / "out") == before
    # The same records in a store that was made again: the images are what they should be.
    (tmp_path / "again").mkdir()
    again = make_store(tmp_path / "again" / "0.zarr", names[0])
    assert again.id != one.id
    assert render(again, flux, tmp_path / "out").skipped == 4


def test_a_store_that_moved_is_the_same(flux: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "0.zarr", None)
    render(store, flux, tmp_path / "out")
    store.path.rename(tmp_path / "moved.zarr")
    moved = EmbeddingStore.open(tmp_path / "moved.zarr")
    with moved.append(node=0, round=5, if_exists="replace") as batch:
        tensors = {name: array[0] for name, array in values(1, seed=7).items()}
        batch.add(split="train", class_name="dog", index=0, **tensors)
    assert render(moved, flux, tmp_path / "out").done == 1


def test_images_of_before_are_as_before(flux: Path, ours: EmbeddingStore, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    render(ours, flux, folder)
    manifest = (folder / "manifest.jsonl").read_text().splitlines()
    for line in map(json.loads, manifest):
        facts = provenance_of(folder / line["file"])
        assert facts is not None
        older = {k: v for k, v in facts.items() if k not in ("experiment", "store_id")}
        write_png(folder / line["file"], PIXELS, older)
    assert render(ours, flux, folder).skipped == 4
    other = make_store(tmp_path / "other.zarr", "second")
    assert render(other, flux, folder).done == 4


def test_stores_are_told_apart_by_name_else_by_id() -> None:
    named, other = Identity("first", "a"), Identity("second", "a")
    assert named.is_another(other)
    assert not named.is_another(Identity("first", "b"))
    assert Identity("first", "a").is_another(Identity(None, "b"))
    assert Identity(None, "a").is_another(Identity(None, "b"))
    assert not Identity(None, "a").is_another(Identity("first", "a"))
    assert not Identity("first").is_another(Identity())
    assert not Identity(None, "a").is_another(Identity("first"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"experiment": "second"}, "images of experiment second, not of experiment first"),
        ({"fingerprint": "other", "settings": {"steps": 9}}, "steps 9 -> 2"),
    ],
)
def test_what_another_run_puts_there_meanwhile_is_not_replaced(
    flux: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    ours = make_store(tmp_path / "ours.zarr", "first", n=8)
    folder, last = tmp_path / "out", ours.select().keys()[7]
    path = folder / image_name(last)

    class Meanwhile(FakePipeline):
        """Another run makes the last image while this one makes the first."""

        def denoise(self, *args: Any, **options: Any) -> Any:
            if not self.batch_sizes:
                render(ours, flux, tmp_path / "other")
                facts = provenance_of(tmp_path / "other" / path.name)
                assert facts is not None
                settings = {**facts["settings"], **change.get("settings", {})}
                write_png(path, PIXELS, {**facts, **change, "settings": settings})
            return super().denoise(*args, **options)

    folder.mkdir()
    options: dict[str, Any] = {**SETTINGS, "batch_size": 1, "pipeline": Meanwhile(flux)}
    report = generate(ours.select(), folder, **options)
    assert (report.done, len(report.failed)) == (7, 1)
    assert reason in report.failed[0].reason
    facts = provenance_of(path)
    assert facts is not None
    assert all(facts[name] == value for name, value in change.items() if name != "settings")
