"""Legacy `.pt` checkpoints: every known layout imports, and nothing in a file is ever run."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import legacy
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from processes import finished, started

from fedgfe_store.checkpoints import (
    experiment_name,
    find_checkpoints,
    import_checkpoints,
    read_checkpoint,
    schema_of,
)
from fedgfe_store.cli.main import group
from fedgfe_store.errors import DamagedDataError, NotFoundError, SchemaMismatchError
from fedgfe_store.store import EmbeddingStore


class Settings:
    """A class such as a training script defines."""


def stored(path: Path) -> dict[tuple[str, int, str, str, int], tuple[np.ndarray, np.ndarray]]:
    """Return a store's T5 and CLIP by (node, round, split, class, index)."""
    selection = EmbeddingStore.open(path).select()
    t5, clip = selection.read("t5"), selection.read("clip")
    names = ["node", "round", "split", "class_name", "index"]
    keys = selection.records[names].itertuples(index=False, name=None)
    return {key: (t5[i], clip[i]) for i, key in enumerate(keys)}


def same(values: Any, tensor: torch.Tensor) -> bool:
    """Compare bit by bit with an independent widening to float32."""
    return np.asarray(values).tobytes() == tensor.detach().float().contiguous().numpy().tobytes()


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def only(path: Path, **options: Any) -> Any:
    """Import one file into a store beside it and return its report."""
    return import_checkpoints(path.parent / "s.zarr", path, **options).files[0]


# every row of the table of layouts


def test_node_file(tmp_path: Path) -> None:
    path, expected = legacy.node_file(tmp_path, node=3, round=5, classes=["dog", "drum"])
    report = only(path)
    assert (report.node, report.round, report.records, report.error) == ("3", 5, 6, None)
    assert report.classes == {"dog": 3, "drum": 3}
    assert report.splits == {"train": 6}
    found = stored(tmp_path / "s.zarr")
    assert len(found) == 6
    for (name, index), (t5, clip) in expected.items():
        values = found["3", 5, "train", name, index]
        assert same(values[0], t5)
        assert same(values[1], clip)


def test_node_file_metadata(tmp_path: Path) -> None:
    path, _ = legacy.node_file(tmp_path)
    only(path)
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    row = store.select(index=1).records.iloc[0]
    assert row["sample_id"] == "train_1"
    assert row["image_filename"] == "node_0_train_dog_1_r5.png"
    assert row["timestamp"].to_pydatetime() == datetime(2026, 1, 22, 12, tzinfo=UTC)
    image = f"{legacy.IMAGES}/node_0_train_dog_1_r5.png"
    assert row["file_id"] == "f1"
    assert json.loads(row["extra"]) == {"image_path": image}
    assert store.schema.metadata.experiment == "vegas"
    assert store.schema.metadata.classes == ("dog", "drum")
    assert store.schema.metadata.diffusion_type == "flux"


def test_guide_file(tmp_path: Path) -> None:
    path, t5, clip = legacy.guide_file(tmp_path)
    only(path)
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert store.schema.columns == {"t5": (512, 4096), "clip": (77, 768)}
    selection = store.select()
    assert same(selection.read("t5"), t5)
    assert same(selection.read("clip"), clip)
    assert set(selection.records["audio_path"]) == {"/data/audio.wav"}


def test_server_file(tmp_path: Path) -> None:
    path, expected = legacy.server_file(tmp_path, n=3)
    report = only(path)
    assert (report.node, report.records, report.skipped) == ("server", 12, {})
    assert "audio embeddings left out: 12 records" in report.notes
    found = stored(tmp_path / "s.zarr")
    for (split, name), (t5, clip, _) in expected.items():
        for i in range(3):
            values = found["server", 5, split, name, i]
            assert same(values[0], t5[i])
            assert same(values[1], clip[i])


def test_server_audio(tmp_path: Path) -> None:
    path, expected = legacy.server_file(tmp_path)
    only(path, audio=True)
    selection = EmbeddingStore.open(tmp_path / "s.zarr").select(split="val", class_name="drum")
    assert same(selection.read("audio"), expected["val", "drum"][2])


def test_audio_of_a_later_file(tmp_path: Path) -> None:
    legacy.node_file(tmp_path)
    legacy.server_file(tmp_path)
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path, audio=True)
    assert not report.failed
    assert EmbeddingStore.open(tmp_path / "s.zarr").schema.columns["audio"] == (4, 768)


def test_audio_into_store_without(tmp_path: Path) -> None:
    path, _ = legacy.server_file(tmp_path)
    only(path)
    with pytest.raises(SchemaMismatchError, match=r"audio: expected a store with a column"):
        only(path, audio=True)


def test_server_entries_of_one_class_go_on_counting(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(5)
    entries = [legacy.stack(t5[:3], clip[:3], node_id=0), legacy.stack(t5[3:], clip[3:], node_id=1)]
    only(legacy.save(tmp_path, legacy.content(entries, "server")))
    selection = EmbeddingStore.open(tmp_path / "s.zarr").select()
    assert selection.records["index"].tolist() == [0, 1, 2, 3, 4]
    assert same(selection.read("t5"), t5)
    assert [json.loads(extra)["node_id"] for extra in selection.records["extra"]] == [0, 0, 0, 1, 1]


def test_node_entries_without_index(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(4)
    names = ["dog", "drum", "dog", "dog"]
    entries = [legacy.entry(t5[i], clip[i], class_name=names[i]) for i in range(4)]
    for made in entries:
        del made["index"]
    entries[2]["clip_embedding"] = None  # keeps its number: mended, it gives the same keys
    only(legacy.save(tmp_path, legacy.content(entries)))
    keys = {(k[3], k[4]) for k in stored(tmp_path / "s.zarr")}
    assert keys == {("dog", 0), ("drum", 0), ("dog", 2)}


@pytest.mark.parametrize("t5", [None, torch.ones(1, 17, 4096)])
def test_stable_diffusion_file(tmp_path: Path, t5: torch.Tensor | None) -> None:
    path, clip = legacy.sd_file(tmp_path, t5=t5)
    assert only(path).skipped == {}
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert (store.schema.kind, store.schema.columns) == ("sd", {"clip": (77, 768)})
    assert same(store.select().read("clip"), clip)


def test_stable_diffusion_stack(tmp_path: Path) -> None:
    clip = torch.randn(3, 77, 768)
    value = legacy.content([legacy.stack(None, clip)], "server")
    value["metadata"]["diffusion_type"] = "sd"
    assert only(legacy.save(tmp_path, value)).records == 3
    assert same(EmbeddingStore.open(tmp_path / "s.zarr").select().read("clip"), clip)


def test_swapped_names(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(2)
    entries = [legacy.entry(clip[i : i + 1], t5[i : i + 1], i) for i in range(2)]
    report = only(legacy.save(tmp_path, legacy.content(entries)))
    assert report.notes == ("t5 and clip under each other's name: 2 entries",)
    values = stored(tmp_path / "s.zarr")["0", 5, "train", "dog", 1]
    assert same(values[0], t5[1])
    assert same(values[1], clip[1])


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_batch_axes(tmp_path: Path, lead: tuple[int, ...]) -> None:
    t5, clip = legacy.tensors(1)
    made = legacy.entry(t5[0].reshape(*lead, 17, 4096), clip[0].reshape(*lead, 768))
    only(legacy.save(tmp_path, legacy.content([made])))
    values = stored(tmp_path / "s.zarr")["0", 5, "train", "dog", 0]
    assert values[0].shape == (17, 4096)
    assert values[1].shape == (768,)
    assert same(values[0], t5)
    assert same(values[1], clip)


T5, CLIP = torch.ones(17, 4096), torch.ones(768)


@pytest.mark.parametrize(
    ("t5", "clip", "reason"),
    [
        (None, CLIP, "no t5"),
        (T5, None, "no clip"),
        (None, None, "no t5 and no clip"),
        (torch.ones(2, 17, 4096), CLIP, "t5_embedding has a batch axis longer than 1"),
        (T5, torch.ones(17, 4096), "ambiguous: t5_embedding and clip_embedding both look like t5"),
        (torch.ones(17, 768), CLIP, "ambiguous: t5_embedding and clip_embedding both look like"),
        (torch.ones(17, 2048), CLIP, r"t5_embedding has shape \[17, 2048\], neither T5"),
        (torch.ones(4096), CLIP, r"t5_embedding has shape \[4096\], neither T5"),
        (T5 * float("nan"), CLIP, "t5 has values that are not finite"),
        (T5, CLIP.index_fill(0, torch.tensor([5]), float("-inf")), "clip has values that are not"),
        (T5.double() * 1e39, CLIP, "t5 has values beyond float32"),
        (T5.int(), CLIP, "t5_embedding is not an ordinary tensor of floating-point values"),
        ([0.0], CLIP, "t5_embedding is a list, not a tensor"),
        (torch.ones(512, 4096), CLIP, r"t5 has shape \[512, 4096\], expected \[17, 4096\]"),
        (T5, torch.ones(77, 768), r"clip has shape \[77, 768\], expected \[768\]"),
    ],
)
def test_one_entry_left_out_and_counted(tmp_path: Path, t5: Any, clip: Any, reason: str) -> None:
    entries = [legacy.entry(T5, CLIP, 0), legacy.entry(t5, clip, 1), legacy.entry(T5, CLIP, 2)]
    report = only(legacy.save(tmp_path, legacy.content(entries)))
    assert (report.records, report.error) == (2, None)
    ((found, count),) = report.skipped.items()
    assert count == 1
    assert re.match(reason, found), found
    assert [key[4] for key in stored(tmp_path / "s.zarr")] == [0, 2]


def test_bad_names_and_indices(tmp_path: Path) -> None:
    bad = [
        legacy.entry(T5, CLIP, -1),
        legacy.entry(T5, CLIP, 1, split=None),
        legacy.entry(T5, CLIP, 2, class_name="\ud800"),
        "no dict",
        legacy.entry(T5, CLIP, 0),
    ]
    del bad[1]["class_name"]  # type: ignore[attr-defined]
    path = legacy.save(tmp_path, legacy.content([legacy.entry(T5, CLIP, 0), *bad]))
    checkpoint = read_checkpoint(path)
    assert [(s.reason, s.position) for s in checkpoint.skipped] == [
        ("index is not a whole number from 0", 1),
        ("split is None, expected a name", 2),
        ("class_name is not valid Unicode text", 3),
        ("entry is a str, not a dict", 4),
        ("same split, class and index as an entry before", 5),
    ]
    assert only(path).records == 1


def test_one_row_of_a_stack_not_finite(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(3)
    t5[1, 4, 7] = float("inf")
    report = only(legacy.save(tmp_path, legacy.content([legacy.stack(t5, clip)], "server")))
    assert report.skipped == {"t5 has values that are not finite": 1}
    assert [key[4] for key in stored(tmp_path / "s.zarr")] == [0, 2]


def test_stacks_of_different_length(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(3)
    entries = [legacy.stack(t5, clip[:2]), legacy.stack(t5, clip, class_name="drum")]
    entries.append(legacy.stack(t5[:0], clip[:0], class_name="chainsaw"))
    report = only(legacy.save(tmp_path, legacy.content(entries, "server")))
    assert report.skipped == {
        "stacks of different length: clip has 2 rows, expected 3": 1,
        "stack without rows": 1,
    }
    assert report.classes == {"drum": 3}


def test_none_for_one_class_and_counts(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(4)
    entries = [legacy.entry(t5[i], clip[i], i) for i in range(4)]
    entries += [legacy.entry(t5[i], None, i, class_name="drum") for i in range(3)]
    report = only(legacy.save(tmp_path, legacy.content(entries)))
    assert (report.classes, report.skipped) == ({"dog": 4}, {"no clip": 3})
    assert Counter(key[3] for key in stored(tmp_path / "s.zarr")) == {"dog": 4}


def test_empty_list_makes_no_store(tmp_path: Path) -> None:
    report = only(legacy.save(tmp_path, legacy.content([])))
    assert (report.records, report.error) == (0, None)
    assert not (tmp_path / "s.zarr").exists()


def test_values_beyond_bfloat16(tmp_path: Path) -> None:
    entries = [legacy.entry(T5, CLIP, 0), legacy.entry(T5 * 3.4e38, CLIP, 1)]
    path = legacy.save(tmp_path, legacy.content(entries))
    report = only(path, precision="bfloat16")
    assert (report.records, report.skipped) == (1, {"values beyond bfloat16": 1})


# node, round and time


@pytest.mark.parametrize(
    ("node", "round", "name", "expected", "notes"),
    [
        (0, -1, "node_0_embeddings_r0.pt", ("0", 0), 1),
        (0, None, "node_0_embeddings_r7.pt", ("0", 7), 1),
        (None, None, "server_embeddings_r4.pt", ("server", 4), 1),
        ("server", 3, "anything.pt", ("server", 3), 0),
        (np.int64(4), np.int64(6), "x.pt", ("4", 6), 0),
        (0, 5, "node_1_embeddings_r5.pt", ("0", 5), 1),
    ],
)
def test_node_and_round(
    tmp_path: Path, node: Any, round: Any, name: str, expected: tuple[str, int], notes: int
) -> None:
    value = legacy.content([legacy.entry(T5, CLIP)], node, round)
    checkpoint = read_checkpoint(legacy.save(tmp_path, value, name))
    assert (checkpoint.node, checkpoint.round) == expected
    assert len(checkpoint.notes) == notes


@pytest.mark.parametrize(("node", "round"), [(None, 5), (0, -1), (0, "five"), (0.5, 5)])
def test_no_node_or_round_anywhere(tmp_path: Path, node: Any, round: Any) -> None:
    path = legacy.save(tmp_path, legacy.content([], node, round), "latest.pt")
    with pytest.raises(SchemaMismatchError, match="the file name tells none either"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2026-01-22T12:00:00", datetime(2026, 1, 22, 12, tzinfo=UTC)),
        ("2026-01-22T12:00:00+02:00", datetime(2026, 1, 22, 10, tzinfo=UTC)),
        (None, None),
        ("yesterday", None),
    ],
)
def test_timestamp(tmp_path: Path, given: Any, expected: datetime | None) -> None:
    path = legacy.save(tmp_path, legacy.content([legacy.entry(T5, CLIP)], timestamp=given))
    assert read_checkpoint(path).timestamp == expected
    assert only(path).records == 1


@pytest.mark.parametrize(
    ("image_path", "expected"),
    [
        ("/a/output_images/vegas-10n/node_0.png", "vegas-10n"),
        ("/a/output_images/node_0.png", "run7"),
        ("C:\\fedgfe\\output_images\\night\\a.png", "night"),
        (None, "run7"),
    ],
)
def test_experiment_name(tmp_path: Path, image_path: str | None, expected: str) -> None:
    made = legacy.entry(T5, CLIP, image_path=image_path)
    path = legacy.save(tmp_path / "run7", legacy.content([made]))
    assert experiment_name(read_checkpoint(path)) == expected


# tensors of every kind


def test_dtypes_gradients_and_strides(tmp_path: Path) -> None:
    base = torch.randn(17, 4096, generator=torch.Generator().manual_seed(3))
    grown = torch.nn.Parameter(base.clone())
    kinds = [
        base.bfloat16(),
        base.half(),
        base.double() * 1.1,
        grown,
        base.T.contiguous().T,
        torch.stack([base, base], 2)[..., 0],
    ]
    entries = [legacy.entry(value, CLIP.clone(), i) for i, value in enumerate(kinds)]
    report = only(legacy.save(tmp_path, legacy.content(entries)))
    assert report.notes == ("float64 rounded to float32: 1 entry",)
    found = stored(tmp_path / "s.zarr")
    for i, value in enumerate(kinds):
        assert same(found["0", 5, "train", "dog", i][0], value), i


def test_bfloat16_edge_values(tmp_path: Path) -> None:
    edges = torch.zeros(17, 4096, dtype=torch.bfloat16)
    edges.view(torch.int16)[0, :4] = torch.tensor([-32768, 1, 0x7F7F, -127], dtype=torch.int16)
    edges[1] = torch.nan_to_num(edges[1])
    edges.view(torch.int16)[0, 3] = -32767  # the smallest negative subnormal
    only(legacy.save(tmp_path, legacy.content([legacy.entry(edges, CLIP)])))
    values = torch.from_numpy(stored(tmp_path / "s.zarr")["0", 5, "train", "dog", 0][0])
    assert torch.equal(values.bfloat16().view(torch.int16), edges.view(torch.int16))


def test_entries_own_their_memory(tmp_path: Path) -> None:
    path, expected = legacy.node_file(tmp_path)
    entries = list(read_checkpoint(path).entries)
    path.write_bytes(b"")
    path.unlink()
    for made in entries:
        t5, clip = expected["dog", made.index]
        assert made.t5 is not None
        assert made.clip is not None
        assert torch.equal(made.t5, t5)
        assert torch.equal(made.clip, clip)
        assert made.t5.untyped_storage().nbytes() == 17 * 4096 * 4


def test_cuda_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path, expected = legacy.node_file(tmp_path)
    monkeypatch.undo()
    with zipfile.ZipFile(path) as archive:
        assert b"cuda:3" in archive.read(f"{path.stem}/data.pkl")
    (made, *_) = read_checkpoint(path).entries
    assert made.t5 is not None
    assert made.t5.device.type == "cpu"
    assert torch.equal(made.t5, expected["dog", 0][0])
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("compress", [False, True])
def test_packed_again(tmp_path: Path, compress: bool) -> None:
    path, expected = legacy.node_file(tmp_path)
    legacy.rewrite_pickle(path, lambda data: data, compress=compress)
    only(path)
    for index in range(3):
        assert same(
            stored(tmp_path / "s.zarr")["0", 5, "train", "dog", index][0], expected["dog", index][0]
        )


def test_older_format(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(2)
    entries = [legacy.entry(t5[i], clip[i], i) for i in range(2)]
    value = legacy.content(entries)
    only(legacy.save(tmp_path, value, _use_new_zipfile_serialization=False))
    assert same(stored(tmp_path / "s.zarr")["0", 5, "train", "dog", 1][0], t5[1])


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_values_of_both_versions(tmp_path: Path, module: bytes) -> None:
    value = legacy.content([legacy.entry(T5, CLIP)])
    value["metadata"] |= legacy.numpy_values()
    path = legacy.save(tmp_path, value)
    here = type(np.float64(0).__reduce__()[0])
    assert here is not None

    def rename(data: bytes) -> bytes:
        for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
            data = data.replace(b"c" + name + b"\n", b"c" + module + b"\n")
        return data

    legacy.rewrite_pickle(path, rename)
    with zipfile.ZipFile(path) as archive:
        assert b"c" + module + b"\nscalar" in archive.read(f"{path.stem}/data.pkl")
    metadata = read_checkpoint(path).metadata
    assert metadata["accuracy"] == 0.25
    assert metadata["count"] == 7
    assert metadata["losses"] == [0.5, 1.5]
    assert metadata["name"] == "vegas"


# files that are not what they seem


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "marker"
    value = legacy.content([legacy.entry(T5, CLIP)], config=legacy.Touches(marker))
    path = legacy.save(tmp_path, value, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    (note,) = checkpoint.notes
    assert re.match(r"_?io\.open: not a plain value, not run, only its name is kept", note)
    assert len(list(checkpoint.entries)) == 1
    assert not marker.exists()
    torch.load(path, weights_only=False)["config"].close()
    assert marker.exists()  # the trap works


def test_every_unknown_class_is_named(tmp_path: Path) -> None:
    value = legacy.content([], settings=[Settings(), Settings()], touches=legacy.Touches(tmp_path))
    first, second = read_checkpoint(legacy.save(tmp_path, value)).notes
    name = f"{Settings.__module__}.Settings"
    assert first == f"{name}: not a plain value, not run, only its name is kept: 2 objects"
    assert second.endswith("open: not a plain value, not run, only its name is kept: 1 object")


@pytest.mark.parametrize("zipped", [True, False])
def test_changed_bytes_of_a_pickle_give_our_errors_only(tmp_path: Path, zipped: bool) -> None:
    value = legacy.content([legacy.entry(T5[:1, :1], CLIP[:1]), legacy.stack(T5[:1, :1], None)])
    path = legacy.save(tmp_path, value, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    start = whole.index(b"node_id")
    outcomes = Counter[str]()
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(start, start + 900, size=2):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            list(read_checkpoint(path).read())
        except (DamagedDataError, SchemaMismatchError) as error:
            outcomes[type(error).__name__] += 1
    assert len(outcomes) == 1 if zipped else 2  # zip files have a checksum of the pickle


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_cut_short(tmp_path: Path, share: float, zipped: bool) -> None:
    value = legacy.content([legacy.entry(T5, CLIP)])
    path = legacy.save(tmp_path, value, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DamagedDataError, match="cut short") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
        (b"hello", "not a file written by torch.save"),
    ],
)
def test_no_checkpoint_at_all(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "node_0_embeddings_r5.pt"
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=reason):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"state_dict": {}, "epoch": 3}, "got a dict of 'state_dict', 'epoch'"),
        (torch.ones(3), "got a Tensor"),
        ({"Dog": {"flux": {}, "sd": 0}}, "got a cache of reference text embeddings"),
        (legacy.content([], embeddings=None), "expected a dict with a list `embeddings`"),
    ],
)
def test_other_files(tmp_path: Path, value: Any, what: str) -> None:
    with pytest.raises(SchemaMismatchError, match=f"not a FedGFE checkpoint.*{what}"):
        read_checkpoint(legacy.save(tmp_path, value))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_checkpoint(tmp_path / "node_0_embeddings_r5.pt")


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path, expected = legacy.node_file(tmp_path)
    data = bytearray(path.read_bytes())
    at = bytes(data).index(expected["dog", 1][0].numpy().tobytes())
    data[at + 1000] ^= 4
    path.write_bytes(data)
    report = only(path)
    assert report.error is not None
    assert "damaged (Bad CRC-32" in report.error
    assert not (tmp_path / "s.zarr").exists()


def test_file_changed_while_read(tmp_path: Path) -> None:
    path, _ = legacy.node_file(tmp_path, round=5)
    checkpoint = read_checkpoint(path)
    legacy.node_file(tmp_path, round=5, n=4)
    with pytest.raises(DamagedDataError, match="changed while it was being read"):
        list(checkpoint.entries)


# schema


def test_schema_of(tmp_path: Path) -> None:
    path, _ = legacy.node_file(tmp_path)
    schema = schema_of(read_checkpoint(path), precision="bfloat16")
    assert schema.columns == {"t5": (17, 4096), "clip": (768,)}
    assert schema.precision == "bfloat16"


def test_schema_of_nothing_complete(tmp_path: Path) -> None:
    path = legacy.save(tmp_path, legacy.content([legacy.entry(T5, None)]))
    with pytest.raises(SchemaMismatchError, match="expected a record with t5 and clip"):
        schema_of(read_checkpoint(path))


def test_other_shapes_than_the_store_are_refused(tmp_path: Path) -> None:
    legacy.node_file(tmp_path, round=1)
    legacy.node_file(tmp_path, round=2, tokens=20)
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    assert [file.records for file in report.files] == [3, 0]
    error = report.files[1].error
    assert error is not None
    assert "t5 [17, 4096]" in error
    assert "t5 [20, 4096]" in error


def test_no_clip_in_a_t5_clip_store(tmp_path: Path) -> None:
    legacy.node_file(tmp_path, round=1)
    value = legacy.content([legacy.entry(T5, None)], 1, 1)
    legacy.save(tmp_path, value, "node_1_embeddings_r1.pt")
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    assert report.files[1].skipped == {"no clip": 1}
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert len(store) == 3
    assert store.select().read("t5").shape[0] == store.select().read("clip").shape[0] == 3


# folders


def test_natural_order(tmp_path: Path) -> None:
    names = ["node_0_embeddings_r10.pt", "node_0_embeddings_r2.pt", "server_embeddings_r1.pt"]
    for name in names:
        (tmp_path / name).touch()
    found = [path.name for path in find_checkpoints(tmp_path)]
    assert found == [names[1], names[0], names[2]]
    assert [p.name for p in find_checkpoints(tmp_path, pattern="node_[0-4]*.pt")] == found[:2]
    with pytest.raises(NotFoundError, match=r"no file matches 'x\*'"):
        find_checkpoints(tmp_path, pattern="x*")


def test_folder_with_late_rounds(tmp_path: Path) -> None:
    expected: dict[Any, Any] = {}
    for number, (node, round) in enumerate([(0, 7), (0, 6), (1, 7), (1, 5), (0, 5)]):
        folder = tmp_path / f"batch{number}"
        _, made = legacy.node_file(folder, node, round, n=2)
        expected |= {(str(node), round, "train", *key): value for key, value in made.items()}
        import_checkpoints(tmp_path / "s.zarr", folder)
    found = stored(tmp_path / "s.zarr")
    assert found.keys() == expected.keys()
    assert all(same(found[key][0], expected[key][0]) for key in expected)
    picked = EmbeddingStore.open(tmp_path / "s.zarr").select(round=range(5, 7)).records
    assert set(zip(picked["node"], picked["round"], strict=True)) == {("0", 5), ("0", 6), ("1", 5)}


def test_import_again_changes_nothing(tmp_path: Path) -> None:
    legacy.node_file(tmp_path)
    legacy.server_file(tmp_path)
    first = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    commit = EmbeddingStore.open(tmp_path / "s.zarr").commit
    again = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    assert (first.records, again.records, again.unchanged) == (15, 0, 15)
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert (store.commit, len(store)) == (commit, 15)
    assert commit == 2


def test_changed_file(tmp_path: Path) -> None:
    path, _ = legacy.node_file(tmp_path)
    only(path)
    _, changed = legacy.node_file(tmp_path, seed=77)
    error = only(path).error
    assert error is not None
    assert "node 0, round 5, split train, class dog, index 0" in error
    assert only(path, if_exists="skip").unchanged == 3
    assert only(path, if_exists="replace").replaced == 3
    assert same(stored(tmp_path / "s.zarr")["0", 5, "train", "dog", 2][0], changed["dog", 2][0])


def test_text_caches_become_references(tmp_path: Path) -> None:
    legacy.node_file(tmp_path)
    cache, expected = legacy.text_cache(tmp_path, name="a_text_embs_dict.pt")
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    file = report.files[-1]
    assert (file.path, file.node, file.round, file.records) == (cache, "text", 0, 2)
    assert (file.classes, file.splits) == ({"baby_cry": 1, "dog": 1}, {"reference": 2})
    found = stored(tmp_path / "s.zarr")
    for given, name in (("Dog", "dog"), ("baby_cry", "baby_cry")):
        t5, clip = found["text", 0, "reference", name, 0]
        assert same(t5, expected[given]["t5"])
        assert same(clip, expected[given]["clip"])
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    extra = store.select(node="text").records["extra"]
    assert [json.loads(text) for text in extra] == [{"cache": cache.name}] * 2
    assert store.schema.metadata.classes == ("dog", "drum", "baby_cry")
    again = only(cache)
    assert (again.records, again.unchanged) == (0, 2)
    assert EmbeddingStore.open(tmp_path / "s.zarr").commit == store.commit


def test_a_text_cache_that_changed_is_a_conflict(tmp_path: Path) -> None:
    assert only(legacy.text_cache(tmp_path)[0]).records == 2
    cache, _ = legacy.text_cache(tmp_path, ["baby_cry", "Dog"])
    assert "node text, round 0, split reference, class baby_cry" in only(cache).error
    assert only(cache, if_exists="replace").replaced == 2


def test_the_stores_kind_decides_what_of_a_text_cache_is_taken(tmp_path: Path) -> None:
    legacy.sd_file(tmp_path)
    _, expected = legacy.text_cache(tmp_path)
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    assert [file.error for file in report.files] == [None, None]
    selection = EmbeddingStore.open(tmp_path / "s.zarr").select(node="text", class_name="dog")
    assert same(selection.read("clip")[0], expected["Dog"]["sequence"])


def test_a_text_cache_alone_makes_a_store(tmp_path: Path) -> None:
    cache, _ = legacy.text_cache(tmp_path)
    assert only(cache, dry_run=True).records == 2
    assert not (tmp_path / "s.zarr").exists()
    assert only(cache).classes == {"Dog": 1, "baby_cry": 1}
    schema = EmbeddingStore.open(tmp_path / "s.zarr").schema
    assert (schema.kind, schema.columns) == ("flux", {"t5": (17, 4096), "clip": (768,)})
    lone = legacy.save(tmp_path / "sd", {"dog": {"sd": torch.ones(77, 768)}}, cache.name)
    assert only(lone).records == 1
    assert EmbeddingStore.open(tmp_path / "sd" / "s.zarr").schema.kind == "sd"


def test_what_does_not_fit_of_a_text_cache_is_counted(tmp_path: Path) -> None:
    t5, clip = legacy.tensors(2)
    nan, long = torch.full((1, 17, 4096), torch.nan), torch.ones(1, 512, 4096)
    more: dict[str, Any] = {
        "long": {"flux": {"prompt_embeds": long, "pooled_prompt_embeds": clip[:1]}},
        "half": {"flux": {"prompt_embeds": t5[:1], "pooled_prompt_embeds": None}},
        "bad": {"flux": {"prompt_embeds": nan, "pooled_prompt_embeds": clip[:1]}},
        "none": {"sd": torch.ones(77, 768)},
        "raw": torch.ones(3),
        "swapped": {"flux": {"prompt_embeds": clip[1], "pooled_prompt_embeds": t5[1]}},
    }
    legacy.node_file(tmp_path)
    legacy.text_cache(tmp_path, ["Dog", "dog", 3], **more)
    file = import_checkpoints(tmp_path / "s.zarr", tmp_path).files[-1]
    assert file.error is None
    assert file.classes == {"3": 1, "dog": 1, "swapped": 1}
    assert file.skipped == {
        "t5 has shape [512, 4096], expected [17, 4096]": 1,
        "t5 has values that are not finite": 1,
        "no clip": 1,
        "no t5 and no clip": 1,
        "entry is a Tensor, not a dict": 1,
        "same split, class and index as an entry before": 1,
    }
    assert same(stored(tmp_path / "s.zarr")["text", 0, "reference", "swapped", 0][0], t5[1])


def test_a_text_cache_none_of_which_fits_is_refused(tmp_path: Path) -> None:
    legacy.node_file(tmp_path)
    legacy.text_cache(tmp_path, tokens=32)
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path)
    error = report.files[1].error or ""
    assert "expected tensors as in the store (flux: t5 [17, 4096]" in error
    assert "got flux: t5 [32, 4096], clip [768]" in error


def test_text_caches_are_loaded_safely(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bad, _ = legacy.text_cache(tmp_path, evil=legacy.Touches(marker))
    report = only(bad)
    assert report.records == 2
    assert [re.sub("_io", "io", reason) for reason in report.skipped] == [
        "entry is <io.open>, not a dict"
    ]
    assert "open: not a plain value, not run" in report.notes[-1]
    assert not marker.exists()
    other = legacy.save(tmp_path, legacy.content([]), "other_text_embs_dict.pt")
    assert "expected a dict of classes with 'flux' or 'sd' each, got a dict" in only(other).error


def test_import_shows_text_caches(tmp_path: Path) -> None:
    legacy.node_file(tmp_path)
    legacy.text_cache(tmp_path)
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"vegas_text_embs_dict.pt +text +0 +2 +0 +baby_cry 1, dog 1", result.output)
    assert "2 files" in result.output


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    legacy.node_file(tmp_path, n=2)
    legacy.server_file(tmp_path, n=2)
    report = import_checkpoints(tmp_path / "s.zarr", tmp_path, dry_run=True)
    assert [file.records for file in report.files] == [2, 8]
    assert not (tmp_path / "s.zarr").exists()


def test_source_may_go_after_the_import(tmp_path: Path) -> None:
    path, expected = legacy.node_file(tmp_path)
    only(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    assert same(stored(tmp_path / "s.zarr")["0", 5, "train", "dog", 0][0], expected["dog", 0][0])


def test_reading_leaves_torchs_settings_alone(tmp_path: Path) -> None:
    path, _ = legacy.node_file(tmp_path)
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_checkpoint(path)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# the command


def test_command(tmp_path: Path) -> None:
    legacy.node_file(tmp_path / "c", classes=["dog", "drum"])
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert "node_0_embeddings_r5.pt" in result.output
    assert "dog 3, drum 3" in result.output
    assert "6 new records" in result.output


def test_command_goes_on_after_bad_files_and_mends(tmp_path: Path) -> None:
    legacy.node_file(tmp_path / "c", 0)
    bad, _ = legacy.node_file(tmp_path / "c", 1)
    legacy.node_file(tmp_path / "c", 2)
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    store = tmp_path / "s.zarr"
    result = run("--store", store, "import", tmp_path / "c")
    assert result.exit_code == 3
    assert "failed: " in result.output
    assert "cut short" in result.output
    assert {key[0] for key in stored(store)} == {"0", "2"}
    bad.write_bytes(whole)
    result = run("--store", store, "import", tmp_path / "c")
    assert result.exit_code == 0
    assert "3 new records, 6 unchanged" in result.output


def test_command_when_all_fail(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "a.pt")
    assert result.exit_code == 1
    assert "empty file" in result.output
    assert run("--store", tmp_path / "s.zarr", "import", tmp_path / "none").exit_code == 1
    assert not (tmp_path / "s.zarr").exists()


def test_command_abbreviates_classes(tmp_path: Path) -> None:
    legacy.node_file(tmp_path / "c", n=1, classes=[f"class{i}" for i in range(9)])
    result = run("--store", tmp_path / "s.zarr", "import", tmp_path / "c", "--dry-run")
    assert result.exit_code == 0
    assert "9 with 1 each" in result.output
    assert "dry run, nothing written" in result.output


# processes


@pytest.mark.slow
@pytest.mark.kill
def test_killed_import_goes_on(tmp_path: Path) -> None:
    expected: dict[Any, Any] = {}
    for round in range(1, 6):
        _, made = legacy.node_file(tmp_path / "c", 0, round, n=40)
        expected |= {("0", round, "train", *key): value for key, value in made.items()}
    script = (
        "import sys, torch\n"
        "from fedgfe_store.checkpoints import import_checkpoints\n"
        "say = lambda file: print(file.round, flush=True)\n"
        "import_checkpoints(sys.argv[1], sys.argv[2], on_file=say)\n"
    )
    store, folder = tmp_path / "s.zarr", tmp_path / "c"
    for files in (1, 2):
        with started([sys.executable, "-c", script, store, folder]) as child:
            assert [child.line() for _ in range(files)] == [f"{n + 1}" for n in range(files)]
            child.kill()
    assert not import_checkpoints(store, folder).failed
    found = stored(store)
    assert found.keys() == expected.keys()
    assert all(same(found[key][0], expected[key][0]) for key in expected)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dry_run_of_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    n = 3600
    t5, clip = torch.zeros(n, 17, 4096), torch.zeros(n, 768)
    entries = [legacy.entry(t5[i], clip[i], i) for i in range(n)]
    path = legacy.save(tmp_path, legacy.content(entries))
    del t5, clip, entries
    script = (
        "import sys, re\n"
        "from click.testing import CliRunner\n"
        "from fedgfe_store.cli.main import group\n"
        "import fedgfe_store.checkpoints\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "arguments = ['--store', sys.argv[2], 'import', sys.argv[1], '--dry-run']\n"
        "result = CliRunner().invoke(group, arguments)\n"
        "assert result.exit_code == 0 and '3,600 records found' in result.output, result.output\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "s.zarr")]
    done = finished(command, check=False)
    size = path.stat().st_size
    path.unlink()
    assert done.returncode == 0, done.stderr
    grown = 1024 * int(done.stdout)
    assert size > 1_000_000_000
    assert grown < size / 4, f"{grown / 1e6:.0f} MB"
