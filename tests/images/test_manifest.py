"""Manifests: one file for each part, finished and failed images, and the latest line of each."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import fill
from generation_fakes import SIZE, FakePipeline, save_random_flux

from fedgfe_store import EmbeddingStore
from fedgfe_store.generation.run import generate
from fedgfe_store.images.manifest import (
    Manifest,
    latest,
    listed_files,
    manifest_name,
    part_count,
    read_manifest,
    seconds_per_image,
    timestamp,
)
from fedgfe_store.records import RecordKey

KEY = RecordKey("server", 5, "train", "dog", 3)


def write(folder: Path, *lines: dict[str, object], part: str = "0/1") -> None:
    with Manifest(folder, manifest_name(*map(int, part.split("/")))) as manifest:
        for line in lines:
            manifest.append(line)


def made(file: str, minute: int, **more: object) -> dict[str, object]:
    return {"file": file, "created": f"2026-01-22T12:{minute:02}:00+00:00", **more}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("0/1", "manifest.jsonl"),
        ("2/8", "manifest-2-of-8.jsonl"),
        ("2/16", "manifest-02-of-16.jsonl"),
        ("99/100", "manifest-099-of-100.jsonl"),
    ],
)
def test_each_part_has_a_file(tmp_path: Path, part: str, name: str) -> None:
    write(tmp_path, {"file": "a.png"}, part=part)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert list(read_manifest(tmp_path)) == [{"file": "a.png"}]


def test_all_files_are_read(tmp_path: Path) -> None:
    write(tmp_path, {"file": "a.png"})
    write(tmp_path, {"file": "b.png"}, {"file": "c.png"}, part="0/2")
    write(tmp_path, {"file": "d.png"}, part="11/12")
    (tmp_path / "manifest-old.jsonl").write_text('{"file": "x.png"}\n')
    assert sorted(line["file"] for line in read_manifest(tmp_path)) == [
        "a.png", "b.png", "c.png", "d.png"
    ]  # fmt: skip
    assert listed_files(tmp_path) == {"a.png", "b.png", "c.png", "d.png"}


def test_a_failure_is_a_line_with_its_reason(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    with Manifest(tmp_path) as manifest:
        manifest.fail("x.png", key=KEY, image=1, error="t5 of … is damaged")
    (line,) = read_manifest(tmp_path)
    assert before <= datetime.fromisoformat(line.pop("created")) <= datetime.now(UTC)
    assert line == {
        "file": "x.png",
        "key": {"node": "server", "round": 5, "split": "train", "class_name": "dog", "index": 3},
        "image": 1,
        "error": "t5 of … is damaged",
    }
    assert listed_files(tmp_path) == set()


def test_the_latest_line_of_each_image_counts(tmp_path: Path) -> None:
    write(tmp_path, made("a.png", 5, seed=1), made("a.png", 5, seed=2), made("b.png", 9, error="e"))
    write(tmp_path, made("a.png", 4, error="e"), made("b.png", 8), made("c.png", 1), part="0/2")
    write(tmp_path, made("c.png", 2, error="e"), {"file": "d.png"}, {"seed": 4}, part="1/2")
    found = latest(tmp_path, dict)
    assert found == {
        "a.png": made("a.png", 5, seed=2),
        "b.png": made("b.png", 9, error="e"),
        "c.png": made("c.png", 2, error="e"),
        "d.png": {"file": "d.png"},
    }
    assert listed_files(tmp_path) == {"a.png", "d.png"}


def test_of_torn_lines_and_strange_ones_json_says_what_is_listed(tmp_path: Path) -> None:
    """What is not parsed is taken for what parsing would say of it."""
    said = {"key": {"class_name": 'a", "error": "x'}, "image": 0, "settings": {"error": [1]}}
    whole = [
        json.dumps(made("a.png", 1, key={"node": "0"}, image=0, seed=3)),
        json.dumps({"file": "b.png", **said, "created": "2026-01-22T12:01:00+00:00"}),
        json.dumps({"file": 'ü"\\.png', "key": {}, "created": "2026-01-22T12:01:00+00:00"}),
        json.dumps({"file": "c.png", "key": {}, "error": "e", "created": "2026-01-22T12:01"}),
        json.dumps({"file": "d.png", "key": {}, "created": "2026-01-22T12:01:00+00:00"}),
        json.dumps({"file": "d.png", "key": {}, "error": "e", "created": "2026-01-22T12:02"}),
        json.dumps({"file": "e.png", "key": {"file": "f.png"}, "created": "2026"}),
    ]
    last = json.dumps({"file": "z.png", "key": {}, "created": "2026-01-22T12:01:00+00:00"})
    torn = [line[:cut] for line in whole for cut in range(1, len(line))]
    lines = [*whole, *torn, *(begin + last for begin in torn)]
    (tmp_path / "manifest.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    assert listed_files(tmp_path) == {"a.png", "b.png", 'ü"\\.png', "e.png"}
    # Each by itself, since a later line of the same file would hide what one was taken for.
    for line in lines:
        (tmp_path / "manifest.jsonl").write_text(line + "\n", "utf-8")
        assert listed_files(tmp_path) == _listed(line)


def _listed(text: str) -> set[str]:
    try:
        line = json.loads(text)
    except ValueError:
        return set()
    return {line["file"]} if "error" not in line else set()


def test_lines_that_no_run_writes_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b'3\n"x"\n[]\n\xff\xfe\n{"file": 3}\n{"file": "a.png"}\n')
    wrong = [{"settings": "x"}, {"fingerprint": []}, {"error": 5}, {"key": 1}, {"seconds": "1"}]
    path.write_bytes(path.read_bytes() + b"".join(json.dumps(w).encode() + b"\n" for w in wrong))
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n")
    assert list(read_manifest(tmp_path)) == [{"file": "a.png"}]
    assert latest(tmp_path, dict) == {"a.png": {"file": "a.png"}}


def test_the_rate_is_that_of_the_latest_images_of_all_parts(tmp_path: Path) -> None:
    common = {"fingerprint": "f", "settings": {"model": "x" * 2000}}
    old = [made("o.png", 1, seconds=9.0, **common) for _ in range(200)]
    write(tmp_path, *old)
    for i in range(2):
        new = [made("n.png", 2 + i, seconds=1.0 + i, **common) for _ in range(50)]
        write(tmp_path, *new, made("x.png", 50, error="e"), part=f"{i}/2")
    assert seconds_per_image(tmp_path, "f") == 1.5
    assert seconds_per_image(tmp_path, "g") is None


def test_only_the_end_of_a_long_manifest_is_read_for_the_rate(tmp_path: Path) -> None:
    write(tmp_path, *[made("a.png", 1, padding="x" * 1000) for _ in range(500)], {"file": "z.png"})
    (line, *_, last) = read_manifest(tmp_path, tail_bytes=5000)
    assert json.dumps(line).startswith('{"file": "a.png"')
    assert last == {"file": "z.png"}
    assert len(list(read_manifest(tmp_path, tail_bytes=5000))) < 6


def test_the_number_of_parts_is_that_of_the_latest_run(tmp_path: Path) -> None:
    assert part_count(tmp_path) is None
    write(tmp_path, {"file": "a.png"})
    assert part_count(tmp_path) is None
    write(tmp_path, {"file": "a.png"}, part="3/16")
    write(tmp_path, {"file": "a.png"}, part="3/8")
    os.utime(tmp_path / "manifest-03-of-16.jsonl", ns=(1, 1))
    assert part_count(tmp_path) == 8
    os.utime(tmp_path / "manifest-3-of-8.jsonl", ns=(0, 0))
    assert part_count(tmp_path) == 16


def test_times_are_milliseconds_in_utc_that_follow_whole_seconds_of_before() -> None:
    assert timestamp(1_769_083_200.9) == "2026-01-22T12:00:00.900+00:00"
    assert "2026-01-22T12:00:00+00:00" < timestamp(1_769_083_200.5) < "2026-01-22T12:00:01+00:00"
    assert datetime.fromisoformat(timestamp()).tzinfo is UTC


def test_an_image_made_after_a_failure_is_listed_though_the_run_was_killed(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, classes="dog", n=2)
    folder, flux = tmp_path / "images", save_random_flux(tmp_path / "flux")
    for _ in range(2):
        generate(store.select(), folder, pipeline=FakePipeline(flux), height=SIZE, width=SIZE)
        finished = latest(folder, dict)
        assert sorted(finished) == ["node_0_train_dog_0_r5.png", "node_0_train_dog_1_r5.png"]
        assert all("error" not in line for line in finished.values())
        # What is left where the first image failed, was made, and its line not yet written.
        lines = [
            finished["node_0_train_dog_1_r5.png"],
            made("node_0_train_dog_0_r5.png", 0, error="e"),
        ]
        (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    written = (folder / "node_0_train_dog_0_r5.png").stat().st_mtime
    assert finished["node_0_train_dog_0_r5.png"]["created"] == timestamp(written)
