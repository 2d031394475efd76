"""Status: what became of each image, by the folder's own settings and without a model."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import fill, values
from PIL import Image
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.parts import WHOLE, Part, parts_of
from fedgfe_store.generation.settings import Settings, fingerprint, settings_json
from fedgfe_store.images.manifest import Manifest, manifest_name
from fedgfe_store.images.png import write_png
from fedgfe_store.images.status import ImageStatus, image_status
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)


class Folder:
    """Makes images of a store's records as a run would, without one."""

    def __init__(self, path: Path, store: EmbeddingStore) -> None:
        self.path, self.store = path, store
        self.minute = 0
        path.mkdir(parents=True)

    def keys(self) -> list[RecordKey]:
        return self.store.select().keys()

    def make(
        self,
        *positions: int,
        image: int = 0,
        made_with: Settings = SETTINGS,
        columns: tuple[str, ...] = ("t5", "clip"),
        listed: bool = True,
        shard: Part = WHOLE,
        **changes: Any,
    ) -> None:
        self.minute += 1
        frame = self.store.select().records
        for position in positions:
            key = self.keys()[position]
            provenance = {
                "key": key_json(key),
                "image": image,
                "digests": {c: frame[f"{c}_digest"][position] for c in columns},
                "settings": settings_json(made_with),
                "fingerprint": fingerprint(made_with),
                **changes,
            }
            name = image_name(key, image)
            write_png(self.path / name, np.zeros((8, 8, 3), np.uint8), provenance)
            if listed:
                self.line({"file": name, **provenance}, shard)

    def fail(self, position: int, error: str, *, image: int = 0) -> None:
        self.minute += 1
        key = self.keys()[position]
        facts = {"key": key_json(key), "image": image, "error": error}
        self.line({"file": image_name(key, image), **facts})

    def line(self, line: dict[str, Any], shard: Part = WHOLE) -> None:
        created = f"2026-01-22T12:{self.minute:02}:00+00:00"
        with Manifest(self.path, manifest_name(shard.index, shard.count)) as manifest:
            manifest.append({**line, "created": created})

    def status(self, **options: Any) -> ImageStatus:
        return image_status(self.store.select(), self.path, **options)


@pytest.fixture
def folder(store: EmbeddingStore, tmp_path: Path) -> Folder:
    """A folder for six records."""
    fill(store, node=0, round=5)
    return Folder(tmp_path / "images", store)


def statuses(status: ImageStatus) -> list[str]:
    return status.frame["status"].tolist()


def test_nothing_is_there_yet(store: EmbeddingStore, tmp_path: Path) -> None:
    fill(store, node=0, round=5)
    status = image_status(store.select(), tmp_path / "nowhere")
    assert statuses(status) == ["missing"] * 6
    assert status.settings is None
    assert not (tmp_path / "nowhere").exists()


def test_each_kind_of_status(folder: Folder) -> None:
    folder.make(0, 1, 2)
    folder.fail(3, "latents are not finite")
    folder.fail(4, "disk is full")
    (folder.path / image_name(folder.keys()[1])).write_bytes(b"cut")
    with folder.store.append(node=0, round=5, if_exists="replace") as batch:
        batch.add(
            split="train", class_name="dog", index=2, **{k: v[0] for k, v in values(1).items()}
        )
    status = folder.status()
    by_name = {row.file: (row.status, row.reason) for row in status.frame.itertuples()}
    assert by_name == {
        "node_0_train_dog_0_r5.png": ("done", ""),
        "node_0_train_dog_1_r5.png": ("missing", "damaged file"),
        "node_0_train_dog_2_r5.png": ("stale", "embedding changed"),
        "node_0_train_cat_0_r5.png": ("failed", "latents are not finite"),
        "node_0_train_cat_1_r5.png": ("failed", "disk is full"),
        "node_0_train_cat_2_r5.png": ("missing", ""),
    }
    assert status.totals == {"done": 1, "missing": 2, "stale": 1, "failed": 2, "all": 6}
    assert status.settings == settings_json(SETTINGS)


def test_a_failed_image_that_was_made_later_is_done(folder: Folder) -> None:
    folder.fail(0, "disk is full")
    folder.make(0)
    folder.make(1)
    folder.fail(1, "disk is full")
    assert statuses(folder.status())[:2] == ["done", "done"]


def test_the_settings_are_those_of_the_image_finished_last(folder: Folder) -> None:
    other = replace(SETTINGS, steps=50)
    folder.make(0, 1, made_with=other)
    folder.make(2, 3, shard=Part(1, 2))
    folder.fail(4, "disk is full")
    status = folder.status()
    assert statuses(status) == ["stale"] * 2 + ["done"] * 2 + ["failed", "missing"]
    assert status.frame["reason"][0] == "steps 50 -> 2"
    folder.make(5, made_with=other)
    assert statuses(folder.status()) == ["done"] * 2 + ["stale"] * 2 + ["failed", "done"]


def test_settings_that_this_version_does_not_know(folder: Folder) -> None:
    newer = {**settings_json(SETTINGS), "scheduler": "heun"}
    folder.make(0)
    folder.make(1, settings=newer, fingerprint="of-a-newer-version")
    status = folder.status()
    assert statuses(status)[:2] == ["stale", "done"]
    assert status.frame["reason"][0] == "scheduler None -> heun"


def test_without_a_manifest_the_newest_sound_file_says_the_settings(folder: Folder) -> None:
    folder.make(0, made_with=replace(SETTINGS, steps=50), listed=False)
    folder.make(1, 2, listed=False)
    for position, age in ((0, 300), (1, 200), (2, 100)):
        os.utime(folder.path / image_name(folder.keys()[position]), (10_000 - age,) * 2)
    (folder.path / image_name(folder.keys()[3])).write_bytes(b"cut")
    Image.new("RGB", (8, 8)).save(folder.path / image_name(folder.keys()[4]))
    Image.new("RGB", (8, 8)).save(folder.path / "contact_sheet.png")
    status = folder.status()
    assert status.settings == settings_json(SETTINGS)
    assert statuses(status) == ["stale", "done", "done", "missing", "stale", "missing"]
    assert status.frame["reason"][4] == "not made by fedgfe-store"


def test_only_tensors_that_the_picture_depends_on_count(folder: Folder) -> None:
    folder.make(0, columns=("clip",))
    folder.make(1, columns=("t5", "clip"))
    folder.make(2, digests={})
    folder.make(3, digests={"audio": "0" * 16})
    folder.make(4, digests=3)
    same = {"t5": values(1, 1)["t5"][0], "clip": np.zeros(4, np.float32)}
    old = folder.store.select(index=[0, 1], class_name="dog")
    with folder.store.append(node=0, round=5, if_exists="replace") as batch:
        for position in range(2):
            batch.add(split="train", class_name="dog", index=position,
                      t5=same["t5"], clip=old.read("clip")[position])  # fmt: skip
    found = {r.file: r.status for r in folder.status().frame.itertuples()}
    assert found["node_0_train_dog_0_r5.png"] == "done"
    assert found["node_0_train_dog_1_r5.png"] == "stale"
    assert found["node_0_train_dog_2_r5.png"] == "stale"
    assert found["node_0_train_cat_0_r5.png"] == "stale"
    assert found["node_0_train_cat_1_r5.png"] == "stale"


def test_images_per_record_is_what_any_selected_record_has_had(folder: Folder) -> None:
    assert folder.status().images_per_record == 1
    folder.make(0)
    folder.make(0, image=1)
    assert statuses(folder.status()) == ["done", "done"] + ["missing"] * 10
    folder.fail(1, "disk is full", image=2)
    status = folder.status()
    assert status.images_per_record == 3
    assert Counter(statuses(status)) == {"done": 2, "failed": 1, "missing": 15}
    assert status.frame["image"].tolist() == [0, 1, 2] * 6
    assert statuses(folder.status(images_per_record=1)) == ["done"] + ["missing"] * 5
    others = folder.store.select(class_name="cat")
    assert image_status(others, folder.path).images_per_record == 1
    with pytest.raises(SchemaMismatchError, match="images_per_record: expected from 1 up, got 0"):
        folder.status(images_per_record=0)


def test_images_per_record_is_known_without_a_manifest(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, classes="a/b", n=1)
    folder = Folder(tmp_path / "images", store)
    folder.make(0, image=1, listed=False)
    assert "_h" in next(folder.path.glob("*.png")).name
    assert statuses(folder.status()) == ["missing", "done"]


def test_counts_of_groups_in_natural_order(store: EmbeddingStore, tmp_path: Path) -> None:
    for node in (10, 9, "server"):
        for round_ in (10, 9):
            fill(store, node=node, round=round_, n=1)
    folder = Folder(tmp_path / "images", store)
    folder.make(*[p for p, key in enumerate(folder.keys()) if key.node == "9"])
    counts = folder.status().counts(["node", "round"])
    assert list(counts.columns) == ["node", "round", "done", "missing", "stale", "failed", "all"]
    assert counts.to_numpy().tolist() == [
        [node, round_, done, 2 - done, 0, 0, 2]
        for node, done in (("9", 2), ("10", 0), ("server", 0))
        for round_ in (9, 10)
    ]
    by_class = folder.status().counts(["class_name"])
    assert by_class.to_numpy().tolist() == [["cat", 2, 4, 0, 0, 6], ["dog", 2, 4, 0, 0, 6]]
    for wrong in ([], ["index"], ["node", "node"]):
        with pytest.raises(SchemaMismatchError, match="by: expected some of node, round"):
            folder.status().counts(wrong)


def test_unfinished_shards_are_those_that_hold_a_record_not_done(folder: Folder) -> None:
    folder.make(0, 1, 2)
    status = folder.status()
    expected = {i for i in range(8) for key in folder.keys()[3:] if Part(i, 8).holds(key)}
    assert parts_of(status.unfinished, 8) == sorted(expected)
    assert parts_of(status.unfinished, 1) == [0]
    folder.make(3, 4, 5)
    assert parts_of(folder.status().unfinished, 8) == []


def test_nothing_selected(folder: Folder) -> None:
    status = image_status(folder.store.select(round=99), folder.path)
    assert status.totals == {"done": 0, "missing": 0, "stale": 0, "failed": 0, "all": 0}
    assert len(status.counts(["node", "round"])) == 0
    assert parts_of(status.unfinished, 4) == []


def test_progress_counts_records(folder: Folder) -> None:
    steps: list[int] = []
    folder.status(images_per_record=3, progress=steps.append)
    assert steps == [1] * 6


def run(folder: Folder, *words: Any) -> Result:
    options = ["--store", str(folder.store.path), "status", "--output-dir", str(folder.path)]
    result = CliRunner().invoke(group, [*options, *map(str, words)])
    assert result.exit_code == 0, result.output
    return result


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_the_table_counts_by_node_and_round_and_by_class(folder: Folder) -> None:
    fill(folder.store, node="server", round=5, n=1)
    folder.make(0, 1, 3)
    folder.fail(4, "disk is full")
    output = run(folder).output
    assert "model: tiny (abc), float32\nsettings: 2 steps, 8x8, guidance 3.5, seed 0\n" in output
    found = rows(output)
    assert ["node", "round", "done", "missing", "stale", "failed", "all"] in found
    assert ["0", "5", "3", "2", "0", "1", "6"] in found
    assert ["server", "5", "0", "2", "0", "0", "2"] in found
    assert found.count(["all", "3", "4", "0", "1", "8"]) == 2
    assert ["dog", "2", "2", "0", "0", "4"] in found
    assert found[-1] == ["to", "finish:", "5", "images"]
    only = rows(run(folder, "--by", "class,split", "--node", "server").output)
    assert ["dog", "train", "0", "1", "0", "0", "1"] in only
    assert ["node", "round", "done", "missing", "stale", "failed", "all"] not in only


def test_the_array_to_finish(folder: Folder) -> None:
    expected = {i for i in range(16) for key in folder.keys()[2:] if Part(i, 16).holds(key)}
    folder.make(0, 1, shard=Part(3, 16))
    for output in (run(folder).output, run(folder, "--shards", 16).output):
        listed = output.splitlines()[-1].removeprefix("to finish: --array=").split(",")
        ends = [[int(end) for end in part.split("-")] for part in listed]
        assert {n for end in ends for n in range(end[0], end[-1] + 1)} == expected
    assert run(folder, "--shards", 1).output.endswith("to finish: --array=0\n")
    folder.make(2, 3, 4, 5)
    assert run(folder).output.endswith("nothing is missing\n")


def test_failures_and_stale_images_say_why(folder: Folder) -> None:
    folder.make(0, 1, made_with=replace(SETTINGS, steps=50))
    folder.make(2)
    folder.fail(4, "latents [of] node 0 are not finite")
    output = run(folder, "--failed").output
    assert "stale: 2 images: steps 50 -> 2" in output
    assert "latents [of] node 0 are not finite" in output
    assert "latents" not in run(folder).output
    lines = run(folder, "--failed", "--format", "json").output.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"node": "0", "round": 5, "split": "train", "class_name": "cat", "index": 1, "image": 0,
         "file": "node_0_train_cat_1_r5.png", "reason": "latents [of] node 0 are not finite"}
    ]  # fmt: skip


def test_csv_and_json_agree(folder: Folder) -> None:
    folder.make(0)
    lines = run(folder, "--format", "csv").output.splitlines()
    assert lines == [
        "node,round,class_name,done,missing,stale,failed,all",
        "0,5,cat,0,3,0,0,3",
        "0,5,dog,1,2,0,0,3",
    ]
    found = [json.loads(line) for line in run(folder, "--format", "json").output.splitlines()]
    assert [",".join(map(str, each.values())) for each in found] == lines[1:]


@pytest.mark.parametrize("by", ["index", "node,node", "", "class_name"])
def test_unknown_groups_are_usage_mistakes(folder: Folder, by: str) -> None:
    result = CliRunner().invoke(group, ["--store", str(folder.store.path), "status", "--by", by])
    assert result.exit_code == 2
    assert "expected some of node, round, split, class" in result.stderr


def test_the_default_folder_is_that_of_generate_and_torch_is_not_needed(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5)
    Folder(tmp_path / "output_images" / "embeddings", store).make(*range(6))
    code = (
        "import sys\nfrom fedgfe_store.cli.main import group\n"
        "try: group(['status', '--round', '5'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = finished(command, cwd=tmp_path)
    assert "folder: output_images/embeddings\n" in done.stdout
    assert done.stdout.endswith("nothing is missing\n[]\n")
    assert ["all", "6", "0", "0", "0", "6"] in rows(done.stdout)
