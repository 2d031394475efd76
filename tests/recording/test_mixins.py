"""FedGFE's own methods, hook and configuration, writing to a store."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import legacy
import miniature
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from processes import finished

from fedgfe_store import EmbeddingStore, Metadata
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording.fedgfe import (
    EmbeddingBatch,
    EmbeddingClientMixin,
    EmbeddingServerMixin,
    RecordingSettings,
)
from fedgfe_store.storage.lock import WriterLock

FEDA2V = {
    "save_embeddings_instead_of_images": True,
    "embeddings_save_frequency": 2,
    "generate_nodes_images_frequency": 0,
    "generate_global_images_frequency": 0,
}
Found = dict[tuple[str, int, str, str, int], tuple[int, ...]]


def content(path: Path) -> Found:
    """Digests of the tensors by key: what a store holds, whatever its order and history."""
    selection = EmbeddingStore.open(path).select()
    digests = selection.records.filter(like="_digest").to_numpy().tolist()
    keys = [(k.node, k.round, k.split, k.class_name, k.index) for k in selection.keys()]
    return dict(zip(keys, map(tuple, digests), strict=True))


class Client(EmbeddingClientMixin):
    """A client that yields what it is given for each split."""

    def __init__(self, **splits):
        self.id, self.splits = 0, splits

    def iter_embeddings(self, split):
        return self.splits.get(split)


def batch(n: int = 2, seed: int = 0, **more) -> EmbeddingBatch:
    t5, clip = legacy.tensors(n, seed)
    return EmbeddingBatch(**{"class_name": "dog", "t5": t5, "clip": clip, **more})


# a client


def test_a_client_saves_all_splits_as_one_commit(tmp_path):
    client = Client(train=[batch(2, 1), batch(1, 2, class_name="cat")], test=[batch(1, 3)])
    folder = tmp_path / "checkpoints" / "vegas"
    path = client.save_embeddings_to_checkpoint(
        split="all", checkpoint_dir=str(folder), round_num=5
    )
    assert path == folder / "embeddings.zarr"
    store = EmbeddingStore.open(path)
    assert store.commit == 1
    records = store.select().records
    assert records["image_filename"].tolist() == [
        "node_0_train_dog_0_r5.png",
        "node_0_train_dog_1_r5.png",
        "node_0_train_cat_0_r5.png",
        "node_0_test_dog_0_r5.png",
    ]
    assert [json.loads(extra)["image_path"] for extra in records["extra"]] == [
        f"output_images/vegas/{name}" for name in records["image_filename"]
    ]
    assert store.schema.metadata == Metadata("vegas", "flux", ("dog", "cat"))
    assert np.array_equal(store.select(split="test").read("t5"), legacy.tensors(1, 3)[0].numpy())


def test_split_by_split_adds_and_never_overwrites(tmp_path):
    client = Client(train=[batch(2, 1)], val=[batch(1, 2)], test=[batch(3, 3)])
    for split in ("train", "val", "test"):
        path = client.save_embeddings_to_checkpoint(split, tmp_path / "one", 5)
    client = pickle.loads(pickle.dumps(copy.deepcopy(client)))
    together = client.save_embeddings_to_checkpoint("all", tmp_path / "all", 5)
    assert content(path) == content(together)
    assert len(content(path)) == 6
    assert EmbeddingStore.open(path).commit == 3
    client.save_embeddings_to_checkpoint("val", tmp_path / "one", 5)
    assert EmbeddingStore.open(path).commit == 3, "the same again is no commit"


def test_a_round_of_none_is_0_as_in_the_name_of_the_file(tmp_path):
    path = Client(train=[batch()]).save_embeddings_to_checkpoint(checkpoint_dir=tmp_path)
    assert {key[:2] for key in content(path)} == {("0", 0)}


def test_a_host_may_override_what_it_is_called_and_what_is_known(tmp_path):
    class Hospital(Client):
        embedding_splits = ("train", "extra")
        embedding_precision = "bfloat16"
        embedding_node = "münchen"
        images_output_dir = "/data/images"

        def embedding_metadata(self, checkpoint_dir):
            return Metadata(experiment="run 2", model="tiny", classes=("cat", "dog"))

    client = Hospital(train=[batch()], extra=[batch(1)], val=[batch(5)])
    store = EmbeddingStore.open(client.save_embeddings_to_checkpoint("all", tmp_path, 1))
    assert store.schema.precision == "bfloat16"
    assert store.schema.metadata == Metadata("run 2", "flux", ("cat", "dog"), None, "tiny")
    records = store.select(node="münchen").records
    assert records["split"].tolist() == ["train", "train", "extra"]
    assert json.loads(records["extra"][0])["image_path"].startswith("/data/images/run 2/node_m")


def test_entries_as_they_stood_in_checkpoints(tmp_path):
    """The store is the one that importing the legacy file of the same entries makes."""
    t5, clip = legacy.tensors(3)
    entries = [legacy.entry(t5[i][None], clip[i][None], i) for i in range(3)]
    folder = tmp_path / "vegas"
    legacy.save(folder, legacy.content(entries, round=4), "node_0_embeddings_r4.pt")
    import_checkpoints(tmp_path / "imported.zarr", folder)
    path = Client(train=entries).save_embeddings_to_checkpoint("train", folder, 4)
    assert content(path) == content(tmp_path / "imported.zarr")
    columns = ["sample_id", "image_filename", "audio_path", "extra"]
    found, expected = (
        EmbeddingStore.open(each).select().records[columns]
        for each in (path, tmp_path / "imported.zarr")
    )
    assert found.to_dict() == expected.to_dict()


def test_entries_without_tensors_are_left_out_and_counted(tmp_path, caplog):
    t5, clip = legacy.tensors(2)
    entries = [legacy.entry(t5[0], clip[0], 0), *(legacy.entry(None, None, i) for i in (1, 2))]
    path = Client(train=entries).save_embeddings_to_checkpoint("train", tmp_path, 5)
    assert {key[-1] for key in content(path)} == {0}
    told = "node 0, round 5, split train: 2 entries without tensors left out"
    assert told in caplog.messages


def test_a_servers_stacks_as_they_stood_in_checkpoints(tmp_path):
    class Server(EmbeddingServerMixin):
        def iter_embeddings(self, split):
            for item in entries:
                if item["split"] == split:
                    yield item

    file, _ = legacy.server_file(tmp_path / "c", audio=False)
    entries = torch.load(file, weights_only=True)["embeddings"]
    import_checkpoints(tmp_path / "imported.zarr", tmp_path / "c")
    path = Server().save_server_embeddings_to_checkpoint(tmp_path, round_num=5)
    assert content(path) == content(tmp_path / "imported.zarr")


def test_metadata_of_several_samples(tmp_path):
    given = dict(vars(batch(2)))
    given["sample_metadata"] = [
        {"sample_id": "a", "audio_path": "a.wav", "file_id": torch.tensor(1)},
        {"sample_id": 2, "file_id": None},
    ]
    path = Client(train=[given]).save_embeddings_to_checkpoint("train", tmp_path, 1)
    records = EmbeddingStore.open(path).select().records
    assert records["sample_id"].tolist() == ["a", "2"]
    assert records["audio_path"].tolist() == ["a.wav", ""]
    assert records["file_id"].tolist() == ["1", ""]
    assert [list(json.loads(extra)) for extra in records["extra"]] == [["image_path"]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clas_name": "dog"}, "no such key 'clas_name'; did you mean class_name?"),
        ({"t5_embeding": 1}, "no such key 't5_embeding'; did you mean t5_embedding?"),
        ({"split": "val"}, "expected split 'train', got 'val'"),
        ({"node_id": 3}, "expected node_id '0', got 3"),
        ({"class_name": None}, "expected class_name, got none"),
        ({"sample_metadata": "x"}, "sample_metadata: expected a dict, or one for each sample"),
        (
            {"sample_metadata": {"x": torch.ones(2)}},
            "x: expected a plain value, got one that cannot be kept",
        ),
        ({"sample_metadata": {}, "extra": {}}, "expected extra or an entry's own keys, got both"),
    ],
)
def test_what_a_host_yields_is_checked(tmp_path, change, message):
    client = Client(train=[vars(batch()) | change])
    with pytest.raises(SchemaMismatchError, match=message) as caught:
        client.save_embeddings_to_checkpoint("train", tmp_path, 1)
    assert str(caught.value).startswith("iter_embeddings('train') of node 0: ")
    assert not (tmp_path / "embeddings.zarr").exists()


def test_a_host_that_lacks_something_is_told(tmp_path):
    with pytest.raises(SchemaMismatchError, match="expected an EmbeddingBatch .* got a Tensor"):
        Client(train=[torch.ones(3)]).save_embeddings_to_checkpoint("all", tmp_path, 1)
    with pytest.raises(NotImplementedError, match=r"Bare needs a method iter_embeddings\(split\)"):
        type("Bare", (EmbeddingClientMixin,), {"id": 1})().save_embeddings_to_checkpoint(
            "all", tmp_path, 1
        )
    client = Client(train=[batch()])
    del client.id
    with pytest.raises(SchemaMismatchError, match="expected an attribute id"):
        client.save_embeddings_to_checkpoint("all", tmp_path, 1)


def test_an_exception_of_the_host_commits_nothing_and_passes(tmp_path):
    class Fails(Client):
        def iter_embeddings(self, split):
            yield batch()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Fails().save_embeddings_to_checkpoint("train", tmp_path, 1)
    assert not (tmp_path / "embeddings.zarr").exists()


def test_under_warn_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    client = Client(train=[batch()])
    client.embedding_on_error = "warn"
    client.save_embeddings_to_checkpoint("all", tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for round in (2, 3):
            client.save_embeddings_to_checkpoint("all", tmp_path, round)
    assert [each.round for each in client.missing_embeddings] == [2, 3]
    assert "node 0, round 3 is not recorded: [Errno 28] No space left" in caplog.text
    client.save_embeddings_to_checkpoint("all", tmp_path, 3)
    assert [each.round for each in client.missing_embeddings] == [2]


# the configuration


class Dots:
    """As FedGFE's own class for configurations: no Mapping, and None for what is not there."""

    def __init__(self, data):
        self._data = data

    def __getattr__(self, key):
        return self._data.get(key)

    def __getitem__(self, key):
        return self._data[key]

    def keys(self):
        return self._data.keys()


GUIDE = {
    "save_embeddings_instead_of_images": True,
    "embeddings_checkpoint_dir": "checkpoints/embeddings/experiment1",
    "embeddings_save_frequency": 5,
    "generate_nodes_images_frequency": 0,
    "generate_global_images_frequency": 0,
}
DEFAULTS = {
    "generate_embeddings_only": False,
    "embeddings_checkpoint_dir": "checkpoints/embeddings",
    "generate_nodes_images_frequency": 0,
    "generate_global_images_frequency": 0,
    "store_audio_embeddings": False,
    "audio_embedding_file_name": "audio_embeddings.pt",
    "generate_from_t5_text_embeddings": False,
}
FOLDER = "checkpoints/embeddings"


@pytest.mark.parametrize(
    ("feda2v", "expected", "told"),
    [
        (
            GUIDE,
            (True, "checkpoints/embeddings/experiment1", 5, 5),
            "embeddings of 3 nodes and the server every 5 rounds to "
            "checkpoints/embeddings/experiment1/embeddings.zarr",
        ),
        (DEFAULTS, (False, FOLDER, 1, 1), "no embeddings are recorded"),
        ({}, (False, FOLDER, 1, 1), "no embeddings are recorded"),
        (None, (False, FOLDER, 1, 1), "no embeddings are recorded"),
        (
            DEFAULTS | {"save_embeddings_instead_of_images": True},
            (True, FOLDER, 1, 1),
            f"embeddings of 3 nodes and the server every round to {FOLDER}/embeddings.zarr",
        ),
        (
            DEFAULTS | {"generate_embeddings_only": True, "generate_nodes_images_frequency": 4},
            (True, FOLDER, 4, 0),
            f"embeddings of 3 nodes every 4 rounds to {FOLDER}/embeddings.zarr",
        ),
        (
            {
                "generate_embeddings_only": True,
                "generate_nodes_images_frequency": 1,
                "generate_global_images_frequency": 2,
            },
            (True, FOLDER, 1, 2),
            "embeddings of 3 nodes every round and the server every 2 rounds to "
            f"{FOLDER}/embeddings.zarr",
        ),
        (
            GUIDE | {"embeddings_save_frequency": 0},
            (True, "checkpoints/embeddings/experiment1", 0, 0),
            "no embeddings are recorded",
        ),
    ],
)
@pytest.mark.parametrize(
    "form",
    [lambda s: s, lambda s: s if s is None else SimpleNamespace(**s), lambda s: Dots(s or {})],
)
def test_the_guides_keys_in_any_form(feda2v, expected, told, form):
    settings = RecordingSettings.read(form(feda2v))
    assert settings == RecordingSettings(expected[0], Path(expected[1]), *expected[2:])
    assert settings.describe(3) == told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings_save_frequency": -1}, "embeddings_save_frequency: expected a whole number"),
        ({"embeddings_save_frequency": "5"}, "expected a whole number from 0, got '5'"),
        ({"embeddings_save_frequency": True}, "expected a whole number from 0, got True"),
        ({"generate_nodes_images_frequency": 1.5}, "generate_nodes_images_frequency: expected a"),
        ({"save_embeddings_instead_of_images": "yes"}, "expected true or false, got 'yes'"),
        ({"generate_embeddings_only": 1}, "generate_embeddings_only: expected true or false"),
        ({"embeddings_checkpoint_dir": ""}, "embeddings_checkpoint_dir: expected a folder, got ''"),
        ({"embeddings_checkpoint_dir": 5}, "expected a folder, got 5"),
        ({"embedding_checkpoint_dir": "x"}, "did you mean embeddings_checkpoint_dir?"),
        ({"embeddings_save_freqency": 5}, "did you mean embeddings_save_frequency?"),
        ({"embedings_save_frequency": 5}, "did you mean embeddings_save_frequency?"),
        (
            {"save_embedings_instead_of_images": True},
            "did you mean save_embeddings_instead_of_images?",
        ),
        (
            {"save_embedding_instead_of_images": True},
            "did you mean save_embeddings_instead_of_imag",
        ),
    ],
)
def test_mistakes_in_the_configuration(change, message):
    with pytest.raises(SchemaMismatchError, match=message) as caught:
        RecordingSettings.read(GUIDE | change)
    assert str(caught.value).startswith(f"feda2v.{next(iter(change))}: ")


def test_a_section_that_is_none(tmp_path):
    with pytest.raises(SchemaMismatchError, match="feda2v: expected a mapping.* got 7"):
        RecordingSettings.read(7)


# the server's hook


def config(folder: Path, rounds: int = 3, **feda2v) -> Path:
    section = FEDA2V | {"embeddings_checkpoint_dir": str(folder / "checkpoints")} | feda2v
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({"feda2v": section, "federation": {"global_rounds": rounds}}))
    return path


def expected(rounds: list[int]) -> set[tuple[str, int, str, str, int]]:
    return {
        (str(node), round, split, name, index)
        for node, names in miniature.CLASSES.items()
        for name in names
        for round in rounds
        for split, n in miniature.PER_CLASS.items()
        for index in range(n)
    }


def test_a_miniature_of_fedgfe_records_what_its_configuration_asks_for(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fedgfe_store")
    miniature.main(config(tmp_path))
    path = tmp_path / "checkpoints" / "embeddings.zarr"
    told = f"embeddings of 3 nodes and the server every 2 rounds to {path}"
    assert caplog.messages.count(told) == 1
    store = EmbeddingStore.open(path)
    assert content(path).keys() == expected([2])
    assert store.commit == 4, "one a node and round"
    assert store.schema.metadata.diffusion_type == "flux"
    found = store.select(node=2, split="train", class_name="bird")
    t5, clip = miniature.embeddings(2, 2, "train", "bird")
    assert np.array_equal(found.read("t5"), t5.numpy())
    assert np.array_equal(found.read("clip"), clip.numpy())
    assert found.records["audio_path"][1] == "/data/bird/train_1.wav"


def test_the_guides_commands_render_what_the_miniature_recorded(tmp_path, monkeypatch):
    miniature.main(config(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDGFE_MODEL", "tiny")
    generate = ["generate", "--steps", "1", "--quiet"]
    one = ["--checkpoint", "checkpoints/node_2_embeddings_r2.pt", "--output_dir", "one"]
    result = CliRunner().invoke(group, [*generate, *one])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "one").glob("*.png")}
    assert len(names) == 2 * 5
    assert all(name.startswith("node_2_") and name.endswith("_r2.png") for name in names)
    both = ["--checkpoint_dir", "checkpoints", "--round", "2", "--node", "0,server"]
    result = CliRunner().invoke(group, [*generate, *both, "--output_dir", "both"])
    assert result.exit_code == 0, result.output
    found = EmbeddingStore.open("checkpoints/embeddings.zarr").select(round=2, node=["0", "server"])
    names = {path.name for path in (tmp_path / "both").glob("*.png")}
    assert names == set(found.records["image_filename"])
    assert len(names) == 4 * 5


def test_fedgfes_own_switch_and_frequencies(tmp_path):
    switches: dict[str, Any] = {
        "save_embeddings_instead_of_images": None,
        "embeddings_save_frequency": None,
    }
    own: dict[str, Any] = {"generate_embeddings_only": True, "generate_nodes_images_frequency": 2}
    miniature.main(config(tmp_path, **switches, **own))
    found = content(tmp_path / "checkpoints" / "embeddings.zarr")
    assert found.keys() == {key for key in expected([2]) if key[0] != "server"}


def test_embeddings_switched_off(tmp_path):
    miniature.main(config(tmp_path, save_embeddings_instead_of_images=False))
    assert not (tmp_path / "checkpoints").exists()


def test_a_server_that_lacks_something_is_told_before_any_training():
    class Server(EmbeddingServerMixin):
        config: dict[str, Any]
        clients: list[Any]

    server = Server()
    with pytest.raises(SchemaMismatchError, match="expected an attribute config with a section"):
        server.prepare_embeddings()
    server.config = {"feda2v": GUIDE}
    server.clients = [Client(), SimpleNamespace(id=7)]
    with pytest.raises(SchemaMismatchError, match="client 7: .* add EmbeddingClientMixin to its"):
        server.prepare_embeddings()
    server.clients = []
    server.prepare_embeddings()
    with pytest.raises(SchemaMismatchError, match="attribute current_round or round, got neither"):
        server.save_round_embeddings()


def test_the_guides_current_round_counts_too(tmp_path):
    class Server(EmbeddingServerMixin):
        current_round, clients = 4, ()
        config = SimpleNamespace(feda2v=FEDA2V | {"embeddings_checkpoint_dir": tmp_path})

        def iter_embeddings(self, split):
            return [batch()] if split == "train" else None

    server = Server()
    assert server.save_round_embeddings() == tmp_path / "embeddings.zarr"
    server.current_round = 5
    assert server.save_round_embeddings() is None
    assert {key[1] for key in content(tmp_path / "embeddings.zarr")} == {4}


class Round(EmbeddingServerMixin):
    """A server at round 3 with clients that do something before they yield."""

    def __init__(self, folder: Path, *clients: Client):
        self.round, self.clients, self.splits = 3, list(clients), {"train": [batch(1, 9)]}
        section = FEDA2V | {"embeddings_checkpoint_dir": folder, "embeddings_save_frequency": 1}
        self.config = SimpleNamespace(feda2v=section)

    iter_embeddings = Client.iter_embeddings


def test_while_a_client_computes_those_before_it_are_written(tmp_path):
    class Second(Client):
        def iter_embeddings(self, split):
            lock.release()  # until then nothing can be written
            return super().iter_embeddings(split)

    first, second = Client(train=[batch(2, 1)]), Second(train=[batch(2, 2)])
    second.id, second.embedding_splits = 1, ("train",)
    lock = WriterLock(tmp_path / "embeddings.zarr", 1)
    path = Round(tmp_path, first, second).save_round_embeddings()
    assert path is not None
    assert EmbeddingStore.open(path).commit == 3
    assert [key[0] for key in content(path)] == ["0", "0", "1", "1", "server"]
    first.save_embeddings_to_checkpoint("train", tmp_path, 4)
    assert EmbeddingStore.open(path).commit == 4, "written at once where no round ends"


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_disk_that_is_full_at_the_end_of_a_round(tmp_path, monkeypatch, on_error):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server = Round(tmp_path, Client(train=[batch()]))
    server.embedding_on_error = on_error
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        if on_error == "raise":
            with pytest.raises(OSError, match="No space left"):
                server.save_round_embeddings()
        else:
            server.save_round_embeddings()
            assert [(m.node, m.round) for m in server.missing_embeddings] == [
                ("0", 3),
                ("server", 3),
            ]
    path = server.save_round_embeddings()
    assert path is not None
    assert server.missing_embeddings == ()
    assert [key[0] for key in content(path)] == ["0", "0", "server"]


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
import miniature
ended, touched, last = 0, itertools.count(), int(sys.argv[2])
def watch(event, arguments):
    global ended
    if event == "os.rename" and str(arguments[1]).endswith("state.json"):
        ended += 1
        if ended == 2: print("touched", next(touched), flush=True)
    elif ended == 1 and event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir"):
        if "embeddings.zarr" in str(arguments[0]) and next(touched) == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
miniature.main(Path(sys.argv[1]))
"""


def train(path: Path, *, until: int = -1) -> subprocess.CompletedProcess[str]:
    """Train in another process, which dies when it touches the store's files once more than that
    in round 2.
    """
    command = [sys.executable, "-c", KILLED, str(path), str(until)]
    return finished(command, check=False, cwd=Path(miniature.__file__).parent)


@pytest.mark.slow
@pytest.mark.kill
def test_killed_in_round_2_and_started_again_it_ends_with_the_same_store(tmp_path):
    def begin(name: str) -> tuple[Path, Path]:
        path = config(tmp_path / name, embeddings_save_frequency=1)
        return path, path.parent / "checkpoints" / "embeddings.zarr"

    path, store = begin("whole")
    touched = int(re.findall(r"^touched (\d+)$", train(path).stdout, re.MULTILINE)[0])
    assert touched > 20
    wanted = content(store)
    assert wanted.keys() == expected([1, 2, 3])
    for part in (0.2, 0.8):
        path, store = begin(f"killed at {part}")
        assert train(path, until=int(part * touched)).returncode == -signal.SIGKILL
        miniature.main(path)
        assert content(store) == wanted, f"killed at {part} of round 2"
        assert EmbeddingStore.open(store).verify().sound
