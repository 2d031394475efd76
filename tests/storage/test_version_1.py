"""A store of format version 1, as the release before version 2 left it, goes on as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import xxhash
from click.testing import CliRunner
from places import DATA

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError

EXPECTED: list[dict[str, Any]] = json.loads((DATA / "federation_v1.json").read_text("utf-8"))
COLUMNS = ("t5", "clip", "audio")


@pytest.fixture
def old(tmp_path: Path) -> EmbeddingStore:
    path = tmp_path / "old.zarr"
    shutil.copytree(DATA / "federation_v1.zarr", path)
    return EmbeddingStore.open(path)


def version(store: EmbeddingStore) -> int:
    document = json.loads((store.path / "zarr.json").read_text("utf-8"))
    return document["attributes"]["fedgfe_store"]["version"]


def shown(store: EmbeddingStore) -> list[dict[str, Any]]:
    """What the store holds, in the words of the fixture's description."""
    selection = store.select()
    frame = selection.records
    tensors = {name: selection.read(name) for name in COLUMNS}
    found = []
    for i, row in enumerate(frame.to_dict("records")):
        one = {name: row[name] for name in EXPECTED[0] if name in row and name != "timestamp"}
        one["timestamp"] = row["timestamp"].isoformat()
        one |= {name: xxhash.xxh3_128_hexdigest(t[i].tobytes()) for name, t in tensors.items()}
        found.append(one)
    return found


def ordered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("node", "round", "split", "class_name", "index")
    return sorted(records, key=lambda record: [record[name] for name in names])


def tensors(n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "t5": rng.standard_normal((n, 2, 4096), dtype=np.float32),
        "clip": rng.standard_normal((n, 768), dtype=np.float32),
    }


def append(store: EmbeddingStore, **notes: Any) -> None:
    with store.append(node=7, round=2, source="a test") as batch:
        batch.add(split="test", class_name="dog", index=range(3), **tensors(3, 0), **notes)


def test_it_reads_as_the_release_that_wrote_it_read_it(old):
    assert version(old) == 1
    assert old.id is None
    assert shown(old) == EXPECTED
    assert old.verify().sound
    assert set(old.select().records["file_id"]) == {""}
    assert set(old.history()["source"]) == {""}


def test_it_is_written_on_in_version_1_and_keeps_what_it_had(old):
    append(old)
    old.delete(node=0, round=1)
    old.compact()
    opened = EmbeddingStore.open(old.path)
    assert version(opened) == 1
    assert sorted(p.name for p in opened.path.iterdir() if p.is_file()) == ["zarr.json"]
    assert not (opened.path / "file_id").exists()
    found = [record for record in shown(opened) if record["node"] != "7"]
    gone = [r for r in EXPECTED if (r["node"], r["round"]) == ("0", 1)]
    assert ordered(found) == ordered([record for record in EXPECTED if record not in gone])
    assert opened.verify().sound


def test_a_writer_of_version_1_that_died_is_cleared_and_its_pending_too(old):
    (old.path / "pending").write_text("{}")
    (old.path / "t5" / "c.99.0.0").write_bytes(b"torn")
    append(old)
    found = EmbeddingStore.open(old.path).verify()
    assert (found.sound, found.leftovers) == (True, ())


def test_upgrade_keeps_every_record_and_finds_its_file_id(old):
    before = old.history()
    assert old.upgrade()
    opened = EmbeddingStore.open(old.path)
    assert version(opened) == 2
    assert opened.id
    assert shown(opened) == EXPECTED
    named = [json.loads(record["extra"])["file_id"] for record in EXPECTED]
    assert opened.select().records["file_id"].tolist() == named
    assert len(opened.select(file_id=named[3])) == 1
    assert opened.history()["kind"].tolist() == [*before["kind"], "upgrade"]
    assert opened.verify().sound
    assert not opened.upgrade()
    append(opened, file_id=["x", "y", "z"])
    assert opened.select(file_id="y").records["index"].tolist() == [1]
    assert opened.history()["source"].tolist()[-1] == "a test"
    past = EmbeddingStore.open(old.path, as_of=11)
    assert shown(past) == EXPECTED


def test_the_first_record_with_a_file_id_upgrades_it(old, caplog):
    append(old, file_id=["x", "y", "z"])
    assert version(old) == 2
    assert "format version 2" in caplog.text
    assert old.select(file_id=["x", "y"]).records["index"].tolist() == [0, 1]
    assert ordered([r for r in shown(old) if r["node"] != "7"]) == ordered(EXPECTED)
    assert EmbeddingStore.open(old.path).verify().sound


def test_a_broken_off_upgrade_leaves_version_1(old, monkeypatch):
    real = EmbeddingStore.open(old.path)

    def full(self, contents):
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patched:
        patched.setattr("fedgfe_store.storage.staging.Staging.write", full)
        with pytest.raises(OSError, match="No space"):
            real.upgrade()
    opened = EmbeddingStore.open(old.path)
    assert version(opened) == 1
    assert shown(opened) == EXPECTED
    assert opened.upgrade()
    assert shown(EmbeddingStore.open(old.path)) == EXPECTED


def test_any_zarr_reader_opens_it_before_and_after(old):
    def plain() -> list[str]:
        ds = xr.open_zarr(old.path)
        commit = ds.attrs["fedgfe_store"]["commit_point"]["commit"]
        visible = (ds.created_in > 0) & ~((ds.deleted_in > 0) & (ds.deleted_in <= commit))
        ds = ds.isel(record=np.flatnonzero(visible))
        return [xxhash.xxh3_128_hexdigest(each.tobytes()) for each in ds.t5.to_numpy()]

    expected = [record["t5"] for record in EXPECTED]
    assert plain() == expected
    old.upgrade()
    assert plain() == expected


def test_it_renders(old, tmp_path):
    command = ["--store", str(old.path), "generate", "--steps", "1", "--round", "0"]
    done = CliRunner().invoke(group, [*command, "--output-dir", str(tmp_path / "images")])
    assert done.exit_code == 0, done.output
    count = sum(record["round"] == 0 for record in EXPECTED)
    assert len(list((tmp_path / "images").glob("*.png"))) == count


def test_it_is_verified_and_upgraded_on_the_command_line(old):
    def run(*words: str) -> str:
        done = CliRunner().invoke(group, ["--store", str(old.path), *words])
        assert done.exit_code == 0, done.output
        return done.output

    assert "sound: 13 records" in run("verify", "--quiet")
    assert "format version 2" in run("upgrade")
    assert "sound: 13 records" in run("verify", "--quiet")
    assert "nothing to do" in run("upgrade")


def test_what_a_later_version_may_ask_is_refused_by_name(old):
    old.upgrade()
    file = old.path / "zarr.json"
    document = json.loads(file.read_text("utf-8"))
    document["attributes"]["fedgfe_store"]["features"] = ["masks", "zone maps"]
    file.write_text(json.dumps(document))
    with pytest.raises(SchemaMismatchError, match=r"does not know \(masks, zone maps\): install"):
        EmbeddingStore.open(old.path)
