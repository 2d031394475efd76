"""Export: legacy files that old scripts, torch's safe loader and our own import read."""

from __future__ import annotations

import errno
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import legacy
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.checkpoints import export_checkpoints, import_checkpoints, read_checkpoint
from fedgfe_store.cli.main import group
from fedgfe_store.errors import ConflictError, SchemaMismatchError
from fedgfe_store.names import checkpoint_names
from fedgfe_store.schema import TensorColumn

WHEN = datetime(2026, 1, 22, 12, 30, 15, 250_000, UTC)


def described(store: EmbeddingStore, *columns: str) -> list[tuple[Any, ...]]:
    """Return key, digests and the notes `columns` of each record, sorted."""
    records = store.select().records
    names = ["node", "round", "split", "class_name", "index", *columns]
    names += [name for name in records.columns.astype(str) if name.endswith("_digest")]
    return sorted(map(tuple, records[names].to_numpy().tolist()))


def there_and_back(store: EmbeddingStore, folder: Path, layout: Any, **options) -> EmbeddingStore:
    files = export_checkpoints(store.select(), folder / "out", layout=layout)
    assert not [file.error for file in files if file.error]
    report = import_checkpoints(folder / "back.zarr", folder / "out", **options)
    assert not report.failed
    assert not any(file.skipped for file in report.files)
    return EmbeddingStore.open(folder / "back.zarr")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def add(batch, names: str, n: int, seed: int, schema: Schema, **more) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        t.name: rng.standard_normal((n, *t.shape), dtype=np.float32)
        for t in schema.tensors
        if not t.optional
    }
    split, class_name = names.split("/")
    given = {"split": split, "class_name": class_name, "index": range(n), **tensors}
    batch.add(**(given | more))


def notes(n: int, split: str) -> dict[str, Any]:
    return {
        "sample_id": [f"{split}_{i}" for i in range(n)],
        "audio_path": [f"/data/{split}/{i}.wav" for i in range(n)],
        "image_filename": [f"picture {i}.png" for i in range(n)],
        "extra": [{"image_path": f"/a/vegas/picture {i}.png", "tags": [1, 2]} for i in range(n)],
        "file_id": [f"f{i}" for i in range(n)],
        "timestamp": WHEN,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Nodes 0 and 10 and the server at rounds 4 and 5, with everything that can be known."""
    path = tmp_path_factory.mktemp("made") / "vegas.zarr"
    metadata = Metadata("vegas", "flux", ("dog", "cat", "bird"))
    store = EmbeddingStore.create(path, Schema.flux(17, metadata=metadata))
    for seed, node in enumerate(("0", "10", "server")):
        for round in (4, 5):
            with store.append(node=node, round=round) as batch:
                for number, names in enumerate(("train/dog", "val/dog", "train/cat")):
                    n = (3, 1, 2)[number]
                    more = notes(n, names.split("/")[0])
                    add(batch, names, n, 100 * seed + 10 * round + number, store.schema, **more)
    return path


@pytest.fixture
def vegas(made, tmp_path) -> EmbeddingStore:
    shutil.copytree(made, tmp_path / "vegas.zarr")
    return EmbeddingStore.open(tmp_path / "vegas.zarr")


# what import makes of it


@pytest.mark.parametrize("layout", ["guide", "upstream"])
def test_importing_an_export_gives_the_same_records(vegas, tmp_path, layout):
    back = there_and_back(vegas, tmp_path, layout)
    known = ("sample_id", "file_id", "audio_path", "image_filename", "extra", "timestamp")
    assert described(back, *known) == described(vegas, *known)
    assert back.schema.metadata.experiment == "vegas"
    assert back.schema.columns == vegas.schema.columns


@pytest.mark.parametrize("layout", ["guide", "upstream"])
@pytest.mark.parametrize(
    "schema",
    [
        Schema.flux(17, clip=(77, 768)),
        Schema.flux(40),
        Schema.sd(77),
        Schema.flux(17, precision="bfloat16"),
    ],
    ids=lambda schema: f"{schema.describe()}, {schema.precision}",
)
def test_every_kind_of_store(tmp_path, schema, layout):
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    for node in ("3", "server"):
        with store.append(node=node, round=1) as batch:
            add(batch, "train/dog", 2, 1, schema)
            add(batch, "train/cat", 1, 2, schema)
    back = there_and_back(store, tmp_path, layout)
    assert described(back) == described(store)
    assert (back.schema.kind, back.schema.columns) == (schema.kind, schema.columns)


@pytest.mark.parametrize("layout", ["guide", "upstream"])
def test_audio_of_some_records(tmp_path, layout):
    store = EmbeddingStore.create(tmp_path / "s.zarr", Schema.flux(17, audio=(4, 768)))
    audio = np.random.default_rng(0).standard_normal((3, 4, 768), dtype=np.float32)
    for node in ("0", "server"):
        with store.append(node=node, round=1) as batch:
            add(batch, "train/cat", 3, 1, store.schema, audio=audio)
            add(batch, "train/dog", 2, 2, store.schema)
            add(batch, "train/dog", 3, 3, store.schema, index=[2, 3, 4], audio=audio)
            add(batch, "train/dog", 1, 4, store.schema, index=[5])
    back = there_and_back(store, tmp_path, layout, audio=True)
    assert described(back, "has_audio") == described(store, "has_audio")


def test_nodes_of_any_name(tmp_path):
    schema = Schema.flux(17)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    nodes = ["0", "01", "7", "hospital-a", "../../x", "münchen/1", "münchen:1", "a b", "x" * 300]
    for seed, node in enumerate(nodes):
        with store.append(node=node, round=1) as batch:
            add(batch, "train/dog", 1, seed, schema)
    assert described(there_and_back(store, tmp_path, "guide")) == described(store)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == len(nodes)
    assert {"node_0_embeddings_r1.pt", "node_hospital-a_embeddings_r1.pt"} < names
    assert all(name.isascii() and len(name) < 200 for name in names)


# what old scripts see


def test_the_guides_layout(vegas, tmp_path):
    files = export_checkpoints(vegas.select(), tmp_path / "deep" / "out")
    assert [file.path.name for file in files] == [
        f"{name}_embeddings_r{round}.pt"
        for round in (4, 5)
        for name in ("node_0", "node_10", "server")
    ]
    assert all(file.records == 6 and file.bytes == file.path.stat().st_size for file in files)
    content = load(files[3].path)
    assert list(content) == ["node_id", "round", "timestamp", "embeddings", "metadata"]
    assert (content["node_id"], content["round"]) == (0, 5)
    assert content["timestamp"] == "2026-01-22T12:30:15.250000"
    assert content["metadata"] == {"diffusion_type": "flux", "selected_classes": ["dog", "cat"]}
    first = content["embeddings"][0]
    tensors = {name: first.pop(f"{name}_embedding") for name in ("t5", "clip")}
    assert first == {
        "split": "train",
        "index": 0,
        "class_name": "dog",
        "image_path": "/a/vegas/picture 0.png",
        "image_filename": "picture 0.png",
        "sample_metadata": {
            "sample_id": "train_0",
            "audio_path": "/data/train/0.wav",
            "file_id": "f0",
            "tags": [1, 2],
        },
    }
    stored = vegas.select(node=0, round=5, split="train", class_name="dog", index=0)
    for name, shape in {"t5": (1, 17, 4096), "clip": (1, 768)}.items():
        assert tensors[name].shape == shape
        assert tensors[name].dtype is torch.float32
        assert np.array_equal(tensors[name].numpy(), stored.read(name))
        assert tensors[name].untyped_storage().nbytes() == tensors[name].nbytes
    assert load(files[5].path)["node_id"] == "server"
    assert "selected_classes" in load(files[5].path)["metadata"]


def test_the_upstream_layout(vegas, tmp_path):
    export_checkpoints(vegas.select(round=5), tmp_path / "out", layout="upstream")
    node = load(tmp_path / "out" / "node_10_embeddings_r5.pt")
    assert [tuple(e["t5_embedding"].shape) for e in node["embeddings"]] == [(17, 4096)] * 6
    assert [tuple(e["clip_embedding"].shape) for e in node["embeddings"]] == [(768,)] * 6
    server = load(tmp_path / "out" / "server_embeddings_r5.pt")
    assert server["metadata"] == {
        "diffusion_type": "flux",
        "federation_classes": ["dog", "cat", "bird"],
    }
    found = [
        (e["split"], e["class_name"], e["node_id"], tuple(e["t5"].shape), tuple(e["clip"].shape))
        for e in server["embeddings"]
    ]
    assert found == [
        ("train", "cat", "server", (2, 17, 4096), (2, 768)),
        ("train", "dog", "server", (3, 17, 4096), (3, 768)),
        ("val", "dog", "server", (1, 17, 4096), (1, 768)),
    ]
    dogs = vegas.select(node="server", round=5, split="train", class_name="dog").read("t5")
    assert np.array_equal(server["embeddings"][1]["t5"].numpy(), dogs)


def test_records_of_which_nothing_is_known_get_the_guides_names(tmp_path):
    schema = Schema.flux(17, metadata=Metadata(experiment="run"))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    with store.append(node=3, round=7) as batch:
        add(batch, "val/dog", 1, 0, schema)
    (file,) = export_checkpoints(store.select(), tmp_path / "out")
    (entry,) = load(file.path)["embeddings"]
    assert entry["image_filename"] == "node_3_val_dog_0_r7.png"
    assert entry["image_path"] == "output_images/run/node_3_val_dog_0_r7.png"
    assert entry["sample_metadata"] == {"sample_id": None, "audio_path": None}


def test_indices_that_the_upstream_layout_cannot_hold_are_told(vegas, tmp_path):
    selection = vegas.select(node=["0", "server"], round=5, index=[1, 2], class_name="dog")
    node, server = export_checkpoints(selection, tmp_path / "out", layout="upstream")
    assert node.notes == ()
    assert server.notes == (
        "split train, class dog: the layout counts samples from 0, so that their indices (1 to 2) "
        "are lost",
    )


def test_a_legacy_file_comes_back_as_it_was(tmp_path):
    """File to store to file: the entries are those that FedGFE wrote, batch axes aside."""
    path, _ = legacy.node_file(tmp_path / "in", 0, 5)
    import_checkpoints(tmp_path / "s.zarr", path)
    selection = EmbeddingStore.open(tmp_path / "s.zarr").select()
    (file,) = export_checkpoints(selection, tmp_path / "out", layout="upstream")
    before, after = load(path), load(file.path)
    for old, new in zip(before.pop("embeddings"), after.pop("embeddings"), strict=True):
        for name in ("t5_embedding", "clip_embedding"):
            assert torch.equal(old.pop(name), new.pop(name))
        assert new["sample_metadata"].pop("audio_path") is None
        assert new == old
    assert before.pop("metadata")["diffusion_type"] == after.pop("metadata")["diffusion_type"]
    assert after == before


# files


def test_files_that_are_there_are_refused_and_nothing_is_written(vegas, tmp_path):
    out = tmp_path / "out"
    legacy.save(out, {}, "node_10_embeddings_r5.pt")
    size = (out / "node_10_embeddings_r5.pt").stat().st_size
    with pytest.raises(ConflictError, match=r"1 of 6 files .* such as node_10_embeddings_r5.pt"):
        export_checkpoints(vegas.select(), out)
    assert [path.name for path in out.iterdir()] == ["node_10_embeddings_r5.pt"]
    assert (out / "node_10_embeddings_r5.pt").stat().st_size == size
    files = export_checkpoints(vegas.select(), out, overwrite=True)
    assert len(files) == len(list(out.iterdir())) == 6
    assert read_checkpoint(out / "node_10_embeddings_r5.pt").node == "10"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_no_other(vegas, tmp_path, monkeypatch, name):
    def fails(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    (file,) = export_checkpoints(vegas.select(node=0, round=5), out)
    before = file.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        with pytest.raises(OSError, match="No space left"):
            export_checkpoints(vegas.select(node=0, round=5), out, overwrite=True)
    assert [path.name for path in out.iterdir()] == [file.path.name]
    assert file.path.read_bytes() == before


def test_a_damaged_record_fails_its_file_alone(vegas, tmp_path):
    (vegas.path / "t5" / "c.2.0.0").unlink()
    reports: list[Any] = []
    files = export_checkpoints(vegas.select(), tmp_path / "out", on_file=reports.append)
    assert tuple(reports) == files
    (failed,) = [file for file in files if file.error]
    assert (failed.node, failed.round, failed.bytes) == ("10", 4, 0)
    assert "t5 of node 10, round 4, split train, class dog, index 0" in (failed.error or "")
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_a_layout_that_is_none(vegas, tmp_path):
    layout: Any = "server"
    with pytest.raises(SchemaMismatchError, match="layout: expected one of guide, upstream, got"):
        export_checkpoints(vegas.select(), tmp_path / "out", layout=layout)


# columns that FedGFE's scripts do not know


@pytest.mark.parametrize(
    "schema",
    [
        Schema("flux", (TensorColumn("llama", (4, 8), ("a", "b")),)),
        Schema.flux(17, width=7680),
        Schema.flux(17, clip=(1280,)),
        Schema.flux(17, clip=(1, 768)),
        Schema.sd(77, width=1024),
        Schema("flux", Schema.sd(77).tensors),
        Schema("sd", Schema.flux(17, audio=(3, 768)).tensors),
        Schema.of("sdxl", clip=(77, 768), pooled_prompt_embeds=(1280,)),
        Schema.of("x.1", a=(1,)),
    ],
    ids=Schema.describe,
)
@pytest.mark.parametrize("layout", ["guide", "upstream"])
def test_other_columns_are_declared_and_come_back(tmp_path, schema, layout):
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    for node in ("0", "server"):
        with store.append(node=node, round=1) as batch:
            add(batch, "train/dog", 1, 0, schema)
            add(batch, "train/dog", 1, 1, schema, index=1)
    back = there_and_back(store, tmp_path, layout)
    assert described(back) == described(store)
    assert back.schema.to_json()["tensors"] == schema.to_json()["tensors"]
    assert back.schema.kind == schema.kind


@pytest.mark.parametrize("name", ["node_id", "image_path", "sample_metadata", "t5_embedding"])
def test_a_column_that_is_called_as_something_else_there_is_refused(tmp_path, name):
    t5 = TensorColumn("t5", (17, 4096), ("token", "feature"))
    schema = Schema("flux", (t5, TensorColumn(name, (4,))))
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    result = run(store, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{name} is something else" in result.stderr
    assert not (tmp_path / "out").exists()


def test_names_with_every_sign_come_back(tmp_path):
    schema = Schema.flux(17)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    names = ["../../up", "a/b", "..", "x,y", "CON", "a b", "é", "10-12"]
    with store.append(round=1) as batch:
        for seed, name in enumerate(names):
            add(batch, "train/dog", 1, seed, schema, node=name, split=name, class_name=name)
    back = there_and_back(store, tmp_path, "guide")
    assert described(back) == described(store)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "s.zarr",
        "out",
        "back.zarr",
        *(path.name for path in tmp_path.glob(".*")),
    }


def test_nodes_that_differ_in_case_have_files_on_every_system(tmp_path):
    schema = Schema.flux(17)
    store = EmbeddingStore.create(tmp_path / "s.zarr", schema)
    for seed, node in enumerate(["A", "a", "B", "server", "Server"]):
        with store.append(node=node, round=1) as batch:
            add(batch, "train/dog", 1, seed, schema)
    assert described(there_and_back(store, tmp_path, "guide")) == described(store)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len({name.casefold() for name in names}) == 5
    assert "node_B_embeddings_r1.pt" in names


def test_names_of_checkpoints_stay_as_they_are():
    origins = [("0", 5), ("server", 5), ("Nord", 1), ("nord", 1), ("a/b é", 2), ("_x", 3)]
    assert [*checkpoint_names(origins).values()] == [
        "node_0_embeddings_r5.pt",
        "server_embeddings_r5.pt",
        "node_Nord_h14a81939516cd22d_embeddings_r1.pt",
        "node_nord_hbc0ee731ac560955_embeddings_r1.pt",
        "node_a-b-_hee77837b301362c7_embeddings_r2.pt",
        "node_-x_hd7c85cc6fb11161f_embeddings_r3.pt",
    ]


# the command


def run(store: EmbeddingStore, *args: object):
    result = CliRunner().invoke(group, ["--store", str(store.path), "export", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_command(vegas, tmp_path):
    out = tmp_path / "out"
    result = run(vegas, "--round", "5", "--node", "0,server", "--output-dir", out)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == ["file", "node", "round", "records", "size"]
    assert [line[:4] for line in lines[2:4]] == [
        ["node_0_embeddings_r5.pt", "0", "5", "6"],
        ["server_embeddings_r5.pt", "server", "5", "6"],
    ]
    assert result.output.splitlines()[-1] == f"2 files, 3.4 MB: 12 records; {out}"
    again = run(vegas, "--round", "5", "--output-dir", out)
    assert (again.exit_code, again.output) == (
        1,
        f"error: {out}: 2 of 3 files are there already, such as node_0_embeddings_r5.pt; "
        "overwrite them, or use another folder\n",
    )
    assert run(vegas, "--round", "5", "--output-dir", out, "--overwrite").exit_code == 0


def test_command_as_of_and_layout(vegas, tmp_path):
    vegas.delete(round=4)
    options = ("--as-of", vegas.commit - 1, "--layout", "upstream", "--index", "1-2")
    result = run(vegas, *options, "--output_dir", tmp_path / "out", "--quiet")
    assert result.exit_code == 0
    assert len(list((tmp_path / "out").iterdir())) == 6
    told = "note: server_embeddings_r4.pt: split train, class dog: the layout counts samples"
    assert told in result.output


def test_command_with_nothing_to_export(vegas, tmp_path):
    result = run(vegas, "--round", 99, "--allow-empty", "--output-dir", tmp_path / "out")
    assert (result.exit_code, result.output) == (
        0,
        f"0 files, 0 B: 0 records; {tmp_path / 'out'}\n",
    )


def test_command_with_damaged_records(vegas, tmp_path):
    (vegas.path / "t5" / "c.2.0.0").unlink()
    result = run(vegas, "--output-dir", tmp_path / "out")
    assert result.exit_code == 3
    assert (
        f"failed: {tmp_path / 'out' / 'node_10_embeddings_r4.pt'}: t5 of node 10" in result.stderr
    )
    assert result.stdout.splitlines()[-1].endswith(f"30 records, 1 failed; {tmp_path / 'out'}")
    only = run(vegas, "--node", "10", "--round", "4", "--output-dir", tmp_path / "other")
    assert only.exit_code == 1
