"""A family that a file declares: through a whole run, and in what an image says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from pictures import provenance_of
from PIL import Image
from tiny_families import direct, records

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.generation.stopping import Stop
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Placement
from fedgfe_store.names import image_name

SIZE = 32
NAME = "flux-dev"
DECLARED = """
[mine]
title = "Of this laboratory"
pipelines = ["FluxPipeline"]
latents = "own"
step = 2
size = 2
features = ["num_attention_heads", "attention_head_dim"]
blocks = ["num_layers", "num_single_layers"]
[mine.columns]
prompt_embeds = { is = "sequence", width = "joint_attention_dim" }
pooled_prompt_embeds = { is = "vector", width = "pooled_projection_dim" }
[mine.defaults]
steps = 2
guidance = 3.5
"""

Families = Callable[[str], Path]


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(DECLARED)
    return file


@pytest.fixture
def columns() -> dict[str, NDArray[Any]]:
    return records(NAME, 3, 3)


@pytest.fixture
def store(tmp_path: Path, columns: dict[str, NDArray[Any]]) -> EmbeddingStore:
    shapes: dict[str, Any] = {name: values.shape[1:] for name, values in columns.items()}
    store = EmbeddingStore.create(tmp_path / "e.zarr", Schema.of("mine", **shapes))
    with store.append(node=0, round=1) as batch:
        batch.add(split="train", class_name="dog", index=range(3), **columns)
    return store


def make(
    store: EmbeddingStore, model: Path, declared: Path, folder: Path, **options: Any
) -> GenerationReport:
    asked: dict[str, Any] = {"height": SIZE, "width": SIZE, "device": "cpu", **options}
    if "pipeline" not in asked:
        asked |= {"model": str(model), "family": str(declared)}
    return generate(store.select(), folder, **asked)


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.slow
def test_a_pipeline_that_decodes_itself_goes_through_a_whole_run(
    tiny_model: Families,
    declared: Path,
    store: EmbeddingStore,
    columns: dict[str, NDArray[Any]],
    tmp_path: Path,
) -> None:
    model, selection = tiny_model(NAME), store.select()
    wanted = []
    for i, key in enumerate(selection.keys()):
        row = {n: v[i : i + 1] for n, v in columns.items()}
        wanted += direct(model, NAME, row, [seed_of(0, key)], steps=2, guidance=3.5, size=SIZE)
    paths = [tmp_path / "out" / image_name(key) for key in selection.keys()]

    class Stops(DiffusersImages):
        """Is asked to stop at the third step of all: between the two of the second image."""

        steps, stop = 0, Stop()

        def denoise(self, *given: Any, on_step: Any = list, **more: Any) -> Any:
            def step() -> None:
                self.steps += 1
                if self.steps == 3:
                    self.stop.request("SIGTERM")
                on_step()

            return super().denoise(*given, on_step=step, **more)

    own = resolve_model(str(model), declared=declared)
    stops = Stops.load(own, Placement("float32", "cpu"))
    stopped = make(
        store, model, declared, tmp_path / "out", pipeline=stops, batch_size=1, stop=stops.stop
    )
    assert (stopped.done, stopped.left, stopped.stopped, stops.steps) == (1, 2, "SIGTERM", 3)
    rest = make(store, model, declared, tmp_path / "out", batch_size=1)
    assert (rest.done, rest.skipped, rest.failed) == (2, 1, ())
    for path, image in zip(paths, wanted, strict=True):
        np.testing.assert_array_equal(pixels(path), image)
    assert make(store, model, declared, tmp_path / "out").done == 0

    # A batch that is too large for the memory goes on in halves.
    class Short(DiffusersImages):
        sizes: list[int] = []  # noqa: RUF012

        def denoise(self, embeddings: Any, seeds: Any, *rest: Any, **more: Any) -> torch.Tensor:
            self.sizes.append(len(seeds))
            if len(seeds) > 2:
                raise torch.OutOfMemoryError("no memory")
            return super().denoise(embeddings, seeds, *rest, **more)

    remarks: list[str] = []
    short = Short.load(own, Placement("float32", "cpu"))
    halved = make(
        store, model, declared, tmp_path / "short", pipeline=short, batch_size=3,
        report=remarks.append,
    )  # fmt: skip
    assert (halved.done, short.sizes) == (3, [3, 1, 1, 1])
    assert remarks == ["out of memory: going on in batches of 1"]
    for path, image in zip(paths, wanted, strict=True):
        assert np.abs(pixels(tmp_path / "short" / path.name) - image).max() <= 1
    make(store, model, declared, tmp_path / "batch", batch_size=3)
    for path, image in zip(paths, wanted, strict=True):
        assert np.abs(pixels(tmp_path / "batch" / path.name) - image).max() <= 1


def test_what_only_our_own_decoding_does_is_refused(
    tiny_model: Families, declared: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    with pytest.raises(SchemaMismatchError) as error:
        make(store, tiny_model(NAME), declared, tmp_path / "out", vae_tiling=True)
    assert str(error.value) == (
        "vae_tiling: expected a family whose latents are decoded here, got mine, whose pipeline "
        "decodes itself"
    )


def run(store: Path, *words: str) -> tuple[int, str]:
    command = ["--store", str(store), "generate", "--device", "cpu", *words]
    result = CliRunner().invoke(group, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.slow
def test_an_image_says_which_declaration_it_is_of_and_is_made_again_by_it(
    tiny_model: Families, declared: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    model = ["--model", str(tiny_model(NAME)), "--steps", "1", "--batch-size", "1"]
    asked = [*model, "--family", str(declared), "--output-dir", str(tmp_path / "out")]
    code, output = run(store.path, *asked, "--limit", "1")
    assert code == 0, output
    (path,) = (tmp_path / "out").glob("*.png")
    made, first = provenance_of(path), pixels(path)
    assert first.shape == (16, 16, 3), "the declaration's size"
    assert (made["family"], made["diffusion_type"]) == (f"../{declared.name}", "mine")

    # A remark in it is nothing to an image; what it declares is.
    declared.write_text(f"# tried on the first data\n{DECLARED}")
    code, output = run(store.path, "--from-image", str(path))
    assert code == 0, output
    np.testing.assert_array_equal(pixels(path.parent / "again" / path.name), first)
    declared.write_text(DECLARED.replace("steps = 2", "steps = 3"))
    code, output = run(store.path, "--from-image", str(path), "--overwrite")
    digest = made["settings"]["family"]
    assert (code, f"cannot be made again: family {digest} -> " in output) == (1, True), output
    declared.rename(tmp_path / "moved.toml")
    code, output = run(store.path, "--from-image", str(path), "--overwrite")
    assert (code, output.count("\n")) == (1, 1), output
    assert f"family: expected a file {declared}, got" in output
    (tmp_path / "moved.toml").write_text(DECLARED)
    moved = ["--family", str(tmp_path / "moved.toml")]
    code, output = run(store.path, "--from-image", str(path), "--overwrite", *moved)
    assert code == 0, output
    np.testing.assert_array_equal(pixels(path), first)

    # Without it the model is one of FLUX, whose images are others.
    code, output = run(store.path, *model, "--output-dir", str(tmp_path / "out"), "--width", "16",
                       "--height", "16")  # fmt: skip
    assert (code, f"family {digest} -> None" in output) == (1, True), output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine", "family: expected TOML in "),
        ("", ": expected one table, such as [mine], got nothing"),
        ("steps = 3", ": expected one table, such as [mine], got steps"),
        (DECLARED.replace('"own"', '"none"'), "as latents, got 'none'"),
        (DECLARED.replace("steps = 2", 'steps = "2"'), "expected a whole number as steps, got '2'"),
        (DECLARED + "colour = 1", "expected no 'colour'"),
        (DECLARED.replace("sequence", "vector"), "expected a sequence first, got vector"),
        (DECLARED.replace("FluxPipeline", "OtherPipeline"), "expected a OtherPipeline, got Flux"),
    ],
)
def test_a_wrong_declaration_is_one_line(
    tiny_model: Families, declared: Path, store: EmbeddingStore, text: str, message: str
) -> None:
    declared.write_text(text)
    asked = ["--model", str(tiny_model(NAME)), "--family", str(declared), "--dry-run"]
    code, output = run(store.path, *asked)
    assert (code, output.count("\n")) == (1, 1), output
    assert message in output
