"""Sweeps: each cell is a run of its own, and sheets put cells side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import SMALL, fill
from generation_fakes import SIZE as PIXELS
from PIL import Image

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation import run, sweep
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import generate
from fedgfe_store.images.arrange import arrange
from fedgfe_store.images.folder import ImageFolder

SIZE: dict[str, Any] = {"height": PIXELS, "width": PIXELS, "device": "cpu", "batch_size": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EmbeddingStore:
    made = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "embeddings.zarr", SMALL)
    fill(made, node=0, round=5, classes="dog cat", n=1)
    return made


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def swept(store, flux, tmp_path_factory) -> tuple[Path, list[Any]]:
    """A sweep of four cells, and the models that were loaded for it."""
    folder = tmp_path_factory.mktemp("out") / "sweep"
    loaded = []

    def counted(of: Any, report: Any) -> Any:
        loaded.append(of.plan.settings.model)
        return sweep_load(of, report)

    sweep_load = run.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "load_model", counted)
        runs = sweep.prepare_cells(
            store.select(),
            folder,
            Request(model=str(flux), **SIZE),
            axes={"steps": [1, 2], "seed": range(2)},
        )
        done = list(sweep.render_cells(runs))
    assert [report.done for report in done] == [2] * 4
    return folder, loaded


def test_each_cell_is_a_run_of_its_own(swept, store, flux, tmp_path):
    folder, loaded = swept
    assert sorted(each.name for each in folder.iterdir()) == [
        "steps-1_seed-0",
        "steps-1_seed-1",
        "steps-2_seed-0",
        "steps-2_seed-1",
    ]
    assert len(loaded) == 1
    request = Request(model=str(flux), **SIZE)
    generate(store.select(), tmp_path / "one", request, steps=2, seed=1)
    wanted, found = pixels(tmp_path / "one"), pixels(folder / "steps-2_seed-1")
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    first = next(iter(wanted))
    other = pixels(folder / "steps-2_seed-0")[first]
    assert not np.array_equal(found[first], other)
    again = generate(store.select(), folder / "steps-2_seed-1", request, steps=2, seed=1)
    assert (again.done, again.skipped) == (0, 2)


def test_images_of_cells_are_arranged_by_their_settings(swept):
    folder, _ = swept
    images = [i for each in sorted(folder.iterdir()) for i in ImageFolder.scan(each).select()]
    sheet = arrange(images, rows=["class_name"], columns=["steps", "seed"])
    assert sheet.columns == ((1, 0), (1, 1), (2, 0), (2, 1))
    assert sheet.missing == 0
    cell = sheet.cells[("dog",), (2, 1)]
    assert cell.folder.name == "steps-2_seed-1"
    by_steps = arrange(images, rows=["class_name"], columns=["steps"])
    # One seed for all cells, and the title says which.
    assert {cell.setting("seed") for cell in by_steps.cells.values()} == {0}
    assert "seed 0" in by_steps.title
    assert "steps-" not in by_steps.title + by_steps.caption(by_steps.cells[("dog",), (1,)])
    one = arrange(ImageFolder.scan(folder / "steps-1_seed-0").select(), columns=["round"])
    assert "seed" not in one.title
    with pytest.raises(SchemaMismatchError, match="columns: expected some of node"):
        arrange(images, columns=["colour"])


def invoke(store: EmbeddingStore, *words: Any) -> Result:
    return CliRunner().invoke(group, ["--store", str(store.path), *map(str, words)])


def test_the_command(swept, store, flux, tmp_path):
    folder, _ = swept
    words = [
        "--model",
        flux,
        "--height",
        PIXELS,
        "--width",
        PIXELS,
        "--device",
        "cpu",
        "--batch-size",
        2,
    ]
    asked = ["sweep", *words, "--steps", "1-2", "--seed", "0,1", "--output-dir"]
    done = invoke(store, *asked, folder)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("0 images rendered, 2 were there already") == 4
    done = invoke(store, *asked, tmp_path / "plan", "--dry-run")
    assert done.stdout.count("to render: 2") == 4
    assert not (tmp_path / "plan").exists()
    sheet = tmp_path / "sheet.png"
    done = invoke(store, "sheet", "--input-dir", folder, "--rows", "seed", "--columns", "steps",
               "--class", "dog", "--output", sheet)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "2 rows, 2 columns, 4 pictures, 0 missing" in done.stdout
    assert sheet.is_file()
    done = invoke(store, "sweep", *words)
    assert done.exit_code == 2
    assert "expected several values of --model" in done.stderr
    assert invoke(store, "sweep", "--guidance", "1,x").exit_code == 2


def test_mistakes_are_named(flux, tmp_path):
    twin = tmp_path / flux.name
    twin.symlink_to(flux)
    request = Request()
    for axes, what in (
        ({"height": [16]}, "expected axes of model, steps, guidance, seed"),
        ({"steps": []}, "steps: expected values, each once"),
        ({"seed": [1, 1]}, "seed: expected values, each once"),
        ({"model": [str(flux), str(twin)]}, "expected models whose names differ"),
        ({"steps": [0]}, "steps: expected at least 1"),
    ):
        with pytest.raises(SchemaMismatchError, match=what):
            sweep.cells(tmp_path, request, axes)
    (only,) = sweep.cells(tmp_path, request, {"guidance": [3.5], "model": ["a/b"]})
    assert only.name == "model-a-b_guidance-3.5"
