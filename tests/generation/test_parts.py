"""Parts of a run: disjoint, complete and lasting, and each builds only its own images."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline, save_random_flux
from hypothesis import given
from hypothesis import strategies as st
from processes import finished

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.generation import items
from fedgfe_store.generation.parts import Part, places_of
from fedgfe_store.generation.plan import plan_images
from fedgfe_store.generation.prepare import prepare
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import generate, render
from fedgfe_store.generation.settings import Settings
from fedgfe_store.images import manifest as manifest_module
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.records import RecordKey
from fedgfe_store.selection import Selection

SETTINGS = Settings("tiny", "abc", "float32", steps=2, guidance=3.5, height=8, width=8)
RECORDS = 6400


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    path = tmp_path_factory.mktemp("parts") / "embeddings.zarr"
    store = EmbeddingStore.create(path, Schema.flux(1, width=1, clip=(1,)))
    with store.append(node=0, round=0) as batch:
        batch.add(
            split="train",
            class_name=["dog", "cat"] * (RECORDS // 2),
            index=range(RECORDS),
            t5=np.ones((RECORDS, 1, 1), np.float32),
            clip=np.ones((RECORDS, 1), np.float32),
        )
    return store.select()


def test_a_part_builds_its_own_images_and_no_others(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: Counter[str] = Counter()

    def counted(name: str, function):
        def call(*args: Any, **options: Any) -> object:
            built[name] += 1
            return function(*args, **options)

        return call

    for name in ("PlanItem", "seed_of"):
        monkeypatch.setattr(items, name, counted(name, getattr(items, name)))
    monkeypatch.setattr(RecordKey, "__init__", counted("key", RecordKey.__init__))
    plan = plan_images(selection, SETTINGS, tmp_path, Request(part=Part(0, 64)))
    # Two classes; and no image is asked for yet.
    assert built == {"key": 2}
    assert plan.counts["missing"] == len(plan.images) <= RECORDS / 64 + RECORDS / 100
    assert len(plan.items) == len(plan.todo) == built["PlanItem"] / 2 == built["seed_of"] / 2
    assert len({item.key for item in plan.items}) == len(plan.images)


def test_parts_together_are_the_whole_in_its_order(selection: Selection, tmp_path: Path) -> None:
    some = selection.take(slice(300))
    whole = plan_images(some, SETTINGS, tmp_path, Request(images_per_record=2)).items
    parts = [
        plan_images(some, SETTINGS, tmp_path, Request(images_per_record=2, part=Part(i, 7))).items
        for i in range(7)
    ]
    found = {item: number for number, part in enumerate(parts) for item in part}
    assert len(found) == sum(map(len, parts)) == len(whole)
    for number, part in enumerate(parts):
        assert part == tuple(item for item in whole if found[item] == number)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
KEYS = st.builds(
    RecordKey, NAMES, st.integers(0, 2**31 - 1), NAMES, NAMES, st.integers(0, 2**63 - 1)
)


@given(st.lists(KEYS, max_size=50), st.integers(1, 20), st.randoms())
def test_parts_are_disjoint_complete_and_do_not_depend_on_the_other_records(keys, n, random):
    def split(records: list[RecordKey]) -> list[list[RecordKey]]:
        return [[key for key in records if Part(i, n).holds(key)] for i in range(n)]

    whole = split(keys)
    assert sum(map(Counter, whole), Counter()) == Counter(keys)
    # What a filter leaves, or what is not done yet, in any order, is split in the same way.
    rest = random.sample(keys, random.randint(0, len(keys)))
    for part, of_rest in zip(whole, split(rest), strict=True):
        assert set(of_rest) == set(part) & set(rest)


def test_more_parts_than_records_leave_some_without_work() -> None:
    keys = [RecordKey("0", 5, "train", "dog", i) for i in range(3)]
    held = [sum(Part(i, 16).holds(key) for key in keys) for i in range(16)]
    assert sum(held) == 3
    assert held.count(0) >= 13


def test_parts_are_even_and_rounds_of_a_sample_spread() -> None:
    parts = itertools.product("01234", range(10), ["train"], ["dog", "cat"], range(100))
    keys = [RecordKey(*each) for each in parts]
    counts = Counter(next(i for i in range(8) if Part(i, 8).holds(key)) for key in keys)
    assert max(counts.values()) < 1.1 * len(keys) / 8
    of_rounds = {
        i for i in range(8) for r in range(40) if Part(i, 8).holds(RecordKey("0", r, "a", "b", 0))
    }
    assert len(of_rounds) > 4


def test_parts_are_the_same_in_every_process_and_version() -> None:
    code = (
        "from fedgfe_store.generation.parts import part_of\n"
        "from fedgfe_store.records import RecordKey\n"
        "keys = [RecordKey('server', 5, 'train', 'chien été', i) for i in range(12)]\n"
        "print([part_of(key, 8) for key in keys])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code]
    output = finished(command, env=environment)
    assert output.stdout.strip() == "[3, 5, 1, 4, 4, 6, 1, 0, 0, 7, 4, 6]"


def test_a_part_is_written_as_it_is_read() -> None:
    assert Part.parse("3/8") == Part(3, 8)
    assert str(Part(3, 8)) == "3/8"
    assert Part.parse("0/1") == Part()


@given(st.lists(KEYS, max_size=30), st.integers(1, 9))
def test_records_are_where_their_keys_say_one_by_one(keys: list[RecordKey], count: int) -> None:
    text, names = np.dtypes.StringDType(), ("node", "split", "class_name")
    columns = {name: np.array([getattr(key, name) for key in keys], text) for name in names}
    columns |= {n: np.array([getattr(k, n) for k in keys], np.int64) for n in ("round", "index")}
    for index in range(count):
        part = Part(index, count)
        expected = [place for place, key in enumerate(keys) if part.holds(key)]
        assert places_of(columns, part).tolist() == expected


def test_a_part_that_is_done_reads_no_other_parts_lists(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, node=0, round=5, n=4)
    flux, folder = save_random_flux(tmp_path / "flux"), tmp_path / "images"
    options: dict[str, Any] = {"pipeline": FakePipeline(flux), "height": SIZE, "width": SIZE}
    parts = [generate(store.select(), folder, **options, part=Part(i, 2)) for i in range(2)]
    read: Counter[Any] = Counter()
    lines_of, outcomes_of = manifest_module._lines, manifest_module._outcomes

    def lines(path: Path, tail_bytes: int | None = None) -> Iterator[dict[str, Any]]:
        for line in lines_of(path, tail_bytes):
            read[path.name] += tail_bytes is None  # the ends of all are looked at, of any size
            yield line

    def outcomes(path: Path) -> Iterator[Any]:
        for outcome in outcomes_of(path):
            read[path.name] += 1
            yield outcome

    monkeypatch.setattr(manifest_module, "_lines", lines)
    monkeypatch.setattr(manifest_module, "_outcomes", outcomes)
    again = generate(store.select(), folder, **options, part=Part(1, 2))
    assert again.skipped == parts[1].done > 0
    # The settings stand in the first line that there is.
    assert read == {"manifest-0-of-2.jsonl": 1, "manifest-1-of-2.jsonl": parts[1].done}
    assert parts[0].done > 1


def test_what_another_part_has_listed_is_not_listed_again(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    fill(store, node=0, round=5, n=4)
    flux, folder = save_random_flux(tmp_path / "flux"), tmp_path / "images"
    options: dict[str, Any] = {"pipeline": FakePipeline(flux), "height": SIZE, "width": SIZE}
    assert generate(store.select(), folder, **options).done == 8
    for i in range(2):
        generate(store.select(), folder, **options, part=Part(i, 2))
    assert Counter(line["file"] for line in read_manifest(folder)).most_common(1)[0][1] == 1


ARRAY = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "1", "MIN": "0", "MAX": "3"}.items()}
ARRAY["SLURM_ARRAY_TASK_COUNT"] = "4"
IGNORED = "the tasks of the SLURM array are not taken for parts of the work"


@pytest.fixture
def plan_of(store: EmbeddingStore, tmp_path: Path):
    """Plan six images from the command line, as a process with this environment would."""
    fill(store, node=0, round=5)
    flux = save_random_flux(tmp_path / "flux")

    def plan_of(environ: dict[str, str], *options: str) -> Result:
        words = ["--store", str(store.path), "generate", "--model", str(flux), "--dry-run"]
        words += ["--output-dir", str(tmp_path / "images"), "--device", "cpu", *options]
        return CliRunner().invoke(group, words, env=environ, catch_exceptions=False)

    return plan_of


def test_a_task_of_an_array_renders_all_and_says_how_to_share_it_out(plan_of) -> None:
    result = plan_of(ARRAY)
    assert "\n6 images: 0 done" in result.stdout
    assert IGNORED in result.stderr
    assert "--part auto" in result.stderr
    assert result.stderr.count("note:") == 1
    assert IGNORED not in plan_of({}).stderr
    assert IGNORED not in plan_of({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "1"}).stderr


def test_a_task_of_an_array_is_a_part_where_that_is_asked_for(plan_of) -> None:
    for option in ("--part", "--shard"):
        for part, shown in {"auto": "1/4", "auto/8": "1/8", "1/8": "1/8"}.items():
            result = plan_of(ARRAY, option, part)
            assert f", part {shown}\n" in result.stdout
            assert IGNORED not in result.stderr
    assert "part 0/1: one process" in plan_of({}, "--part", "auto").stderr
    assert "part: expected i/n" in plan_of({}, "--part", "x").stderr


def test_ranks_are_parts_with_an_array_or_without(plan_of) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2"}
    assert ", part 1/2\n" in plan_of(ranks).stdout
    result = plan_of({**ARRAY, **ranks})
    assert ", part 1/2\n" in result.stdout
    assert IGNORED in result.stderr
    assert ", part 3/8\n" in plan_of({**ARRAY, **ranks}, "--part", "auto").stdout


def test_records_that_a_compaction_moves_are_found_without_looking_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=200)
    flux, folder = save_random_flux(tmp_path / "flux"), tmp_path / "images"
    request, pipeline = Request(height=SIZE, width=SIZE, batch_size=2, limit=4), FakePipeline(flux)
    run = prepare(store.select(index=range(0, 200, 2)), folder, request, pipeline=pipeline)
    other = EmbeddingStore.open(store.path)
    other.delete(index=range(1, 200, 2))
    assert other.compact().records_moved
    built, init = [], RecordKey.__init__

    def counted(self: RecordKey, *args: Any) -> None:
        built.append(args)
        init(self, *args)

    monkeypatch.setattr(RecordKey, "__init__", counted)
    assert render(run, pipeline=pipeline).done == 4
    assert len(built) < 40


def test_a_folder_that_would_lie_in_the_root_can_be_planned(selection: Selection) -> None:
    assert len(plan_images(selection.take([0]), SETTINGS, Path("/no-such-folder")).items) == 1
