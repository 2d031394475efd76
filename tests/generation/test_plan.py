"""Plans: which images count as done, which are rendered again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fill
from PIL import Image
from processes import finished

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.errors import ConflictError, DamagedDataError, SchemaMismatchError
from fedgfe_store.generation.plan import Plan, PlanItem, plan_images
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.settings import Settings, fingerprint, seed_of, settings_json
from fedgfe_store.images.compare import difference
from fedgfe_store.images.manifest import Manifest, read_manifest, seconds_per_image
from fedgfe_store.images.png import write_png
from fedgfe_store.images.status import image_status
from fedgfe_store.names import image_name, key_json
from fedgfe_store.records import RecordKey

SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)
KEY = RecordKey("0", 5, "train", "dog", 0)


def render(item: PlanItem, settings: Settings = SETTINGS, **changes: Any) -> None:
    """Put an image of `item` where it belongs, as a run would."""
    provenance = {
        "key": key_json(item.key),
        "image": item.number,
        "digests": item.digests,
        "settings": settings_json(settings),
        "fingerprint": fingerprint(settings),
        **changes,
    }
    item.path.parent.mkdir(exist_ok=True)
    write_png(item.path, np.zeros((settings.height, settings.width, 3), np.uint8), provenance)


@pytest.fixture
def plan(store: EmbeddingStore, tmp_path: Path) -> Plan:
    """A plan of six images in a folder that does not exist yet."""
    fill(store, node=0, round=5)
    return plan_images(store.select(), SETTINGS, tmp_path / "images")


def again(plan: Plan, store: EmbeddingStore, settings: Settings = SETTINGS, **options) -> Plan:
    return plan_images(store.select(), settings, plan.folder, Request(**options))


def statuses(plan: Plan) -> list[str]:
    return [item.status for item in plan.items]


def test_a_new_folder_lacks_every_image(plan: Plan, store: EmbeddingStore) -> None:
    frame = store.select().records
    assert [item.key for item in plan.items] == store.select().keys()
    assert [item.path.name for item in plan.items] == [image_name(i.key) for i in plan.items]
    assert [item.digests["t5"] for item in plan.items] == frame["t5_digest"].tolist()
    assert [item.digests["clip"] for item in plan.items] == frame["clip_digest"].tolist()
    assert plan.counts == {"done": 0, "missing": 6, "stale": 0}
    assert plan.todo == plan.items
    assert not plan.folder.exists()


def test_images_of_these_records_and_settings_are_done(plan: Plan, store: EmbeddingStore) -> None:
    for item in plan.items[:4]:
        render(item)
    later = again(plan, store)
    assert statuses(later) == ["done"] * 4 + ["missing"] * 2
    assert later.todo == later.items[4:]


def test_files_that_do_not_verify_are_rendered_again(plan: Plan, store: EmbeddingStore) -> None:
    for item in plan.items:
        render(item)
    empty, cut, flipped, small, *_ = (item.path for item in plan.items)
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-20])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with Image.open(small) as image:
        text = image.info["fedgfe_store"]
    write_png(small, np.zeros((4, 4, 3), np.uint8), json.loads(text))
    later = again(plan, store)
    assert statuses(later) == ["missing"] * 4 + ["done"] * 2
    assert {item.reason for item in later.todo} == {"damaged file"}


def test_a_changed_embedding_is_rendered_again(plan: Plan, store: EmbeddingStore) -> None:
    for item in plan.items:
        render(item)
    with store.append(node=0, round=5, if_exists="replace") as batch:
        batch.add(
            split="train",
            class_name="dog",
            index=1,
            t5=np.ones((3, 8), np.float32),
            clip=np.ones(4, np.float32),
        )
    later = again(plan, store)
    assert {str(item.key): item.reason for item in later.todo} == {
        str(replace(KEY, index=1)): "embedding changed"
    }
    assert again(plan, store, on_stale="keep").todo == later.todo


def test_changed_settings_are_refused_with_the_difference(
    plan: Plan, store: EmbeddingStore
) -> None:
    for item in plan.items[:3]:
        render(item)
    render(plan.items[3], replace(SETTINGS, seed=7))
    new = replace(SETTINGS, steps=50)
    with pytest.raises(ConflictError) as caught:
        again(plan, store, new)
    message = str(caught.value)
    assert "4 images" in message
    assert "3 files: steps 2 -> 50" in message
    assert "1 files: steps 2 -> 50, seed 7 -> 0" in message
    assert str(plan.folder) in message


def test_on_stale_keeps_or_regenerates(plan: Plan, store: EmbeddingStore) -> None:
    for item in plan.items[:3]:
        render(item, replace(SETTINGS, steps=50))
    render(plan.items[3])
    kept = again(plan, store, on_stale="keep")
    assert statuses(kept) == ["stale"] * 3 + ["done"] + ["missing"] * 2
    assert (kept.kept, kept.todo) == (3, kept.items[4:])
    regenerated = again(plan, store, on_stale="regenerate")
    assert regenerated.todo == (*regenerated.items[:3], *regenerated.items[4:])
    with pytest.raises(SchemaMismatchError, match="on_stale: expected error, regenerate or keep"):
        again(plan, store, on_stale="overwrite")


def test_keep_does_not_keep_the_image_of_an_old_embedding(
    plan: Plan, store: EmbeddingStore
) -> None:
    other = replace(SETTINGS, steps=50)
    render(plan.items[0], other, digests={"t5": "0" * 16, "clip": "0" * 16})
    with pytest.raises(ConflictError, match="steps 50 -> 2"):
        again(plan, store)
    assert again(plan, store, on_stale="keep").todo[0].reason == "embedding changed"


def test_pictures_that_are_not_ours_are_not_overwritten(plan: Plan, store: EmbeddingStore) -> None:
    plan.folder.mkdir()
    Image.new("RGB", (8, 8)).save(plan.items[0].path)
    render(plan.items[1], key=key_json(plan.items[2].key))
    with pytest.raises(ConflictError) as caught:
        again(plan, store)
    assert "1 files: not made by fedgfe-store" in str(caught.value)
    assert "1 files: image of another record" in str(caught.value)
    assert len(again(plan, store, on_stale="keep").todo) == 4
    assert len(again(plan, store, on_stale="regenerate").todo) == 6


@pytest.mark.parametrize("reads_as_png", [b"{}", b"[]", b'{"settings": 3}', b"null"])
def test_a_strange_text_chunk_is_not_trusted(
    plan: Plan, store: EmbeddingStore, reads_as_png: bytes
) -> None:
    plan.folder.mkdir()
    write_png(plan.items[0].path, np.zeros((8, 8, 3), np.uint8), json.loads(reads_as_png))
    later = again(plan, store)
    assert later.todo == later.items
    assert later.todo[0].reason == "damaged file"


def test_the_limit_counts_images_to_render(plan: Plan, store: EmbeddingStore) -> None:
    for item in plan.items[:2]:
        render(item)
    limited = again(plan, store, limit=3)
    assert limited.todo == limited.items[2:5]
    assert limited.waiting == 1
    assert again(plan, store, limit=0).todo == ()


def test_a_record_that_is_selected_twice_counts_once(plan: Plan, store: EmbeddingStore) -> None:
    twice = plan_images(store.select().take([0, 1, 0]), SETTINGS, plan.folder)
    assert [item.key for item in twice.items] == store.select().keys()[:2]


def test_the_summary_gives_counts_batches_disk_and_time(plan: Plan, store: EmbeddingStore) -> None:
    for item in plan.items[:2]:
        render(item)
    summary = again(plan, store).summary(batch_size=3)
    assert "6 images: 2 done, 4 missing" in summary
    assert "4 in 2 batches of 3" in summary
    assert "disk: about" in summary
    assert "time" not in summary
    with Manifest(plan.folder) as manifest:
        manifest.append({"fingerprint": fingerprint(SETTINGS), "seconds": 30.0})
        manifest.append({"fingerprint": "another", "seconds": 1.0})
    assert "time: about 2 min 0 s" in again(plan, store).summary(batch_size=3)


@pytest.mark.parametrize(("one", "other"), [("class_name", "split"), ("extra", "audio_path")])
def test_records_whose_keys_or_notes_changed_places_are_not_rendered(
    tmp_path: Path, one: str, other: str
) -> None:
    """In a store of version 1, whose key columns have no digests of their own."""
    path = tmp_path / "old.zarr"
    shutil.copytree(Path(__file__).parent.parent / "data" / "federation_v1.zarr", path)
    assert plan_images(EmbeddingStore.open(path).select(), SETTINGS, tmp_path / "images").todo
    (path / one).rename(path / "was")
    (path / other).rename(path / one)
    (path / "was").rename(path / other)
    with pytest.raises(DamagedDataError, match="the key or notes of row"):
        plan_images(EmbeddingStore.open(path).select(), SETTINGS, tmp_path / "images")


def test_names_that_differ_in_case_only_are_images_of_their_own(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, classes="dog Dog DOG", n=1)
    items = plan_images(store.select(), SETTINGS, tmp_path).items
    assert len({item.path.name.lower() for item in items}) == 3
    assert items[0].path.name == "node_0_train_dog_0_r5.png"


def test_images_with_capital_letters_under_their_older_names_are_found(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, classes="dog Dog DOG", n=1)
    folder = tmp_path / "images"
    dog, capital, shouted = plan_images(store.select(), SETTINGS, folder).items
    older = folder / "node_0_train_Dog_0_r5.png"
    render(replace(capital, path=older))
    # A file system that ignores case took two for one: what lies there is the other one's.
    render(replace(dog, path=folder / "node_0_train_DOG_0_r5.png"))
    plan = plan_images(store.select(), SETTINGS, folder)
    assert statuses(plan) == ["missing", "done", "missing"]
    assert [item.path for item in plan.items] == [dog.path, older, shouted.path]
    frame = image_status(store.select(), folder).frame
    assert frame["status"].tolist() == ["missing", "done", "missing"]
    assert frame["file"].tolist() == [dog.path.name, older.name, shouted.path.name]


@pytest.mark.slow
def test_ten_thousand_images_are_planned(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "big.zarr", Schema.flux(1, width=1, clip=(1,)))
    ones = np.ones((10_000, 1, 1), np.float32)
    with store.append(node=0, round=0) as batch:
        batch.add(
            split="train",
            class_name=["dog"] * 10_000,
            index=range(10_000),
            t5=ones,
            clip=ones[:, 0],
        )
    plan = plan_images(store.select(), SETTINGS, tmp_path / "images")
    for item in plan.items[:500]:
        render(item)
    assert Counter(statuses(again(plan, store))) == {"done": 500, "missing": 9500}


def test_the_fingerprint_covers_each_setting_and_nothing_else() -> None:
    changed: dict[str, Any] = {
        "model": "other",
        "revision": "def",
        "dtype": "bfloat16",
        "steps": 3,
        "guidance": 4.0,
        "height": 16,
        "width": 16,
        "seed": 1,
        "pool": "last",
        "quantization": "int8",
        "negative": "0",
        "noise": "file_id",
        "column": ("t5=round:20",),
        "lora": ("abc:0.5",),
        "family": "def",
    }
    assert changed.keys() == asdict(SETTINGS).keys()
    variants = [replace(SETTINGS, **{name: value}) for name, value in changed.items()]
    assert len({fingerprint(s) for s in [SETTINGS, *variants]}) == len(changed) + 1
    for name, variant in zip(changed, variants, strict=True):
        before, after = settings_json(SETTINGS), settings_json(variant)
        old = before.get(name, {"noise": "index"}.get(name))
        assert difference(before, after) == f"{name} {old} -> {after[name]}"


def test_seeds_and_fingerprints_do_not_change_between_versions() -> None:
    assert seed_of(0, KEY) == 22727749606992097
    assert fingerprint(SETTINGS) == "1bf3f7e87462acf937c083d5c106f057"


def test_seeds_are_the_same_in_every_process() -> None:
    code = (
        "from fedgfe_store.generation.settings import seed_of;"
        "from fedgfe_store.records import RecordKey;"
        "print(seed_of(3, RecordKey('0', 5, 'train', 'dog', 0), 1))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code]
    output = finished(command, env=environment)
    assert int(output.stdout) == seed_of(3, KEY, 1)


def test_seeds_differ_by_sample_and_not_by_round() -> None:
    assert seed_of(0, KEY) == seed_of(0, replace(KEY, round=6))
    others = [replace(KEY, node="1"), replace(KEY, split="val"), replace(KEY, class_name="cat")]
    seeds = [seed_of(0, k) for k in [KEY, *others, replace(KEY, index=1)]]
    seeds += [seed_of(1, KEY), seed_of(0, KEY, 1)]
    seeds += [seed_of(0, replace(KEY, index=i), n) for i in range(2, 5000) for n in range(2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_torn_manifest_line_is_skipped_and_not_continued(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        manifest.append({"file": "a.png", "fingerprint": "f", "seconds": 1.0})
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(path.read_bytes() + b'{"file": "b.p')
    with Manifest(tmp_path) as manifest:
        manifest.append({"file": "c.png", "fingerprint": "f", "seconds": 3.0})
    assert [line["file"] for line in read_manifest(tmp_path)] == ["a.png", "c.png"]
    assert seconds_per_image(tmp_path, "f") == 2.0
    assert seconds_per_image(tmp_path, "g") is None
    assert list(read_manifest(tmp_path / "nowhere")) == []
