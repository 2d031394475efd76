"""Columns of other records: of another round, node or split, or of a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, fill, values
from generation_fakes import SIZE, FakePipeline, checksum
from pictures import provenance_of
from PIL import Image

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError, NotFoundError, SchemaMismatchError
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import seed_of
from fedgfe_store.images.elsewhere import Elsewhere
from fedgfe_store.images.folder import ImageFolder
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name

ASKED: dict[str, Any] = {"steps": 1, "height": SIZE, "width": SIZE}


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Rounds 5 and 20 of three samples of two classes, and a reference of each class."""
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5)
    fill(store, node=0, round=20)
    refer(store, 0)
    return store


def refer(store: EmbeddingStore, index: int, seed: int = 7, **options: Any) -> None:
    with store.append(node="text", round=0, **options) as batch:
        for number, name in enumerate(("dog", "cat")):
            given = values(1, seed + number + 10 * index)
            batch.add(split="reference", class_name=name, index=[index], **given)


def make(
    flux: Path, store: EmbeddingStore, folder: Path, *column: str, **options: Any
) -> GenerationReport:
    selection, pipeline = store.select(node=0, round=5), FakePipeline(flux)
    return generate(selection, folder, pipeline=pipeline, column=column, **ASKED, **options)


def shown(path: Path) -> bytes:
    with Image.open(path) as image:
        return np.asarray(image)[0, 0].tobytes()


def one(store: EmbeddingStore, column: str, **keys: Any) -> np.ndarray:
    (row,) = store.select(**keys).read(column)
    return np.asarray(row)


def digest(store: EmbeddingStore, column: str, **keys: Any) -> str:
    (found,) = store.select(**keys).records[f"{column}_digest"]
    return str(found)


@pytest.mark.parametrize(
    "asked", [("t5=round:20", "clip=node:text"), ("prompt_embeds=round:20", "clip=node:text")]
)
def test_an_image_is_of_the_records_that_its_columns_are_from(
    flux: Path, store: EmbeddingStore, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    report = make(flux, store, tmp_path / "out", *asked, batch_size=4)
    assert (report.done, report.failed) == (6, ())
    for key in store.select(node=0, round=5).keys():
        same = {"class_name": key.class_name, "index": key.index}
        t5 = one(store, "t5", node=0, round=20, **same)
        clip = one(store, "clip", node="text", class_name=key.class_name)
        path = tmp_path / "out" / image_name(key)
        # The noise is that of the image's own record, so that it can be compared with others.
        assert shown(path) == checksum(t5, clip, seed_of(0, key, 0, ""))
        made = provenance_of(path)
        assert made["digests"] == {
            "t5": digest(store, "t5", node=0, round=20, **same),
            "clip": digest(store, "clip", node="text", class_name=key.class_name),
        }
        assert made["settings"]["column"] == ["clip=node:text", "t5=round:20"]
    assert make(flux, store, tmp_path / "out", *asked).done == 0


def test_images_with_and_without_are_not_taken_for_one_another(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    plain = make(flux, store, tmp_path / "out")
    assert "column" not in provenance_of(plain.plan.items[0].path)["settings"]
    with pytest.raises(ConflictError, match=r"6 files: column None -> \['t5=round:20'\]"):
        make(flux, store, tmp_path / "out", "t5=round:20")
    kept = make(flux, store, tmp_path / "out", "t5=round:20", on_stale="keep")
    assert (kept.done, kept.skipped) == (0, 6)
    again = make(flux, store, tmp_path / "out", "t5=round:20", on_stale="regenerate", limit=2)
    assert again.done == 2
    selection = store.select(node=0, round=5)
    status = image_status(selection, tmp_path / "out")
    assert status.totals == {"done": 2, "missing": 0, "stale": 4, "failed": 0, "all": 6}
    reasons = set(status.frame["reason"]) - {""}
    assert reasons == {"column None -> ['t5=round:20']"}


def test_an_image_is_out_of_date_when_the_other_record_changes(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    make(flux, store, tmp_path / "out", "clip=node:text")
    selection = store.select(node=0, round=5)
    assert image_status(selection, tmp_path / "out").totals["done"] == 6
    refer(store, 0, seed=7, if_exists="replace")
    with store.append(node="text", round=0, if_exists="replace") as batch:
        batch.add(split="reference", class_name="dog", index=[0], **values(1, seed=99))
    changed = store.select(node=0, round=5)
    status = image_status(changed, tmp_path / "out")
    stale = status.frame[status.frame["status"] == "stale"]
    assert set(stale["class_name"]) == {"dog"}
    assert set(stale["reason"]) == {"embedding changed"}
    images = ImageFolder.scan(tmp_path / "out").select(store=store)
    marks = {(image.key.value("class_name"), image.mark) for image in images}
    assert marks == {("dog", "embedding changed"), ("cat", "")}
    again = make(flux, store, tmp_path / "out", "clip=node:text")
    assert (again.done, again.skipped) == (3, 3)


def test_records_without_a_partner_and_with_several_are_one_line(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, n=5, classes="drum")
    with pytest.raises(NotFoundError) as missing:
        make(flux, store, tmp_path / "out", "t5=round:20")
    assert str(missing.value) == (
        f"column t5=round:20: expected a record node 0, round 20, split train, class drum, index 0 "
        f"in {store.path}, got none (for node 0, round 5, split train, class drum, index 0, and 4 "
        "more)"
    )
    store.delete(class_name="drum")
    refer(store, 1)
    with pytest.raises(SchemaMismatchError) as several:
        make(flux, store, tmp_path / "out", "clip=node:text")
    assert str(several.value) == (
        "column clip=node:text: expected one record node text, round 0, split reference, class "
        "dog, got those of the indices 0, 1: clip=node:text,index:N names one"
    )
    assert make(flux, store, tmp_path / "out", "clip=node:text,index:1").done == 6
    key = store.select(node=0, round=5).keys()[0]
    same = {"class_name": key.class_name, "index": key.index}
    t5 = one(store, "t5", node=0, round=5, **same)
    clip = one(store, "clip", node="text", class_name=key.class_name, index=1)
    assert shown(tmp_path / "out" / image_name(key)) == checksum(t5, clip, seed_of(0, key))


@pytest.mark.parametrize(
    "text",
    ["t5", "t5=", "t5=round", "t5=round:x", "t5=round:-1", "t5=class:dog", "=round:5",
     "t5=round:5,round:6", "t5=round:5,", "t5=node:"],
)  # fmt: skip
def test_what_is_no_column_of_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(SchemaMismatchError) as error:
        Elsewhere.parse(text)
    assert str(error.value) == (
        "column: expected COLUMN=KEY:VALUE with the keys node, round, split, index, such as "
        f"t5=round:20 or clip=node:text, got {text!r}"
    )


def test_a_column_is_named_once_and_is_one_of_the_models(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    known = "column: expected one of t5, clip, prompt_embeds, pooled_prompt_embeds, each once, got "
    for asked, got in (
        (("audio=round:20",), "'audio'"),
        (("t5=round:20", "prompt_embeds=node:text"), "t5 twice"),
    ):
        with pytest.raises(SchemaMismatchError) as error:
            make(flux, store, tmp_path / "out", *asked)
        assert str(error.value) == known + got


def test_an_image_of_several_records_is_made_again_from_its_own_metadata(
    flux: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    base = ["--store", str(store.path), "generate", "--device", "cpu"]
    asked = ["--round", "5", "--model", str(flux), "--height", str(SIZE), "--width", str(SIZE)]
    asked += ["--steps", "2", "--batch-size", "1", "--output-dir", str(tmp_path / "out")]
    asked += ["--column", "t5=round:20", "--column", "clip=node:text"]
    result = CliRunner().invoke(group, [*base, *asked])
    assert result.exit_code == 0, result.output
    assert "column clip=node:text t5=round:20" in result.output
    path = min((tmp_path / "out").glob("*.png"))
    with Image.open(path) as image:
        expected = np.asarray(image)
    again = [*base, "--from-image", str(path)]
    assert CliRunner().invoke(group, again).exit_code == 0
    copy = path.parent / "again" / path.name
    with Image.open(copy) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)
    own, first = provenance_of(copy), provenance_of(path)
    for name in ("key", "seed", "digests", "settings", "fingerprint"):
        assert own[name] == first[name]
    refused = CliRunner().invoke(group, [*again, "--column", "t5=round:5"])
    assert (refused.exit_code, "--from-image decides on --column" in refused.output) == (2, True)

    # What the other record was then is taken from then.
    with store.append(node=0, round=20, if_exists="replace") as batch:
        for name in ("dog", "cat"):
            batch.add(split="train", class_name=name, index=range(3), **values(3, seed=50))
    copy.unlink()
    result = CliRunner().invoke(group, again)
    assert (result.exit_code, "has changed since commit" in result.output) == (0, True)
    with Image.open(copy) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_compaction_meanwhile_moves_the_other_records_too(flux: Path, tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    for number in (5, 20):
        fill(store, node=0, round=number, n=10)
    selection = store.select(round=5)
    # Three of the four records of two files: their fourth is moved.
    others = (2, 3, 5, 6, 7, 9)
    lost = {key for key in selection.keys() if key.class_name == "cat" and key.index in others}

    class Meanwhile(FakePipeline):
        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            if not self.batch_sizes:
                other = EmbeddingStore.open(store.path)
                other.delete(round=20, class_name="cat", index=[key.index for key in lost])
                assert other.compact().records_moved
            return super().denoise(*args, **options)

    asked: dict[str, Any] = {**ASKED, "column": ("t5=round:20",), "batch_size": 1}
    made = generate(selection, tmp_path / "out", pipeline=Meanwhile(flux), **asked)
    assert {failure.key for failure in made.failed} == lost
    assert all("has been deleted since" in failure.reason for failure in made.failed)
    store.refresh()
    for item in [item for item in made.plan.items if item.key not in lost]:
        same = {"class_name": item.key.value("class_name"), "index": item.key.value("index")}
        t5 = one(store, "t5", node=0, round=20, **same)
        clip = one(store, "clip", node=0, round=5, **same)
        assert shown(item.path) == checksum(t5, clip, item.seed)
