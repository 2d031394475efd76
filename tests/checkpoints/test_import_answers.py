"""What import says: which round counts, what was left out, and that nothing could be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import legacy
import pytest
import torch
from click.testing import CliRunner

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import ImportRequest, import_checkpoints, read_checkpoint
from fedgfe_store.checkpoints.request import ImportOptions
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError

T5, CLIP = torch.ones(17, 4096), torch.ones(768)
NAN = torch.full((768,), torch.nan)


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def save(folder: Path, *entries: Any, **more: Any) -> Path:
    name = more.pop("name", "node_0_embeddings_r5.pt")
    return legacy.save(folder, legacy.content(entries, **more), name)


# what is asked


def test_every_field_of_a_request_is_a_keyword_of_its_type():
    assert get_type_hints(ImportOptions) == get_type_hints(ImportRequest)
    assert not ImportOptions.__required_keys__


def test_keywords_take_the_place_of_a_requests_fields(tmp_path: Path):
    legacy.node_file(tmp_path / "c", 0, 4, n=2)
    request = ImportRequest(pattern="*.none", dry_run=True, precision="bfloat16")
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path / "c", request, pattern="*.pt")
    assert report.records == 2
    assert not Path(str(report.store_path)).exists()
    import_checkpoints(report.store_path, tmp_path / "c", request, pattern="*.pt", dry_run=False)
    assert EmbeddingStore.open(report.store_path).schema.precision == "bfloat16"


def test_type_checkers_see_wrong_keywords_of_an_import(tmp_path: Path):
    # mypy, which checks the tests, complains of a comment that hides nothing.
    with pytest.raises(TypeError, match="'patern'"):
        import_checkpoints(tmp_path / "s.zarr", tmp_path, patern="*.pt")  # type: ignore[call-arg]


# a round in the name and another in the content


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """A folder with round 4, and a file named r5 that says it is round 4, too."""
    folder = tmp_path / "c"
    legacy.node_file(folder, 0, 4, n=2)
    t5, clip = legacy.tensors(2, 55)
    entries = [legacy.entry(t5[i], clip[i], i) for i in range(2)]
    save(folder, *entries, round=4)
    return folder


def rounds_in(store: Path) -> list[int]:
    return EmbeddingStore.open(store).select().records["round"].tolist()


def test_a_file_whose_name_tells_another_round_is_refused(rounds: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    result = run("--store", store, "import", rounds)
    assert result.exit_code == 3
    assert (
        "node_0_embeddings_r5.pt: round 4 by content, 5 by file name: say which counts with "
        "`import --round-from content` or `--round-from name`\n"
    ) in result.stderr
    assert rounds_in(store) == [4, 4]
    result = run("--store", store, "import", rounds, "--if-exists", "replace")
    assert result.exit_code == 3
    assert "2 unchanged, 1 failed" in result.output


def test_the_round_of_the_name_counts_where_that_is_said(rounds: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    result = run("--store", store, "import", rounds, "--round-from", "name")
    assert result.exit_code == 0
    note = "note: node_0_embeddings_r5.pt: round 4 by content, 5 by file name: file name counts"
    assert note in result.output
    assert rounds_in(store) == [4, 4, 5, 5]
    assert import_checkpoints(store, rounds, round_from="name").unchanged == 4


def test_the_round_of_the_content_counts_and_failed_files_have_notes(
    rounds: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    result = run("--store", store, "import", rounds, "--round-from", "content")
    assert result.exit_code == 3
    assert "round 4 by content, 5 by file name: content counts" in result.output
    assert "round 4, split train, class dog, index 0 is in" in result.stderr


@pytest.mark.parametrize("given", [-1, None, "five", 5])
def test_a_round_that_agrees_or_that_nobody_knows_needs_no_word(tmp_path: Path, given: Any) -> None:
    path = save(tmp_path, legacy.entry(T5, CLIP), round=given)
    assert read_checkpoint(path).round == 5


def test_round_from_is_one_of_two(tmp_path: Path) -> None:
    path = save(tmp_path, legacy.entry(T5, CLIP), round=4)
    assert read_checkpoint(path, round_from="name").round == 5
    assert read_checkpoint(path, round_from="content").round == 4
    with pytest.raises(SchemaMismatchError, match="expected name or content, got 'both'"):
        read_checkpoint(path, round_from="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [2**31, 2**70, 10**5000], ids=["31", "70", "5000"])
def test_a_round_that_no_store_can_hold(tmp_path: Path, number: int) -> None:
    path = save(tmp_path, legacy.entry(T5, CLIP), round=number, name="x.pt")
    with pytest.raises(SchemaMismatchError, match="round: expected 0 to 2147483647, got"):
        read_checkpoint(path)


# files of which nothing is usable

WIDE = torch.ones(17, 7680)


@pytest.mark.parametrize(
    ("entries", "kind", "says"),
    [
        ([legacy.entry(None, None, i) for i in range(5)], "flux", "no t5 and no clip: split train"),
        ([legacy.entry(WIDE, CLIP)], "flux", "t5_embedding has shape [17, 7680], neither T5"),
        ([legacy.entry(T5, CLIP, class_name=None)], "flux", "class_name is None, expected a name"),
        ([legacy.entry(None, CLIP)], "sd", "clip has shape [768], expected two axes: split train"),
    ],
)
def test_a_file_of_which_nothing_can_be_used(
    tmp_path: Path, entries: list[Any], kind: str, says: str
) -> None:
    path = save(tmp_path, *entries, metadata={"diffusion_type": kind})
    result = run("--store", tmp_path / "s.zarr", "import", path)
    assert result.exit_code == 3
    assert f"left out: {path}: {says}" in result.stderr
    assert f"{len(entries)} skipped; no store at {tmp_path / 's.zarr'}" in result.output
    assert not (tmp_path / "s.zarr").exists()


def test_classes_that_are_numbers_become_text_with_a_note(tmp_path: Path) -> None:
    numbers = [legacy.entry(T5, CLIP, class_name=name) for name in (3, torch.tensor(7))]
    path = save(tmp_path, *numbers)
    result = run("--store", tmp_path / "s.zarr", "import", path)
    assert result.exit_code == 0
    assert "class_name is a number: taken as text: 2 entries" in result.output
    found = EmbeddingStore.open(tmp_path / "s.zarr").select().records["class_name"]
    assert sorted(found) == ["3", "7"]


# records that are left out


def test_records_that_are_left_out_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    legacy.node_file(folder, 1, n=1)
    bad = [legacy.entry(T5, NAN, i) for i in range(1, 6)]
    path = save(folder, legacy.entry(T5, CLIP), *bad, "no entry")
    store = tmp_path / "s.zarr"
    for options in ([], ["--dry-run"]):
        result = run("--store", store, "import", folder, *options)
        assert result.exit_code == 3
        lines = [line for line in result.stderr.splitlines() if line.startswith("left out")]
        named = "; ".join(f"split train, class dog, index {i}" for i in (1, 2, 3))
        assert sorted(lines) == [
            f"left out: {path}: clip has values that are not finite: {named} and 2 more",
            f"left out: {path}: entry is a str, not a dict: entry 6",
        ]
    assert len(EmbeddingStore.open(store)) == 2


def test_values_beyond_the_stores_precision_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, legacy.entry(T5, CLIP), legacy.entry(T5 * 3.4e38, CLIP, 1))
    report = import_checkpoints(tmp_path / "s.zarr", path, precision="bfloat16").files[0]
    assert report.left_out == {
        "values beyond bfloat16": ("split train, class dog, index 1",),
    }


def test_records_that_were_deleted_are_no_failure(tmp_path: Path) -> None:
    legacy.node_file(tmp_path, n=2)
    store = tmp_path / "s.zarr"
    import_checkpoints(store, tmp_path)
    EmbeddingStore.open(store).delete(index=1)
    (tmp_path / ".s.zarr.imported").unlink()
    (report,) = import_checkpoints(store, tmp_path, new_only=True).files
    assert (report.skipped, report.left_out) == ({"deleted from the store before": 1}, {})


def test_fail_fast_stops_before_a_file_is_taken_in_part(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    legacy.node_file(folder, 0, 4, n=1)
    path = save(folder, legacy.entry(T5, CLIP), legacy.entry(T5, NAN, 1))
    legacy.node_file(folder, 0, 6, n=1)
    store = tmp_path / "s.zarr"
    result = run("--store", store, "import", folder, "--fail-fast")
    assert result.exit_code == 3
    why = "split train, class dog, index 1: clip has values that are not finite"
    assert f"failed: {path}: {why}\n" in result.stderr
    assert "stopped: 1 file not read" in result.stderr
    assert rounds_in(store) == [4]
    assert EmbeddingStore.open(store).verify().sound


def test_failed_files_count_with_their_size(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x" * 2000)
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "a.pt")
    assert result.exit_code == 1
    assert re.search(
        r"^1 file, 2.0 kB: 0 new records, 1 failed; no store", result.output, re.MULTILINE
    )
