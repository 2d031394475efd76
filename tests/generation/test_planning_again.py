"""Planning again: what was found done is not read a second time, unless it changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline, save_random_flux

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import ConflictError
from fedgfe_store.generation import items
from fedgfe_store.generation.plan import Plan
from fedgfe_store.generation.prepare import Run, prepare
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import generate, render
from fedgfe_store.images import checked, manifest, png
from fedgfe_store.images import folder as folder_module

SETTINGS: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE}


@pytest.fixture
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FakePipeline:
    return FakePipeline(save_random_flux(tmp_path_factory.mktemp("model") / "flux"))


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5)
    return store


class Folder:
    """Six images of a store, and the names of the files that a plan reads."""

    def __init__(self, path: Path, store: EmbeddingStore, pipeline: FakePipeline) -> None:
        self.path, self.store, self.pipeline = path, store, pipeline
        self.read: list[str] = []

    def plan(self, **options: Any) -> Plan:
        return self.run(**options).plan

    def run(self, **options: Any) -> Run:
        self.read.clear()
        request = Request(**{**SETTINGS, **options})
        return prepare(self.store.select(), self.path, request, pipeline=self.pipeline)

    def generate(self) -> int:
        selection = self.store.select()
        return generate(selection, self.path, pipeline=self.pipeline, **SETTINGS).done


@pytest.fixture
def images(
    tmp_path: Path,
    store: EmbeddingStore,
    pipeline: FakePipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> Folder:
    images = Folder(tmp_path / "images", store, pipeline)
    inspect = png.inspect_image

    def inspected(path: Path) -> Any:
        images.read.append(path.name)
        return inspect(path)

    monkeypatch.setattr(folder_module, "inspect_image", inspected)
    monkeypatch.setattr(checked, "ENOUGH", 1)
    monkeypatch.setattr(checked, "SETTLED_NS", -(10**18))
    assert images.generate() == 6
    return images


def test_what_a_run_has_written_is_not_read_by_the_next(images: Folder) -> None:
    plan = images.plan()
    assert (plan.counts["done"], images.read) == (6, [])
    assert [item.seen for item in plan.items] == [
        folder_module.file_stamp(item.path) for item in plan.items
    ]
    assert images.generate() == 0
    # Nor what the plan had to read, as where the notes are lost.
    (images.path / ".fedgfe-checked").write_bytes(b"fedgfe checked 1\nhalf a li")
    assert images.plan().counts["done"] == len(images.read) == 6
    assert images.generate() == 0
    assert (images.plan().counts["done"], images.read) == (6, [])


def test_images_that_are_done_have_no_objects(
    images: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does ending a run with nothing to do make any, or parse a line of a manifest."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("made, or parsed")

    first, *_ = images.plan().items
    first.path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(items, "PlanItem", refused)
        plan = images.plan()
        assert plan.counts == {"done": 5, "missing": 1, "stale": 0}
    assert [item.key for item in plan.todo] == [first.key]
    assert images.generate() == 1
    run = images.run()
    monkeypatch.setattr(items, "PlanItem", refused)
    monkeypatch.setattr(manifest, "_read_line", refused)
    assert render(run, pipeline=images.pipeline).skipped == 6


def test_a_file_that_changed_is_read(images: Folder) -> None:
    flipped, copied, gone, *_ = (item.path for item in images.plan().items)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    # The same bytes and time, as a backup puts back: but another file.
    found, whole = copied.stat(), copied.read_bytes()
    (images.path / "new").write_bytes(whole)
    os.utime(images.path / "new", ns=(found.st_mtime_ns, found.st_mtime_ns))
    (images.path / "new").replace(copied)
    gone.unlink()
    plan = images.plan()
    assert sorted(images.read) == sorted([flipped.name, copied.name])
    reasons = {item.path: (item.status, item.reason) for item in plan.items[:3]}
    assert reasons == {
        flipped: ("missing", "damaged file"),
        copied: ("done", ""),
        gone: ("missing", ""),
    }


def test_an_image_of_what_is_asked_no_more_is_read(images: Folder) -> None:
    with images.store.append(node=0, round=5, if_exists="replace") as batch:
        new = {"t5": np.ones((3, 8), np.float32), "clip": np.ones(4, np.float32)}
        batch.add(split="train", class_name="dog", index=1, **new)
    images.store = EmbeddingStore.open(images.store.path)
    (stale,) = images.plan().todo
    assert (stale.reason, images.read) == ("embedding changed", [stale.path.name])
    with pytest.raises(ConflictError, match="6 images that this run would replace"):
        images.plan(steps=3)
    assert len(images.read) == 6


def test_a_file_as_young_as_a_tick_of_the_clock_is_read(
    images: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images.path / ".fedgfe-checked").unlink()
    monkeypatch.setattr(checked, "SETTLED_NS", 10**18)
    assert images.generate() == 0
    assert images.plan().counts["done"] == len(images.read) == 6


def test_a_picture_of_another_size_fails(
    tmp_path: Path, store: EmbeddingStore, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = pipeline.decode

    def smaller(*args: Any, **options: Any) -> list[Any]:
        return [picture[:8] for picture in decode(*args, **options) if picture is not None]

    monkeypatch.setattr(pipeline, "decode", smaller)
    made = generate(store.select(), tmp_path / "out", pipeline=pipeline, **SETTINGS)
    reasons = {failure.reason for failure in made.failed}
    assert reasons == {f"expected a picture of {SIZE}x{SIZE}, the model gave {SIZE}x8"}
